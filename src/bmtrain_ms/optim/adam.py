"""AdamW over shards, with float32 masters."""

from __future__ import annotations

from typing import Any, Iterable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from bmtrain_ms_base.checks import number

from ..compat.device import on_host
from ..compat.runtime import host_array, is_at, kept_on_host, numpy_dtype, values, writable_array
from .base import ParamState, ShardOptimizer
from .host_adam import Workers, apply_updates, follow
from .update import CHUNK, Coefficients, Delta, Update

_LARGEST = 2.0**127  # what float32 can hold


class Adam(ShardOptimizer):
    """What Adam is, wherever it keeps its state."""

    def _check(self, group: dict[str, Any]) -> None:
        lr, eps, decay = (number(name, group[name]) for name in ("lr", "eps", "weight_decay"))
        betas, hold_steps = group["betas"], number("hold_steps", group["hold_steps"])
        if not isinstance(betas, (tuple, list)):
            raise TypeError(f"betas must be two numbers, not {betas!r}")
        betas = tuple(number("betas", beta) for beta in betas)
        possible = all(0 <= x < _LARGEST for x in (lr, eps, decay)) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        if not possible or eps == 0:
            raise ValueError(f"need lr, weight_decay >= 0, eps > 0 and 0 <= betas < 1, not {lr}, {decay}, {eps}, {betas}")
        # zero would make 0 / 0 of a gradient that has always been zero, as that of the padding is
        if np.float32(eps * (1 - betas[1]) ** 0.5) == 0:  # as the first step has it
            raise ValueError(f"eps = {eps} is zero in float32, in which updates are computed; use 1e-30 or more")
        if not 0 <= hold_steps < _LARGEST:
            raise ValueError(f"hold_steps must be 0 or more, not {group['hold_steps']}")


def group_settings(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, hold_steps: int, maximize: bool
) -> dict[str, Any]:
    """The settings of Adam, in the form that a parameter group has them."""
    return {
        "lr": lr,
        "betas": tuple(betas) if isinstance(betas, list) else betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "hold_steps": hold_steps,
        "maximize": maximize,
    }


class AdamOptimizer(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) (BMTrain: `optim.AdamOptimizer`).

    p -= lr * (m̂ / (sqrt(v̂) + eps) + weight_decay * p), for every dtype. Moments are float32 and free of the loss scale; a 16-bit
    parameter has a float32 master, and is its rounding to nearest. State: `exp_avg`, `exp_avg_sq`, and `master` for 16 bits.

    Args:
        params: parameters, or groups `{"params": [...], "lr": ..., "weight_decay": ...}` with settings of their own.
        lr, betas, eps, weight_decay: defaults for the groups.
        hold_steps: the parameter's first steps fill the moments only, e.g. after resuming without an optimizer state.
        maximize: follow the gradient upwards.

    Raises:
        ValueError: no parameters, one twice, an unknown setting, or one out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hold_steps: int = 0,
        maximize: bool = False,
    ):
        self._on_host = on_host()
        super().__init__(params, group_settings(lr, betas, eps, weight_decay, hold_steps, maximize))
        self._workers = Workers() if self._on_host else None

    def _make_state(self, p: Parameter) -> ParamState:
        return HostState(p) if self._on_host else DeviceState(p)

    def _update(self, updates: list[tuple[dict[str, Any], Parameter, Tensor]], scale: float) -> None:
        if self._workers is None:
            for group, p, grad in updates:
                self._states[id(p)].update(group, grad, scale)
        else:
            ready = [self._states[id(p)].prepare(group, values(grad), scale) for group, p, grad in updates]
            apply_updates(ready, self._workers)


