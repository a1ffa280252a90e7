"""Ascend ranks over HCCL: the thinnest layer over `mindspore.communication.comm_func`.

No Ascend device is available to this project's tests. The calls are checked against the signatures of the installed MindSpore
with a stand-in that records them (`tests/unit/test_hccl.py`), and whole trainings run over another one (`comm.rehearsed`).
Transfers run on the device's own streams, so the time-out is HCCL's: set `HCCL_EXEC_TIMEOUT` and `HCCL_CONNECT_TIMEOUT`.
"""

from __future__ import annotations

import hashlib
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..compat.runtime import from_host, host_array
from .engine import Buffer, Clock, Engine, Work
from .reduce import reduce_rows

WORLD = "hccl_world_group"  # the name of the group of all ranks
REDUCES = (ms.int8, ms.int32, ms.float16, ms.float32, ms.bfloat16)  # what HCCL sums, as MindSpore's operations check it


class _Handles(Work):
    """Operations in flight, and what is to be made of their results."""

    def __init__(self, outputs: list[Tensor], handles: list[Any], last: Callable[[Tensor, int], Tensor] | None = None):
        """`last`: makes the result of the i-th output that arrived; not before it did, as even a view may copy."""
        self.outputs, self._handles = outputs, [handle for handle in handles if handle is not None]
        self._last = last

    def done(self) -> bool:
        return not self._handles  # HCCL offers no query

    def wait(self) -> list[Tensor]:
        for handle in self._handles:
            handle.wait()  # the compute stream waits, not the host
        self._handles = []
        if self._last is not None:
            self.outputs[:] = [self._last(y, i) for i, y in enumerate(self.outputs)]
            self._last = None
        return self.outputs

    def then(self, more: Callable[[Tensor, int], Tensor]) -> _Handles:
        """The same operations, and `more` made of each result."""
        last = self._last
        self._last = more if last is None else lambda y, i: more(last(y, i), i)
        return self


def _in_flight(pairs: Sequence[tuple[Tensor, Any]], last: Callable[[Tensor, int], Tensor] | None = None) -> _Handles:
    """What comm_func returns."""
    return _Handles([y for y, _ in pairs], [handle for _, handle in pairs], last)


def _moved(x: Tensor) -> Tensor:
    """The tensor in a type that HCCL can move: truth values as uint8."""
    return x.astype(ms.uint8) if x.dtype == ms.bool_ else x


