"""Learning-rate schedules (BMTrain: `lr_scheduler`).

n is the number of steps done, s the peak rate, w the warm-up length, e the end. During warm-up (n < w) the rate is s * n / w
(for Noam s / sqrt(w) * n / w). Construction and every `step` write the rate into all parameter groups of the optimizer.
"""

from __future__ import annotations

import math
from typing import Any


class WarmupLRScheduler:
    """Base class.

    Args:
        optimizer: its `param_groups` receive the rate.
        start_lr: peak rate s.
        warmup_iter: w.
        end_iter: e; must not be smaller than w.
        num_iter: steps done so far.
    """

    def __init__(self, optimizer: Any, start_lr: float, warmup_iter: int, end_iter: int, num_iter: int = 0):
        if warmup_iter < 0 or end_iter < warmup_iter:
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

    def get_lr_decay(self, num_iter: int) -> float:
        """The rate from the end of warm-up on."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_lr_decay")

    def step(self, num_iter: int | None = None) -> None:
        """Count one step, or go to `num_iter`, and apply the rate."""
        self.num_iter = self.num_iter + 1 if num_iter is None else num_iter
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        return {k: v for k, v in vars(self).items() if k != "optimizer" and not k.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        own = set(self.state_dict())
        if set(state) != own:
            raise ValueError(f"this is not the state of a {type(self).__name__}: it has {sorted(state)}, expected {sorted(own)}")
        vars(self).update(state)
        self._apply()

    def _apply(self) -> None:
        self._current_lr = self.get_lr()
        for group in self.optimizer.param_groups:
            group["lr"] = self._current_lr


class NoDecay(WarmupLRScheduler):
    """s."""

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr


class Noam(WarmupLRScheduler):
    """s / sqrt(n); warm-up s / sqrt(w) * n / w (Vaswani et al., 2017)."""

    def get_lr_warmup(self, num_iter: int) -> float:
        return self.start_lr / math.sqrt(self.warmup_iter) * num_iter / self.warmup_iter

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr / math.sqrt(max(1, num_iter))


class Linear(WarmupLRScheduler):
    """s * (e - n) / (e - w), 0 from e on."""

    def get_lr_decay(self, num_iter: int) -> float:
        return max(0.0, self.start_lr * (self.end_iter - num_iter) / max(1, self.end_iter - self.warmup_iter))


class Cosine(WarmupLRScheduler):
    """s * (1 + cos(pi * (n - w) / (e - w))) / 2, 0 from e on."""

    def get_lr_decay(self, num_iter: int) -> float:
        if num_iter >= self.end_iter:
            return 0.0
        progress = (num_iter - self.warmup_iter) / (self.end_iter - self.warmup_iter)
        return self.start_lr * 0.5 * (1.0 + math.cos(math.pi * progress))


class Exponential(WarmupLRScheduler):
    """s * gamma^(n - w)."""

    def __init__(self, optimizer: Any, start_lr: float, warmup_iter: int, end_iter: int, num_iter: int = 0, gamma: float = 0.95):
        self.gamma = gamma
        super().__init__(optimizer, start_lr, warmup_iter, end_iter, num_iter)

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr * self.gamma ** (num_iter - self.warmup_iter)


class WSD(WarmupLRScheduler):
    """Warm-up, stable, decay (Hu et al., "MiniCPM", 2024): s until `decay_iter`, then linear to `end_lr` at e.

    Args:
        decay_iter: first step of the decay, between w and e.
        end_lr: rate from e on.
    """

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
    ):
        if not warmup_iter <= decay_iter <= end_iter:
            raise ValueError(f"need warmup_iter <= decay_iter <= end_iter, not {warmup_iter}, {decay_iter}, {end_iter}")
        self.decay_iter, self.end_lr = decay_iter, end_lr
        super().__init__(optimizer, start_lr, warmup_iter, end_iter, num_iter)

    def get_lr_decay(self, num_iter: int) -> float:
        if num_iter < self.decay_iter:
            return self.start_lr
        left = max(0.0, (self.end_iter - num_iter) / max(1, self.end_iter - self.decay_iter))
        return self.end_lr + (self.start_lr - self.end_lr) * min(1.0, left)
