"""Cells whose parameters gather themselves when they are read."""

from __future__ import annotations

from typing import Any

from mindspore import nn

from ..compat.cells import parameter_table
from .param import DistributedParameter


class DistributedModule(nn.Cell):
    """A Cell for layers that are used outside a `Block` too (BMTrain: `DistributedModule`).

    Reading an attribute that is a `DistributedParameter` gathers it, on all ranks together, differentiably, each time: read it
    once per call. Inside a Block the attribute is the already gathered tensor while the Block runs, and the bare parameter (this
    rank's shard) otherwise. `parameter(name)` never gathers.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, DistributedParameter) and not self.__dict__.get("_in_block"):
            return value.gather()
        return value

    def parameter(self, name: str) -> DistributedParameter:
        """The parameter itself, e.g. to freeze it: `layer.parameter("weight").requires_grad = False`."""
        return parameter_table(self)[name]
