"""A folder of checkpoints: which there are, which is the latest, which may go, and whose it is.

    step-00000360/    a checkpoint, see `sharded`; complete, because it got this name by a rename
    .step-00000480.X  one that is being written, or was when its job died; .old: being replaced; .gone: being deleted
    latest            the name of the one to go on from; written last
    .lock             held by the job that saves here

Order is that of the steps; clocks play no part.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import socket
import weakref
from pathlib import Path
from typing import Sequence

from ..files.errors import CheckpointError
from ..files.format import RegularFile
from ..files.locking import hold, let_go
from ..files.replacing import replace_text, sync_folder
from .index import INDEX

LATEST = "latest"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)


def checkpoint_name(step: int) -> str:
    """What the checkpoint after `step` steps is called."""
    return f"step-{step:08}"


def step_of(checkpoint: Path) -> int:
    """How many steps were done when a checkpoint was saved, by its name."""
    return int(checkpoint.name[len("step-") :])


def steps_in(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir() if (path / INDEX).is_file()]
    return sorted(int(match[1]) for match in found if match)


def latest_in(folder: Path) -> Path | None:
    """The checkpoint to go on from."""
    return find_latest(folder)[0]


def find_latest(folder: Path) -> tuple[Path | None, str]:
    """The checkpoint to go on from: what `latest` names, or, if that is gone, the one of the most steps; None: there is none.

    And what is wrong with `latest`, if it was of no use; empty: nothing.
    """
    before, wrong = None, ""
    try:
        while True:
            with RegularFile(folder / LATEST) as file:
                name = file.read(0, min(file.size, 64)).decode(errors="replace").strip()
            if _NAME.fullmatch(name) and (folder / name / INDEX).is_file():
                return folder / name, ""
            if name == before:
                break
            before = name  # a job that saves may have moved `latest` since it was read, and deleted this one
        wrong = f"{folder / LATEST} says {name!r}, which is no checkpoint here"
    except CheckpointError as error:
        wrong = str(error)
    steps = steps_in(folder)
    if not steps:
        return None, ""
    found = folder / checkpoint_name(steps[-1])
    return found, f"{wrong}; going on from {found.name}, which has the most steps. Name another one if that is not right"


def state_of(checkpoint: Path) -> tuple[int, ...] | None:
    """What changes when another checkpoint gets its name; None: there is none."""
    try:
        index = (checkpoint / INDEX).stat()
        return checkpoint.stat().st_ino, index.st_ino, index.st_ctime_ns
    except OSError:
        return None


def point_to(folder: Path, name: str) -> None:
    """Make `name` the latest, in one instant."""
    replace_text(folder / LATEST, name + "\n")


def exchange(new: Path, old: Path) -> bool:
    """Let two names change places in one instant; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0


class Naming:
    """Gives a complete folder its name, in one instant; can be undone until the files that it replaced are deleted.

    Attributes:
        replaced: where the checkpoint is that had the name before, if there was one.
    """

    def __init__(self, new: Path, final: Path):
        self._new, self._final, self._done = new, final, False
        self.replaced: Path | None = None

    def do(self) -> None:
        """Rename, and bring the name to the disk."""
        if self._final.exists():  # saved before, by this run or by one that went back
            if exchange(self._new, self._final):
                self.replaced, self._done = self._new, True
            else:  # not Linux, or an old file system: for a moment there is none of this step
                old = self._final.with_name(f".{self._final.name}.old")  # which `sweep` would put back
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self._final, old)
                self.replaced = old
        if not self._done:
            os.replace(self._new, self._final)
            self._done = True
        sync_folder(self._final.parent)

    def undo(self) -> None:
        """Make the folder what it was before, whatever of `do` was done; the new files are deleted."""
        if self._done and self.replaced == self._new:
            exchange(self._new, self._final)
        else:
            if self._done:
                os.replace(self._final, self._new)
            if self.replaced is not None:
                os.replace(self.replaced, self._final)
        shutil.rmtree(self._new, ignore_errors=True)
        sync_folder(self._final.parent)


def prune(folder: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Take the names of checkpoints that need not be kept, oldest first; never of the one that `latest` names.

    Returns folders whose files are still to be deleted, which may take as long as writing them.

    Those of later steps than the latest, which a run that went back has left, are neither counted nor deleted.

    Raises:
        OSError: one cannot be renamed.
    """
    if keep_last is None:
        return []
    latest = latest_in(folder)
    if latest is None:
        return []
    current, gone = step_of(latest), []
    counted = [step for step in steps_in(folder) if step <= current]
    for step in counted[:-keep_last]:  # the latest is the last of them
        if keep_every and step % keep_every == 0:
            continue
        gone.append(doomed(folder / checkpoint_name(step)))
    return gone


def doomed(path: Path) -> Path:
    """Take a checkpoint's name, so that it is never found half deleted; returns where its files are."""
    target = path.with_name(f".{path.name.lstrip('.')}.gone")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(path, target)
    return target


def delete(folders: Sequence[Path]) -> None:
    """Delete folders with all files in them; what cannot be deleted stays."""
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what dead jobs left; one that was about to be replaced gets its name back. Only the holder of the lock may do this."""
    for path in folder.glob(".step-*.old"):
        final = folder / path.name[1 : -len(".old")]
        if not final.exists() and (path / INDEX).is_file():
            os.replace(path, final)
            sync_folder(folder)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{LATEST}.*"):
        path.unlink(missing_ok=True)


class FolderLock:
    """That one job only saves to a folder. The system lets go of it when the process ends, however it ends.

    Args:
        folder: which has to be there.
        name: of the file that is locked; who starts ranks has one of its own, as the first of them takes `.lock`.

    Raises:
        CheckpointError: another job has it, or the file system has no locks.
    """

    def __init__(self, folder: Path, name: str = ".lock"):
        path = folder / name
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise CheckpointError(
                f"another job saves to {folder} ({holder}); end it, or choose another folder: they would mix their checkpoints"
            ) from error
        except OSError as error:
            os.close(self._file)
            raise CheckpointError(
                f"{path} cannot be locked, so that two jobs could mix their checkpoints: {error.strerror}; choose a folder on "
                "another file system"
            ) from error
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        hold(self._file)
        self._close = weakref.finalize(self, let_go, self._file)

    def release(self) -> None:
        """A second call does nothing."""
        self._close()
