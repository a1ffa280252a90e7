"""Where the tokens of a forward pass stand, and which of them see each other."""

from __future__ import annotations

from typing import Union

import numpy as np
from mindspore import Tensor, ops

from ...comm import world as current_world
from ...compat.autograd import recording
from ...compat.runtime import host_array
from ...nn import Routing, functional
from ...ops.seen import counts_before
from .cache import KeyValueCache
from .rotary import RotaryEmbedding

Marks = Union[Tensor, np.ndarray]  # one for each token


class Positions:
    """What attention must know of a forward pass beside the hidden states; made once per pass, for all layers.

    Hidden states are (batch * length, dim), row behind row. A token sees itself and those of its row before it.

    Attributes:
        rows: of hidden states: the tokens, and behind them padding where ranks divide them and there are not enough for all.
        last_only: nobody wants logits of other positions than each row's last.

    Args:
        batch: rows.
        length: tokens of each row in this pass.
        offset: tokens of each row before them, which a cache holds.
        padding: (batch, offset + length) bool, False where a token is padding, which nobody sees; None: no padding.
        documents: (batch, length) of int, for rows that hold several documents: the same number for tokens of the same one. A
            token sees its own document only, in which positions begin at 0. None: each row is a document.

    Raises:
        ValueError: `padding` or `documents` has another shape, or there are documents behind an offset.
    """

    def __init__(self, batch: int, length: int, offset: int = 0, padding: Marks | None = None, documents: Marks | None = None):
        self.batch, self.length, self.offset = batch, length, offset
        self.rows, self.ranks, self.last_only = batch * length, 1, False
        self._routing: Routing | None = None
        self._real: np.ndarray | None = None  # (batch, offset + length) bool: what is no padding
        self._documents: np.ndarray | None = None  # (batch, length)
        self._places: np.ndarray | None = None  # (batch, length): positions in documents
        self._seen: dict[int | None, functional.Seen] = {}  # by window
        self._angles: dict[RotaryEmbedding, functional.Angles] = {}
        if padding is not None:
            self._real = _marks("padding", padding, batch, offset + length).astype(bool)
        if documents is not None:
            if offset:
                raise ValueError(f"documents behind {offset} tokens of a cache: packed rows are for training, without a cache")
            self._documents = _marks("documents", documents, batch, length)
            self._places = counts_before(self._documents)

    @classmethod
    def of(
        cls, input_ids: Tensor, padding: Marks | None = None, cache: KeyValueCache | None = None, documents: Marks | None = None
    ) -> Positions:
        """The positions of a model's pass over input_ids (batch, length), behind what the cache holds.

        Raises:
            ValueError: see the class; or there are both a cache and documents.
            RuntimeError: there is a cache where gradients are taken.
        """
        if cache is not None and documents is not None:
            raise ValueError("documents are for training on packed rows, a cache is for generation: leave one of them out")
        if cache is not None and recording():
            raise RuntimeError("no gradient goes through a KeyValueCache: leave it out where gradients are taken")
        batch, length = input_ids.shape
        return cls(batch, length, 0 if cache is None else cache.length, padding, documents)

    def divide(self, ranks: int) -> None:
        """Have hidden states have a multiple of `ranks` rows, of which each of them has a part."""
        self.ranks, self.rows = ranks, -(-self.batch * self.length // ranks) * ranks
        if ranks > 1:
            for what, marks in (("padding", self._real), ("documents", self._documents)):
                current_world().along("tp").compare(what, marks)

    @property
    def part(self) -> slice:
        """This rank's rows of hidden states."""
        rows = self.rows // self.ranks
        first = current_world().mesh.tp_rank * rows if self.ranks > 1 else 0
        return slice(first, first + rows)

    @property
    def tokens(self) -> int:
        """How many of the rows, of all ranks, are tokens and no padding."""
        return self.batch * self.length if self._real is None else int(self._real[:, self.offset :].sum())

    @property
    def routing(self) -> Routing:
        """What routers are told of this rank's rows, and where they note their losses; one for the pass."""
        if self._routing is None:
            tokens, numbers = np.zeros(self.rows, bool), np.arange(self.rows) // self.length
            tokens[: self.batch * self.length] = True if self._real is None else self._real[:, self.offset :].reshape(-1)
            self._routing = Routing(tokens[self.part], np.minimum(numbers, self.batch - 1)[self.part])
        return self._routing

    @property
    def routed(self) -> Routing | None:
        """`routing`, if a router has been told."""
        return self._routing

    def places(self) -> np.ndarray:
        """(batch, length) of int: how many tokens each one has before it, of its row or document, padding not counted."""
        if self._places is not None:
            return self._places
        if self._real is None:
            return np.broadcast_to(np.arange(self.offset, self.offset + self.length), (self.batch, self.length))
        return np.maximum(self._real.cumsum(1) - 1, 0)[:, self.offset :]

    def without_padding(self, x: Tensor) -> Tensor:
        """The rows of x that are tokens."""
        tokens = self.batch * self.length
        return x if x.shape[0] == tokens else x[:tokens]

    def with_padding(self, x: Tensor, value: float = 0) -> Tensor:
        """x with `rows` rows, of which those that are no tokens have this value."""
        missing = self.rows - x.shape[0]
        return ops.cat((x, ops.full((missing, *x.shape[1:]), value, dtype=x.dtype)), 0) if missing else x

    @property
    def wanted(self) -> int:
        """Positions of each row that logits are made of; all of them where ranks have a part of the rows each."""
        return 1 if self.last_only and self.ranks == 1 else self.length

    def last_of(self, hidden: Tensor) -> Tensor:
        """The hidden states of the positions that are wanted: all, or only the last of each row, (batch, dim)."""
        if self.wanted == self.length:
            return hidden
        return functional.reshape(hidden, (self.batch, self.length, -1))[:, -1]

    def angles(self, rotary: RotaryEmbedding) -> functional.Angles:
        """What `functional.split_heads` rotates by: each (length, dim / 2), or (batch, 1, length, dim / 2) where rows differ."""
        if self._places is None:
            return rotary.angles(self.offset, self.length)
        if rotary not in self._angles:
            cos, sin = rotary.angles_at(self._places)
            self._angles[rotary] = cos[:, None], sin[:, None]
        return self._angles[rotary]

    @property
    def seen(self) -> functional.Seen | None:
        """What `functional.attention` is told of who sees whom; None where every key is seen. One for the pass."""
        return self.within(None)

    def within(self, window: int | None) -> functional.Seen | None:
        """`seen`, where tokens see the last `window` ones at most, themselves included; None: all. One for the pass.

        What is padding counts as a place of the window, as in Hugging Face's models.
        """
        window = None if window is None or window >= self.offset + self.length else window
        before = self.offset if window is None else min(self.offset, window - 1)  # which a cache keeps
        if self._real is None and self._documents is None and self.length == 1:
            return None  # the last position sees everything that is kept
        if window not in self._seen:
            real = None if self._real is None else self._real[:, self.offset - before :]
            self._seen[window] = functional.Seen(self.length, before + self.length, real, self._documents, window)
        return self._seen[window]


def _marks(name: str, marks: Marks, batch: int, keys: int) -> np.ndarray:
    if tuple(marks.shape) != (batch, keys):
        raise ValueError(
            f"{name} has the shape {tuple(marks.shape)}, not {(batch, keys)}: one entry per token, cached ones included"
        )
    return host_array(marks)
