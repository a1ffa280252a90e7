"""Counter-based randomness: the value of element i depends on a key and on i, never on what was drawn before.

So a rank can draw exactly its slice of a parameter, any number of ranks draw the same full tensor, and a recomputed forward pass
draws the same dropout mask. The generator is Philox4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Iterator

import numpy as np

from .layout import Layout

CHUNK = 1 << 14  # elements; a multiple of the 4 words that one counter value yields
_POSITIONS = 1 << 20  # elements whose positions are looked up at a time


def key_of(seed: int, *parts: object) -> np.ndarray:
    """Two 64-bit words from the run's seed and whatever names the thing that is drawn."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=16).digest()
    return np.frombuffer(digest, np.uint64)


def chunks(key: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, slice]]:
    """The 64-bit words of elements [start, stop), in whole chunks.

    Yields:
        (index of the chunk's first element, its CHUNK words, which of them lie in the range). Callers transform the whole chunk
        and slice afterwards: vectorised functions may round an element differently at another position in an array.
    """
    for chunk in range(start // CHUNK, -(-stop // CHUNK)):
        first = chunk * CHUNK
        yield first, _words(key, chunk), slice(max(start - first, 0), min(stop - first, CHUNK))


def chunks_of(key: np.ndarray, layout: Layout) -> Iterator[tuple[slice, np.ndarray, slice | np.ndarray]]:
    """The words of the elements that a rank owns; each element has the same ones whatever the layout.

    Yields:
        (slice of the shard, words of the whole chunk, which of them belong to the slice).
    """
    if layout.local == layout.whole:
        start, stop = layout.owned
        for first, words, inside in chunks(key, start, stop):
            yield slice(first + inside.start - start, first + inside.stop - start), words, inside
        return
    for begin in range(0, layout.owned_size, _POSITIONS):
        positions = layout.positions(begin, begin + _POSITIONS)
        edges = [0, *(np.flatnonzero(np.diff(positions // CHUNK)) + 1).tolist(), len(positions)]
        for left, right in zip(edges, edges[1:]):
            chunk = int(positions[left]) // CHUNK
            yield slice(begin + left, begin + right), _words(key, chunk), positions[left:right] - chunk * CHUNK


def _words(key: np.ndarray, chunk: int) -> np.ndarray:
    return np.random.Philox(key=key, counter=chunk * CHUNK // 4).random_raw(CHUNK)


def uniform(words: np.ndarray) -> np.ndarray:
    """64-bit words -> float64 in [0, 1), 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def normal(words: np.ndarray) -> np.ndarray:
    """64-bit words -> standard normal float64, one per word (Box-Muller on its two halves); |value| < 6.8."""
    radius = ((words >> np.uint64(32)) + 0.5) * 2.0**-32
    angle = (words & np.uint64(0xFFFFFFFF)) * (2.0 * np.pi * 2.0**-32)
    return np.sqrt(-2.0 * np.log(radius)) * np.cos(angle)


class Draws:
    """Numbers what happens in forward passes, so that recomputation can repeat it: random draws, and records of `inspect`.

    A draw's key is (seed, step, number of the draw within the step), the same on every rank: which elements of it a rank draws is
    up to who draws. Passes whose gradient nobody takes number theirs `apart`: an evaluation between two passes of training, of
    however many passes on this layout, changes nothing of what these draw.

    Attributes:
        step: steps made so far, without those that were skipped: so the next one draws what a run would that never saw it.
        count: draws so far in this step.
        records: tensors recorded so far.
        replaying: a forward pass is being repeated.
        part: of this rank's rows, which those that are computed now are: the first one's number, how many, of how many; None: all.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self.step, self.count, self.records, self.replaying = 0, 0, 0, False
        self._apart, self._counts_apart = False, 0
        self.part: tuple[int, int, int] | None = None

    def next_step(self, made: bool) -> None:
        """Count a step, if it was made, and number from 0: a resumed run repeats the numbers."""
        self.step += made
        self.count = self._counts_apart = 0

    @contextlib.contextmanager
    def replay(self, start: tuple[int, int]) -> Iterator[None]:
        """Number from `start`, (count, records) of then, as a forward pass did; afterwards go on as before."""
        before = self.count, self.records, self.replaying
        (self.count, self.records), self.replaying = start, True
        try:
            yield
        finally:
            self.count, self.records, self.replaying = before

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Inside the `with` statement draws are those of a pass whose gradient nobody takes, and count by themselves."""
        if self._apart:
            yield
            return
        before, self.count, self._apart = self.count, self._counts_apart, True
        try:
            yield
        finally:
            self._counts_apart, self.count, self._apart = self.count, before, False

    @contextlib.contextmanager
    def among(self, part: tuple[int, int, int] | None) -> Iterator[None]:
        """Inside the `with` statement a part of the rows is computed, see `part`; inside of another one, a part of that."""
        before = self.part
        if before is not None and part is not None:  # a micro-batch of a pass that has some of the step's rows
            (first, rows, total), (inner, count, among) = before, part
            part = first + inner * rows // among, count * rows // among, total
        self.part = part or before
        try:
            yield
        finally:
            self.part = before

    def place(self, rank: int, size: int) -> int:
        """Where in a draw for the rows of all ranks the `size` elements begin that this rank, of that number, draws now."""
        first, rows, total = self.part or (0, 1, 1)
        return rank * (size * total // rows) + size * first // rows

    @contextlib.contextmanager
    def numbered(self, count: int) -> Iterator[None]:
        """Number from `count`, for what has a place of its own among the draws of a step; afterwards go on as before."""
        before, self.count = self.count, count
        try:
            yield
        finally:
            self.count = before

    def next_key(self) -> np.ndarray:
        """The key of the next draw."""
        self.count += 1
        return key_of(self._seed, "draw apart" if self._apart else "draw", self.step, self.count)
