"""Setting the learning rates of parameter groups, of our optimizers and of MindSpore's."""

from __future__ import annotations

from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from ..compat.runtime import host_array, overwrite

# (the rate that the group was given for itself, or None; what sets its rate)
GroupRate = tuple[Optional[float], Callable[[float], None]]


# Kept in an optimizer of MindSpore's: the rates that its groups were given for themselves, before a schedule wrote over them.
_OWN_RATES = "_bmtrain_ms_own_rates"


def group_rates(optimizer: Any) -> list[GroupRate]:
    """How to set the rate of each parameter group of an optimizer: ours, or MindSpore's.

    MindSpore's do not say which groups were given a rate: a group whose rate is that of the optimizer has none of its own.

    Raises:
        TypeError: it is not an optimizer, or it computes its rate by itself.
    """
    if hasattr(optimizer, "param_groups"):
        setters = [_setter(group) for group in optimizer.param_groups]
        if all("own_lr" in group for group in optimizer.param_groups):
            return list(zip([group["own_lr"] for group in optimizer.param_groups], setters))
        default, rates = getattr(optimizer, "defaults", {}).get("lr"), [float(group["lr"]) for group in optimizer.param_groups]
    elif isinstance(optimizer, nn.Optimizer) and not optimizer.dynamic_lr:
        if not optimizer.is_group_lr:
            return [(None, _writer(optimizer.learning_rate))]
        setters = [_writer(rate) for rate in optimizer.learning_rate]
        default, rates = (
            getattr(optimizer, "init_learning_rate", None),
            [host_array(rate).item() for rate in optimizer.learning_rate],
        )
    elif isinstance(optimizer, nn.Optimizer):
        raise TypeError(f"this {type(optimizer).__name__} has a schedule of its own; give it a constant learning_rate")
    else:
        raise TypeError(f"{type(optimizer).__name__} has no param_groups: it is not an optimizer that a schedule can drive")
    known: list[float | None] = getattr(optimizer, _OWN_RATES, [])[: len(rates)]
    new = rates[len(known) :]  # groups that were added later have the rate that they were given, too
    setattr(optimizer, _OWN_RATES, known + [None if default is None or np.float32(x) == np.float32(default) else x for x in new])
    return list(zip(getattr(optimizer, _OWN_RATES), setters))


def _setter(group: dict[str, Any]) -> Callable[[float], None]:
    if isinstance(group["lr"], Parameter):
        return _writer(group["lr"])

    def set_rate(rate: float) -> None:
        group["lr"] = rate

    return set_rate


def _writer(parameter: Parameter) -> Callable[[float], None]:
    # in place: what MindSpore's optimizers compiled goes on with the memory that it has seen
    return lambda rate: overwrite(parameter, Tensor(rate, ms.float32))
