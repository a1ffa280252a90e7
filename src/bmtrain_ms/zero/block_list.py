"""Chains of Blocks."""

from __future__ import annotations

import contextlib
from typing import Any, ContextManager, Iterator, Sequence

from mindspore import Tensor, nn, ops

from ..compat.cells import child_table
from .block import Block, CheckpointBlock
from .context import context_of


class TransformerBlockList(nn.Cell):
    """A chain of Blocks (BMTrain: `TransformerBlockList`).

    Args:
        modules: Cells, which are wrapped in `Block`, or Blocks; any iterable. The same Cell twice shares its parameters.
        num_hidden: how many leading arguments are hidden states, each replaced by the outputs of the block before.
        numbers: where these stand in a longer list, of which a pipeline stage has a part: parameters are named by it, and `[...]`
            with a number as text finds a block. Default: from 0.

    `list(h_1, ..., h_n, *others, return_hidden_states=False, **kwargs)`: the other arguments go unchanged to every block. The
    result is the last block's output: a tensor for `num_hidden=1`, else a tuple. With `return_hidden_states` a stacked tensor for
    each hidden state follows, (len(list), *hidden.shape), of the *inputs* of the blocks. May also be iterated, indexed and sliced.

    Raises:
        AssertionError: the same Block twice (as BMTrain).
        ValueError: no modules, or fewer arguments than hidden states.
    """

    def __init__(self, modules: Any, num_hidden: int = 1, *, numbers: Sequence[int] | None = None):
        super().__init__()
        blocks: list[Block] = []
        for module in modules:
            block = module if isinstance(module, Block) else Block(module)
            if any(block is other for other in blocks):
                raise AssertionError("the same Block appears twice in the list; pass its inner module twice to share parameters")
            blocks.append(block)
        if not blocks:
            raise ValueError("a TransformerBlockList needs at least one module")
        numbers = range(len(blocks)) if numbers is None else numbers
        if len(set(numbers)) != len(blocks) or len(numbers) != len(blocks):
            raise ValueError(f"{len(blocks)} modules need as many numbers, all different, not {list(numbers)}")
        self.num_hidden = num_hidden
        named: set[int] = set()
        for i, block in zip(numbers, blocks):
            if id(block.inner) not in named:
                block.update_parameters_name(f"{i}.")
            named.add(id(block.inner))
            child_table(self)[str(i)] = block

    def __len__(self) -> int:
        return len(child_table(self))

    def __iter__(self) -> Iterator[Block]:
        return iter(child_table(self).values())

    def __getitem__(self, index: int | str | slice) -> Any:
        if isinstance(index, str):
            return child_table(self)[index]
        return list(child_table(self).values())[index]

    def construct(self, *args: Any, return_hidden_states: bool = False, **kwargs: Any) -> Any:
        if len(args) < self.num_hidden:
            raise ValueError(f"{self.num_hidden} hidden states are expected as the first arguments, {len(args)} were given")
        hidden, others = args[: self.num_hidden], args[self.num_hidden :]
        seen: list[tuple[Tensor, ...]] = []
        with self._undisturbed():
            for block in self:
                seen.append(hidden)
                out = block(*hidden, *others, **kwargs)
                hidden = out if isinstance(out, tuple) else (out,)
                if len(hidden) != self.num_hidden:
                    raise ValueError(f"a block returned {len(hidden)} tensors for {self.num_hidden} hidden states")
        if return_hidden_states:
            hidden += tuple(ops.stack(list(states)) for states in zip(*seen))
        return hidden[0] if len(hidden) == 1 else hidden

    def _undisturbed(self) -> ContextManager[None]:
        """Between two blocks of the list none of the user's code runs."""
        group = next((group for block in self for group in block.groups), None)
        return contextlib.nullcontext() if group is None else context_of(group.world).pipeline.undisturbed()


__all__ = ["Block", "CheckpointBlock", "TransformerBlockList"]  # BMTrain has them in one module
