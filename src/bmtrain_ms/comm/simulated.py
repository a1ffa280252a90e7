"""One rank of a world of any size in one process: what would rank 5 of 8192 hold, and how long would its own work take?"""

from __future__ import annotations

from typing import Sequence

import numpy as np
from mindspore import Tensor

from ..compat.runtime import numpy_dtype, shared_array, shared_tensor
from .engine import Buffer, Clock, Done, Engine, Work


class SimulatedEngine(Engine):
    """Returns at once, as if every rank had given what this one gives. Shapes and types are right, values are not."""

    name = "simulated"
    lands_in_place = True

    def __init__(self, rank: int, size: int, clock: Clock | None = None):
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is outside the world of {size} (0..{size - 1})")
        self.rank, self.size, self.clock = rank, size, clock or Clock()

    def all_gather(self, tensors: Sequence[Buffer], out: Sequence[Buffer] | None = None, label: str = "") -> Work:
        if out is None:
            shapes = [(self.size * (x.shape[0] if x.shape else 1), *x.shape[1:]) for x in tensors]
            out = [shared_tensor(np.empty(shape, numpy_dtype(x.dtype))) for shape, x in zip(shapes, tensors)]
        for x, y in zip(tensors, out):
            shared_array(y).reshape(self.size, -1)[...] = shared_array(x).reshape(-1)
        return Done(list(out))

    def reduce_scatter(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        self._check_divisible(tensors, "reduce_scatter")
        return Done([shared_tensor(part.copy()) for part in map(self._part, tensors)])

    def all_reduce(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        return Done([shared_tensor(shared_array(x).copy()) for x in tensors])

    def broadcast(self, tensors: Sequence[Buffer], root: int = 0, label: str = "") -> Work:
        self._check_peer(root, "root")
        return Done(list(tensors))

    def all_to_all(self, tensors: Sequence[Buffer], label: str = "") -> Work:
        self._check_divisible(tensors, "all_to_all")
        return Done([shared_tensor(np.concatenate([self._part(x)] * self.size)) for x in tensors])

    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        self._check_peer(dst, "dst")
        return Done([])

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        self._check_peer(src, "src")
        return Done([shared_tensor(shared_array(x).copy()) for x in like])

    def barrier(self, label: str = "") -> Work:
        return Done([])

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        if self.rank not in ranks:
            raise ValueError(f"rank {self.rank} is not in the sub-group {list(ranks)}: only its members create it")
        return SimulatedEngine(ranks.index(self.rank), len(ranks), self.clock)

    def _part(self, x: Tensor) -> np.ndarray:
        """This rank's part of dim 0."""
        return shared_array(x).reshape(self.size, -1, *x.shape[1:])[self.rank]