class HostState(ParamState):
    """A parameter's state in host memory, updated there.

    Args:
        p: its parameter.
        shared: whether the parameter's own memory is host memory; otherwise a copy of it is kept, in float32 (the master) and, for
            16 bits, in its own type (`staged`), all allocated now.
    """

    def __init__(self, p: Parameter, shared: bool = True):
        super().__init__()
        self._p = p
        shape, low = tuple(p.shape), p.dtype != ms.float32
        self._moments = [np.zeros(shape, np.float32) for _ in range(2)]
        self._has_master = low or not shared
        self._master = np.empty(shape if self._has_master else 0, np.float32)
        self._master_version: int | None = None  # the parameter's `replaced` when the master was compared with it
        self._master_made = False  # filled at the first step: the parameter may be loaded or initialised until then
        self._known, self._known_version = self._master, None  # the parameter's memory, see `_memory`
        self._staged = np.empty(shape, numpy_dtype(p.dtype)) if low and not shared else None

    @property
    def _arrays(self) -> list[np.ndarray]:
        return [*self._moments, self._master, *([] if self._staged is None else [self._staged])]

    def nbytes(self) -> int:
        """The size of the arrays kept here, in bytes."""
        return sum(x.nbytes for x in self._arrays)

    def touch(self) -> None:
        """Have the system provide all of the memory now."""
        for x in self._arrays:
            x.fill(0)

    def new_values(self) -> np.ndarray:
        """What the parameter is to become after an update, where its memory is not shared."""
        return self._master if self._staged is None else self._staged

    def tensors(self) -> dict[str, Tensor]:
        named = {"exp_avg": kept_on_host(self._moments[0]), "exp_avg_sq": kept_on_host(self._moments[1])}
        if self._p.dtype != ms.float32:
            named["master"] = kept_on_host(self._master_of())
        return named

    def prepare(
        self, group: dict[str, Any], grad: np.ndarray, scale: float, delta: Delta | None = None, now: np.ndarray | None = None
    ) -> Update:
        """Count a step and say what is to be computed.

        Args:
            now: what the parameter is, where its memory is not shared.
        """
        self.step += 1
        m, v, master = (x.reshape(-1) for x in (*self._moments, self._master))
        low = self._p.dtype != ms.float32
        memory = now if now is not None else self._memory()
        if self._has_master and not (low and self._master_made):
            master[...] = memory
            self._master_made = True
        if self._staged is not None:
            memory = self._staged.reshape(-1)
            memory[...] = now
        coefficients = Coefficients.of(group, self.step, scale)
        return Update(master if self._has_master else memory, m, v, grad.reshape(-1), memory if low else None, coefficients, delta)

    def _memory(self) -> np.ndarray:
        """The parameter's own memory, flat."""
        p, version = self._p, getattr(self._p, "replaced", None)
        if version is not None and version == self._known_version and is_at(p, self._known):
            return self._known
        memory = writable_array(p)
        if memory is None:
            raise RuntimeError(f"parameter {p.name} has no contiguous memory on the host; set_data a contiguous tensor")
        self._known, self._known_version = memory, version
        return memory

    def _master_of(self) -> np.ndarray:
        """The float32 copy of a 16-bit parameter, which each step has follow it (`host_adam.follow`); so does this, where it has
        other memory since, e.g. was loaded."""
        version = getattr(self._p, "replaced", None)
        if not self._master_made:
            self._master[...] = host_array(self._p)
        elif version is None or version != self._master_version:
            now, master = host_array(self._p).reshape(-1), self._master.reshape(-1)
            for start in range(0, now.size, CHUNK):
                follow(master[start : start + CHUNK], now[start : start + CHUNK])
        self._master_made, self._master_version = True, version
        return self._master


class DeviceState(ParamState):
    """A parameter's state in device memory, updated by MindSpore's fused operation."""

    def __init__(self, p: Parameter):
        super().__init__()
        self._p = p
        self._moments = tuple(ops.zeros(tuple(p.shape), ms.float32) for _ in range(2))
        self._master: Tensor | None = None  # made at the first step: the parameter may be loaded or initialised until then
        self._master_version: int | None = None  # the parameter's `replaced` when the master was compared with it
        self._fused = ops.AdamWeightDecay()

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"exp_avg": self._moments[0], "exp_avg_sq": self._moments[1]}
        if self._p.dtype != ms.float32:
            named["master"] = self._ensure_master()
        return named

    def update(self, group: dict[str, Any], grad: Tensor, scale: float) -> None:
        """Count a step and make it."""
        self.step += 1
        c = Coefficients.of(group, self.step, scale)
        grad = grad if grad.dtype == ms.float32 else grad.astype(ms.float32)
        grad = grad if c.factor == 1.0 else grad * c.factor
        target = self._p if self._p.dtype == ms.float32 else self._ensure_master(look=True)
        decay = (1.0 - c.keep) / c.rate if c.rate else 0.0  # the operation multiplies it with the rate
        self._fused(target, *self._moments, c.rate, c.beta1, c.beta2, c.eps, decay, grad)
        if target is not self._p:
            self._p.set_data(target.astype(self._p.dtype))
            self._master_version = getattr(self._p, "replaced", None)

    def _ensure_master(self, look: bool = False) -> Tensor:
        """The float32 copy, made at the first use; where the parameter was written, it follows (`host_adam.follow`).

        Args:
            look: at its values; otherwise it is known to be written only where it has other memory.
        """
        p, version = self._p, getattr(self._p, "replaced", None)
        if self._master is None:
            self._master = p.astype(ms.float32)
        elif look or version is None or version != self._master_version:
            rounded, now = self._master.astype(p.dtype).astype(ms.float32), p.astype(ms.float32)
            ops.assign(self._master, ops.where(rounded == now, self._master, now))
        self._master_version = version
        return self._master
