"""How a plain model becomes a parallel one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from mindspore import nn

from ..comm import world
from ..zero import Block, TransformerBlockList
from .layer import Encoder

Model = TypeVar("Model", bound=nn.Cell)


@dataclass(frozen=True)
class Spread:
    """How a model is spread over the ranks, and what of it is kept for the backward pass.

    `recompute`: the layers compute again in the backward pass instead of keeping their activations.  `zero_level`: 3 gathers a
    layer's parameters again for the backward pass; 2 keeps them.

    Raises:
        ValueError: `zero_level` is not 2 or 3.
    """

    recompute: bool = True
    zero_level: int = 3

    def __post_init__(self) -> None:
        if self.zero_level not in (2, 3):
            raise ValueError(f"zero_level must be 2 or 3, not {self.zero_level!r}")


def spread(model: Model, how: Spread = Spread()) -> Model:
    """Have each repeated layer of a model gather its parameters as a whole, ahead of its call, and divide all of them over the
    tensor-parallel ranks; in place.

    Change the model (adapters, other layers) before, and initialise or load it before or after. Parameters are named by their path
    in `model`, as they were when it was built; where it is part of a bigger Cell, spread the bigger one. A model that is not spread
    computes the same: each of its parameters is gathered alone, when it is read.

    Returns:
        `model`.

    Raises:
        TypeError: it has no `Encoder`.
        ValueError: it has been spread, a layer cannot be a `Block`, or cannot be divided over so many ranks.
    """
    encoders = [cell for _, cell in model.cells_and_names() if isinstance(cell, Encoder)] if isinstance(model, nn.Cell) else []
    if not encoders:
        raise TypeError(
            f"spread takes a model made of the layers of model_center, with an Encoder in it, and {type(model).__name__} has none: "
            "use BMTrainModelWrapper"
        )
    if any(isinstance(encoder.layers, TransformerBlockList) for encoder in encoders):
        raise ValueError(f"this {type(model).__name__} has been spread already: a model is spread once")
    ranks = world().along("tp").size
    if ranks > 1:
        for cell in [cell for _, cell in model.cells_and_names() if hasattr(cell, "divide")]:
            cell.divide(ranks)
    # Order matters. What takes layers away or exchanges them belongs in front of the Blocks, which hold a layer to what it was when
    # it was wrapped. Names come last: MindSpore renames the parameters of a Cell that is put somewhere.
    for encoder in encoders:
        encoder.layers = TransformerBlockList(Block(layer, how.recompute, how.zero_level) for layer in encoder.layers)
    model.update_parameters_name()
    return model
