"""Parameters that travel in one collective, and gathered copies of them.

[Note: vocabulary]
*full* tensor: what the layer computes with, shape `full_shape`.  *shard*: this rank's flat piece, `shard_length` elements on every
rank; rank r owns elements [r * shard_length, (r + 1) * shard_length) of the flattened full tensor, and what lies beyond its end is
padding: zeros that stay zero.  *padded full*: all shards in rank order, `size * shard_length` elements; the full tensor is its
beginning. *gather*: shards -> full; *release*: the opposite; *reduce*: full gradients -> this rank's shard of their mean.
"""

from __future__ import annotations

import math
from enum import Enum, auto
from typing import Any, Iterable, Protocol, Sequence

import numpy as np
import xxhash
from mindspore import Tensor, ops

from ..comm import Buffer, Engine, Label, SingleEngine, Work, World
from ..compat.autograd import no_grad
from ..compat.executor import finish
from ..compat.runtime import Values, address, from_host, host_array, numpy_dtype, values, was_copied, zeros
from .buffers import BufferPool, HostBuffer, aligned_offsets
from .wire import wire_for


class Sharded(Protocol):
    """What a group asks of a parameter, see `DistributedParameter`; as a tensor it is this rank's shard."""

    name: str
    world: World
    along: str
    tp_parts: int
    in_stage: bool
    on_all_stages: bool
    full_shape: tuple[int, ...]
    full_size: int
    shard_length: int
    dtype: Any
    requires_grad: bool

    @property
    def on_host(self) -> Values:
        """The shard's values, on the host."""
        ...


class ShardState(Enum):
    """SHARD: only this rank's piece is alive.  FULL: the gathered copy is alive, or on its way."""

    SHARD = auto()
    FULL = auto()


