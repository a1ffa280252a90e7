"""Loops that numba compiles for this processor at their first call, some tenths of a second each, and keeps on disk.

Importing this imports numba, 0.1 s: import it where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

import llvmlite.binding
import numba
from numba import config

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(reassociate: bool = False) -> Callable[[Function], Function]:
    """Compile a function of arrays and numbers, which then lets go of the interpreter; 1 / 0 is inf.

    To be called with arguments of the same types always: then ranks that compile at the same time all write the same file.

    Args:
        reassociate: sums may be added up in another order, and x * y + z rounded once, so that loops fill vector registers. inf and
            nan stay what they are. Otherwise: IEEE in the order that is written, the same bits on every processor.
    """

    def decorate(function: Any) -> Any:
        freedom = {"reassoc", "contract", "nsz"} if reassociate else False  # not left out: it would be the caller's
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": freedom}
        with _cache_folder():
            try:
                return numba.njit(cache=True, **options)(function)
            except RuntimeError:  # there is no folder that may be written
                return numba.njit(**options)(function)

    return decorate


@contextlib.contextmanager
def _cache_folder() -> Iterator[None]:
    """One for each kind of processor: hosts that share a home write into files of their own."""
    before = config.CACHE_DIR
    processor = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    base = Path(before) if before else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bmtrain_ms"
    config.CACHE_DIR = str(base / "kernels" / hashlib.sha256(processor.encode()).hexdigest()[:16])
    try:
        yield
    finally:
        config.CACHE_DIR = before