def _as(given: Sequence[Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Makes of what arrived the type of what was given."""
    return lambda y, i: y.astype(ms.bool_) if given[i].dtype == ms.bool_ else y


class HcclEngine(Engine):
    """Ranks of an HCCL group.

    Sums are made by HCCL in the tensors' own type and in its own order; a mean divides before it sums, as 16-bit sums overflow.
    Types that HCCL does not sum (float64, int64) are moved by it, and summed on the host.
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
            comm_func: stands in for `mindspore.communication.comm_func`, and (`comm_func.create_group`, if it has that) for
                `mindspore.communication.create_group`.
            ranks: the members' global ranks, in ascending order; by default `size` ranks from 0.
        """
        if comm_func is None:
            from mindspore.communication import comm_func
        self._group, self.rank, self.size = group, rank, size
        self.clock, self._comm = clock or Clock(), comm_func
        self._ranks = list(range(size) if ranks is None else ranks)  # comm_func's src and dst are global ranks

    def all_gather(self, tensors: Sequence[Buffer], out: Sequence[Buffer] | None = None, label: str = "") -> _Handles:
        self._note("all_gather", label)
        tensors = [x if x.shape else x.reshape(1) for x in tensors]  # which has a first dim
        pairs = [self._comm.all_gather_into_tensor(_moved(x), group=self._group, async_op=True) for x in tensors]

        def joined(y: Tensor, i: int) -> Tensor:
            """comm_func may stack: (size, n, ...)."""
            return y.reshape((-1, *tensors[i].shape[1:])) if len(y.shape) > len(tensors[i].shape) else y

        return _in_flight(pairs, joined).then(_as(tensors))

    def reduce_scatter(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._note("reduce_scatter", label)
        self._check_op(op, tensors)
        self._check_divisible(tensors, "reduce_scatter")
        if not all(x.dtype in REDUCES for x in tensors):
            parts = self.all_to_all(tensors, label)
            return parts.then(lambda y, i: self._reduced(y, op, (tensors[i].shape[0] // self.size, *tensors[i].shape[1:])))
        kind, tensors = self._kind(op, tensors)
        return _in_flight([self._comm.reduce_scatter_tensor(x, op=kind, group=self._group, async_op=True) for x in tensors])

    def all_reduce(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._note("all_reduce", label)
        self._check_op(op, tensors)
        if not all(x.dtype in REDUCES for x in tensors):
            rows = self.all_gather([x.reshape(-1) for x in tensors], label=label)
            return rows.then(lambda y, i: self._reduced(y, op, tuple(tensors[i].shape)))
        kind, tensors = self._kind(op, tensors)
        return _in_flight([self._comm.all_reduce(x, op=kind, group=self._group, async_op=True) for x in tensors])

    def broadcast(self, tensors: Sequence[Buffer], root: int = 0, label: str = "") -> Work:
        self._note("broadcast", label)
        self._check_peer(root, "root")
        there = [self._comm.broadcast(_moved(x), src=self._ranks[root], group=self._group) for x in tensors]
        return _Handles(there, []).then(_as(tensors))

    def all_to_all(self, tensors: Sequence[Buffer], label: str = "") -> _Handles:
        self._note("all_to_all", label)
        self._check_divisible(tensors, "all_to_all")
        pairs = [
            self._comm.all_to_all_single_with_output_shape(tuple(x.shape), _moved(x), group=self._group, async_op=True)
            for x in tensors
        ]
        return _in_flight(pairs).then(_as(tensors))

    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        self._note("send", label)
        self._check_peer(dst, "dst")
        return _Handles([], [self._comm.isend(_moved(x), dst=self._ranks[dst], group=self._group) for x in tensors])

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        self._note("recv", label)
        self._check_peer(src, "src")
        return _in_flight([self._comm.irecv(_moved(x), src=self._ranks[src], group=self._group) for x in like]).then(_as(like))

    def barrier(self, label: str = "") -> Work:
        self._note("barrier", label)
        self._comm.barrier(group=self._group)
        return _Handles([], [])

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        if list(ranks) != sorted(ranks):
            raise ValueError(f"HCCL numbers the ranks of a group in ascending order; sort the sub-group {list(ranks)}")
        members = [self._ranks[rank] for rank in ranks]
        digest = hashlib.sha256(str(members).encode()).hexdigest()[:16]
        name = f"bmtrain_ms-{len(members)}-{digest}"  # HCCL takes at most 127 characters
        self._create_group()(name, members)
        return HcclEngine(name, list(ranks).index(self.rank), len(members), self.clock, self._comm, members)

    def _create_group(self) -> Callable[[str, list[int]], Any]:
        from mindspore import communication

        return getattr(self._comm, "create_group", communication.create_group)

    def _kind(self, op: str, tensors: Sequence[Buffer]) -> tuple[str, Sequence[Tensor]]:
        """HCCL has no mean."""
        return ("sum", [x * (1.0 / self.size) for x in tensors]) if op == "mean" else (op, tensors)

    def _reduced(self, rows: Tensor, op: str, shape: tuple[int, ...]) -> Tensor:
        """The reduction of every rank's row, in rank order, made on the host: few such tensors are large."""
        parts = host_array(rows).reshape(self.size, -1)
        out = np.empty(parts.shape[1], parts.dtype)
        reduce_rows(parts, op, out)
        return from_host(out.reshape(shape))
