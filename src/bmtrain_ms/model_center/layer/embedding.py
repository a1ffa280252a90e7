"""Token embedding."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor

from ...nn import functional
from ...zero import DistributedModule, DistributedParameter, ParameterInitializer, empty, init


class Embedding(DistributedModule):
    """A table of vectors; also the output projection of a tied model (ModelCenter: `Embedding`).

    Args:
        vocab_size, embedding_size: shape of the table.
        dtype: of the table.
        init_std: of the normal distribution that it starts with.
    """

    def __init__(self, vocab_size: int, embedding_size: int, dtype: Any = ms.float32, init_std: float = 0.02):
        super().__init__()
        method = ParameterInitializer(init.normal_, std=init_std)
        self.weight = DistributedParameter(empty(vocab_size, embedding_size, dtype=dtype), init_method=method)

    def construct(self, ids: Tensor) -> Tensor:
        """ids (...) of int32 in [0, vocab_size) -> (..., embedding_size)."""
        return functional.embedding(ids, self.weight)

    def projection(self, x: Tensor) -> Tensor:
        """x (..., embedding_size) -> logits (..., vocab_size) with the same table."""
        return functional.linear(x, self.weight)
