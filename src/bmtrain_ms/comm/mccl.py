"""CPU ranks under `msrun`, without MPI: what MindSpore itself offers there, and the rest composed from it.

On CPU MindSpore has all-gather (float16, float32) and little else; its all-reduce sums in no fixed order. An all-gather only moves
bytes, so it carries any type, and every other collective is an all-gather followed by local work. That costs size times the memory
of the result: right for a laptop and for checking a script, not for training. Prefer `mpiexec` on CPU.

MindSpore ends these collectives after 30 s by itself (2.5, 2.7; `MS_CPU_COMM_OP_TIMEOUT` works on 2.10): no rank may work alone
for longer than that.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
from mindspore import Tensor, ops

from ..compat.runtime import shared_array, shared_tensor
from .engine import Buffer, Clock, CommError, Done, Engine, Work
from .reduce import reduce_rows


class McclEngine(Engine):
    """All ranks of an `msrun` job on CPU; call after `mindspore.communication.init()`."""

    name = "mccl"
    lands_in_place = True

    def __init__(self, rank: int, size: int, clock: Clock | None = None):
        self.rank, self.size, self.clock = rank, size, clock or Clock()
        self._gather_bits = ops.AllGather()

    def all_gather(self, tensors: Sequence[Buffer], out: Sequence[Buffer] | None = None, label: str = "") -> Work:
        results = []
        for i, x in enumerate(tensors):
            array = shared_array(x)
            rows = self._rows(array, f"all_gather ({label})")
            joined = rows.reshape(self.size * (x.shape[0] if x.shape else 1), *x.shape[1:])
            if out is None:
                results.append(shared_tensor(joined))
            else:
                shared_array(out[i])[...] = joined
                results.append(out[i])
        return Done(results)

    def reduce_scatter(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        self._check_divisible(tensors, "reduce_scatter")
        results = []
        for x in tensors:
            rows = self._rows(shared_array(x), f"reduce_scatter ({label})")
            mine = rows.reshape(self.size, self.size, -1)[:, self.rank]
            results.append(self._reduce(mine, op).reshape(x.shape[0] // self.size, *x.shape[1:]))
        return Done([shared_tensor(y) for y in results])

    def all_reduce(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        rows = [self._rows(shared_array(x), f"all_reduce ({label})") for x in tensors]
        return Done([shared_tensor(self._reduce(y, op).reshape(x.shape)) for x, y in zip(tensors, rows)])

    def broadcast(self, tensors: Sequence[Buffer], root: int = 0, label: str = "") -> Work:
        self._check_peer(root, "root")
        rows = [self._rows(shared_array(x), f"broadcast ({label})") for x in tensors]
        return Done([shared_tensor(y[root].reshape(x.shape).copy()) for x, y in zip(tensors, rows)])

    def all_to_all(self, tensors: Sequence[Buffer], label: str = "") -> Work:
        self._check_divisible(tensors, "all_to_all")
        results = []
        for x in tensors:
            rows = self._rows(shared_array(x), f"all_to_all ({label})").reshape(self.size, self.size, -1)
            results.append(shared_tensor(np.ascontiguousarray(rows[:, self.rank]).reshape(x.shape)))
        return Done(results)

    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        raise CommError(self._absent("point-to-point messages"))

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        raise CommError(self._absent("point-to-point messages"))

    def barrier(self, label: str = "") -> Work:
        self._rows(np.zeros(1, np.float32), f"barrier ({label})")
        return Done([])

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        if list(ranks) == list(range(self.size)):
            return self
        raise CommError(self._absent("sub-groups"))

    @staticmethod
    def _absent(what: str) -> str:
        return f"MindSpore has no {what} on CPU under msrun; start the job with mpiexec (bmtrain-ms launch --with mpi)"

    def _rows(self, array: np.ndarray, what: str) -> np.ndarray:
        """(size, n): every rank's flat array, whatever its type; the bits travel as float32."""
        self._note(what.replace(" ()", ""))
        flat = array.reshape(-1)
        padded = np.zeros(-(-flat.nbytes // 4) * 4, np.uint8)
        padded[: flat.nbytes] = flat.view(np.uint8)
        try:
            gathered = shared_array(self._gather_bits(Tensor(padded.view(np.float32))))
        except RuntimeError as error:
            raise CommError(
                f"{what.replace(' ()', '')} failed at step {self.clock.step} on rank {self.rank} of {self.size}: {error}"
            ) from error
        rows = gathered.view(np.uint8).reshape(self.size, -1)[:, : flat.nbytes]
        return np.ascontiguousarray(rows).view(array.dtype).reshape(self.size, -1)

    @staticmethod
    def _reduce(rows: np.ndarray, op: str) -> np.ndarray:
        out = np.empty(rows.shape[1], rows.dtype)
        reduce_rows(rows, op, out)
        return out
