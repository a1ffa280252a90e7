"""How a plain model becomes a parallel one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence, TypeVar

from mindspore import nn

from ..comm import world as current_world
from ..nn.tensor_parallel import dividing
from ..zero import Block, TransformerBlockList
from .layer import Encoder
from .staged import StagedModel, Stages

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


def spread(model: Model, how: Spread = Spread(), stages: str | Sequence[int] | Stages | None = None) -> Model:
    """Have each repeated layer of a model gather its parameters as a whole, ahead of its call, divide all of them over the
    tensor-parallel ranks, and leave each rank of a pipeline its stages only; in place.

    Exchange its layers before (adapters may be added after, too), and initialise or load it before or after. Parameters are named
    by their path in `model`, as they were when it was built; where it is part of a bigger Cell, spread the bigger one. A model that
    is not spread computes the same: each of its parameters is gathered alone, when it is read.

    In stages, what other ranks of the pipeline have is gone from the model, and its memory, if it had been given values, is free;
    layers keep their numbers and names. Spread first and initialise then, and nothing is ever allocated for it. What trains is
    `manager.backward(model.loss, *batch)`, with the same rows on all ranks of a pipeline (`mesh.dp_rank` says which);
    `model.loss(*batch)` and `model(ids)` evaluate, with the same result on all of them. A tied table is on the first and on the
    last stage.

    Args:
        model: of `model_center.model`, or one that has an `Encoder` in it.
        how: what is kept for the backward pass.
        stages: how layers are divided over the `pipe_size` ranks of a pipeline, and in which order they compute: `Stages`, or its
            layout alone; None: evenly. With `pipe_size=1` `Stages` divide batches into micro-batches.

    Returns:
        `model`.

    Raises:
        TypeError: it has no `Encoder`, or is no language model that can be divided into stages.
        ValueError: it has been spread, a layer cannot be a `Block`, or cannot be divided over so many ranks; see `Stages`.
    """
    encoders = [cell for _, cell in model.cells_and_names() if isinstance(cell, Encoder)] if isinstance(model, nn.Cell) else []
    if not encoders:
        raise TypeError(
            f"spread takes a model made of the layers of model_center, with an Encoder in it, and {type(model).__name__} has none: "
            "use BMTrainModelWrapper"
        )
    if "stages" in vars(model) or any(isinstance(encoder.layers, TransformerBlockList) for encoder in encoders):
        raise ValueError(f"this {type(model).__name__} has been spread already: a model is spread once")
    staged: StagedModel | None = None
    if stages is not None or current_world().mesh.pp > 1:
        stages = stages if isinstance(stages, Stages) else Stages(stages)
        staged = StagedModel(model, stages, how.recompute, current_world(), hold=how.zero_level == 2)
    ranks = current_world().along("tp").size
    if ranks > 1:
        with dividing(model):
            for cell in [cell for _, cell in model.cells_and_names() if hasattr(cell, "divide")]:
                cell.divide(ranks)
    # Order matters. What takes layers away or exchanges them belongs in front of the Blocks, which hold a layer to what it was when
    # it was wrapped. Names come last: MindSpore renames the parameters of a Cell that is put somewhere.
    if staged is None:
        for encoder in encoders:
            encoder.layers = TransformerBlockList(Block(layer, how.recompute, how.zero_level) for layer in encoder.layers)
    elif staged.numbers:  # which recomputes by itself, and then gathers once for recomputation and differentiation
        level = 2 if how.recompute else how.zero_level
        blocks = [Block(layer, use_checkpoint=False, zero_level=level) for layer in staged.encoder.layers]
        staged.encoder.layers = TransformerBlockList(blocks, numbers=staged.numbers)
    model.update_parameters_name()
    if staged is not None:
        staged.attach()
    model.__dict__["spread_as"] = how, stages  # for who makes another one like it
    return model
