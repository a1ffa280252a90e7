"""Host memory for gathered parameters, recycled as soon as nothing refers to it.

Copying into fresh pages is two to three times slower than into used ones, so buffers are kept. A buffer is handed out again only
when no array, tensor, view or autograd graph refers to it any more: NumPy's reference count says so, and nobody has to.

A buffer may be watched: what is in it is a copy that code of the user's was given, who might take it for the thing itself and write
it. Nothing else is written there before the buffer is handed out again: that is when it is looked at, or at the end of a call.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from typing import Callable, Sequence

import numpy as np

_HUGE = 1 << 21  # bytes of a huge page: one fault instead of 512
_ALIGN = 64  # bytes between the tensors of one buffer


class HostBuffer:
    """Anonymous memory whose pages can be given back to the system while its address stays valid."""

    def __init__(self, nbytes: int):
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
        huge = nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE")
        # where the last huge page would be filled by half it is taken whole; addresses cost nothing, so they begin where one does
        used = -(-nbytes // _HUGE) * _HUGE if huge and -nbytes % _HUGE <= _HUGE // 2 else max(nbytes, 1)
        self._map = mmap.mmap(-1, used + _HUGE if huge else used, **flags)
        self._whole = np.frombuffer(self._map, np.uint8)  # what NumPy has all views refer to
        start = -self._whole.__array_interface__["data"][0] % _HUGE if huge else 0
        if huge:
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE, start, used)
        self.bytes = self._whole[start : start + max(nbytes, 1)]
        self._unused = sys.getrefcount(self._whole)
        self._watch: Callable[[HostBuffer], None] | None = None

    def watch(self, look: Callable[[HostBuffer], None] | None) -> None:
        """Have `look(self)` raise, if what is in it now was written, when `looked_at` is called, or this again; None: no more."""
        self.looked_at()
        self._watch = look

    def looked_at(self) -> None:
        """Look, if it is watched. An error is told once."""
        look, self._watch = self._watch, None
        if look is not None:
            look(self)
            if self.in_use():
                self._watch = look

    def carve(self, offsets: Sequence[int], sizes: Sequence[tuple[int, np.dtype]]) -> list[np.ndarray]:
        """Flat arrays of (elements, type) that begin at `offsets` in it."""
        return [self.bytes[start : start + n * dtype.itemsize].view(dtype) for start, (n, dtype) in zip(offsets, sizes)]

    def in_use(self) -> bool:
        """Whether anything views this memory."""
        return sys.getrefcount(self._whole) > self._unused

    def drop_pages(self) -> None:
        """Give the memory back; what is read before it is written again is undefined (zero on Linux)."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def address_range(self) -> tuple[int, int]:
        """First address and the one after the last."""
        start = self.bytes.__array_interface__["data"][0]
        return start, start + self.bytes.nbytes


class BufferPool:
    """Buffers by size."""

    def __init__(self, spare: int):
        """`spare`: how many unused buffers of one size to keep."""
        self._spare = spare
        self._buffers: dict[int, list[HostBuffer]] = {}

    def acquire(self, nbytes: int) -> HostBuffer:
        """A buffer that nothing else refers to. It comes back by itself when the last view of it is gone."""
        buffers = self._buffers.setdefault(nbytes, [])
        for buffer in buffers:
            # the loop variable, the list and the argument do not count: only views do
            if not buffer.in_use():
                buffer.looked_at()
                buffers.remove(buffer)
                buffers.append(buffer)
                return buffer
        made = HostBuffer(nbytes)
        buffers.append(made)
        return made

    def trim(self) -> None:
        """Forget unused buffers beyond the spare ones, and the ones that somebody holds on to."""
        for nbytes, buffers in list(self._buffers.items()):
            unused = [buffer for buffer in buffers if not buffer.in_use()]
            self._buffers[nbytes] = unused[-self._spare :] if self._spare else []

    def look(self) -> None:
        """Raise where a buffer that is watched was written, see `HostBuffer.watch`."""
        for buffer in [buffer for buffers in self._buffers.values() for buffer in buffers]:
            buffer.looked_at()

    def sizes(self) -> dict[int, int]:
        """Buffer size in bytes -> how many there are, used or not."""
        return {nbytes: len(buffers) for nbytes, buffers in self._buffers.items() if buffers}


def aligned_offsets(sizes: list[int]) -> tuple[list[int], int]:
    """Aligned offsets for pieces of the given sizes in bytes, and the total."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGN) * _ALIGN
    return offsets, end
