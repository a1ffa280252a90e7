"""Where the elements that a rank stores lie in the whole tensor.

[Note: layout]
*whole*: the tensor as one rank alone would have it, and as files hold it.  *splits*: tensor and expert parallelism cut it along
dims; what is left to a rank is the *local* tensor, a box of the whole one, which layers compute with.  *shard*: ZeRO flattens the
local tensor and gives every rank of the sharding group a piece of `length` elements; what lies beyond the end is padding.
Parameters, initial values, optimizer states, norms and checkpoints ask a `Layout`, and nobody else, which element is where: whoever
can say its boxes can be saved, loaded and distributed anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Iterator, Mapping

import numpy as np

Box = tuple[slice, ...]  # one slice with start and stop for each dim


def part_of(size: int, index: int, parts: int) -> tuple[int, int]:
    """First and one past the last of `size` things that belong to part `index` of `parts`; sizes of parts differ by one at most."""
    return size * index // parts, size * (index + 1) // parts


@dataclass(frozen=True)
class Split:
    """A dim that is cut: this rank has part `index` of `parts`, see `part_of`."""

    dim: int
    index: int
    parts: int


@dataclass(frozen=True)
class Layout:
    """What one rank stores of a tensor, see [Note: layout].

    Attributes:
        whole: shape of the whole tensor.
        splits: dims that are cut, each at most once.
        index, ranks: this rank among those over which the local tensor is sharded.
        copy: which of the ranks that store these same elements this is: what counts each element once counts those of copy 0.

    Raises:
        ValueError: a split or an index that is outside of its range, or a dim that is cut twice.
    """

    whole: tuple[int, ...]
    splits: tuple[Split, ...] = ()
    index: int = 0
    ranks: int = 1
    copy: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", tuple(int(n) for n in self.whole))
        dims = [split.dim for split in self.splits]
        if len(set(dims)) < len(dims) or not all(0 <= dim < len(self.whole) for dim in dims):
            raise ValueError(f"dims {dims} of a tensor of shape {self.whole} cannot be split: each at most once, from 0")
        places = [(split.index, split.parts) for split in self.splits] + [(self.index, self.ranks)]
        if not all(0 <= index < parts for index, parts in places) or self.copy < 0:
            raise ValueError(f"a layout has parts (index, number) {places} and copy {self.copy}: an index is below its number")

    @cached_property
    def box(self) -> Box:
        """Where the local tensor lies in the whole one."""
        ends = [(0, n) for n in self.whole]
        for split in self.splits:
            ends[split.dim] = part_of(self.whole[split.dim], split.index, split.parts)
        return tuple(slice(*pair) for pair in ends)

    @cached_property
    def local(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        return tuple(part.stop - part.start for part in self.box)

    @cached_property
    def local_size(self) -> int:
        """Elements of the local tensor."""
        return math.prod(self.local)

    @cached_property
    def length(self) -> int:
        """Elements of a shard, padding included; the same on all `ranks`."""
        return -(-self.local_size // self.ranks)

    @cached_property
    def owned(self) -> tuple[int, int]:
        """First and one past the last element of the flattened local tensor that are this rank's; may be none."""
        start = min(self.index * self.length, self.local_size)
        return start, min(start + self.length, self.local_size)

    @property
    def owned_size(self) -> int:
        """Elements of the shard that are no padding."""
        return self.owned[1] - self.owned[0]

    def boxes(self) -> Iterator[tuple[slice, Box]]:
        """(slice of the shard, box of the whole tensor) of all owned elements, in order; at most two for each dim, less one.

        The elements of a box, flattened in row-major order, are those of the slice.
        """
        start, stop = self.owned
        done = 0
        for box in _boxes(self.local, start, stop):
            size = math.prod(part.stop - part.start for part in box)
            yield (
                slice(done, done + size),
                tuple(slice(inner.start + outer.start, inner.stop + outer.start) for inner, outer in zip(box, self.box)),
            )
            done += size

    def positions(self, start: int, stop: int) -> np.ndarray:
        """int64 indices into the flattened whole tensor of the elements [start, stop) of the shard, ascending; without padding."""
        first, last = self.owned
        flat = np.arange(min(first + start, last), min(first + stop, last), dtype=np.int64)
        if self.local == self.whole:
            return flat
        corners = np.unravel_index(flat, self.local)
        return np.asarray(np.ravel_multi_index([x + part.start for x, part in zip(corners, self.box)], self.whole), np.int64)

    def cut(self, whole: np.ndarray) -> np.ndarray:
        """The shard, (length,), of an array of the whole tensor; padding is zero."""
        start, stop = self.owned
        shard = np.zeros(self.length, whole.dtype)
        if self.local == self.whole:
            if start < stop:  # NumPy crashes where no elements of MindSpore's bfloat16 are assigned
                shard[: stop - start] = whole.reshape(-1)[start:stop]
        else:
            for piece, box in self.boxes():
                shard[piece] = whole[box].reshape(-1)
        return shard

    def paste(self, shard: np.ndarray, out: np.ndarray) -> None:
        """Write the owned elements of a shard to where they lie in `out`, an array of the whole tensor."""
        for piece, box in self.boxes():
            out[box] = shard[piece].reshape(out[box].shape)

    def of_rank(self, index: int) -> Layout:
        """The layout of another rank of the sharding group."""
        return Layout(self.whole, self.splits, index, self.ranks, self.copy)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; `copy` is no part of it."""
        splits = [[split.dim, split.index, split.parts] for split in self.splits]
        return {"whole": list(self.whole), "splits": splits, "index": self.index, "ranks": self.ranks}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Layout:
        """The layout that was written by `to_json`.

        Raises:
            ValueError: it is none.
        """
        try:
            numbers = [*saved["whole"], *(n for split in saved["splits"] for n in split), saved["index"], saved["ranks"]]
            if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
                raise TypeError("not whole numbers")
            splits = tuple(Split(dim, index, parts) for dim, index, parts in saved["splits"])
            return cls(tuple(saved["whole"]), splits, saved["index"], saved["ranks"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not a layout: {error}") from error


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The range [start, stop) of a flattened tensor as boxes of it, in order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are [first, last)
    if first > last:  # inside of one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (slice(first, last), *(slice(0, n) for n in shape[1:]))
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    for box in _boxes(shape[1:], start, stop):
        yield (slice(index, index + 1), *box)
