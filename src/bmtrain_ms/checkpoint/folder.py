"""A folder of checkpoints: which there are, which is the latest, which may go, and whose it is.

    step-00000360/    a checkpoint, see `sharded`; complete, because it got this name by a rename
    .step-00000480.X  one that is being written, or was when its job died; .old: being replaced; .gone: being deleted
    latest            the name of the one to go on from; written last
    .lock             held by the job that saves here

Order is that of the steps; clocks play no part.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import socket
import weakref
from pathlib import Path

from .errors import CheckpointError
from .format import RegularFile
from .sharded import INDEX

LATEST = "latest"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)


def checkpoint_name(step: int) -> str:
    """Of the checkpoint after so many steps."""
    return f"step-{step:08}"


def step_of(checkpoint: Path) -> int:
    """What its name says."""
    return int(checkpoint.name[len("step-") :])


def steps_in(folder: Path) -> list[int]:
    """Of the complete checkpoints, ascending."""
    if not folder.is_dir():
        return []
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir() if (path / INDEX).is_file()]
    return sorted(int(match[1]) for match in found if match)


def latest_in(folder: Path) -> Path | None:
    """The checkpoint to go on from: what `latest` names, or, if that is gone, the one of the most steps; None: there is none."""
    with contextlib.suppress(CheckpointError, UnicodeDecodeError), RegularFile(folder / LATEST) as file:
        name = file.read(0, min(file.size, 64)).decode().strip()
        if _NAME.fullmatch(name) and (folder / name / INDEX).is_file():
            return folder / name
    steps = steps_in(folder)
    return folder / checkpoint_name(steps[-1]) if steps else None


def point_to(folder: Path, name: str) -> None:
    """Make `name` the latest, in one instant."""
    replace_text(folder / LATEST, name + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file; it appears under its name, complete and on the disk, in one instant."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_text(temporary, text)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file, and bring it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def exchange(new: Path, old: Path) -> bool:
    """Let two names change places in one instant; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0


def sync_folder(folder: Path) -> None:
    """Bring names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(folder: Path, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Delete checkpoints that need not be kept, oldest first; never the one that `latest` names. Returns their names.

    Those of later steps than the latest, which a run that went back has left, are neither counted nor deleted.

    Raises:
        OSError: one cannot be deleted.
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
        name = checkpoint_name(step)
        discard(folder / name)
        gone.append(name)
    return gone


def discard(path: Path) -> None:
    """Delete a checkpoint. It first loses its name and then its files, so that none is ever found half deleted."""
    doomed = path.with_name(f".{path.name.lstrip('.')}.gone")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


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

    Raises:
        CheckpointError: another job has it.
    """

    def __init__(self, folder: Path):
        self._file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise CheckpointError(
                f"another job saves to {folder} ({holder}); end it, or choose another folder: they would mix their checkpoints"
            ) from error
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._close = weakref.finalize(self, os.close, self._file)

    def release(self) -> None:
        """A second call does nothing."""
        self._close()
