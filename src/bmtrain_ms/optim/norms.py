"""Norms of gradients that are sharded: of whole tensors, over all ranks, each element once."""

from __future__ import annotations

import math
from typing import Any, Iterable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from bmtrain_ms_base.checks import number

from ..comm import World, reduce_numbers
from ..comm import world as current_world
from ..compat.autograd import no_grad
from ..compat.runtime import from_host, host_array
from ..ops.in_place import square_sum
from ..zero import DistributedParameter, context_of
from .base import average_whole


def clip_grad_norm(
    parameters: Iterable[Parameter], grads: Sequence[Tensor], max_norm: float, norm_type: float | str = 2.0, eps: float = 1e-6
) -> tuple[tuple[Tensor, ...], float]:
    """Scale gradients down so that their norm over all ranks is at most `max_norm`; for loops that use no `OptimManager`.

    `loss, grads = ms.value_and_grad(forward, None, params)(...)` gives shards. What MindSpore makes of them (`clip_by_global_norm`,
    `clip_by_norm`, `amp.all_finite`) is each rank's own: ranks would drift apart. All ranks call this together.

    Args:
        parameters: what was differentiated with respect to, in the order of `grads`, e.g. `optimizer.parameters`.
        grads: as `value_and_grad` returns them.
        max_norm: the largest norm; positive.
        norm_type: p of the p-norm; `inf`, also as a string, for the largest absolute value.
        eps: is added to the norm.

    Returns:
        The gradients, those of parameters that are not sharded averaged over the ranks, and the norm before clipping. Where it is
        not finite nothing is scaled.

    Raises:
        ValueError: `max_norm` or `norm_type` is not positive, or the numbers of parameters and gradients differ.
    """
    order = checked_order(max_norm, norm_type)
    params, averaged, world = _averaged(parameters, grads)
    norm = total_norm(_counted(params, averaged, world), world, order)
    coefficient = max_norm / (norm + eps)
    if not (math.isfinite(norm) and coefficient < 1.0):
        return tuple(averaged), norm
    with no_grad():
        return tuple(grad * coefficient for grad in averaged), norm


def all_finite(parameters: Iterable[Parameter], grads: Sequence[Tensor]) -> bool:
    """Whether every element of every gradient is finite on every rank; the same answer on all. All ranks call it together.

    Args:
        parameters, grads: as in `clip_grad_norm`.
    """
    params, averaged, world = _averaged(parameters, grads)
    return math.isfinite(total_norm(_counted(params, averaged, world), world, math.inf))


def checked_order(max_norm: float, norm_type: float | str) -> float:
    """The p of a p-norm, as a number.

    Raises:
        TypeError: it, or `max_norm`, is not a number.
        ValueError: it, or `max_norm`, is not positive.
    """
    max_norm, order = number("max_norm", max_norm), math.inf if norm_type == "inf" else number("norm_type", norm_type)
    if not (max_norm > 0 and order > 0):
        raise ValueError(f"max_norm and norm_type must be positive, not {max_norm}, {order}")
    return order


def counts_here(p: Parameter, world: World) -> bool:
    """Whether a norm over all ranks has to count this rank's gradient of `p`: of ranks that store the same elements one does."""
    if isinstance(p, DistributedParameter):
        return p.layout.copy == 0
    return (world.everyone if context_of(world).rows_differ else world.stage).rank == 0


def total_norm(grads: Sequence[Tensor], world: World, p: float) -> float:
    """p-norm over all ranks of float32 gradients; not finite if an element is not.

    `grads`: what `counts_here`; the padding of shards is zero.
    """
    if p == math.inf:
        # the sum is 0, or NaN if an element is not finite: max() on CPU ignores NaN
        largest = [host_array(g.abs().max() + (g * 0.0).sum()).item() for g in grads]
        mine = math.nan if any(math.isnan(x) for x in largest) else max(largest, default=0.0)
        gathered = host_array(world.everyone.all_gather([_scalar(mine)], label="grad norm").wait()[0])
        return float(np.max(gathered))
    unit = 1.0
    if p == 2.0:
        mine = sum(map(square_sum, grads))
    else:  # powers of what is at most 1: those of a scaled gradient leave float32
        unit = total_norm(grads, world, math.inf)
        if not 0.0 < unit < math.inf:
            return unit
        mine = sum(host_array(((g.abs() * (1.0 / unit)) ** p).sum()).item() for g in grads)
    powers = reduce_numbers(world.everyone, [mine], "grad norm").item()
    return unit * powers ** (1.0 / p) if math.isfinite(powers) else powers


def _averaged(parameters: Iterable[Parameter], grads: Sequence[Tensor]) -> tuple[list[Parameter], list[Tensor], World]:
    params, world = list(parameters), current_world()
    if len(params) != len(grads):
        raise ValueError(
            f"{len(grads)} gradients for {len(params)} parameters: pass what value_and_grad returned, with its weights"
        )
    return params, average_whole(params, list(grads), world), world


def _counted(params: Sequence[Parameter], grads: Sequence[Tensor], world: World) -> list[Tensor]:
    """The gradients of parameters that `counts_here` says count, in float32."""
    with no_grad():
        return [g if g.dtype == ms.float32 else g.astype(ms.float32) for p, g in zip(params, grads) if counts_here(p, world)]


def _scalar(x: float) -> Tensor:
    with np.errstate(over="ignore"):  # inf, as a sum in float32 has it
        return from_host(np.array([x], np.float32))


def parameters_of(what: Any) -> list[Parameter]:
    """The parameters of an optimizer, of groups, or of a list; each once, also where groups overlap."""
    if isinstance(what, Parameter):
        return [what]
    items: Any = getattr(what, "param_groups", None) or getattr(what, "parameters", what)
    if isinstance(items, dict) or not isinstance(items, Iterable):
        raise TypeError(f"clip_grad_norm takes an optimizer, its param_groups or a list of parameters, not {type(what).__name__}")
    found = [p for item in items for p in (item["params"] if isinstance(item, dict) else [item])]
    other = [type(p).__name__ for p in found if not isinstance(p, Parameter)]
    if other:  # a list of Blocks, or of names, would have been clipped to nothing
        raise TypeError(f"clip_grad_norm takes Parameters, not a {other[0]}: give it model.trainable_params()")
    return list({id(p): p for p in found}.values())
