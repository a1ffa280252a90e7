"""What a cell's attribute gives where the parameter itself is a shard: a copy of the whole, which is not the parameter.

Code that was written for a `Parameter` freezes it, puts hooks on it and writes it through the same attribute. On a mere tensor the
first two would do nothing without a word, and so would a write. `ReadCopy` hands the one on, and refuses the other.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import numpy as np
from mindspore import Parameter, Tensor

_WRITING = ("__setitem__", "assign_value", "set_data")


class ReadCopy:
    """A gathered copy of a parameter, for those who compute with it or look at it; a tensor's class besides its own.

    Whether a gradient is taken, hooks and the name are the parameter's. Writes are refused: the parameter would not see them.
    """

    __slots__ = ()  # otherwise a tensor cannot be given the class
    read_of: Parameter

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return self.read_of.name

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient of the parameter is taken; to be set, too."""
        return self.read_of.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.read_of.requires_grad = value

    def register_hook(self, hook: Callable) -> Any:
        """Register a hook on the parameter."""
        return self.read_of.register_hook(hook)

    def asnumpy(self) -> np.ndarray:
        """The values, which cannot be written: on the host an array shares the memory of its tensor."""
        array = super().asnumpy().view()
        array.flags.writeable = False
        return array

    def __deepcopy__(self, memo: dict) -> Tensor:
        return Tensor(self.asnumpy())  # as of a Parameter: MindSpore's copies of mere tensors share their memory


def _refusing(name: str) -> Callable:
    def refuse(self: ReadCopy, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(no_write(self.read_of))

    refuse.__name__ = name
    refuse.__doc__ = "Refused: the parameter would not see it."
    return refuse


for _name in (*_WRITING, *(x for x in dir(Tensor) if x.endswith("_") and not x.startswith("_"))):  # zero_, copy_, add_ ...
    setattr(ReadCopy, _name, _refusing(_name))


def as_read(tensor: Tensor, parameter: Parameter) -> Tensor:
    """The same tensor, as a copy of `parameter`."""
    if Tensor not in type(tensor).__mro__:
        return tensor  # a device on 2.5: what operations return there takes no other class, so nothing is noticed
    if not isinstance(tensor, ReadCopy):
        tensor.__class__ = _class_of(type(tensor))
    tensor.read_of = parameter
    return tensor


@functools.cache
def _class_of(kind: type) -> Any:
    """The class for a tensor of class `kind`, Tensor or one that derives from it."""
    return type("ReadCopy", (ReadCopy, kind), {"__module__": __name__, "__slots__": ()})


def no_write(parameter: Parameter) -> str:
    """What those are told who write a parameter where they have a copy of it."""
    return (
        f"each rank has a shard of {parameter.name}, and a read of it gives a copy of the whole, so that what is written there "
        "would be lost: write whole values with copy_full of its cell's parameter(name); what a model itself updates while it runs "
        "(a statistic, a centre, a counter) has to be named in buffers=[...] of BMTrainModelWrapper, or be a plain Parameter with "
        "requires_grad=False"
    )
