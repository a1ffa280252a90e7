"""Passes during which parameters stay as they are."""

from __future__ import annotations

import contextlib
from typing import Iterator

from mindspore import nn

from .block import Block
from .context import ZeroContext, context_of
from .group import ParamGroup
from .param import DistributedParameter


@contextlib.contextmanager
def unwritten(model: nn.Cell) -> Iterator[None]:
    """Inside the `with` statement nobody writes the model's parameters, and no gradients are taken: on CPU those that this rank has
    all of are used where they are, instead of being copied for each use."""
    blocks = [cell for _, cell in model.cells_and_names() if isinstance(cell, Block)]
    inside = {id(p) for block in blocks for p in block.get_parameters()}
    groups = [group for block in blocks for group in block.groups]
    groups += [p.alone for p in model.get_parameters() if isinstance(p, DistributedParameter) and id(p) not in inside]
    by_context: dict[ZeroContext, list[ParamGroup]] = {}
    for group in groups:
        if group.is_whole:
            by_context.setdefault(context_of(group.world), []).append(group)
    with contextlib.ExitStack() as stack:
        for context, found in by_context.items():
            stack.enter_context(context.pipeline.hold(found, share=True))
        yield
