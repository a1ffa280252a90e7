"""How many parameters a model has, of its sizes alone."""

from __future__ import annotations

import math
from typing import Any, Callable

from mindspore import nn

from ..comm import Mesh, SimulatedEngine, World, use_world
from ..nn import MoE

_RANKS = 1 << 13  # of a world in which a rank's part of any model is small


def parameter_count(model: Callable[[Any], nn.Cell], config: Any, active: bool = False) -> int:
    """How many parameters `model(config)` would have; no more memory is taken than a rank of a very large world would need.

    Args:
        model: makes it, e.g. `Llama`.
        config: its sizes.
        active: only those that a token uses: of the experts of a `MoE` as many as it chooses.
    """
    with use_world(World(SimulatedEngine(0, _RANKS), Mesh(_RANKS, 0))):
        made = model(config)
        total = sum(_elements(p) for p in made.get_parameters())
        if active:
            for cell in [cell for _, cell in made.cells_and_names() if isinstance(cell, MoE)]:
                of_experts = sum(_elements(p) for p in cell.experts.get_parameters())
                total -= of_experts - of_experts * cell.gate.top_k // cell.gate.experts
    return total


def _elements(parameter: Any) -> int:
    return math.prod(getattr(parameter, "full_shape", parameter.shape))
