"""Which MindSpore releases are verified, and how a changed one is recognised."""

from __future__ import annotations

import hashlib
import inspect
import os
from typing import Callable

import mindspore

from . import autograd, parameter
from .executor import PyNativeExecutor

OVERRIDE = "BMTRAIN_MS_ALLOW_UNVERIFIED"

# Release -> fingerprint of the functions in `_relied_on`. A release enters this table when the whole test suite passed on it;
# 2.5.0 itself is not on PyPI, its dev wheel of the same week stands for it.
_FINGERPRINT_2_5 = "5ac38a3673e74150"
VERIFIED = {
    "2.5.0": _FINGERPRINT_2_5,
    "2.5.0.dev20250202": _FINGERPRINT_2_5,
    "2.10.0": "0e54949572894900",
}


class UnsupportedMindSporeError(ImportError):
    """This MindSpore has not been verified to work with the run-time patch."""


def version() -> str:
    """MindSpore's version string."""
    return str(mindspore.__version__)


def _relied_on() -> dict[str, Callable]:
    """The private functions that are replaced, or whose behaviour the patch assumes."""
    names = ("__new__", "_get_base_class", "_get_parameter_new_args", "__deepcopy__", "__reduce_ex__")
    functions = {f"Parameter.{name}": parameter.original(name) for name in names}
    functions["PyNativeExecutor.grad"] = autograd.original_grad()
    for name in ("new_graph", "end_graph", "call_custom_bprop", "grad_flag", "enable_grad", "set_enable_grad"):
        functions[f"PyNativeExecutor.{name}"] = vars(PyNativeExecutor)[name]
    return functions


def fingerprint() -> str:
    """Hash of the source text of the private functions in use."""
    digest = hashlib.sha256()
    for name, function in sorted(_relied_on().items()):
        try:
            source = inspect.getsource(getattr(function, "__func__", function))
        except (OSError, TypeError) as error:
            source = f"no source: {error}"
        digest.update(f"{name}\n{source}\n".encode())
    return digest.hexdigest()[:16]


def is_verified(found: str, found_fingerprint: str) -> bool:
    """Whether this version with these functions is in the table."""
    return VERIFIED.get(found) == found_fingerprint


def check() -> None:
    """Raise `UnsupportedMindSporeError` unless this MindSpore is verified or the override is set."""
    found, found_fingerprint = version(), fingerprint()
    if is_verified(found, found_fingerprint) or os.environ.get(OVERRIDE) == "1":
        return
    if found in VERIFIED:
        what = f"MindSpore {found} is installed, but its Parameter/PyNative functions differ from the verified ones "
        what += f"(fingerprint {found_fingerprint}, verified {VERIFIED[found]}): was its source edited?"
    else:
        what = f"MindSpore {found} (fingerprint {found_fingerprint}) is not verified with this bmtrain_ms."
    raise UnsupportedMindSporeError(
        f"{what} Verified releases: {', '.join(VERIFIED)}. Install one of them, or set {OVERRIDE}=1 to go on at your own risk "
        "(run the test suite first)."
    )
