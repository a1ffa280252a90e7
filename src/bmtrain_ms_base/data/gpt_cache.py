"""Indices on disk, by what they were made of: whoever lacks them makes them, and on one host nobody makes them twice."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import numpy as np
import xxhash

from .extras import DataError
from .indexed import sync_folder

Arrays = dict[str, np.ndarray]
_CONTENTS = "contents.json"  # name of each array -> its form and a hash
_CHUNK = 1 << 20  # numbers that are hashed at a time


def cached(folder: Path | None, beside: str, known: Mapping[str, Any], build: Callable[[], Arrays] | None) -> Arrays:
    """The arrays that belong to `known`, mapped from disk, and made first if they are not there or damaged.

    Args:
        folder: for them; None: `cache` beside the data, or if that cannot be written one in the user's cache.
        beside: the data's name.
        known: all that they depend on, for JSON.
        build: makes them; None: another rank has made them just now, and has looked at every byte.

    Raises:
        DataError: the folder cannot be written, or its disk is full; or nothing is to be made, and nothing is there.
    """
    name = xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True).encode())
    for home in _homes(folder, beside):
        found = _load(home / name, whole=build is not None)
        if found is not None:
            return found
    if build is None:
        places = " and ".join(map(str, _homes(folder, beside)))
        raise DataError(
            f"indices of {beside}, which another rank has made, are not in {places}: if this host has a disk of its own, do "
            "without shared storage"
        )
    home = cache_home(folder, beside)
    if home is None:
        raise DataError(f"indices of {beside} cannot be kept in {folder or 'any folder'}: give one that can be written, cache=")
    try:
        with _locked(home / f"{name}.lock"):
            found = _load(home / name)  # somebody else was here while we waited
            if found is None:
                _save(home / name, build(), known)
                found = _load(home / name)
    except OSError as error:
        raise DataError(
            f"indices of {beside} cannot be written to {home}: {error}; make room, or give another folder, cache="
        ) from error
    if found is None:
        raise DataError(f"what was just written to {home / name} cannot be read as it was written: is its disk damaged?")
    return found


def cache_home(folder: Path | None, beside: str) -> Path | None:
    """Where indices that are missing would be made, see `cached`; None where no folder can be written."""
    return next((home for home in _homes(folder, beside) if _writable(home)), None)


def _homes(folder: Path | None, beside: str) -> list[Path]:
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


def _load(folder: Path, whole: bool = True) -> Arrays | None:
    """What a folder has; None if it is not there, or not as it was written, which `whole` looks at byte by byte."""
    try:
        contents = json.loads((folder / _CONTENTS).read_text())
        found = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in contents}
        kept = all(_content(array, whole)[: 1 + whole] == contents[name][: 1 + whole] for name, array in found.items())
    except (OSError, ValueError, TypeError):
        return None
    return found if found and kept else None


def _content(array: np.ndarray, hashed: bool = True) -> list[Any]:
    """The type and shape of an array, and a hash of its bytes."""
    found = xxhash.xxh3_128()
    numbers = np.ravel(array)
    for start in range(0, numbers.size if hashed else 0, _CHUNK):
        found.update(numbers[start : start + _CHUNK].tobytes())
    return [f"{array.dtype.str} {list(array.shape)}", found.hexdigest()]


def _save(folder: Path, arrays: Arrays, known: Mapping[str, Any]) -> None:
    """Save the arrays as a whole or not at all, also for other hosts that share the disk and do the same."""
    new = folder.with_name(f"{folder.name}.{os.uname().nodename}.{os.getpid()}.partial")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        for name, array in arrays.items():
            _write(new / f"{name}.npy", lambda file, array=array: np.save(file, array, allow_pickle=False))
        texts = {"description.json": known, _CONTENTS: {name: _content(array) for name, array in arrays.items()}}
        for name, value in texts.items():
            _write(new / name, lambda file, value=value: file.write(json.dumps(value, indent=1).encode()))
        if _load(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # damaged
        try:
            os.rename(new, folder)
            sync_folder(folder.parent)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another host was faster
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(path: Path, content: Callable[[Any], Any]) -> None:
    with open(path, "wb") as file:
        content(file)
        file.flush()
        os.fsync(file.fileno())
