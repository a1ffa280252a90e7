"""Open files that hold a lock: it goes with the process that took it, and forked children have no part in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path

from bmtrain_ms_base.system import close_in_children


class _Held:
    """Open files of this process."""

    def __init__(self) -> None:
        self.files: set[int] = set()

    def close_in_child(self) -> None:
        """Close the files without unlocking them: the process that was forked from still has the lock."""
        for file in self.files:
            os.close(file)
        self.files.clear()


_held = _Held()


def hold(file: int) -> None:
    """Close this file in forked children: one that outlives its parent would keep the lock."""
    _held.files.add(file)
    close_in_children(_held)


def let_go(file: int) -> None:
    """Close it; does nothing the second time, and in a forked child, which has closed it."""
    if file in _held.files:
        _held.files.discard(file)
        with contextlib.suppress(OSError):  # explicitly: a child that was forked just now has not closed its copy yet
            fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def lock_temporary(path: Path) -> int:
    """Say that this file or folder, which is being written, has a living owner; until `let_go`.

    A file system that has no locks is no obstacle.
    """
    file = os.open(path, os.O_RDONLY)
    hold(file)
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def sweep_temporaries(folder: Path, before: str, after: str) -> None:
    """Delete what is called BEFORE, the id of a process, AFTER, if that process was killed before it could.

    One of this id may run on another host, and on this one another process may have the id: only what nobody has locked, and no
    process here can have made, is deleted.
    """
    pattern = re.compile(re.escape(before) + r"(\d{1,9})" + re.escape(after), re.ASCII)
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = pattern.fullmatch(path.name)
            if match and not path.is_symlink() and not _is_running(int(match[1])):
                with contextlib.suppress(OSError):
                    _delete_unlocked(path)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _delete_unlocked(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(file)
