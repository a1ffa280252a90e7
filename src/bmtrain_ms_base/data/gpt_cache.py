"""Indices on disk, by what they were made of: whoever lacks them makes them, and on one host nobody makes them twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

import numpy as np
import xxhash

from .extras import DataError
from .indexed import sync_folder

Arrays = dict[str, np.ndarray]


def cached(folder: Optional[Path], beside: str, known: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """The arrays that belong to `known`, mapped from disk, and made first if they are not there or damaged.

    Args:
        folder: for them; None: `cache` beside the data, or if that cannot be written one in the user's cache.
        beside: the data's name.
        known: all that they depend on, for JSON.
        build: makes them.

    Raises:
        DataError: the folder cannot be written.
    """
    name = xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True).encode())
    for home in _homes(folder, beside):
        found = _load(home / name)
        if found is not None:
            return found
    home = next((home for home in _homes(folder, beside) if _writable(home)), None)
    if home is None:
        raise DataError(f"indices of {beside} cannot be kept in {folder or 'any folder'}: give one that can be written, cache=")
    with _locked(home / f"{name}.lock"):
        found = _load(home / name)  # somebody else was here while we waited
        if found is None:
            _save(home / name, build(), known)
            found = _load(home / name)
    if found is None:
        raise DataError(f"what was just written to {home / name} cannot be read: is its disk full?")
    return found


def _homes(folder: Optional[Path], beside: str) -> list[Path]:
    if folder is not None:
        return [Path(os.path.expanduser(folder))]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bmtrain_ms" / "data"
    return [Path(beside).absolute().parent / "cache", user]


def _writable(home: Path) -> bool:
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        return os.access(home, os.W_OK)
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # some clusters' disks have no locks; then two may build, and both write the same
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(folder: Path) -> Optional[Arrays]:
    """What a folder has; None if it is not there, or not whole."""
    try:
        sizes = json.loads((folder / "sizes.json").read_text())
        found = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in sizes}
    except (OSError, ValueError):
        return None
    return found if found and {name: list(array.shape) for name, array in found.items()} == sizes else None


def _save(folder: Path, arrays: Arrays, known: Mapping[str, Any]) -> None:
    """As a whole or not at all, also for other hosts that share the disk and do the same."""
    new = folder.with_name(f"{folder.name}.{os.uname().nodename}.{os.getpid()}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name, array in arrays.items():
        with open(new / f"{name}.npy", "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    (new / "description.json").write_text(json.dumps(known, indent=1))
    (new / "sizes.json").write_text(json.dumps({name: list(array.shape) for name, array in arrays.items()}))
    if _load(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # damaged
    with contextlib.suppress(OSError):  # another host was faster
        os.rename(new, folder)
        sync_folder(folder.parent)
    shutil.rmtree(new, ignore_errors=True)
