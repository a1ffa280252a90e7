"""Adam's arithmetic on the host: NumPy, in chunks that stay in the cache, on all cores of the process.

A fused operation of MindSpore's reaches a quarter of the memory's bandwidth on CPU; this reaches 0.3 to 0.7 of it, by processor and
cores (docs/benchmarks/adam.md). Nothing here depends on the processor.
"""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional, Sequence

import mindspore as ms
import numpy as np

from ..compat.runtime import numpy_dtype

CHUNK = 1 << 18  # elements: large enough that the interpreter's part is small, small enough for the cache


@dataclass(frozen=True)
class Coefficients:
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
        """For the step-th step, counted from 1, with a group's settings; gradients are multiplied by `scale`."""
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
    """One parameter's arrays, flat and equally long, all but `grad` float32; changed in place.

    `low`: the 16-bit parameter that `p` is the master of, or None.  `delta`: where to add up what is subtracted, or None.
    """

    p: np.ndarray
    m: np.ndarray
    v: np.ndarray
    grad: np.ndarray
    low: Optional[np.ndarray]
    coefficients: Coefficients
    delta: Optional[Delta] = None

    def chunks(self) -> list[Update]:
        """The same in pieces."""
        if self.p.size <= CHUNK:
            return [self]
        parts = [slice(start, start + CHUNK) for start in range(0, self.p.size, CHUNK)]
        return [
            replace(self, p=self.p[x], m=self.m[x], v=self.v[x], grad=self.grad[x], low=None if self.low is None else self.low[x])
            for x in parts
        ]


class Workers:
    """Runs functions on the cores of this process; NumPy lets go of the interpreter while it computes."""

    def __init__(self, threads: int | None = None):
        """`threads`: default: the cores that this process may use now, i.e. after `init_distributed`."""
        self.threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self.threads, "bmtrain_ms-adam") if self.threads > 1 else None

    def map(self, function: Callable[[Any], None], items: Sequence[Any]) -> None:
        """Call `function` on every item; raises what one of them raised, after all have ended."""
        if self._pool is None or len(items) < 2:
            for item in items:
                function(item)
            return
        left = iter(items)  # shared: who is done takes the next

        def work() -> None:
            for item in left:
                function(item)

        futures = [self._pool.submit(work) for _ in range(min(self.threads, len(items)))]
        for future in futures:
            future.exception()  # wait for all before one of them raises
        for future in futures:
            future.result()


class _Scratch(threading.local):
    """Two arrays of a chunk's size for each thread."""

    def __init__(self) -> None:
        self.t, self.u = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)


_scratch = _Scratch()
_lock = threading.Lock()


def run(updates: Sequence[Update], workers: Workers) -> None:
    """Apply all updates."""
    workers.map(_apply, [chunk for update in updates for chunk in update.chunks()])


def _apply(x: Update) -> None:
    c, n = x.coefficients, x.p.size
    t, u = _scratch.t[:n], _scratch.u[:n]
    p, m, v, g = x.p, x.m, x.v, x.grad
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if g.dtype != np.float32:
            u[...] = g
            g = u
        if c.factor != 1.0:
            np.multiply(g, np.float32(c.factor), u)
            g = u
        np.multiply(m, np.float32(c.beta1), m)
        np.multiply(g, np.float32(1.0 - c.beta1), t)
        np.add(m, t, m)
        np.multiply(g, g, t)
        np.multiply(t, np.float32(1.0 - c.beta2), t)
        np.multiply(v, np.float32(c.beta2), v)
        np.add(v, t, v)
        if x.delta is None and c.rate == 0.0:
            return
        np.sqrt(v, t)
        np.add(t, np.float32(c.eps), t)
        np.divide(m, t, t)
        if x.delta is not None:
            _note(x.delta, p, t, u, c)
        if c.rate == 0.0:
            return
        np.multiply(t, np.float32(c.rate), t)
        if c.keep != 1.0:
            np.multiply(p, np.float32(c.keep), p)
        np.subtract(p, t, p)
        if x.low is not None:
            round_to(p, x.low)


def _note(delta: Delta, p: np.ndarray, t: np.ndarray, u: np.ndarray, c: Coefficients) -> None:
    np.multiply(t, np.float32(c.correction), u)
    if c.decay:
        u += np.float32(c.decay) * p
    total, squares = float(np.sum(u, dtype=np.float64)), float(np.dot(u, u))
    with _lock:
        delta.total += total
        delta.squares += squares


def round_to(source: np.ndarray, out: np.ndarray) -> None:
    """float32 -> float16 or bfloat16, to the nearest value, ties to even."""
    if out.dtype != numpy_dtype(ms.bfloat16):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(out, source, casting="same_kind")
        return
    wide = source.view(np.uint32)  # the type's own cast takes twice as long
    rounded = ((wide >> 16) & 1) + wide + np.uint32(0x7FFF)
    nan = np.isnan(source)
    if nan.any():
        rounded[nan] = wide[nan] | np.uint32(0x400000)
    out.view(np.uint16)[...] = rounded >> 16


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers, so that NaN equals itself and -0.0 is not 0.0."""
    return array.view(f"u{array.itemsize}")
