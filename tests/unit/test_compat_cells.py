"""What a call of a Cell does beside calling its `construct`."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import pytest
from mindspore import nn

from bmtrain_ms.compat.cells import is_only_construct

CHANGES: dict[str, Callable[[nn.Cell], Any]] = {
    "to_float": lambda cell: cell.to_float(ms.float16),
    "to_float above": lambda cell: nn.CellList([cell]).to_float(ms.float16),
    "recompute": lambda cell: cell.recompute(),
    "forward_pre_hook": lambda cell: cell.register_forward_pre_hook(lambda cell, inputs: None),
    "forward_hook": lambda cell: cell.register_forward_hook(lambda cell, inputs, output: None),
    "backward_hook": lambda cell: cell.register_backward_hook(lambda cell, grad_input, grad_output: None),
    "backward_pre_hook": lambda cell: cell.register_backward_pre_hook(lambda cell, grad_output: None),
    "construct of its own": lambda cell: setattr(cell, "construct", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_around_a_construct_is_seen(change: str):
    cell = nn.Dense(2, 2)
    assert is_only_construct(cell)
    CHANGES[change](cell)
    assert not is_only_construct(cell)
