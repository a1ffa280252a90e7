"""Gradients on their way from full tensors to shards."""

from __future__ import annotations

from collections import Counter
from typing import Sequence

from mindspore import Tensor

from ..comm import Work
from .group import AcrossReplicas, ParamGroup


class Reducer:
    """Reduces gradients asynchronously where nobody can look at the result too early.

    The backward function of a gather returns shards that are still being written. That is safe while autograd only passes them
    on, and all are waited for before `value_and_grad` returns. Where it adds two of them (a parameter gathered twice in one
    forward pass) or a hook of the user's reads one, the reduce is waited for at once.
    """

    def __init__(self) -> None:
        self._gathers: Counter[int] = Counter()  # id of parameter -> recorded gathers since the last backward pass
        self._in_flight: list[Work] = []

    def expect(self, group: ParamGroup, indices: Sequence[int]) -> None:
        """A recorded gather of these parameters will end in a `reduce`."""
        self._gathers.update(id(group.params[i]) for i in indices)

    def reduce(self, group: ParamGroup, indices: Sequence[int], grads: Sequence[Tensor]) -> list[Tensor]:
        """Full gradients -> shards of their mean; flat, `shard_length` elements, of the gradients' dtype.

        At most one earlier reduce stays in flight, so that full gradients of at most two groups are alive.
        """
        for work in self._in_flight:
            if isinstance(work, AcrossReplicas):
                work.start_second()
        self.finish(keep=1)
        work = group.reduce(indices, grads)
        self._in_flight.append(work)
        if any(self._gathers[id(group.params[i])] > 1 or group.params[i].has_hooks for i in indices):
            self.finish()
        return work.outputs

    def finish(self, keep: int = 0) -> None:
        """Wait for all but the `keep` latest reduces."""
        while len(self._in_flight) > keep:
            self._in_flight.pop(0).wait()

    def end_of_backward(self, failed: bool) -> None:
        """Everything has arrived, or the pass failed and nothing will be used."""
        if failed:
            self._in_flight.clear()
        self.finish()
        self._gathers.clear()
