"""MindSpore's own optimizers under the manager."""

from __future__ import annotations

import warnings
from typing import Any, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.experimental.optim.optimizer import Optimizer as ExperimentalOptimizer

from ..compat.habits import before_updates
from ..compat.runtime import is_float
from ..zero import DistributedParameter
from .base import announce_change, average_whole
from .driver import Driver, OtherOptimizer, OtherSchedule, Schedule
from .rates import group_rates
from .state import StateTensors, check_arrays, from_arrays, to_arrays

# What they compute for a parameter takes all of its elements, or its axes; a shard is flat, and a part.
_WHOLE = tuple(getattr(nn, name) for name in ("AdaFactor", "LARS", "Lamb") if hasattr(nn, name))
_managed: list[Any] = []  # whose step a manager makes now: it has averaged the gradients


class NativeOptimizer:
    """Gives an optimizer of `mindspore.nn`, `mindspore.experimental.optim` or `mindspore.mint.optim` the interface of ours.

    Its moments are sharded as the parameters are, because it clones them. It has no float32 masters, updates all of its parameters
    in every step, and keeps moments in the parameters' type; all of this is MindSpore's.

    Raises:
        ValueError: it needs whole parameters (norms of each parameter, rows and columns), and they are sharded.
    """

    def __init__(self, optimizer: Any):
        _refuse_whole(optimizer, [p.name for p in optimizer.parameters if isinstance(p, DistributedParameter)])
        self.optimizer = optimizer
        self._replaced: dict[int, int] = {}  # id of parameter -> its `replaced` at the last step
        low = sorted({str(p.dtype) for p in self.parameters if p.dtype != ms.float32})
        if low:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {', '.join(low)} parameters without a float32 copy: small updates are lost to "
                "rounding. Use bmtrain_ms.optim.AdamOptimizer",
                stacklevel=3,
            )

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order in which the optimizer takes gradients."""
        return list(self.optimizer.parameters)

    def step(self, grads: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Update all parameters by gradients of their shards times `scale`, in the order of `parameters`.

        Raises:
            ValueError: a parameter has no gradient.
            RuntimeError: a parameter was loaded after the first step.
        """
        present = [(p, grad) for p, grad in zip(self.parameters, grads) if grad is not None]
        missing = [p.name for p, grad in zip(self.parameters, grads) if grad is None]
        if missing:
            raise ValueError(
                f"{type(self.optimizer).__name__} updates all of its parameters, and {missing[0]} has no gradient (as have "
                f"{len(missing) - 1} others); give it those that are trained, or use bmtrain_ms.optim.AdamOptimizer"
            )
        replaced = {id(p): getattr(p, "replaced", 0) for p in self.parameters}
        other = [p.name for p in self.parameters if self._replaced.get(id(p), replaced[id(p)]) != replaced[id(p)]]
        if other:
            kind = type(self.optimizer).__name__
            raise RuntimeError(
                f"parameter {other[0]} (and {len(other) - 1} others) got other memory after {kind}'s first step, as loading does, "
                "and MindSpore's optimizers go on with the old; load before the first step, or make a new optimizer and manager"
            )
        self._replaced = replaced
        announce_change(self.parameters)
        _managed.append(self.optimizer)
        try:
            self.optimizer(tuple(_prepared(grad, p, scale) for p, grad in present))
        finally:
            _managed.pop()

    def state_tensors(self) -> StateTensors:
        """Moments and counters, by the names that MindSpore gives them."""
        own = {id(p) for p in self.parameters}
        states: Sequence[Parameter] = [s for s in self.optimizer.get_parameters() if id(s) not in own]
        return {s.name: (s if isinstance(s, DistributedParameter) and is_float(s) else None, s) for s in states}

    def state_dict(self, gather: bool = False, tensors: bool = True) -> dict[str, Any]:
        """Moments and counters, as `ShardOptimizer.state_dict` gives them; of the settings, the rates only."""
        state = {"native": type(self.optimizer).__name__, "rates": _rates(self.optimizer)}
        return {**state, **to_arrays(self.state_tensors(), gather)} if tensors else state

    def settings(self) -> list[dict[str, Any]]:
        """The rate of each group; none where the optimizer computes them."""
        return [{"lr": rate} for rate in _rates(self.optimizer)]

    def change_settings(self, index: int, values: dict[str, Any]) -> None:
        """Set the rate of the group at `index`."""
        for rate in values.values():
            group_rates(self.optimizer)[index][1](rate)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Restore what `state_dict` returned; `strict` as in `ShardOptimizer.load_state_dict`.

        Raises:
            ValueError: of another optimizer, other parameters (strict), or shards of another number of ranks.
        """
        self.check_state_dict(state, strict)
        from_arrays(self.state_tensors(), state)
        rates = state["rates"] if len(state["rates"]) == len(_rates(self.optimizer)) else []
        for rate, (_, set_rate) in zip(rates, group_rates(self.optimizer) if rates else ()):
            set_rate(rate)

    def check_state_dict(self, state: Any, strict: bool = True) -> None:
        """Whether `load_state_dict` would take it; changes nothing.

        Raises:
            ValueError: it would not.
        """
        mine, saved = type(self.optimizer).__name__, state if isinstance(state, dict) else {}
        if saved.get("native") != mine:
            raise ValueError(f"the state is that of {saved.get('native') or 'an optimizer of bmtrain_ms'}, this is a {mine}")
        rates = saved.get("rates")
        if (
            not isinstance(rates, list)
            or not all(type(x) is float for x in rates)
            or (strict and len(rates) != len(_rates(self.optimizer)))
        ):
            raise ValueError(f"the state has the rates {rates!r}, this {mine} needs {len(_rates(self.optimizer))} numbers")
        check_arrays(self.state_tensors(), saved, strict)


def _refuse_whole(optimizer: Any, sharded: Sequence[str]) -> None:
    centralised = any(getattr(optimizer, "grad_centralization_flags", ()))
    if sharded and (isinstance(optimizer, _WHOLE) or centralised):
        what = "grad_centralization" if centralised else type(optimizer).__name__
        raise ValueError(
            f"{what} needs whole parameters, and {sharded[0]} is sharded; use an optimizer that works element by element, as "
            "bmtrain_ms.optim.AdamOptimizer, nn.Momentum or nn.AdamWeightDecay do"
        )


def _of_all_ranks(optimizer: Any, grads: Any) -> Any:
    """The gradients for an optimizer of MindSpore's that somebody calls, where it has sharded parameters: those of parameters that
    are whole on every rank become means, too.

    Raises:
        ValueError: it needs whole parameters.
    """
    if any(optimizer is one for one in _managed):
        return grads
    params = list(optimizer.parameters)
    sharded = [p for p in params if isinstance(p, DistributedParameter)]
    if not sharded or not isinstance(grads, (tuple, list)) or len(grads) != len(params):
        return grads
    _refuse_whole(optimizer, [p.name for p in sharded])
    announce_change(sharded)
    return tuple(average_whole(params, list(grads), sharded[0].world))


before_updates.append(_of_all_ranks)


def _rates(optimizer: Any) -> list[float]:
    """The rates of the groups, as `group_rates` sets them; none if the optimizer computes them. Not all are its parameters."""
    if hasattr(optimizer, "param_groups"):
        return [float(group["lr"]) for group in optimizer.param_groups]
    if optimizer.dynamic_lr:
        return []
    return [float(rate) for rate in (optimizer.learning_rate if optimizer.is_group_lr else [optimizer.learning_rate])]


def _prepared(grad: Tensor, p: Parameter, scale: float) -> Tensor:
    grad = grad if scale == 1.0 else grad * scale
    return grad if grad.dtype == p.dtype else grad.astype(p.dtype)


def adapted_schedule(schedule: Any) -> Schedule:
    """One of ours, or an adapter around somebody's, or around None.

    Raises:
        TypeError: it has no `step`.
    """
    if schedule is not None and not hasattr(schedule, "step"):
        raise TypeError(f"lr_scheduler must be one of bmtrain_ms.lr_scheduler, made for this optimizer, not {schedule!r}")
    return OtherSchedule(schedule) if schedule is None or not isinstance(schedule, Schedule) else schedule


def adapted(optimizer: Any) -> Driver:
    """The optimizer itself if it is one of ours; an adapter around one of MindSpore's, or around one that works like ours.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(optimizer, (nn.Optimizer, ExperimentalOptimizer)):
        return NativeOptimizer(optimizer)
    missing = [name for name in ("parameters", "step", "state_dict", "load_state_dict") if not hasattr(optimizer, name)]
    if missing or isinstance(optimizer, type):
        kind = type(optimizer).__name__
        missing = missing or ["an instance: it is the class"]
        raise TypeError(f"{kind} is neither an optimizer of bmtrain_ms nor one of MindSpore's: it lacks {', '.join(missing)}")
    return optimizer if isinstance(optimizer, Driver) else OtherOptimizer(optimizer)
