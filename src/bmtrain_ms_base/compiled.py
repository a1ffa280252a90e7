"""Loops that numba compiles for this processor at their first call, some tenths of a second each, and keeps on disk.

Importing this imports numba, which takes longer than all of bmtrain_ms: import it where it is used.

Raises:
    ImportError: numba cannot be imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

try:
    import llvmlite.binding
    import numba
    from numba import config, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError(f"operations and optimizers on the host are compiled by numba, and it cannot be imported: {error}") from error

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


def _reinterpreted(source: Any, target: Any) -> Any:
    def reinterpret(typing: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), generate

    return intrinsic(reinterpret)


bits_of = _reinterpreted(types.float32, types.int32)
"""In compiled loops: the int32 that has the bits of a float32."""

float_of = _reinterpreted(types.int32, types.float32)
"""In compiled loops: the float32 that has the bits of an int32."""
