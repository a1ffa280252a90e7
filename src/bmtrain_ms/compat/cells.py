"""The tables in which a Cell keeps its parameters and children."""

from __future__ import annotations

from typing import Any

from mindspore import nn


def parameter_table(cell: nn.Cell) -> dict[str, Any]:
    """Attribute name -> Parameter, of the cell itself; the live table."""
    return cell._params


def child_table(cell: nn.Cell) -> dict[str, Any]:
    """Attribute name -> Cell, of the cell itself; the live table."""
    return cell._cells


def share_tables(cell: nn.Cell, with_cell: nn.Cell) -> None:
    """Let `cell` have the parameters and children of `with_cell`: to every walk over them it looks like that cell."""
    cell.__dict__["_params"], cell.__dict__["_cells"] = with_cell._params, with_cell._cells
