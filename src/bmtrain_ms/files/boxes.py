"""Boxes of a tensor, put together out of pieces of it, whichever way either is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Callable

import numpy as np

from bmtrain_ms_base.layout import Box, Layout


@dataclass(frozen=True)
class Piece(Layout):
    """Elements [first, last) of a flattened local tensor, see [Note: layout]: what a file has of a tensor, or a block of that."""

    first: int = 0
    last: int = 0

    @cached_property
    def owned(self) -> tuple[int, int]:
        """The elements that the piece holds: (first, last)."""
        return self.first, self.last

    @cached_property
    def length(self) -> int:
        """Number of elements; there is no padding."""
        return self.last - self.first

    def part(self, start: int, stop: int) -> Piece:
        """Elements [start, stop) of this piece."""
        return replace(self, first=self.first + start, last=self.first + stop)

    def reach(self, box: Box) -> tuple[int, int]:
        """First and one past the last element of this piece that can lie in a box of the whole tensor."""
        common = shared(box, self.box)
        if common is None:
            return 0, 0
        start = stop = 0
        for part, outer, size in zip(common, self.box, self.local):
            start, stop = start * size + part.start - outer.start, stop * size + part.stop - 1 - outer.start
        start, stop = max(start - self.first, 0), min(stop + 1, self.last) - self.first
        return (start, stop) if start < stop else (0, 0)


def shared(a: Box, b: Box) -> Box | None:
    """The elements that lie in both; None: there are none."""
    common = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b))
    return common if all(part.start < part.stop for part in common) else None


def extents(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(part.stop - part.start for part in box)


def fill(out: np.ndarray, box: Box, piece: Piece, block: int, read: Callable[[int, int], np.ndarray]) -> None:
    """Put those elements of a piece that lie in a box to their places.

    Args:
        out: of the box's shape; values are converted to its dtype.
        block: elements that are read at once, at most.
        read: gives elements [start, stop) of the piece, flat. They are asked for in order, each once, none across a multiple of
            `block`, and no block of which nothing lies in the box.
    """
    reached, end = piece.reach(box)
    while reached < end:
        stop = min(reached - reached % block + block, end)
        parts = [(inside, x, shared(x, box)) for inside, x in piece.part(reached, stop).boxes()]
        if any(common is not None for _, _, common in parts):
            values = read(reached, stop)
            for inside, x, common in parts:
                if common is not None:
                    out[_within(common, box)] = values[inside].reshape(extents(x))[_within(common, x)]
        reached = stop


def _within(inner: Box, outer: Box) -> Box:
    return tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(inner, outer))
