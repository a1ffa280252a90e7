"""What one Adam step of one parameter is made of: arrays and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

CHUNK = 1 << 18  # elements: large enough that the interpreter's part is small, small enough to share a parameter out


class Coefficients(NamedTuple):  # which compiled loops take as it is
    """One parameter's numbers of one step: p = keep * p - rate * m / (sqrt(v) + eps), after m and v were updated.

    Bias correction is folded into rate and eps:
    lr * m/c1 / (sqrt(v/c2) + eps) = (lr * sqrt(c2) / c1) * m / (sqrt(v) + eps * sqrt(c2)).

    `factor`: of the gradient, 1 / loss scale, negative to maximise.  `decay`: weight decay.  `correction`: sqrt(c2) / c1.
    """

    beta1: float
    beta2: float
    eps: float
    rate: float
    keep: float
    factor: float
    decay: float
    correction: float

    @classmethod
    def of(cls, group: dict[str, Any], step: int, scale: float) -> Coefficients:
        """The coefficients of the step-th step, counted from 1, by a group's settings; gradients are multiplied by `scale`."""
        beta1, beta2 = (float(np.float32(beta)) for beta in group["betas"])  # as float32 arithmetic has them
        lr = 0.0 if step <= group["hold_steps"] else float(group["lr"])
        root = math.sqrt(1.0 - beta2**step)
        correction = root / (1.0 - beta1**step)
        return cls(
            beta1,
            beta2,
            group["eps"] * root,
            lr * correction,
            1.0 - lr * group["weight_decay"],
            -scale if group["maximize"] else scale,
            group["weight_decay"],
            correction,
        )


@dataclass
class Delta:
    """Sums over what was subtracted from parameters, before the learning rate."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0


@dataclass(frozen=True)
class Update:
    """One parameter's arrays, flat and equally long (compiled loops do not look), changed in place; float32 but for `grad`, `low`.

    `low`: the 16-bit parameter that `p` is the master of, or None.  `delta`: where to add up what is subtracted, or None.
    """

    p: np.ndarray
    m: np.ndarray
    v: np.ndarray
    grad: np.ndarray
    low: np.ndarray | None
    coefficients: Coefficients
    delta: Delta | None = None

    def chunks(self) -> list[Update]:
        """The update in pieces of `CHUNK` elements at most, which share its arrays."""
        if self.p.size <= CHUNK:
            return [self]
        parts = [slice(start, start + CHUNK) for start in range(0, self.p.size, CHUNK)]
        return [
            replace(self, p=self.p[x], m=self.m[x], v=self.v[x], grad=self.grad[x], low=None if self.low is None else self.low[x])
            for x in parts
        ]
