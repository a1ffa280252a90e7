"""How this process computes: on the host, where NumPy sees the memory of tensors, or on a device, where it does not.

Every choice between the two asks here, and nobody else asks MindSpore what its device is: so a *rehearsal* can make all of them
as on a device while MindSpore computes on CPU. See `init_distributed`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import mindspore as ms

from bmtrain_ms_base.launchers import REHEARSE


@dataclass(frozen=True)
class Device:
    """What this process computes on.

    Attributes:
        target: of MindSpore, `CPU` or `Ascend`.
        rehearsed: whether everything but MindSpore is as on a device.
    """

    target: str
    rehearsed: bool = False

    chosen: ClassVar[Device | None] = None  # for this process, by `choose`

    @property
    def on_host(self) -> bool:
        """Whether tensors are in host memory, and NumPy may see it there."""
        return self.target == "CPU" and not self.rehearsed


def asked_for(target: str | None = None) -> Device:
    """The device that a caller names, or MindSpore's own; a rehearsal where the environment asks for one.

    Raises:
        RuntimeError: a rehearsal is asked for on a device.
        ValueError: the environment's variable is neither 1 nor 0.
    """
    word = os.environ.get(REHEARSE, "0")
    if word not in ("", "0", "1"):
        raise ValueError(f"{REHEARSE}={word!r}: write 1 to rehearse on CPU what an Ascend device would run, or 0")
    if word != "1":
        return Device(target or str(ms.get_context("device_target")))
    if target not in (None, "CPU"):
        raise RuntimeError(f"{REHEARSE}=1 rehearses a device on CPU: leave device={target!r} out, or write {REHEARSE}=0")
    return Device("CPU", rehearsed=True)


def choose(device: Device) -> None:
    """From now on compute so; for `init_distributed`."""
    Device.chosen = device


def on_host() -> bool:
    """Whether NumPy may see the memory of tensors; as chosen, and before that as the environment and MindSpore say."""
    return (Device.chosen or asked_for()).on_host


def rehearsed() -> bool:
    """Whether this is a rehearsal."""
    return (Device.chosen or asked_for()).rehearsed
