"""Repeating a forward pass, and noticing when it was not repeated."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Sequence

import numpy as np
import xxhash
from mindspore import Parameter, Tensor

from bmtrain_ms_base import generators
from bmtrain_ms_base.random import Draws

from ..compat.runtime import host_array, values

_SAMPLE = 1 << 10  # elements of an output that are kept, to tell rounding from another result


class Replay:
    """A forward pass that is made again in backward.

    What it draws is drawn again: from `draws`, from Python's and from NumPy's global generator. What it returns is compared,
    each time: whatever else is random in it (an operation of MindSpore's, a generator of its own) or counts its calls gives other
    values, and gradients would be those of another function.
    """

    def __init__(self, draws: Draws, looks: bool):
        """The pass begins.

        Args:
            draws: those of the world.
            looks: whether results are compared. On a device that waits for all that was issued.
        """
        self._draws, self._looks = draws, looks
        self._start = draws.count, draws.records
        self._generators: generators.States | None = generators.states()
        self._results: list[_Result] = []
        self._given: list[int] = []
        self._flags: list[bool] = []

    def given(self, leaves: Sequence[Any]) -> None:
        """What the pass computes with: tensors and arrays are remembered by a hash."""
        self._given = _hashes_of(leaves) if self._looks else []

    def inputs_differ(self, leaves: Sequence[Any]) -> bool:
        """Whether somebody has written into what the pass was given."""
        return self._looks and self._given != _hashes_of(leaves)

    def flags_differ(self, flags: list[bool]) -> bool:
        """Whether truth values that the module may decide by are others."""
        return self._looks and self._flags != flags

    def ended(self, outputs: Sequence[Tensor], flags: list[bool]) -> None:
        """The pass has returned `outputs`, and left these truth values in the module."""
        self._flags = flags
        if self._generators is not None and generators.same(self._generators, generators.states()):
            self._generators = None  # nothing was drawn: nothing to draw again
        if self._looks:
            self._results = [_Result(x) for x in outputs]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside the `with` statement the pass's random numbers are drawn again; afterwards generators go on as before."""
        with self._draws.replay(self._start):
            if self._generators is None:
                yield
                return
            now = generators.states()
            generators.restore(self._generators)
            try:
                yield
            finally:
                generators.restore(now)

    def differs(self, outputs: Sequence[Tensor]) -> bool:
        """Whether the repeated pass has returned something else, beyond rounding."""
        return self._looks and any(first.differs(again) for first, again in zip(self._results, outputs))


class _Result:
    """What is remembered of an output: a hash, and some of its elements."""

    def __init__(self, x: Tensor):
        flat = values(x).reshape(-1)
        self._hash = _hash(flat)
        self._sample = flat[:: max(1, flat.size // _SAMPLE)].astype(np.float32)

    def differs(self, again: Tensor) -> bool:
        other = _Result(again)
        if other._hash == self._hash:
            return False
        a, b = self._sample, other._sample
        if np.array_equal(a, b, equal_nan=True):
            return True  # here and there: rounding would be everywhere
        rough = 1e-3 if values(again).dtype == np.float32 else 1e-2
        return not np.allclose(a, b, rtol=rough, atol=rough * float(np.abs(a[np.isfinite(a)]).max(initial=0)), equal_nan=True)


def hashes(parameters: Sequence[Parameter]) -> list[int]:
    """What tells later whether one of them was written."""
    return [_hash(host_array(p).reshape(-1)) for p in parameters]


def _hashes_of(leaves: Sequence[Any]) -> list[int]:
    arrays = (values(x) if isinstance(x, Tensor) else x for x in leaves if isinstance(x, (Tensor, np.ndarray)))
    return [_hash(x.reshape(-1)) for x in arrays if not x.dtype.hasobject]  # Python's objects are not in their array's memory


def _hash(flat: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(flat).view(np.uint8).data)