class ParamGroup:
    """Parameters gathered together.

    Attributes:
        params: in the order in which they travel.
        label: for messages and event lists, e.g. `layers.3`.
        block: the same for all groups of a Block, which are gathered ahead together.
        engine: among the ranks that share the parameters.
        wires: how each travels; None: as it is.
        shapes, full_sizes: of the full tensors.
        sizes: (elements, type) of each padded full tensor.
        full_nbytes: of all of them.
        offsets: where they begin in one buffer.
        buffer_nbytes: of that.
        own: where in it this rank's pieces are.
    """

    def __init__(self, params: Sequence[Sharded], label: str, block: object = None):
        self.params, self.block = list(params), self if block is None else block
        self._details = [f"{p.name} {p.full_shape} {p.dtype}" for p in self.params]
        self.label = Label(label, self._details)
        self.world = self.params[0].world
        along, mesh = self.params[0].along, self.world.mesh
        self.engine: Engine = self.world.along(along)
        # of an expert there are no replicas, but fewer ranks than data-parallel ones, over all of which gradients are averaged
        replicas = self.world.along("replica") if along == "shard" else SingleEngine(self.engine.clock)
        hops = ((replicas, self.world.sharing(mesh.tp // p.tp_parts)) for p in self.params)
        self._hops = [[engine if engine.size > 1 else None for engine in engines] for engines in hops]
        self._shares = [mesh.size(along) * replicas.size / mesh.dp / p.tp_parts for p in self.params]
        self.wires = [wire_for(self.world.gather_dtype, p.dtype) for p in self.params]
        self.shapes, self.full_sizes = [p.full_shape for p in self.params], [p.full_size for p in self.params]
        self._lengths = [p.shard_length for p in self.params]
        self.sizes = [(self.engine.size * n, numpy_dtype(p.dtype)) for p, n in zip(self.params, self._lengths)]
        self.full_nbytes = sum(n * dtype.itemsize for n, dtype in self.sizes)
        self.offsets, self.buffer_nbytes = aligned_offsets([n * dtype.itemsize for n, dtype in self.sizes])
        pieces = [(start, n * dtype.itemsize) for start, n, (_, dtype) in zip(self.offsets, self._lengths, self.sizes)]
        rank = self.engine.rank
        self.own = [slice(start + rank * nbytes, start + (rank + 1) * nbytes) for start, nbytes in pieces]

    def __deepcopy__(self, memo: dict) -> None:
        """A copied parameter or Block makes a group of its own when it needs one."""

    def __reduce__(self) -> tuple:
        return type(None), ()

    def reduce(self, indices: Sequence[int], grads: Sequence[Tensor]) -> Work:
        """Start reducing full gradients of `params[i] for i in indices` to shards of the gradient of the mean loss.

        It is the mean over all ranks of the stage: over those that share a parameter it is taken by the collectives, and what only
        some ranks have (parts of tensors, experts) has gradients from these alone, and from nobody else. Where stages have rows of
        their own ([Note: rows]) it is the mean over all of them too.
        """
        with no_grad():
            padded = [self._pad(i, self._shared(i, g)) for i, g in zip(indices, grads)]
        work = self.engine.reduce_scatter(padded, "mean", self._label_of(indices))
        for hop in range(3):
            engines = [self._hop(i, hop) for i in indices]
            for engine in dict.fromkeys(x for x in engines if x is not None):
                places = [place for place, x in enumerate(engines) if x is engine]
                label = self._label_of([indices[place] for place in places])
                # stages may have groups of parameters of their own, with other rates
                work = Across(work, engine, places, label if hop < 2 else Label(label, label.detail, one_rule=False))
        return work

    def told(self, indices: Sequence[int]) -> list[Tensor]:
        """Zeros for the shards of `params[i] for i in indices`: what autograd is told while gradients arrive."""
        return [zeros(self._lengths[i], self.params[i].dtype) for i in indices]

    def shard_prints(self) -> tuple[int, ...]:
        """What tells later whether one of the shards was written."""
        return prints(p.on_host.bytes for p in self.params)

    @property
    def is_whole(self) -> bool:
        """Whether this rank has all of it, in host memory and as it is computed with."""
        return self.engine.size == 1 and self.engine.lands_in_place and not any(self.wires)

    def _hop(self, index: int, hop: int) -> Engine | None:
        """Over which ranks a gradient is averaged next; None: there are no others."""
        if hop < 2:
            return self._hops[index][hop]
        return self.world.along("pp") if self.params[index].on_all_stages else None

    def _label_of(self, indices: Sequence[int]) -> Label:
        return self.label if len(indices) == len(self.params) else Label(self.label, [self._details[i] for i in indices])

    def _shared(self, index: int, grad: Tensor) -> Tensor:
        share = self._shares[index] / (self.world.mesh.pp if self.params[index].in_stage else 1)
        return grad if share == 1.0 else ops.mul(grad, share)

    def _pad(self, index: int, grad: Tensor) -> Buffer:
        """(size * shard_length,): an array on the host."""
        p, size = self.params[index], self.full_sizes[index]
        missing = self.sizes[index][0] - size
        if math.prod(grad.shape) != size:
            raise RuntimeError(
                f"MindSpore made a gradient of shape {tuple(grad.shape)} for parameter {p.name} of shape {p.full_shape}, as 2.5 "
                "does for a batch without rows: give every rank at least one"
            )
        if not self.engine.lands_in_place:
            flat = grad.reshape(-1)
            return ops.cat((flat, ops.zeros((missing,), grad.dtype))) if missing else flat
        flat = values(grad).reshape(-1)
        return np.concatenate([flat, np.zeros(missing, flat.dtype)]) if missing else flat


class Across(Work):
    """A reduce, then the mean of some of its results over other ranks: across nodes, or tensor-parallel ones."""

    def __init__(self, inside: Work, ranks: Engine, indices: Sequence[int], label: str):
        self._inside, self._ranks, self._indices, self._label = inside, ranks, list(indices), label
        self._across: Work | None = None
        self.outputs = list(inside.outputs)
        if not ranks.lands_in_place:  # a device orders its own work, and results cannot be put where they are expected
            self.start_next_part()
            for i, result in zip(self._indices, self._across.outputs):
                self.outputs[i] = result

    def start_next_part(self) -> None:
        """Wait for the first reduce and start the second; does nothing when that has happened."""
        self._inside.start_next_part()
        if self._across is None:
            found = self._inside.wait()
            self._across = self._ranks.all_reduce([found[i] for i in self._indices], "mean", self._label)

    def done(self) -> bool:
        return self._across is not None and self._across.done()

    def wait(self) -> list[Tensor]:
        self.start_next_part()
        results = self._across.wait()
        for i, result in zip(self._indices, results):
            mine = self.outputs[i]
            if mine is not result:
                host_array(mine)[...] = host_array(result)
        return self.outputs


class Gathered:
    """One gathered copy of a group: where it lives, and whether it is there."""

    def __init__(self, group: ParamGroup, pool: BufferPool, meter: Meter):
        self.group, self._pool, self._meter = group, pool, meter
        self.state = ShardState.SHARD
        self._counted = 0  # bytes, by the meter
        self._work: Work | None = None
        self._buffer: HostBuffer | None = None
        self._landing: list[np.ndarray] = []  # padded full, flat, on the host
        self._travelling: list[list[np.ndarray]] = []  # what arrives for each parameter that is not gathered as it is
        self._tensors: list[Tensor] = []
        self.prints: tuple[int, ...] = ()  # of the shards, when `written` looked last
        self._given: tuple[int, ...] = ()  # where fewer bits travel: prints of the shards that were gathered ...
        self._arrived: tuple[int, ...] = ()  # ... and of what this rank's became
        self.parked = False  # a recorded graph refers to the memory
        self.trusted = False  # gathered before it was asked for, and nobody has looked whether it still holds

    def issue(self) -> None:
        """Start the all-gather; does nothing when the copy is there or on its way."""
        if self.state is ShardState.FULL:
            return
        if self.group.engine.lands_in_place:
            if self._buffer is None:
                self._allocate()
            shards, landing = self._host_pieces()
            self._given = self.group.shard_prints() if any(self.group.wires) else ()
            self._work = self.group.engine.all_gather(shards, landing, self.group.label)
        else:
            self._work = self.group.engine.all_gather(self._device_pieces(), label=self.group.label)
        self.state, self._counted = ShardState.FULL, self.group.full_nbytes
        self._meter.add(self._counted)

    def share(self) -> None:
        """Have the full tensors be the parameters' own memory, of a group that is whole: nobody may write them until `release`."""
        group = self.group
        arrays = (p.on_host.array[:n].reshape(shape) for p, n, shape in zip(group.params, group.full_sizes, group.shapes))
        self._tensors, self.state = [from_host(x) for x in arrays], ShardState.FULL

    def tensors(self) -> list[Tensor]:
        """The full tensors, in the group's order; waits for them."""
        self.issue()
        if self._work is not None:
            outputs, self._work = self._work.wait(), None
            if self.group.engine.lands_in_place:
                self._decode()
            else:
                self._tensors = self._full_on_device(outputs)
        return self._tensors

    def written(self) -> list[Sharded]:
        """Parameters whose shard is another than the one that was gathered, or whose part of this copy is not what arrived.

        Nobody announces writes: MindSpore has no counter of them. What a rank can see is its own piece, of the copy and of the
        parameter. On a device, where looking waits for all that was issued, nothing is found.
        """
        if not self._landing:
            return []
        self.tensors()
        self.prints, own = self.group.shard_prints(), self._own_prints()
        given, arrived = (self._given, self._arrived) if self._given else (own, own)
        if self.prints == given and own == arrived:
            return []
        wanted = zip(self.group.params, self.prints, given, own, arrived)
        return [p for p, x, given, y, arrived in wanted if x != given or y != arrived]

    def verify(self) -> None:
        """Raise RuntimeError where a parameter was written since it was gathered, or this copy."""
        self._refuse(self.written())

    def verify_again(self, before: tuple[int, ...]) -> None:
        """Raise RuntimeError where, in backward, parameters are not those of the forward pass.

        Args:
            before: `prints` of then. What a module writes into its copy was noticed then.
        """
        if self._landing:
            now = self.group.shard_prints()
            if now != before:
                self._refuse([p for p, x, y in zip(self.group.params, now, before) if x != y])

    def watch(self, told: str) -> None:
        """Have a RuntimeError say `told` once somebody is found to have written this copy, if it is in host memory of ours."""
        if self._buffer is None:
            return
        own, before = self.group.own, self._own_prints()

        def look(buffer: HostBuffer) -> None:
            finish()
            if prints(buffer.bytes[piece] for piece in own) != before:
                raise RuntimeError(told)

        self._buffer.watch(look)

    def _refuse(self, written: Sequence[Sharded]) -> None:
        if written:
            raise RuntimeError(
                f"parameter {written[0].name} was written while {self.group.label} was computing with it, on rank "
                f"{self.group.world.mesh.rank}: between its gather and the end of the call, or between forward and backward. Its "
                "module has a gathered copy, so the result would be that of neither value. Write parameters before a forward "
                "pass or after backward; what a module updates while it runs (statistics, counters) belongs in a Parameter with "
                "requires_grad=False"
            )

    def _own_prints(self) -> tuple[int, ...]:
        return prints(self._buffer.bytes[piece] for piece in self.group.own)

    def park(self) -> bool:
        """Free the memory but keep its address: a recorded graph reads the tensors again after the next `issue`.

        False where that is impossible (device memory): the copy then stays.
        """
        if self._buffer is None:
            return False
        if self.state is ShardState.FULL:
            self._settle()
            self._buffer.drop_pages()
            self.parked = True
        return True

    def release(self) -> None:
        """Let go of the copy; its memory is reused once nothing else refers to it."""
        if self.parked:
            self.parked = False
            self._settle()
            self._buffer.drop_pages()  # as many as there are blocks; used pages are kept for a few
        else:
            self._settle()
        self._buffer, self._landing, self._tensors = None, [], []

    def copied(self) -> list[Sharded]:
        """Parameters of whose full tensors MindSpore has made a copy, which a recorded graph then keeps; none if it is small."""
        with no_grad():
            copies = [i for i, (full, x) in enumerate(zip(self._tensors, self._landing)) if was_copied(full, x)]
        matters = 8 * sum(self._landing[i].nbytes for i in copies) > self.group.full_nbytes
        return [self.group.params[i] for i in copies] if matters else []

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
            self._work, self._travelling = None, []
        if self.state is ShardState.FULL:
            self.state = ShardState.SHARD
            self._meter.add(-self._counted)
            self._counted = 0

    def _allocate(self) -> None:
        group = self.group
        self._buffer = self._pool.acquire(group.buffer_nbytes)
        self._landing = self._buffer.carve(group.offsets, group.sizes)
        full = (x if x.size == n else x[:n] for x, n in zip(self._landing, group.full_sizes))
        self._tensors = [from_host(x.reshape(shape)) for x, shape in zip(full, group.shapes)]

    def _carve(self, sizes: Sequence[tuple[int, np.dtype]]) -> list[np.ndarray]:
        """Flat arrays of (elements, type) in one buffer of the pool."""
        offsets, total = aligned_offsets([n * dtype.itemsize for n, dtype in sizes])
        return self._pool.acquire(total).carve(offsets, sizes)

    # What travels, where that is not the shard itself (`zero.wire`) #

    def _host_pieces(self) -> tuple[Sequence[Buffer], list[np.ndarray]]:
        """What this rank gives, and where everybody's lands."""
        group, ranks = self.group, self.group.engine.size
        if not any(group.wires):
            return [p.on_host.array for p in group.params], self._landing
        given, landing, self._travelling = [], [], []
        for p, wire, full in zip(group.params, group.wires, self._landing):
            if wire is None:
                given.append(p.on_host.array)
                landing.append(full)
                self._travelling.append([])
                continue
            sizes = wire.sizes(p.shard_length)
            mine = self._carve(sizes)
            try:
                wire.encode(p.on_host.array, mine)
            except ValueError as error:
                raise ValueError(f"parameter {p.name} cannot be gathered: {error}") from error
            theirs = self._carve([(ranks * n, dtype) for n, dtype in sizes])
            given += mine
            landing += theirs
            self._travelling.append(theirs)
        return given, landing

    def _decode(self) -> None:
        ranks = self.group.engine.size
        for wire, theirs, full in zip(self.group.wires, self._travelling, self._landing):
            if wire is not None:
                wire.decode([x.reshape(ranks, -1) for x in theirs], full.reshape(ranks, -1))
        self._travelling = []
        self._arrived = self._own_prints() if self._given else ()

    def _device_pieces(self) -> list[Tensor]:
        given = []
        with no_grad():
            for p, wire in zip(self.group.params, self.group.wires):
                given += [p] if wire is None else wire.encode_on_device(p)
        return given

    def _full_on_device(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        arrived, full = list(outputs), []
        with no_grad():
            for p, wire in zip(self.group.params, self.group.wires):
                if wire is None:
                    flat = arrived.pop(0)
                else:
                    parts = [arrived.pop(0) for _ in wire.sizes(p.shard_length)]
                    flat = wire.decode_on_device(parts, self.group.engine.size, p.shard_length, p.dtype)
                full.append(flat[: p.full_size].reshape(p.full_shape))
        return full


def prints(arrays: Iterable[np.ndarray]) -> tuple[int, ...]:
    """Hashes of arrays of bytes."""
    return tuple([xxhash.xxh3_64_intdigest(x.data) for x in arrays])


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
