"""Where the tokens of a forward pass stand, and which of them see each other."""

from __future__ import annotations

from typing import Union

import numpy as np
from mindspore import Tensor, ops

from ...comm import world
from ...compat.autograd import no_grad, recording
from ...compat.runtime import from_host, host_array
from ...nn import Routing, functional
from .cache import KeyValueCache
from .rotary import RotaryEmbedding

Marks = Union[Tensor, np.ndarray]  # one for each token

_NOT_SEEN = np.float32(-1e30)  # added to a score


class Positions:
    """What attention must know of a forward pass beside the hidden states; made once per pass, for all layers.

    Hidden states are (batch * length, dim), row behind row. A token sees itself and those of its row before it.

    Attributes:
        rows: of hidden states: the tokens, and behind them padding where ranks divide them and there are not enough for all.

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
        self.rows, self.ranks = batch * length, 1
        self._routing: Routing | None = None
        self._real: np.ndarray | None = None  # (batch, offset + length) bool: what is no padding
        self._hidden: np.ndarray | None = None  # (batch, 1 or length, keys) bool: what is not seen besides what comes later
        self._places: np.ndarray | None = None  # (batch, length): positions in documents
        self._masks: dict[tuple[int, int], Tensor | None] = {}
        self._angles: dict[RotaryEmbedding, functional.Angles] = {}
        if padding is not None:
            self._real = _marks("padding", padding, batch, offset + length).astype(bool)
            self._hidden = ~self._real[:, None]
        if documents is not None:
            if offset:
                raise ValueError(f"documents behind {offset} tokens of a cache: packed rows are for training, without a cache")
            numbers = _marks("documents", documents, batch, length)
            same = numbers[:, :, None] == numbers[:, None, :]
            self._places = np.tril(same).sum(-1) - 1
            self._hidden = ~same if self._hidden is None else self._hidden | ~same

    @classmethod
    def of(
        cls, input_ids: Tensor, padding: Marks | None = None, cache: KeyValueCache | None = None, documents: Marks | None = None
    ) -> Positions:
        """Those of a model's pass over input_ids (batch, length), behind what the cache holds.

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

    @property
    def part(self) -> slice:
        """This rank's rows of hidden states."""
        rows = self.rows // self.ranks
        first = world().mesh.tp_rank * rows if self.ranks > 1 else 0
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

    def angles(self, rotary: RotaryEmbedding) -> functional.Angles:
        """What `functional.split_heads` rotates by: each (length, dim / 2), or (batch, 1, length, dim / 2) where rows differ."""
        if self._places is None:
            return rotary.angles(self.offset, self.length)
        if rotary not in self._angles:
            cos, sin = rotary.angles_at(self._places)
            self._angles[rotary] = cos[:, None], sin[:, None]
        return self._angles[rotary]

    def mask(self, heads: int, repeats: int = 1) -> Tensor | None:
        """What `functional.attention` adds to the scores of grouped queries, float32; None where every key is seen.

        Args:
            heads: of keys and values.
            repeats: heads of queries for each of them.

        Returns:
            Broadcastable to (batch, heads, repeats * length, offset + length), and of that shape on CPU. Shared: do not write.
        """
        if (heads, repeats) not in self._masks:
            self._masks[heads, repeats] = self._make_mask(heads, repeats)
        return self._masks[heads, repeats]

    def _make_mask(self, heads: int, repeats: int) -> Tensor | None:
        if self._hidden is None and self.length == 1:
            return None  # the last position sees everything
        causal = functional.causal_mask(self.batch, heads, self.length, self.offset + self.length, repeats)
        if self._hidden is None:
            return causal  # itself, so that who knows it may take a shorter way
        hidden = self._hidden if self._hidden.shape[1] == 1 else np.tile(self._hidden, (1, repeats, 1))
        with no_grad():
            return causal + from_host(hidden[:, None] * _NOT_SEEN)


def _marks(name: str, marks: Marks, batch: int, keys: int) -> np.ndarray:
    if tuple(marks.shape) != (batch, keys):
        raise ValueError(
            f"{name} has the shape {tuple(marks.shape)}, not {(batch, keys)}: one entry per token, cached ones included"
        )
    return host_array(marks)
