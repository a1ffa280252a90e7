"""A model without any of the ZeRO engine around it: what one unsharded MindSpore process does."""

from __future__ import annotations

from typing import Any


def unshard(model: Any) -> Any:
    """Replace every parameter by a plain one with its full values, and every Block by the module inside. World size 1."""
    from mindspore import Parameter, Tensor

    from bmtrain_ms.compat.cells import child_table, parameter_table
    from bmtrain_ms.compat.runtime import host_array
    from bmtrain_ms.zero import Block

    made: dict[int, Parameter] = {}
    for _, cell in list(model.cells_and_names()):
        for name, child in child_table(cell).items():
            if isinstance(child, Block):
                child_table(cell)[name] = child.inner
        for name, p in parameter_table(cell).items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = Parameter(Tensor(host_array(p).reshape(p.full_shape).copy()), name=p.name)
                parameter_table(cell)[name] = made[id(p)]
    return model
