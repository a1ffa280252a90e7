"""Cells whose parameters gather themselves when they are read."""

from __future__ import annotations

from typing import Any

from mindspore import Parameter, Tensor, nn

from ..compat.cells import parameter_at, parameter_table
from ..compat.reads import no_write
from .param import DistributedParameter


class DistributedModule(nn.Cell):
    """A Cell for layers that are used outside a `Block` too (BMTrain: `DistributedModule`).

    Reading an attribute that is a `DistributedParameter` gathers it, on all ranks together, differentiably, each time: read it
    once per call. What it gives is for computing and looking: setting its `requires_grad`, and hooks, act on the parameter; writing
    it, or giving the attribute a tensor, is refused. Inside a Block the attribute is the already gathered tensor while the Block
    runs, and the bare parameter (this rank's shard) otherwise. `parameter(name)` never gathers.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, DistributedParameter) and not self.__dict__.get("_in_block"):
            return value.read()
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, Parameter):
            p = parameter_at(self, name)
            if isinstance(p, DistributedParameter):
                raise RuntimeError(no_write(p))  # MindSpore would take the values for those of the shard
        super().__setattr__(name, value)

    def parameter(self, name: str) -> DistributedParameter:
        """The parameter itself, e.g. to freeze it: `layer.parameter("weight").requires_grad = False`."""
        return parameter_table(self)[name]
