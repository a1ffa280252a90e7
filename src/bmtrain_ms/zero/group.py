"""Parameters that travel in one collective, and gathered copies of them.

[Note: vocabulary]
*full* tensor: what the layer computes with, shape `full_shape`.  *shard*: this rank's flat piece, `shard_length` elements on every
rank; rank r owns elements [r * shard_length, (r + 1) * shard_length) of the flattened full tensor, and what lies beyond its end is
padding: zeros that stay zero.  *padded full*: all shards in rank order, `size * shard_length` elements; the full tensor is its
beginning. *gather*: shards -> full; *release*: the opposite; *reduce*: full gradients -> this rank's shard of their mean.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Sequence

import numpy as np
from mindspore import Tensor, ops

from ..comm import Engine, Label, Work
from ..compat.autograd import no_grad
from ..compat.runtime import address, from_host, numpy_dtype, result_array
from .buffers import BufferPool, HostBuffer, layout

if TYPE_CHECKING:
    from .param import DistributedParameter


class ShardState(Enum):
    """SHARD: only this rank's piece is alive.  FULL: the gathered copy is alive, or on its way."""

    SHARD = auto()
    FULL = auto()


class ParamGroup:
    """Parameters gathered together.

    Attributes:
        params: in the order in which they travel.
        label: for messages and event lists, e.g. `layers.3`.
        engine: among the ranks that share the parameters.
        parked: gathered copies whose memory a recorded graph refers to, oldest first.
    """

    def __init__(self, params: Sequence[DistributedParameter], label: str):
        self.params = list(params)
        self._details = [f"{p.name} {p.full_shape} {p.dtype}" for p in self.params]
        self.label = Label(label, self._details)
        self.world = self.params[0].world
        self.engine: Engine = self.world.engine
        self.parked: list[Gathered] = []

    @property
    def full_nbytes(self) -> int:
        """Bytes of the padded full tensors."""
        return sum(self._padded(p) * numpy_dtype(p.dtype).itemsize for p in self.params)

    def trainable(self) -> list[int]:
        """Indices of the parameters that require a gradient now; the flag may be toggled between calls."""
        return [i for i, p in enumerate(self.params) if p.requires_grad]

    def reduce(self, indices: Sequence[int], grads: Sequence[Tensor]) -> Work:
        """Start reducing full gradients of `params[i] for i in indices` to shards of their mean over the replicas."""
        with no_grad():
            padded = [self._pad(self.params[i], g) for i, g in zip(indices, grads)]
        label = self.label if len(padded) == len(self.params) else Label(self.label, [self._details[i] for i in indices])
        return self.engine.reduce_scatter(padded, "mean", label)

    def _padded(self, p: DistributedParameter) -> int:
        return self.engine.size * p.shard_length

    def _pad(self, p: DistributedParameter, grad: Tensor) -> Tensor:
        missing, flat = self._padded(p) - p.numel, grad.reshape(-1)
        if not self.engine.lands_in_place:
            return ops.cat((flat, ops.zeros((missing,), grad.dtype))) if missing else flat
        values = result_array(flat)
        if missing:
            padded = np.zeros(self._padded(p), values.dtype)
            padded[: p.numel] = values
            values = padded
        return from_host(values)


class Gathered:
    """One gathered copy of a group: where it lives, and whether it is there."""

    def __init__(self, group: ParamGroup, pool: BufferPool, meter: Meter):
        self.group, self._pool, self._meter = group, pool, meter
        self.state = ShardState.SHARD
        self._work: Work | None = None
        self._buffer: HostBuffer | None = None
        self._landing: list[Tensor] | None = None  # padded full, flat, on the host
        self._tensors: list[Tensor] = []

    def issue(self) -> None:
        """Start the all-gather; does nothing when the copy is there or on its way."""
        if self.state is ShardState.FULL:
            return
        if self.group.engine.lands_in_place and self._buffer is None:
            self._allocate()
        self._work = self.group.engine.all_gather(self.group.params, self._landing, self.group.label)
        self.state = ShardState.FULL
        self._meter.add(self.group.full_nbytes)

    def tensors(self) -> list[Tensor]:
        """The full tensors, in the group's order; waits for them."""
        self.issue()
        if self._work is not None:
            outputs, self._work = self._work.wait(), None
            if self._landing is None:
                self._tensors = [y[: p.numel].reshape(p.full_shape) for p, y in zip(self.group.params, outputs)]
        return self._tensors

    def park(self) -> bool:
        """Free the memory but keep its address: a recorded graph reads the tensors again after the next `issue`.

        False where that is impossible (device memory): the copy then stays.
        """
        if self._buffer is None:
            return False
        if self.state is ShardState.FULL:
            self._settle()
            self._buffer.drop_pages()
            self.group.parked.append(self)
        return True

    def release(self) -> None:
        """Let go of the copy; its memory is reused once nothing else refers to it."""
        if self in self.group.parked:
            self.group.parked.remove(self)
            self._settle()
            self._buffer.drop_pages()  # it has its own address; the pool keeps only warm pages
        else:
            self._settle()
        self._buffer, self._landing, self._tensors = None, None, []

    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` is one of the full tensors, or a view of one."""
        if any(tensor is full for full in self._tensors):
            return True
        start = address(tensor)
        if self._buffer is None or start is None:
            return False
        first, end = self._buffer.address_range()
        return first <= start < end

    def _settle(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self.state is ShardState.FULL:
            self.state = ShardState.SHARD
            self._meter.add(-self.group.full_nbytes)

    def _allocate(self) -> None:
        group = self.group
        dtypes = [numpy_dtype(p.dtype) for p in group.params]
        counts = [group._padded(p) for p in group.params]
        offsets, total = layout([n * dtype.itemsize for n, dtype in zip(counts, dtypes)])
        self._buffer = self._pool.acquire(total)
        flat = [
            self._buffer.bytes[offset : offset + n * dtype.itemsize].view(dtype)
            for offset, n, dtype in zip(offsets, counts, dtypes)
        ]
        self._landing = [from_host(x) for x in flat]
        self._tensors = [from_host(x[: p.numel].reshape(p.full_shape)) for p, x in zip(group.params, flat)]


class Meter:
    """Bytes of gathered parameters alive now and at most."""

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more (or, negative, fewer)."""
        self.current += nbytes
        self.peak = max(self.peak, self.current)

    def reset_peak(self) -> None:
        """Start a new peak from what is alive."""
        self.peak = self.current


def element_count(shape: Sequence[int]) -> int:
    """Elements of a tensor of that shape."""
    return int(np.prod(shape, dtype=np.int64))
