"""A parameter of which each rank stores a shard. See [Note: vocabulary] in `zero/group.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Callable, NamedTuple, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from bmtrain_ms_base.checks import whole
from bmtrain_ms_base.layout import Layout, Split
from bmtrain_ms_base.mesh import nearest_divisors

from ..comm import Engine, World
from ..comm import world as current_world
from ..compat.autograd import custom_op, recording
from ..compat.device import on_host
from ..compat.habits import sharded_types
from ..compat.parameter import adopt
from ..compat.reads import as_read, no_write
from ..compat.runtime import Values, from_host, host_array, is_float, numpy_dtype, untouched_zeros, writable_array
from .context import context_of
from .group import ParamGroup
from .pipeline import Phase


@dataclass(frozen=True)
class Empty:
    """Shape and dtype of a full tensor that is never made; see `empty`."""

    shape: tuple[int, ...]
    dtype: Any = ms.float32


def empty(*shape: int, dtype: Any = ms.float32) -> Empty:
    """Describe a parameter without allocating it: `DistributedParameter(empty(4096, 4096), init_method=...)`.

    The shard starts as zeros; `init_parameters` or `load` fills it.
    """
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if not isinstance(dtype, ms.Type):
        raise TypeError(f"dtype must be a type of MindSpore's, as mindspore.float32, not {dtype!r}")
    return Empty(tuple(whole("a dimension", n, 0) for n in sizes), dtype)


class DistributedParameter(Parameter):
    """A parameter of which this rank stores only its shard (BMTrain: `DistributedParameter`).

    As a tensor it *is* the shard: flat, `shard_length` elements, what optimizers update. Layers see the full tensor: inside a
    `Block` gathered for the duration of the call, in a `DistributedModule` at each access.

    Args:
        data: the full values (tensor or array; the same on every rank), or `empty(...)`.
        requires_grad: whether to differentiate; may be toggled later.
        init_method: a `ParameterInitializer`, used by `init_parameters`.
        group: name of a parameter group (`grouped_parameters`).
        tp_mode: with `tp_split_dim`, give each tensor-parallel rank a part of it. `data` is whole in any case (BMTrain: this rank's
            part), so that the same line stands for any number of ranks.
        tp_split_dim: the dim that is cut, from 0; -1: none, every tensor-parallel rank has all of it.
        tp_parts: into how many parts; default: the tensor-parallel ranks. Fewer, a divisor of them, are shared by neighbours, as
            the heads of keys and values where there are fewer of them.
        name: unique in the model; by default the Cell it is assigned to names it.
        in_world: the ranks that share it; default: the current world.
        along: the axis of the mesh over whose ranks it is sharded: `shard`, or `edp` for an expert's, which ranks along `ep` do not
            share. Its gradient is that of the mean of the losses of all ranks of its stage in either case.
        ep_split: dim 0 is of experts, of which each rank along `ep` has a part; it is sharded along `edp` then.

    Attributes:
        layout: see there; `size` and `numel()` are the shard's.
        tp_parts: into how many parts tensor-parallel ranks have cut it; 1: each has all of it.
        replaced: how often `set_data` gave it other memory.
        stage, place: of a `PipelineTransformerBlockList`, which alone has it (None: it is in none), and what messages call it.

    Raises:
        RuntimeError: `init_distributed` has not been called.
        TypeError: `data` is neither a tensor nor an array.
        ValueError: `data` has no elements or is not of a floating-point type, or cannot be cut as `tp_split_dim` says.
    """

    def __new__(
        cls,
        data: Any,
        requires_grad: bool = True,
        init_method: Any = None,
        group: str | None = None,
        tp_mode: bool = False,
        tp_split_dim: int = -1,
        *,
        tp_parts: int | None = None,
        in_world: World | None = None,
        along: str = "shard",
        ep_split: bool = False,
        **kwargs: Any,
    ) -> DistributedParameter:
        if not isinstance(data, (Empty, Tensor, np.ndarray)):
            raise TypeError(f"DistributedParameter takes a tensor, an array or bmtrain_ms.empty(...), not {type(data).__name__}")
        cut = _Cut.of(data.shape, in_world or current_world(), tp_mode, tp_split_dim, tp_parts)
        length = _layout_of(data.shape, in_world or current_world(), along, cut, ep_split).length
        return adopt(cls, from_host(untouched_zeros(length, _dtype_of(data))))

    def __init__(
        self,
        data: Empty | Tensor | np.ndarray,
        requires_grad: bool = True,
        init_method: Any = None,
        group: str | None = None,
        tp_mode: bool = False,
        tp_split_dim: int = -1,
        *,
        tp_parts: int | None = None,
        name: str | None = None,
        in_world: World | None = None,
        along: str = "shard",
        ep_split: bool = False,
    ):
        super().__init__(self, name=name, requires_grad=requires_grad)
        self.world, self.along = in_world or current_world(), "edp" if ep_split else along
        cut = _Cut.of(data.shape, self.world, tp_mode, tp_split_dim, tp_parts)
        self.layout, self.tp_parts = _layout_of(data.shape, self.world, along, cut, ep_split), cut.parts
        self.stage: int | None = None
        self.place = ""
        self.world.sharing(self.world.mesh.tp // cut.parts)
        if not self.full_size:
            raise ValueError(f"a parameter of shape {self.full_shape} has no elements; leave it out of the model")
        if not is_float(self):
            raise ValueError(f"a parameter must be of a floating-point type, not {self.dtype}; keep integers in a buffer")
        self.init_method, self.group = init_method, group
        self.has_hooks, self.replaced = False, 0
        self._alone: ParamGroup | None = None
        self._values: Values | None = None
        if not isinstance(data, Empty):
            self.copy_full(data)

    @property
    def layout(self) -> Layout:
        """Where the shard lies in the whole tensor."""
        return self._everywhere if self.on_all_stages else self._layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        mesh = self.world.mesh
        self._layout = layout
        self._everywhere = replace(layout, copy=layout.copy + mesh.pp_rank * mesh.replica * mesh.tp)

    @property
    def in_stage(self) -> bool:
        """Whether it is of one stage of a `PipelineTransformerBlockList`, and other stages do not have it."""
        return self.stage is not None

    @property
    def on_all_stages(self) -> bool:
        """Whether every stage of a pipeline has it, for rows of its own: see [Note: rows]."""
        return self.world.mesh.pp > 1 and not self.in_stage and context_of(self.world).rows_differ

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the full tensor, which layers compute with."""
        return self.layout.local

    @property
    def full_size(self) -> int:
        """Elements of the full tensor."""
        return self.layout.local_size

    @property
    def shard_length(self) -> int:
        """Elements of a shard, ceil(full_size / ranks); equal on every rank, padded with zeros."""
        return self.layout.length

    @property
    def owned(self) -> tuple[int, int]:
        """First and one past the last element of the flattened full tensor that this rank owns; may be empty."""
        return self.layout.owned

    # BMTrain's names for the same things #

    def gather_all(self) -> Tensor:
        """The whole tensor: what `gather` gives, of all ranks that have cut it, and gradients of it come back to them.

        All ranks of the stage call it together.
        """
        local = self.gather()
        if not self.layout.splits:
            return local
        engine, cut = self._cut_among()

        def give_back(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
            total = host_array(engine.all_reduce([grads[0]], label=f"all of {self.name}, backward").wait()[0])
            # each rank that has a copy of the part is told a share: what it gives up is summed over them
            share = total[self.layout.box] / (engine.size // cut.parts)
            return (from_host(np.ascontiguousarray(share.astype(total.dtype))),)

        return custom_op(lambda local: (from_host(self.joined(host_array(local))),), give_back, local)[0]

    def joined(self, local: np.ndarray) -> np.ndarray:
        """An array of the whole tensor's shape, of what each rank among which it is cut has for its part of it, of `full_shape`.

        All ranks of the stage call it together.
        """
        if not self.layout.splits:
            return local
        engine, cut = self._cut_among()
        whole, size = self.layout.whole, engine.size
        boxes = [Layout(whole, (Split(cut.dim, i * cut.parts // size, cut.parts),)).box for i in range(size)]
        padded = np.zeros(max(math.prod(part.stop - part.start for part in box) for box in boxes), local.dtype)
        padded[: local.size] = local.reshape(-1)
        rows = host_array(engine.all_gather([from_host(padded)], label=f"all of {self.name}").wait()[0]).reshape(size, -1)
        out = np.empty(whole, local.dtype)
        for row, box in zip(rows, boxes):
            out[box] = row[: out[box].size].reshape(out[box].shape)
        return out

    def _cut_among(self) -> tuple[Engine, Split]:
        """The ranks that have the parts, tensor-parallel ones or those of experts, and how it is cut."""
        (cut,) = self.layout.splits
        return self.world.along("tp" if self.tp_parts > 1 else "ep"), cut

    def _copy_data(self, full: Tensor | np.ndarray) -> None:
        self.copy_full(full)

    @property
    def _original_shape(self) -> tuple[int, ...]:
        return self.full_shape

    @property
    def _start_partition(self) -> int:
        return self.owned[0]

    @property
    def _end_partition(self) -> int:
        return self.owned[1]

    def set_shard(self, shard: Tensor) -> None:
        """Adopt `shard`, (shard_length,) of this parameter's dtype, without a copy; where it is padded, zeros are written there."""
        if tuple(shard.shape) != (self.shard_length,) or shard.dtype != self.dtype:
            raise ValueError(
                f"the shard of {self.name} is ({self.shard_length},) {self.dtype}, not {tuple(shard.shape)} {shard.dtype}"
            )
        self.set_data(shard, slice_shape=True)

    def set_data(self, data: Tensor, slice_shape: bool = False) -> DistributedParameter:
        """Give the parameter another shard as its data, as MindSpore's `set_data` does.

        Raises:
            ValueError: it is not of a shard's shape.
        """
        if tuple(data.shape) != (self.shard_length,):
            raise ValueError(
                f"the shard of {self.name} is ({self.shard_length},), and set_data takes another, not {tuple(data.shape)}: "
                "whole values are given with copy_full"
            )
        context_of(self.world).pipeline.parameters_changed()
        self.replaced += 1
        self._values = None
        super().set_data(data, slice_shape)
        self.clear_padding()
        return self

    def clear_padding(self) -> None:
        """Have the padding be zeros again: who writes a shard, element by element, does not think of it. In host memory only."""
        if self.layout.owned_size < self.layout.length and on_host():
            memory = writable_array(self)
            padding = None if memory is None else memory[self.layout.owned_size :].view(np.uint8)
            if padding is not None and padding.any():  # what is right already may be memory that cannot be written
                padding[:] = 0

    @property
    def on_host(self) -> Values:
        """The shard's values, where the process computes on the host."""
        if self._values is None:
            self._values = Values()
        return self._values.of(self)

    def copy_full(self, full: Tensor | np.ndarray) -> None:
        """Take this rank's shard out of full values (BMTrain: `_copy_data`).

        Raises:
            ValueError: the shape differs from `full_shape`.
        """
        values = host_array(full) if isinstance(full, Tensor) else np.asarray(full)
        if isinstance(full, Tensor) and full.has_init:
            values = host_array(full.init_data())
        if tuple(full.shape) != self.layout.whole:
            raise ValueError(f"parameter {self.name} has full shape {self.layout.whole}, the values {tuple(full.shape)}")
        self.set_shard(from_host(self.layout.cut(values).astype(numpy_dtype(self.dtype), copy=False)))

    @property
    def alone(self) -> ParamGroup:
        """The group of this parameter alone, which `gather` gathers."""
        if self._alone is None or self._alone.params[0] is not self:  # a clone has its original's
            self._alone = ParamGroup([self], self.name)
        return self._alone

    def gather(self) -> Tensor:
        """The full tensor, gathered now, on all ranks together; its gradient is reduced to this rank's shard of the mean.

        Every call gathers again (BMTrain: the same). It is a copy, which lives as long as somebody refers to it: the parameter does
        not see what is written into it.

        Raises:
            RuntimeError: it is a layer's of a `PipelineTransformerBlockList`, and what gathers it is no layer of one.
        """
        return self._gather(watched=False)

    def read(self) -> Tensor:
        """`gather`, for code that was written for an ordinary parameter: a write into what it gives is refused, or noticed.

        Noticing costs two looks at this rank's piece; what is trained is written by its optimizer, and not by a forward pass.
        """
        return as_read(self._gather(watched=not self.requires_grad), self)

    def _gather(self, watched: bool) -> Tensor:
        group, context = self.alone, context_of(self.world)
        if self.in_stage and not any(context.in_stage):
            self.refuse_outside()
        phase = Phase.FORWARD if recording() else Phase.EVAL

        def take(*_: Tensor) -> tuple[Tensor, ...]:
            gathered = context.pipeline.enter(group, phase, context.current)
            try:
                full = tuple(gathered.tensors())
                if gathered.trusted:
                    gathered.verify()
                if watched:
                    gathered.watch(no_write(self))
                return full
            finally:
                context.pipeline.leave([gathered])

        def reduce(grads: tuple[Tensor, ...]) -> list[Tensor]:
            context.pipeline.before_reduce()
            return context.reducer.reduce(group, [0], grads)

        context.note_gather(self)
        if not (recording() and self.requires_grad):
            return take()[0]
        return custom_op(take, reduce, self)[0]

    def refuse_outside(self) -> None:
        """Raise RuntimeError where what is trained uses it outside of the list of layers whose stage it belongs to."""
        if self.in_stage and recording():
            raise RuntimeError(
                f"{self.place} of a PipelineTransformerBlockList, which stage {self.stage} has, is used outside of the list, "
                "too: other stages would train one of their own. Give each its own, or put what uses it into the layer"
            )

    def register_hook(self, hook: Callable) -> Any:
        """Register a hook as MindSpore does; the gradient that it sees is this rank's shard of the mean."""
        self.has_hooks = True
        return super().register_hook(hook)


sharded_types.append(DistributedParameter)


class _Cut(NamedTuple):
    """How tensor parallelism cuts a parameter: dim `dim` in `parts`; 1: not at all."""

    dim: int = 0
    parts: int = 1

    @classmethod
    def of(cls, shape: Sequence[int], world: World, tp_mode: bool, dim: int, parts: int | None) -> _Cut:
        """The cut that the arguments of `DistributedParameter` say, which are checked."""
        if dim == -1 or not tp_mode:
            if dim != -1 or parts is not None:
                raise ValueError(f"tp_split_dim={dim}, tp_parts={parts} need tp_mode=True and the dim that is cut, from 0")
            return cls()
        size, parts = world.mesh.tp, world.mesh.tp if parts is None else whole("tp_parts", parts, 1)
        if not 0 <= whole("tp_split_dim", dim) < len(shape):
            raise ValueError(f"tp_split_dim={dim} is no dim of a parameter of shape {tuple(shape)}: give one from 0, or -1")
        if size % parts:
            raise ValueError(f"tp_parts={parts} does not divide the {size} tensor-parallel ranks, which are to share the parts")
        if shape[dim] < parts:
            raise ValueError(
                f"dim {dim} of a parameter of shape {tuple(shape)} cannot be cut in {parts} parts: one would have nothing. Use at "
                f"most {shape[dim]} tensor-parallel ranks"
            )
        return cls(dim, parts)


def _layout_of(shape: Sequence[int], world: World, along: str, cut: _Cut, ep_split: bool) -> Layout:
    if along not in ("shard", "edp"):
        raise ValueError(f"a parameter is sharded along shard or edp, not along {along!r}")
    mesh = world.mesh
    if ep_split:
        if cut.parts > 1:
            raise ValueError("a parameter of experts is cut over ep or over tp, not over both: leave tp_split_dim or ep_split out")
        if not shape or shape[0] % mesh.ep:
            raise ValueError(
                f"dim 0 of a parameter of shape {tuple(shape)} cannot be divided over ep_size={mesh.ep} ranks: use "
                f"{nearest_divisors(shape[0], mesh.ep) if shape else 'a dim of experts'}"
            )
        splits = (Split(0, mesh.coordinate("ep"), mesh.ep),) if mesh.ep > 1 else ()
        return Layout(tuple(shape), splits, mesh.coordinate("edp"), mesh.size("edp"), copy=mesh.tp_rank)
    copies = mesh.tp // cut.parts
    part, copy = divmod(mesh.tp_rank, copies)
    splits = (Split(cut.dim, part, cut.parts),) if cut.parts > 1 else ()
    replica = mesh.coordinate("replica") if along == "shard" else 0
    return Layout(tuple(shape), splits, mesh.coordinate(along), mesh.size(along), copy=replica * copies + copy)


def _dtype_of(data: Any) -> Any:
    if isinstance(data, (Empty, Tensor)):
        return data.dtype
    return from_host(np.zeros(1, np.asarray(data).dtype)).dtype
