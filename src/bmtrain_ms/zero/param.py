"""A parameter of which each rank stores a shard. See [Note: vocabulary] in `zero/group.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from bmtrain_ms_base.checks import whole
from bmtrain_ms_base.layout import Layout

from ..comm import World, world
from ..compat.autograd import custom_op, recording
from ..compat.habits import sharded_types
from ..compat.parameter import adopt
from ..compat.runtime import from_host, host_array, is_float, numpy_dtype
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
        tp_mode, tp_split_dim: shard over tensor-parallel ranks, along a dim; only False and -1 so far.
        name: unique in the model; by default the Cell it is assigned to names it.
        in_world: the ranks that share it; default: the current world.
        along: the axis of the mesh over whose ranks it is sharded: `shard`, or `edp` for an expert's, which ranks along `ep` do not
            share. Its gradient is divided by the number of data-parallel ranks in either case.

    Attributes:
        layout: where the shard lies in the whole tensor; `size` and `numel()` are the shard's.
        replaced: how often `set_data` gave it other memory.

    Raises:
        RuntimeError: `init_distributed` has not been called.
        TypeError: `data` is neither a tensor nor an array.
        ValueError: `data` has no elements or is not of a floating-point type, or `tp_mode`.
    """

    def __new__(
        cls, data: Any, *args: Any, in_world: World | None = None, along: str = "shard", **kwargs: Any
    ) -> DistributedParameter:
        if not isinstance(data, (Empty, Tensor, np.ndarray)):
            raise TypeError(f"DistributedParameter takes a tensor, an array or bmtrain_ms.empty(...), not {type(data).__name__}")
        length = _layout_of(data.shape, in_world or world(), along).length
        return adopt(cls, from_host(np.zeros(length, numpy_dtype(_dtype_of(data)))))

    def __init__(
        self,
        data: Empty | Tensor | np.ndarray,
        requires_grad: bool = True,
        init_method: Any = None,
        group: str | None = None,
        tp_mode: bool = False,
        tp_split_dim: int = -1,
        *,
        name: str | None = None,
        in_world: World | None = None,
        along: str = "shard",
    ):
        if tp_mode or tp_split_dim != -1:
            raise ValueError(
                f"tp_mode={tp_mode}, tp_split_dim={tp_split_dim} need tensor-parallel layers, which are not part of this release; "
                "leave them out"
            )
        super().__init__(self, name=name, requires_grad=requires_grad)
        self.world, self.along = in_world or world(), along
        self.layout = _layout_of(data.shape, self.world, along)
        if not self.full_size:
            raise ValueError(f"a parameter of shape {self.full_shape} has no elements; leave it out of the model")
        if not is_float(self):
            raise ValueError(f"a parameter must be of a floating-point type, not {self.dtype}; keep integers in a buffer")
        self.init_method, self.group = init_method, group
        self.has_hooks, self.replaced = False, 0
        self._alone: ParamGroup | None = None
        if not isinstance(data, Empty):
            self.copy_full(data)

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
        """`gather`, which there also gathers over tensor-parallel ranks."""
        return self.gather()

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
        """Adopt `shard`, (shard_length,) of this parameter's dtype, without a copy. Padding must be zero."""
        if tuple(shard.shape) != (self.shard_length,) or shard.dtype != self.dtype:
            raise ValueError(
                f"the shard of {self.name} is ({self.shard_length},) {self.dtype}, not {tuple(shard.shape)} {shard.dtype}"
            )
        self.set_data(shard, slice_shape=True)

    def set_data(self, data: Tensor, slice_shape: bool = False) -> DistributedParameter:
        """As MindSpore's; of a shard."""
        context_of(self.world).pipeline.parameters_changed()
        self.replaced += 1
        return super().set_data(data, slice_shape)

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

    def gather(self) -> Tensor:
        """The full tensor, gathered now, on all ranks together; its gradient is reduced to this rank's shard of the mean.

        Every call gathers again (BMTrain: the same). It is a copy, which lives as long as somebody refers to it: the parameter does
        not see what is written into it.
        """
        if self._alone is None or self._alone.params[0] is not self:  # a clone has its original's
            self._alone = ParamGroup([self], self.name)
        group, context = self._alone, context_of(self.world)
        phase = Phase.FORWARD if recording() else Phase.EVAL

        def take(*_: Tensor) -> tuple[Tensor, ...]:
            gathered = context.pipeline.enter(group, phase, context.current)
            try:
                full = tuple(gathered.tensors())
                if gathered.trusted:
                    gathered.verify()
                return full
            finally:
                context.pipeline.leave(gathered)

        context.note_gather(self)
        if not (recording() and self.requires_grad):
            return take()[0]
        return custom_op(take, lambda grads: context.reducer.reduce(group, [0], grads), self)[0]

    def register_hook(self, hook: Callable) -> Any:
        """As MindSpore's; the gradient that the hook sees is this rank's shard of the mean."""
        self.has_hooks = True
        return super().register_hook(hook)


sharded_types.append(DistributedParameter)


def _layout_of(shape: Sequence[int], world: World, along: str) -> Layout:
    if along not in ("shard", "edp"):
        raise ValueError(f"a parameter is sharded along shard or edp, not along {along!r}")
    mesh = world.mesh
    replica = mesh.coordinate("replica") if along == "shard" else 0
    return Layout(tuple(shape), (), mesh.coordinate(along), mesh.size(along), copy=replica * mesh.tp + mesh.tp_rank)


def _dtype_of(data: Any) -> Any:
    if isinstance(data, (Empty, Tensor)):
        return data.dtype
    return from_host(np.zeros(1, np.asarray(data).dtype)).dtype
