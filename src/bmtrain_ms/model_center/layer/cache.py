"""Keys and values of tokens that were computed before."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops

from bmtrain_ms_base.checks import whole

from ...compat.device import on_host
from ...compat.runtime import from_host, numpy_dtype, values


class KeyValueCache:
    """What the layers of a model keep of the tokens so far, so that the next pass computes with the new ones only.

    `model(ids, padding, cache)` reads and appends. For evaluation: no gradient goes through it.

    Args:
        capacity: the most positions per row; memory for them is there from the first pass on, and not more.

    Raises:
        TypeError: `capacity` is not a whole number.
        ValueError: it is less than 1.
    """

    def __init__(self, capacity: int):
        self.capacity = whole("capacity", capacity, 1)
        self._layers: dict[int, LayerCache] = {}
        self._passed = 0  # positions that went by where there are no layers

    @property
    def length(self) -> int:
        """Positions of each row that every layer holds; of a rank without layers, those that other ranks' hold."""
        return min((layer.length for layer in self._layers.values()), default=self._passed)

    def check_room(self, more: int) -> None:
        """Raise ValueError where there is no room for so many positions more: before ranks wait for one that has noticed."""
        _check_room(self.length, more, self.capacity)

    def pass_by(self, more: int) -> None:
        """New positions of each row are held by other ranks of a pipeline: this one has no layers."""
        self._passed += more

    def reorder(self, rows: np.ndarray) -> None:
        """Have each row hold what another one held; rows (batch,) of int."""
        for layer in self._layers.values():
            layer.reorder(rows)

    def layer(self, number: int) -> LayerCache:
        """The part of a layer, made at its first use; layers are numbered from 0 over the whole model."""
        return self._layers.setdefault(number, LayerCache(self.capacity))


class LayerCache:
    """The part of one layer in a `KeyValueCache`.

    Args:
        capacity: the most positions per row.

    Attributes:
        length: positions of each row so far.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._held = 0  # positions in the buffers, the last ones
        self._buffers: list[_Buffer] = []

    def update(self, *new: Tensor, window: int | None = None) -> tuple[Tensor, ...]:
        """Append keys and values, or whatever else a layer keeps per position.

        Args:
            new: each (batch, heads, length, dim); always as many, and of the same shapes but for the length.
            window: of a layer whose tokens see so many positions at most, themselves included: others are not kept. Memory is there
                for two windows then, so that positions are moved to its beginning only once in a while. Always the same.

        Returns:
            For each of them (batch, heads, positions, dim), in order: all so far, or those that the first of the new ones sees, and
            the new ones.

        Raises:
            ValueError: it would be more than the capacity, or shapes differ from those before.
        """
        more = new[0].shape[2]
        _check_room(self.length, more, self.capacity)
        room = self.capacity if window is None else min(self.capacity, 2 * window)
        self._buffers = self._buffers or [_Buffer(x, room) for x in new]
        seen = self._held if window is None else min(self._held, window - 1)
        before, end = self._held - seen, self._held + more
        for buffer, x in zip(self._buffers, new):
            buffer.check(x)
        self.length += more
        if end <= room:
            for buffer, x in zip(self._buffers, new):
                buffer.write(self._held, x)
            self._held = end
            return tuple(buffer.read(before, end) for buffer in self._buffers) if end > more else new
        assert window is not None
        joined = tuple(buffer.followed_by(before, self._held, x) for buffer, x in zip(self._buffers, new))
        self._held = min(window - 1, seen + more)
        for buffer, x in zip(self._buffers, joined):
            buffer.write(0, x[:, :, seen + more - self._held :])
        return joined

    def reorder(self, rows: np.ndarray) -> None:
        """Reorder the rows of the layer, see `KeyValueCache.reorder`."""
        for buffer in self._buffers:
            buffer.reorder(rows, self._held)


def _check_room(held: int, more: int, capacity: int) -> None:
    if held + more > capacity:
        raise ValueError(
            f"a KeyValueCache of capacity {capacity} that holds {held} positions has no room for {more} more: "
            f"KeyValueCache({held + more}) has"
        )


class _Buffer:
    """(batch, heads, capacity, dim). On CPU it is NumPy's: MindSpore takes 25 times as long to copy a slice (2.5 and 2.10)."""

    def __init__(self, like: Tensor, capacity: int):
        batch, heads, _, dim = like.shape
        self._shape = batch, heads, capacity, dim
        self._tensor: Tensor | None = None
        if on_host():
            self._array = np.zeros(self._shape, numpy_dtype(like.dtype))  # memory that is not written takes no room
        else:
            self._tensor = ops.zeros(self._shape, like.dtype)

    def check(self, new: Tensor) -> None:
        """Raise ValueError where new positions do not fit to those before."""
        batch, heads, _, dim = new.shape
        begun = self._shape[0], self._shape[1], self._shape[3]
        if (batch, heads, dim) != begun:
            raise ValueError(
                f"this KeyValueCache was begun with (batch, heads, dim) {begun}, and this pass has {(batch, heads, dim)}: "
                "make a new one"
            )

    def write(self, start: int, new: Tensor) -> None:
        length = new.shape[2]
        if self._tensor is None:
            self._array[:, :, start : start + length] = values(new)
        else:
            self._tensor[:, :, start : start + length] = new

    def reorder(self, rows: np.ndarray, length: int) -> None:
        if self._tensor is None:
            self._array[:, :, :length] = self._array[rows, :, :length]
        else:
            self._tensor[:, :, :length] = self._tensor[:, :, :length][from_host(rows.astype(np.int32))]

    def read(self, start: int, stop: int) -> Tensor:
        if self._tensor is None:
            return from_host(np.ascontiguousarray(self._array[:, :, start:stop]))
        return self._tensor[:, :, start:stop]

    def followed_by(self, start: int, stop: int, new: Tensor) -> Tensor:
        """What `read` returns, and behind it the new positions."""
        if self._tensor is None:
            return from_host(np.concatenate((self._array[:, :, start:stop], values(new)), 2))
        return ops.cat((self._tensor[:, :, start:stop], new), 2)
