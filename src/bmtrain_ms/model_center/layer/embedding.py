"""The token embedding."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor

from ...nn import VPEmbedding, functional
from ...nn.tensor_parallel import take_over
from ...zero import DistributedModule, DistributedParameter, ParameterInitializer, empty, init


class ParallelEmbedding(VPEmbedding):
    """What an `Embedding` becomes over tensor-parallel ranks, which have some of the vocabulary each, and some of the rows of
    hidden states; it is called as an `Embedding` is."""

    @classmethod
    def of(cls, embedding: Embedding) -> ParallelEmbedding:
        """A parallel embedding with the weight of `embedding`, under the same name and with the same values."""
        weight = embedding.parameter("weight")
        vocab_size, embedding_size = weight.layout.whole
        return take_over(embedding, cls(vocab_size, embedding_size, weight.dtype, scatter_output=True))

    def projection(self, x: Tensor, gather_input: bool = True, gather_output: bool = True) -> Tensor:
        """This rank's part of the hidden states (rows, embedding_size) -> logits of all rows and the whole vocabulary."""
        return super().projection(x, gather_input, gather_output)


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

    def cross_entropy(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The loss of the logits of `projection` for x (rows, embedding_size), see `functional.linear_cross_entropy`."""
        return functional.linear_cross_entropy(x, self.weight, targets, **options)
