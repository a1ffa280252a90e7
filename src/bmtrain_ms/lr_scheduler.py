"""Learning-rate schedules (BMTrain: `lr_scheduler`).

n is the number of steps done, s the peak rate, w the warm-up length, e the end. During warm-up (n < w) the rate is s * n / w
(for Noam s / sqrt(w) * n / w). Construction and every `step` write the rate into all parameter groups of the optimizer; a group
with a rate of its own keeps that as its peak: it gets own / s of the others' rate (BMTrain overwrites it).
"""

from __future__ import annotations

import copy
import math
import reprlib
from abc import ABC, abstractmethod
from typing import Any, Callable, ClassVar

from bmtrain_ms_base.checks import number

from .optim.rates import group_rates


class WarmupLRScheduler(ABC):
    """Base class: a schedule defines `get_lr_decay`, and `get_lr_warmup` if its warm-up is another.

    Args:
        optimizer: its groups receive the rate; also one of `mindspore.nn` or `mindspore.experimental.optim` with a constant rate.
        start_lr: peak rate s.
        warmup_iter: w.
        end_iter: e. For `Linear`, `Cosine` and `WSD` it must not be smaller than w; the others have no end, and take anything.
        num_iter: steps done so far.
    """

    _has_end = False

    def __init__(self, optimizer: Any, start_lr: float, warmup_iter: int, end_iter: int, num_iter: int = 0):
        group_rates(optimizer)
        given = {"start_lr": start_lr, "warmup_iter": warmup_iter, "num_iter": num_iter}
        if self._has_end:
            given["end_iter"] = end_iter
        wrong = [f"{name}={value}" for name, value in given.items() if not math.isfinite(number(name, value))]
        if wrong:
            raise ValueError(f"a schedule needs finite numbers, not {wrong[0]}")
        if warmup_iter < 0 or (self._has_end and end_iter < warmup_iter):
            raise ValueError(f"need 0 <= warmup_iter <= end_iter, not warmup_iter={warmup_iter}, end_iter={end_iter}")
        self.optimizer = optimizer
        self.start_lr, self.warmup_iter, self.end_iter, self.num_iter = start_lr, warmup_iter, end_iter, num_iter
        self._apply()

    @property
    def current_lr(self) -> float:
        """The rate in force."""
        return self._current_lr

    def get_lr(self) -> float:
        """The rate for `num_iter`."""
        if self.num_iter < self.warmup_iter:
            return self.get_lr_warmup(self.num_iter)
        return self.get_lr_decay(self.num_iter)

    def get_lr_warmup(self, num_iter: int) -> float:
        """The rate during warm-up."""
        return self.start_lr * num_iter / self.warmup_iter

    @abstractmethod
    def get_lr_decay(self, num_iter: int) -> float:
        """The rate from the end of warm-up on."""

    def step(self, num_iter: int | None = None) -> None:
        """Count one step, or go to `num_iter`, and apply the rate."""
        self.num_iter = self.num_iter + 1 if num_iter is None else num_iter
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        return {k: v for k, v in vars(self).items() if k != "optimizer" and not k.startswith("_")}

    def settings(self) -> dict[str, Any]:
        """What it was made with, and its position."""
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: it is that of another class.
        """
        vars(self).update(self.check_state_dict(state))
        self._groups = group_rates(self.optimizer)  # which may have been given other rates of their own
        self._apply()

    def check_state_dict(self, state: Any) -> dict[str, Any]:
        """What `load_state_dict` takes of it; changes nothing.

        Raises:
            ValueError: it would not take it.
        """
        own, kind = self.state_dict(), type(self).__name__
        if not isinstance(state, dict) or set(state) != set(own):
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"this is not the state of a {kind}: it has {found}, expected {sorted(own)}")
        odd = [name for name, x in own.items() if isinstance(x, (int, float)) and not isinstance(state[name], (int, float))]
        if odd:
            raise ValueError(f"this is not the state of a {kind}: {odd[0]} is {state[odd[0]]!r}")
        trial = copy.copy(self)
        vars(trial).update(state)
        try:
            rate = float(trial.get_lr())
            trial.num_iter += 1
            if not (math.isfinite(rate) and math.isfinite(trial.get_lr())):
                raise ValueError("the rate is not finite")
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ValueError(f"this is not the state of a {kind}: no rate follows from {reprlib.repr(state)}: {error}") from error
        return state

    def cover_new_groups(self) -> None:
        """Give groups that were added to the optimizer the rate in force; does nothing where there are none."""
        if len(getattr(self.optimizer, "param_groups", ())) > self._covered:
            self._apply()

    def _apply(self) -> None:
        self._current_lr = self.get_lr()
        self._covered = len(getattr(self.optimizer, "param_groups", ()))
        for own, set_rate in group_rates(self.optimizer):
            set_rate(self._current_lr if own is None else own * self._share())

    def _share(self) -> float:
        """The rate in force as a part of the peak rate."""
        return self._current_lr / self.start_lr if self.start_lr else 0.0


class NoDecay(WarmupLRScheduler):
    """The rate s after the warm-up."""

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr


class Noam(WarmupLRScheduler):
    """s / sqrt(n); warm-up s / sqrt(w) * n / w (Vaswani et al., 2017)."""

    def get_lr_warmup(self, num_iter: int) -> float:
        return self.start_lr / math.sqrt(self.warmup_iter) * num_iter / self.warmup_iter

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr / math.sqrt(max(1, num_iter))


class _Falling(WarmupLRScheduler):
    """A rate that falls to one of its own at the end.

    Args:
        end_lr: the rate from e on (Megatron-LM: `min_lr`).
    """

    _has_end = True

    def __init__(self, optimizer: Any, start_lr: float, warmup_iter: int, end_iter: int, num_iter: int = 0, *, end_lr: float = 0.0):
        self.end_lr = number("end_lr", end_lr)
        if not 0 <= self.end_lr <= number("start_lr", start_lr):
            raise ValueError(f"need 0 <= end_lr <= start_lr, not end_lr={end_lr}, start_lr={start_lr}")
        super().__init__(optimizer, start_lr, warmup_iter, end_iter, num_iter)

    def check_state_dict(self, state: Any) -> dict[str, Any]:
        """What `load_state_dict` takes of a state; in those of earlier releases rates fall to 0."""
        if isinstance(state, dict) and {*state, "end_lr"} == set(self.state_dict()):
            state = {"end_lr": 0.0, **state}
        return super().check_state_dict(state)


class Linear(_Falling):
    """(s - end_lr) * (e - n) / (e - w) + end_lr, and end_lr from e on."""

    def get_lr_decay(self, num_iter: int) -> float:
        left = (self.end_iter - num_iter) / max(1, self.end_iter - self.warmup_iter)
        return self.end_lr + (self.start_lr - self.end_lr) * max(0.0, left)


class Cosine(_Falling):
    """(s - end_lr) * (1 + cos(pi * (n - w) / (e - w))) / 2 + end_lr, and end_lr from e on."""

    def get_lr_decay(self, num_iter: int) -> float:
        if num_iter >= self.end_iter:
            return self.end_lr
        progress = (num_iter - self.warmup_iter) / (self.end_iter - self.warmup_iter)
        return self.end_lr + (self.start_lr - self.end_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Exponential(WarmupLRScheduler):
    """s * gamma^(n - w)."""

    def __init__(self, optimizer: Any, start_lr: float, warmup_iter: int, end_iter: int, num_iter: int = 0, gamma: float = 0.95):
        self.gamma = number("gamma", gamma)
        super().__init__(optimizer, start_lr, warmup_iter, end_iter, num_iter)

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr * self.gamma ** (num_iter - self.warmup_iter)


class WSD(WarmupLRScheduler):
    """Warm-up, stable, decay (Hu et al., "MiniCPM", 2024): s until `decay_iter`, then down to `end_lr` at e.

    Args:
        decay_iter: first step of the decay, between w and e.
        end_lr: rate from e on.
        shape: of the decay, where r is how much of it is done (Megatron-LM's names and formulas): `linear`: 1 - r;
            `exponential`: 2 * 0.5^r - 1; `minus_sqrt`: 1 - sqrt(r); `cosine`: (1 + cos(pi * r)) / 2.

    Raises:
        ValueError: there is no such shape, or the steps do not follow each other.
    """

    _has_end = True
    _SHAPES: ClassVar[dict[str, Callable[[float], float]]] = {
        "linear": lambda r: 1.0 - r,
        "exponential": lambda r: 2.0 * 0.5**r - 1.0,
        "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
        "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
    }

    def __init__(
        self,
        optimizer: Any,
        start_lr: float,
        warmup_iter: int,
        end_iter: int,
        num_iter: int = 0,
        *,
        decay_iter: int,
        end_lr: float = 0.0,
        shape: str = "linear",
    ):
        if shape not in self._SHAPES:
            raise ValueError(f"shape must be one of {', '.join(self._SHAPES)}, not {shape!r}")
        if not number("warmup_iter", warmup_iter) <= number("decay_iter", decay_iter) <= number("end_iter", end_iter):
            raise ValueError(f"need warmup_iter <= decay_iter <= end_iter, not {warmup_iter}, {decay_iter}, {end_iter}")
        self.decay_iter, self.end_lr, self.shape = decay_iter, number("end_lr", end_lr), shape
        super().__init__(optimizer, start_lr, warmup_iter, end_iter, num_iter)

    def get_lr_decay(self, num_iter: int) -> float:
        if num_iter < self.decay_iter:
            return self.start_lr
        left = max(0.0, (self.end_iter - num_iter) / max(1, self.end_iter - self.decay_iter))
        return self.end_lr + (self.start_lr - self.end_lr) * self._SHAPES[self.shape](1.0 - min(1.0, left))

    def check_state_dict(self, state: Any) -> dict[str, Any]:
        """What `load_state_dict` takes of a state; in those of earlier releases the decay is linear."""
        if isinstance(state, dict) and {*state, "shape"} == set(self.state_dict()):
            state = {"shape": "linear", **state}
        if isinstance(state, dict) and state.get("shape", "linear") not in self._SHAPES:
            raise ValueError(f"this is not the state of a WSD: shape is {state['shape']!r}")
        return super().check_state_dict(state)
