"""Adam's arithmetic on the host: one compiled pass over memory, in chunks, on all cores of the process.

In float32 as fast as memory allows, four times as fast as MindSpore's fused operation on CPU (docs/benchmarks/adam.md). Nothing
here depends on the processor.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np

from bmtrain_ms_base import system

from ..compat.runtime import numpy_dtype
from .update import Update


class Workers:
    """Runs functions on the cores of this process; what is compiled lets go of the interpreter."""

    def __init__(self, threads: int | None = None):
        """`threads`: default: the cores that this process may use now, i.e. after `init_distributed`.

        Raises:
            ImportError: numba cannot be imported; now, not at the first step.
        """
        from . import kernels  # noqa: F401

        self.threads = threads or len(system.cores())
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
    """Memory of the largest chunk's size for each thread: what is allocated anew the system provides page by page."""

    def __init__(self) -> None:
        self._wide = np.empty(0, np.float32)

    def of(self, size: int, dtype: Any = np.float32) -> np.ndarray:
        """An array of so many elements, of 32 bits at most; compiled loops, which write here, do not look."""
        if self._wide.size < size:
            self._wide = np.empty(size, np.float32)
        return self._wide.view(dtype)[:size]


_scratch = _Scratch()
_lock = threading.Lock()


def apply_updates(updates: Sequence[Update], workers: Workers) -> None:
    """Apply all updates."""
    workers.map(_apply, [chunk for update in updates for chunk in update.chunks()])


def _apply(x: Update) -> None:
    from . import kernels

    c, grad = x.coefficients, x.grad
    if x.low is not None:
        follow(x.p, x.low)
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
    """The gradient in float32; valid until this thread's next chunk."""
    from . import kernels

    wide = _scratch.of(grad.size)
    if grad.dtype == np.float16:
        kernels.from_float16(as_integers(grad), as_integers(wide))
    elif grad.dtype == numpy_dtype(ms.bfloat16):
        kernels.from_bfloat16(as_integers(grad), as_integers(wide))
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
        kernels.to_float16(as_integers(source), as_integers(out))
    elif out.dtype == numpy_dtype(ms.bfloat16):
        kernels.to_bfloat16(as_integers(source), as_integers(out))
    else:
        np.copyto(out, source)


def follow(master: np.ndarray, low: np.ndarray) -> None:
    """Where 16-bit `low` is not the rounding of its float32 `master`, somebody has written it, and the master becomes equal to it;
    elsewhere, as after loading both in any order, the master keeps its bits. Both flat and equally long."""
    expected = _scratch.of(low.size, low.dtype)
    round_to(master, expected)
    written = as_integers(low) != as_integers(expected)
    if written.any():
        np.copyto(master, low, where=written, casting="unsafe")


def as_integers(array: np.ndarray) -> np.ndarray:
    """The same memory as integers, so that NaN equals itself and -0.0 is not 0.0."""
    return array.view(f"u{array.itemsize}")
