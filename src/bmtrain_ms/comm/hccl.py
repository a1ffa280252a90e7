"""Ascend ranks over HCCL: the thinnest layer over `mindspore.communication.comm_func`.

No Ascend device is available to this project's tests. The calls are checked against the signatures of the installed MindSpore
with a stand-in that records them (`tests/unit/test_hccl.py`); that is all that is known about this file.
Transfers run on the device's own streams, so the time-out is HCCL's: set `HCCL_EXEC_TIMEOUT` and `HCCL_CONNECT_TIMEOUT`.
"""

from __future__ import annotations

import hashlib
from typing import Any, Sequence

from mindspore import Tensor

from .engine import Buffer, Clock, Engine, Work


class _Handles(Work):
    def __init__(self, outputs: list[Tensor], handles: list[Any]):
        self.outputs, self._handles = outputs, [handle for handle in handles if handle is not None]

    def done(self) -> bool:
        return not self._handles  # HCCL offers no query

    def wait(self) -> list[Tensor]:
        for handle in self._handles:
            handle.wait()  # the compute stream waits, not the host
        self._handles = []
        return self.outputs


class HcclEngine(Engine):
    """Ranks of an HCCL group.

    Sums are made by HCCL in the tensors' own type and in its own order; a mean divides before it sums, as 16-bit sums overflow.
    """

    name = "hccl"

    def __init__(
        self,
        group: str,
        rank: int,
        size: int,
        clock: Clock | None = None,
        comm_func: Any = None,
        ranks: Sequence[int] | None = None,
    ):
        """
        Args:
            group: an HCCL group name, `hccl_world_group` for all ranks.
            rank, size: of this process in it.
            clock: the training step, for messages.
            comm_func: stands in for `mindspore.communication.comm_func` in tests.
            ranks: the members' global ranks, in ascending order; by default `size` ranks from 0.
        """
        if comm_func is None:
            from mindspore.communication import comm_func
        self._group, self.rank, self.size = group, rank, size
        self.clock, self._comm = clock or Clock(), comm_func
        self._ranks = list(range(size) if ranks is None else ranks)  # comm_func's src and dst are global ranks

    def all_gather(self, tensors: Sequence[Buffer], out: Sequence[Buffer] | None = None, label: str = "") -> Work:
        self._note("all_gather", label)
        # comm_func stacks: (size, n, ...)
        pairs = [self._comm.all_gather_into_tensor(x, group=self._group, async_op=True) for x in tensors]
        joined = [y.reshape((-1, *x.shape[1:])) if len(y.shape) > len(x.shape) else y for x, (y, _) in zip(tensors, pairs)]
        return _Handles(joined, [handle for _, handle in pairs])

    def reduce_scatter(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._note("reduce_scatter", label)
        self._check_op(op, tensors)
        self._check_divisible(tensors, "reduce_scatter")
        kind, tensors = self._kind(op, tensors)
        pairs = [self._comm.reduce_scatter_tensor(x, op=kind, group=self._group, async_op=True) for x in tensors]
        return _Handles([y for y, _ in pairs], [handle for _, handle in pairs])

    def all_reduce(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._note("all_reduce", label)
        self._check_op(op, tensors)
        kind, tensors = self._kind(op, tensors)
        pairs = [self._comm.all_reduce(x, op=kind, group=self._group, async_op=True) for x in tensors]
        return _Handles([y for y, _ in pairs], [handle for _, handle in pairs])

    def broadcast(self, tensors: Sequence[Buffer], root: int = 0, label: str = "") -> Work:
        self._note("broadcast", label)
        self._check_peer(root, "root")
        return _Handles([self._comm.broadcast(x, src=self._ranks[root], group=self._group) for x in tensors], [])

    def all_to_all(self, tensors: Sequence[Buffer], label: str = "") -> Work:
        self._note("all_to_all", label)
        self._check_divisible(tensors, "all_to_all")
        pairs = [
            self._comm.all_to_all_single_with_output_shape(tuple(x.shape), x, group=self._group, async_op=True) for x in tensors
        ]
        return _Handles([y for y, _ in pairs], [handle for _, handle in pairs])

    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        self._note("send", label)
        self._check_peer(dst, "dst")
        return _Handles([], [self._comm.isend(x, dst=self._ranks[dst], group=self._group) for x in tensors])

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        self._note("recv", label)
        self._check_peer(src, "src")
        pairs = [self._comm.irecv(x, src=self._ranks[src], group=self._group) for x in like]
        return _Handles([y for y, _ in pairs], [handle for _, handle in pairs])

    def barrier(self, label: str = "") -> Work:
        self._note("barrier", label)
        self._comm.barrier(group=self._group)
        return _Handles([], [])

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        if list(ranks) != sorted(ranks):
            raise ValueError(f"HCCL numbers the ranks of a group in ascending order; sort the sub-group {list(ranks)}")
        from mindspore.communication import create_group

        members = [self._ranks[rank] for rank in ranks]
        digest = hashlib.sha256(str(members).encode()).hexdigest()[:16]
        name = f"bmtrain_ms-{len(members)}-{digest}"  # HCCL takes at most 127 characters
        create_group(name, members)
        return HcclEngine(name, list(ranks).index(self.rank), len(members), self.clock, self._comm, members)

    def _kind(self, op: str, tensors: Sequence[Buffer]) -> tuple[str, Sequence[Tensor]]:
        """HCCL has no mean."""
        return ("sum", [x * (1.0 / self.size) for x in tensors]) if op == "mean" else (op, tensors)
