"""Reading the memory of another process of this host (Linux: `process_vm_readv`): one copy, straight to where it is wanted."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, Sequence

import numpy as np

Piece = tuple[int, np.ndarray]  # (address there, contiguous array here)

_PR_SET_PTRACER = 0x59616D61
_MOST_PIECES = 1024  # IOV_MAX


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    read = libc.process_vm_readv
    read.restype = ctypes.c_ssize_t
    read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    return libc


def address_of(x: np.ndarray) -> int:
    """Where the array's values start."""
    return x.__array_interface__["data"][0]


def allow_siblings(launcher: int) -> None:
    """Where the kernel restricts such reads to ancestors (Yama), let all descendants of process `launcher` read too."""
    _libc().prctl(_PR_SET_PTRACER, ctypes.c_ulong(launcher), 0, 0, 0)  # fails, rightly unnoticed, without Yama


def pull(pid: int, pieces: Sequence[Piece]) -> None:
    """Copy memory of process `pid` into arrays.

    Raises:
        OSError: the system does not allow it, the process is gone, or has no such memory.
    """
    wanted = [(there, address_of(here), here.nbytes) for there, here in pieces if here.nbytes]
    while wanted:
        batch = wanted[:_MOST_PIECES]
        remote = np.array([(there, n) for there, _, n in batch], np.uint64)
        local = np.array([(here, n) for _, here, n in batch], np.uint64)
        count = len(batch)
        copied = _libc().process_vm_readv(pid, address_of(local), count, address_of(remote), count, 0)
        if copied <= 0:
            code = ctypes.get_errno()
            raise OSError(code, f"reading the memory of process {pid}: {os.strerror(code)}")
        wanted = _remaining(wanted, copied)


def _remaining(wanted: list[tuple[int, int, int]], copied: int) -> list[tuple[int, int, int]]:
    """What is left after the first `copied` bytes: the system may stop early."""
    for i, (there, here, n) in enumerate(wanted):
        if copied < n:
            return [(there + copied, here + copied, n - copied), *wanted[i + 1 :]]
        copied -= n
    return []
