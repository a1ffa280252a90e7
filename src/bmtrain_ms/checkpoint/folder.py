"""A folder of checkpoints: which there are, which is the latest, which may go, and whose it is.

    step-00000360/    a checkpoint, see `sharded`; complete, because it got this name by a rename
    .step-00000480.X  one that is being written, or was when its job died
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
from .sharded import INDEX

LATEST = "latest"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)


def checkpoint_name(step: int) -> str:
    """Of the checkpoint after so many steps."""
    return f"step-{step:08}"


def steps_in(folder: Path) -> list[int]:
    """Of the complete checkpoints, ascending."""
    if not folder.is_dir():
        return []
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir() if (path / INDEX).is_file()]
    return sorted(int(match[1]) for match in found if match)


def latest_in(folder: Path) -> Path | None:
    """The checkpoint to go on from: what `latest` names, or, if that is gone, the one of the most steps; None: there is none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = (folder / LATEST).read_text(encoding="utf-8").strip()
        if _NAME.fullmatch(name) and (folder / name / INDEX).is_file():
            return folder / name
    steps = steps_in(folder)
    return folder / checkpoint_name(steps[-1]) if steps else None


def point_to(folder: Path, name: str) -> None:
    """Make `name` the latest, in one instant."""
    temporary = folder / f".{LATEST}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / LATEST)
    sync_folder(folder)


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

    Those of later steps than the latest, which a run that went back has left, are neither counted nor deleted. A checkpoint first
    loses its name and then its files, so that none is ever found half deleted.
    """
    if keep_last is None:
        return []
    current = latest_in(folder)
    gone = []
    counted = [s for s in steps_in(folder) if current is None or checkpoint_name(s) <= current.name]
    for step in counted[:-keep_last]:
        name = checkpoint_name(step)
        if (keep_every and step % keep_every == 0) or (current is not None and current.name == name):
            continue
        doomed = folder / f".{name}.old"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder / name, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        gone.append(name)
    return gone


def sweep(folder: Path) -> None:
    """Delete what dead jobs left: only the holder of the lock may."""
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
