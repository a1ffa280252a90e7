"""Gradients on their way from full tensors to shards."""

from __future__ import annotations

from typing import Any, Sequence

from mindspore import Parameter, Tensor, ops

from ..comm import Work
from ..compat.autograd import Deliver, no_grad, requested
from ..compat.runtime import address, zeros
from ..ops.in_place import add_
from .group import ParamGroup


class Reducer:
    """Reduces gradients asynchronously, past autograd.

    The backward function of a gather gives autograd zeros, at once, and nobody a gradient that is still arriving. What arrives is
    added to what autograd has summed up when the pass has ended, whatever else the parameter was used for: a penalty, another
    gather, a function of the user's. Where a hook of the user's reads the gradients of a parameter, its reduce is waited for, and
    its result is given to autograd.
    """

    def __init__(self) -> None:
        self._in_flight: list[tuple[Work, list[Parameter], int]] = []  # with the bytes of the group
        self._largest = 0  # group that was reduced
        self._arrived: dict[int, Tensor] = {}  # id of parameter -> sum of what came for it in this pass

    def reduce(self, group: ParamGroup, indices: Sequence[int], grads: Sequence[Tensor]) -> list[Tensor]:
        """Start reducing full gradients to shards of their mean; what autograd is told: one shard for each.

        Earlier ones stay in flight that are together no larger than the largest group and a quarter, so that full gradients of
        little more than twice that are alive. Of equal Blocks it is one; and nobody waits for an output projection's because a
        norm's came behind it.
        """
        for work, _, _ in self._in_flight:
            work.start_next_part()
        self._largest = max(self._largest, group.full_nbytes)
        self.finish(keep=self._largest * 5 // 4)
        params = [group.params[i] for i in indices]
        work = group.reduce(indices, grads)
        if any(p.has_hooks for p in params):
            return work.wait()
        self._in_flight.append((work, params, group.full_nbytes))
        return group.told(indices)

    def add(self, p: Parameter, grad: Tensor) -> None:
        """Have `grad`, which autograd does not know of, be part of the gradient of `p`. Keeps `grad`, and may write into it.

        Does nothing for a parameter that the pass was not asked for.
        """
        if id(p) not in requested():
            return
        before = self._arrived.get(id(p))
        self._arrived[id(p)] = grad if before is None else add_(before, grad)

    def finish(self, keep: int = -1) -> None:
        """Wait for all reduces, but for the latest ones, of at most `keep` bytes together."""
        while self._in_flight and sum(nbytes for _, _, nbytes in self._in_flight) > keep:
            work, params, _ = self._in_flight.pop(0)
            for p, grad in zip(params, work.wait()):
                self.add(p, grad)

    def end_of_backward(self, failed: bool) -> Deliver:
        """Wait for everything, or forget it where the pass failed; returns what makes gradients whole."""
        if failed:
            self._in_flight.clear()
            self._arrived = {}
        self.finish()
        arrived, self._arrived = self._arrived, {}
        return lambda p, found: _whole(p, arrived.get(id(p)), found)


def _whole(p: Parameter, arrived: Tensor | None, found: Tensor) -> Tensor:
    """What came past autograd, and what it has found: where nothing but our zeros went in, those come out."""
    if not hasattr(p, "layout"):  # not sharded
        return found if arrived is None else _sum(arrived, found)
    told = zeros(p.layout.length, found.dtype)
    if found is told or (address(found) is not None and address(found) == address(told)):
        return found if arrived is None else arrived
    found = without_padding(p, found)
    return found if arrived is None else _sum(arrived, found)


def without_padding(p: Any, grad: Tensor) -> Tensor:
    """The gradient of a shard with zeros where it is padded: who makes a penalty of shards does not think of padding, where it may
    even be NaN."""
    owned, length = p.layout.owned_size, p.layout.length
    if owned == length:
        return grad
    with no_grad():
        padding = ops.zeros((length - owned,), grad.dtype)
        return ops.cat((grad.reshape(-1)[:owned], padding)) if owned else padding


def _sum(arrived: Tensor, found: Tensor) -> Tensor:
    with no_grad():
        return arrived + (found if found.dtype == arrived.dtype else found.astype(arrived.dtype))
