"""Adam's arithmetic on the host: one compiled pass over memory, in chunks, on all cores of the process.

In float32 as fast as memory allows, four times as fast as MindSpore's fused operation on CPU (docs/benchmarks/adam.md). Nothing
here depends on the processor.
"""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Callable, NamedTuple, Optional, Sequence

import mindspore as ms
import numpy as np

from ..compat.runtime import numpy_dtype

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
    """One parameter's arrays, flat and equally long (compiled loops do not look), changed in place; float32 but for `grad`, `low`.

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
    """Runs functions on the cores of this process; what is compiled lets go of the interpreter."""

    def __init__(self, threads: int | None = None):
        """`threads`: default: the cores that this process may use now, i.e. after `init_distributed`.

        Raises:
            ImportError: numba cannot be imported; now, not at the first step.
        """
        try:
            from . import kernels  # noqa: F401
        except ImportError as error:
            raise ImportError(f"Adam on the host is compiled by numba, and it cannot be imported: {error}") from error
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
    """An array of a chunk's size for each thread: what is allocated anew has to be provided by the system, page by page."""

    def __init__(self) -> None:
        self.wide = np.empty(CHUNK, np.float32)


_scratch = _Scratch()
_lock = threading.Lock()


def run(updates: Sequence[Update], workers: Workers) -> None:
    """Apply all updates."""
    workers.map(_apply, [chunk for update in updates for chunk in update.chunks()])


def _apply(x: Update) -> None:
    from . import kernels

    c, grad = x.coefficients, x.grad
    if grad.dtype != np.float32:
        grad = _widened(grad)
    if x.delta is not None:
        total, squares = kernels.deltas(x.p, x.m, x.v, grad, c)
        with _lock:
            x.delta.total += total
            x.delta.squares += squares
    kernels.adam(x.p, x.m, x.v, grad, c)
    if x.low is not None and c.rate != 0.0:
        round_to(x.p, x.low)


def _widened(grad: np.ndarray) -> np.ndarray:
    """In float32; valid until this thread's next chunk."""
    from . import kernels

    wide = _scratch.wide[: grad.size]
    if grad.dtype == np.float16:
        kernels.from_float16(bits(grad), bits(wide))
    elif grad.dtype == numpy_dtype(ms.bfloat16):
        kernels.from_bfloat16(bits(grad), bits(wide))
    else:
        with np.errstate(over="ignore", under="ignore"):
            np.copyto(wide, grad, casting="unsafe")
    return wide


def round_to(source: np.ndarray, out: np.ndarray) -> None:
    """float32 -> float16 or bfloat16, to the nearest value, ties to even; or a copy. Both flat and equally long."""
    from . import kernels

    if source.size != out.size:
        raise ValueError(f"{source.size} values do not fit into {out.size}")
    if out.dtype == np.float16:
        kernels.to_float16(bits(source), bits(out))
    elif out.dtype == numpy_dtype(ms.bfloat16):
        kernels.to_bfloat16(bits(source), bits(out))
    else:
        np.copyto(out, source)


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers, so that NaN equals itself and -0.0 is not 0.0."""
    return array.view(f"u{array.itemsize}")
