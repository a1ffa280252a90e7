"""The tables in which a Cell keeps its parameters and children, and its mode."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

from mindspore import ParameterTuple, nn

_HOOKS = ("_forward_pre_hook", "_forward_hook", "_backward_pre_hook", "_backward_hook")
_MORE_THAN_CONSTRUCT = (
    *(name for hook in _HOOKS for name in (hook, f"_lazy{hook}", f"{hook}_with_kwargs", f"_lazy{hook}_with_kwargs")),
    *("mixed_precision_type", "fp16", "fp32", "bf16", "_has_config_recompute", "construct"),
)


def parameter_table(cell: nn.Cell) -> dict[str, Any]:
    """Attribute name -> Parameter, of the cell itself; the live table."""
    return cell._params


def parameter_at(cell: nn.Cell, name: str) -> Any:
    """The parameter of this attribute name of the cell itself; None: there is none, or the cell is not made yet."""
    return (vars(cell).get("_params") or {}).get(name)


def child_table(cell: nn.Cell) -> dict[str, Any]:
    """Attribute name -> Cell, of the cell itself; the live table."""
    return cell._cells


def parameter_lists(cell: nn.Cell) -> dict[str, Any]:
    """Attribute name -> ParameterTuple; what is in it is in the parameter table too, under its own name."""
    plain = {name: value for name, value in vars(cell).items() if isinstance(value, ParameterTuple)}  # 2.10
    return {**(vars(cell).get("_params_list") or {}), **plain}


def share_tables(cell: nn.Cell, with_cell: nn.Cell) -> None:
    """Let `cell` have the parameters, children and buffers of `with_cell`: to every walk over them it looks like that cell."""
    for table in ("_params", "_cells", "_buffers"):  # buffers since 2.7
        if hasattr(with_cell, table):
            cell.__dict__[table] = getattr(with_cell, table)


def drop_rate(dropout: nn.Dropout) -> float:
    """The probability of a `mindspore.nn.Dropout`, which has either `p` or the older `keep_prob`."""
    return 1.0 - dropout.keep_prob if dropout.p is None else dropout.p


def is_only_construct(cell: nn.Cell) -> bool:
    """Whether a call of the cell does nothing but call the `construct` of its class: no hook, no cast that `to_float` asked for,
    here or above, no recomputation of MindSpore's, and no `construct` of its own."""
    values = vars(cell)
    return not any(values.get(name) for name in _MORE_THAN_CONSTRUCT)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside the `with` statement the model evaluates; afterwards each of its cells is in the mode that it was in, also where a
    part of it is never in training (a frozen dropout or statistics)."""
    training = model.training
    cells = (cell for _, cell in model.cells_and_names()) if isinstance(model, nn.Cell) else ()
    others = [cell for cell in cells if cell.training != training]
    model.set_train(False)
    try:
        yield
    finally:
        model.set_train(training)
        for cell in others:
            cell.add_flags(training=not training)
