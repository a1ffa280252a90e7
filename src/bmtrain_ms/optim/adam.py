"""AdamW over shards, with float32 masters."""

from __future__ import annotations

import math
from typing import Any, Iterable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from ..compat.runtime import from_host
from ..zero import DistributedParameter, context_of

_fused_adam = ops.AdamWeightDecay()


class AdamOptimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) (BMTrain: `optim.AdamOptimizer`).

    p -= lr * (m̂ / (sqrt(v̂) + eps) + weight_decay * p), for every dtype. Moments are float32 and free of the loss scale; a 16-bit
    parameter has a float32 master, and is its rounding. Works on what each rank stores: shards, whose padding stays zero.

    Args:
        params: parameters, or groups `{"params": [...], "lr": ..., "weight_decay": ...}` with settings of their own.
        lr, betas, eps, weight_decay: defaults for the groups.

    Raises:
        ValueError: no parameters, one twice, or a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        # eps = 0 would make 0 / 0 of a gradient that has always been zero, as that of the padding is
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"need lr, weight_decay >= 0, eps > 0 and 0 <= betas < 1, not {lr}, {weight_decay}, {eps}, {betas}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        entries = list(params)
        if entries and not isinstance(entries[0], dict):
            entries = [{"params": entries}]
        self.param_groups: list[dict[str, Any]] = [{**defaults, **entry, "params": list(entry["params"])} for entry in entries]
        if not self.parameters:
            raise ValueError("the optimizer got no parameters; is everything frozen?")
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError("a parameter appears twice in the optimizer's groups")
        self._states: dict[int, _State] = {id(p): _State(p) for p in self.parameters}

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of their groups; what to differentiate with respect to."""
        return [p for group in self.param_groups for p in group["params"]]

    def __call__(self, grads: Sequence[Tensor]) -> None:
        """MindSpore's spelling: `grads` as `value_and_grad(forward, None, optimizer.parameters)` returns them."""
        if len(grads) != len(self.parameters):
            raise ValueError(f"{len(grads)} gradients for {len(self.parameters)} parameters")
        self.step({id(p): g for p, g in zip(self.parameters, grads)})

    def step(self, grads: dict[int, Tensor], scale: float = 1.0) -> None:
        """Update every parameter that has a gradient.

        Args:
            grads: id of parameter -> gradient of its shard, any float dtype.
            scale: what the gradients are multiplied with first, e.g. 1 / loss scale.
        """
        for world in {p.world for p in self.parameters if isinstance(p, DistributedParameter)}:
            context_of(world).pipeline.parameters_changed()
        for group in self.param_groups:
            for p in group["params"]:
                grad = grads.get(id(p))
                if grad is not None:
                    grad = grad if grad.dtype == ms.float32 else grad.astype(ms.float32)
                    self._states[id(p)].update(group, grad if scale == 1.0 else grad * scale)

    def state_of(self, p: Parameter) -> dict[str, Tensor]:
        """The tensors that belong to a parameter: `exp_avg`, `exp_avg_sq`, and `master` for a 16-bit one; float32, as its shard."""
        return self._states[id(p)].tensors()

    def state_dict(self) -> dict[str, Any]:
        """What is not a tensor: the groups' settings and each parameter's number of steps."""
        return {
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
            "steps": [self._states[id(p)].step for p in self.parameters],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; tensors are restored by writing into those of `state_of`."""
        if len(state["groups"]) != len(self.param_groups) or len(state["steps"]) != len(self.parameters):
            raise ValueError(
                f"the state has {len(state['groups'])} groups and {len(state['steps'])} parameters, this optimizer has "
                f"{len(self.param_groups)} and {len(self.parameters)}"
            )
        for group, saved in zip(self.param_groups, state["groups"]):
            group.update({**saved, "betas": tuple(saved["betas"])})
        for p, step in zip(self.parameters, state["steps"]):
            self._states[id(p)].step = int(step)


class _State:
    """One parameter's moments, master and step count."""

    def __init__(self, p: Parameter):
        self._p, self.step = p, 0
        self._moments = tuple(from_host(np.zeros(tuple(p.shape), np.float32)) for _ in range(2))
        self._master: Tensor | None = None  # made at the first step: the parameter may be loaded or initialised until then

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"exp_avg": self._moments[0], "exp_avg_sq": self._moments[1]}
        if self._p.dtype != ms.float32:
            named["master"] = self._ensure_master()
        return named

    def update(self, group: dict[str, Any], grad: Tensor) -> None:
        self.step += 1
        target = self._p if self._p.dtype == ms.float32 else self._ensure_master()
        beta1, beta2 = (float(np.float32(beta)) for beta in group["betas"])  # as the operation sees them: 1 - 0.999 differs by 5e-5
        # The fused operation knows no bias correction; it is folded into its rate, eps and decay:
        #   lr * m/c1 / (sqrt(v/c2) + eps) = (lr * sqrt(c2) / c1) * m / (sqrt(v) + eps * sqrt(c2))
        correction1, correction2 = 1.0 - beta1**self.step, math.sqrt(1.0 - beta2**self.step)
        rate = group["lr"] * correction2 / correction1
        if rate == 0.0:  # moments only; the decay below would divide by it
            rate, decay = 0.0, 0.0
        else:
            decay = group["weight_decay"] * group["lr"] / rate
        _fused_adam(target, *self._moments, rate, beta1, beta2, group["eps"] * correction2, decay, grad)
        if target is not self._p:
            self._p.set_data(target.astype(self._p.dtype))

    def _ensure_master(self) -> Tensor:
        if self._master is None:
            self._master = self._p.astype(ms.float32)
        return self._master
