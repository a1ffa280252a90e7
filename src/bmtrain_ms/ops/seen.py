"""Which keys the queries of attention see, worked out a block at a time: no matrix of all of them is made on the host."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ..compat.autograd import no_grad
from ..compat.runtime import from_host

NOT_SEEN = np.float32(-1e30)  # added to a score


class Seen:
    """A query sees itself and the keys before it, but for those that nobody sees, and those of other documents.

    Args:
        queries: the last ones of the keys.
        keys: at least as many.
        real: (batch, keys) bool, False for keys that nobody sees; None: all are.
        documents: (batch, keys) of int: a query sees keys with its own number only; None: they are all of one.
        window: a query sees so many keys at most, the last one of which is itself (Beltagy et al., 2020); None: all before it.
    """

    def __init__(
        self,
        queries: int,
        keys: int,
        real: np.ndarray | None = None,
        documents: np.ndarray | None = None,
        window: int | None = None,
    ):
        self.queries, self.keys, self._real, self._documents = queries, keys, real, documents
        self.window = None if window is None or window >= keys else window
        self._starts = None if documents is None else first_of_each(documents)
        self._tensors: dict[int, Tensor] = {}
        self._hidden: Tensor | None = None

    @property
    def causal(self) -> bool:
        """Whether that is all: what comes later is not seen."""
        return self._real is None and self._documents is None and self.window is None

    def block(self, rows: slice) -> tuple[int, int, np.ndarray | None]:
        """What queries from rows.start to rows.stop may see: the first key, the end of those keys, and which of them each query
        sees, (batch, rows, keys between) bool; None where all that are not later are seen."""
        before = self.keys - self.queries
        last, first = before + rows.stop, 0
        if self.causal:
            return 0, last, None
        if self._starts is not None:
            first = int(self._starts[:, before + rows.start : last].min())
        if self.window is not None:
            first = max(first, before + rows.start - self.window + 1)
        places, keys = np.arange(before + rows.start, last), np.arange(first, last)
        allowed = keys[None, None] <= places[None, :, None]
        if self.window is not None:
            allowed = allowed & (keys[None, None] > places[None, :, None] - self.window)
        if self._documents is not None:
            allowed = allowed & (self._documents[:, places, None] == self._documents[:, None, first:last])
        if self._real is not None:
            allowed = allowed & self._real[:, None, first:last]
        return first, last, allowed

    def ends(self, most: int) -> tuple[int, ...] | None:
        """Where documents end, counted through all rows: of 3, 2 and 4 tokens 3, 5, 9. None where what is seen depends on more,
        where a document does not lie in one piece, and where there are more than `most`."""
        starts = self._starts
        if starts is None or self._real is not None or self.window is not None or self.queries != self.keys:
            return None
        if (np.diff(starts, axis=1) < 0).any():
            return None
        first = starts == np.arange(self.keys)
        ends = [*np.flatnonzero(first.reshape(-1))[1:].tolist(), starts.size]
        return tuple(ends) if len(ends) <= most else None

    def hidden(self) -> Tensor:
        """(batch, 1, queries, keys) uint8, or (queries, keys) where all rows are the same: 1 where a query does not see a key, but
        for itself, which it always sees here; made once."""
        if self._hidden is None:
            first, last, allowed = self.block(slice(0, self.queries))
            if allowed is None:
                allowed = np.tril(np.ones((self.queries, self.keys), bool), self.keys - self.queries)[None]
            hidden = np.ones((allowed.shape[0], self.queries, self.keys), np.uint8)
            hidden[:, :, first:last][allowed] = 0
            hidden[:, np.arange(self.queries), np.arange(self.keys - self.queries, self.keys)] = 0
            with no_grad():
                self._hidden = from_host(hidden[0] if len(hidden) == 1 else hidden[:, None])
        return self._hidden

    def tensor(self, repeats: int = 1) -> Tensor:
        """What is added to the scores of groups of `repeats` heads: (1 or batch, 1, repeats * queries, keys) float32; made once."""
        if repeats not in self._tensors:
            first, _, allowed = self.block(slice(0, self.queries))
            if allowed is None:
                allowed = np.tril(np.ones((self.queries, self.keys), bool), self.keys - self.queries)[None]
            added = np.full((allowed.shape[0], self.queries, self.keys), NOT_SEEN, np.float32)
            added[:, :, first:][allowed] = 0.0
            with no_grad():
                self._tensors[repeats] = from_host(np.ascontiguousarray(np.tile(added, (1, repeats, 1))[:, None]))
        return self._tensors[repeats]


def first_of_each(numbers: np.ndarray) -> np.ndarray:
    """(batch, n) of int -> for each element the place of the first one in its row with the same number."""
    out = np.empty(numbers.shape, np.int64)
    for row, found in zip(numbers, out):
        _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        found[:] = first[inverse.reshape(-1)]
    return out


def counts_before(numbers: np.ndarray) -> np.ndarray:
    """(batch, n) of int -> how many elements before each one, in its row, have the same number."""
    out = np.empty(numbers.shape, np.int64)
    for row, found in zip(numbers, out):
        order = np.argsort(row, kind="stable")
        _, first, inverse = np.unique(row[order], return_index=True, return_inverse=True)
        found[order] = np.arange(row.size) - first[inverse.reshape(-1)]
    return out
