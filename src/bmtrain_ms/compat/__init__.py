"""The only package that touches non-public MindSpore names.

`install()` makes `Parameter` subclassable at run time and lets the ZeRO engine know when a backward pass has ended.
Importing `bmtrain_ms` calls it. No file of MindSpore is ever written, and `uninstall()` puts everything back.

What is done, why, and when it can go:

* `Parameter.__new__`, `Parameter._get_base_class` name the class `Parameter` literally, so an instance of a subclass comes out
  as a plain `Parameter` (2.5 – 2.10); `__deepcopy__` and `__reduce_ex__` do the same for copies. See `compat.parameter`.
* `_PyNativeExecutor.grad` has no public "backward has ended" event, and a failed forward pass (`_pynative_forward_run`) leaves
  the executor recording. See `compat.autograd`.
* What MindSpore does with whole parameters only, compiling, saving, sharing the work out, is refused. See `compat.habits`.
* So is what would write a copy of a sharded parameter instead of the parameter. See `compat.reads`.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import autograd, habits, parameter, versions
from .versions import UnsupportedMindSporeError

__all__ = ["Status", "UnsupportedMindSporeError", "install", "status", "uninstall"]


@dataclass(frozen=True)
class Status:
    """What `status()` reports.

    `installed`: the patch is on.  `version`: MindSpore's version.  `verified`: version and fingerprint are in the table.
    `fingerprint`: hash of the source of every function that is replaced or relied on.
    """

    installed: bool
    version: str
    verified: bool
    fingerprint: str


def install() -> None:
    """Patch MindSpore; does nothing when it already is.

    Raises:
        UnsupportedMindSporeError: this MindSpore is not in the table of verified releases, or its functions differ from the
            ones that were verified, and `BMTRAIN_MS_ALLOW_UNVERIFIED` is not `1`.
    """
    if parameter.is_installed():
        return
    versions.check()
    parameter.install()
    autograd.install()
    habits.install()


def uninstall() -> None:
    """Put MindSpore's own functions back; does nothing when the patch is off.

    Parameters that exist keep their class. New instances of a subclass come out as plain `Parameter` again.
    """
    habits.uninstall()
    autograd.uninstall()
    parameter.uninstall()


def status() -> Status:
    """Whether the patch is on, and for which MindSpore."""
    version, fingerprint = versions.version(), versions.fingerprint()
    return Status(parameter.is_installed(), version, versions.is_verified(version, fingerprint), fingerprint)
