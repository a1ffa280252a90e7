"""World size 1 is an engine, not a branch: every collective is the identity."""

from __future__ import annotations

from typing import Sequence

from mindspore import Tensor

from ..compat.runtime import shared_array, shared_tensor
from .engine import Buffer, Clock, Done, Engine, Work


class SingleEngine(Engine):
    """The group of one rank."""

    name = "single"
    rank = 0
    size = 1

    def __init__(self, clock: Clock | None = None, host: bool = True):
        """`host`: tensors live in host memory (CPU), so that results can land where they are wanted."""
        self.clock, self.lands_in_place = clock or Clock(), host

    def all_gather(self, tensors: Sequence[Buffer], out: Sequence[Buffer] | None = None, label: str = "") -> Work:
        if out is None or not self.lands_in_place:
            return Done(self._copies(tensors))
        for x, y in zip(tensors, out):
            shared_array(y)[...] = shared_array(x)
        return Done(list(out))

    def reduce_scatter(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        self._check_divisible(tensors, "reduce_scatter")
        return Done(self._copies(tensors))

    def all_reduce(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        return Done(self._copies(tensors))

    def broadcast(self, tensors: Sequence[Buffer], root: int = 0, label: str = "") -> Work:
        self._check_peer(root, "root")
        return Done(list(tensors))

    def all_to_all(self, tensors: Sequence[Buffer], label: str = "") -> Work:
        self._check_divisible(tensors, "all_to_all")
        return Done(self._copies(tensors))

    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        raise ValueError("a group of one rank has nobody to send to")

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        raise ValueError("a group of one rank has nobody to receive from")

    def barrier(self, label: str = "") -> Work:
        return Done([])

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        return self

    def _copies(self, tensors: Sequence[Buffer]) -> list[Tensor]:
        """Copies: a result that shares memory with its input would differ from what two ranks get."""
        if self.lands_in_place:
            return [shared_tensor(shared_array(x).copy()) for x in tensors]
        return [x.copy() for x in tensors]
