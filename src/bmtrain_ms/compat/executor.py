"""MindSpore's PyNative executor: where it lives, and the few of its methods that are used."""

from __future__ import annotations

import inspect

try:  # since 2.9 the old module warns on import
    from mindspore.graph import api as _api
except ImportError:  # 2.5
    from mindspore.common import api as _api

PyNativeExecutor = _api._PyNativeExecutor
executor = _api._pynative_executor
no_grad = _api._no_grad
JitExecutor = getattr(_api, "_JitExecutor", None) or _api._MindsporeFunctionExecutor  # 2.5
GRAD_TAKES_HAS_AUX = "has_aux" in inspect.signature(PyNativeExecutor.grad).parameters


def recording() -> bool:
    """Whether operations executed now are recorded for a backward pass."""
    return executor.grad_flag() and executor.enable_grad()
