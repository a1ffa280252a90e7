"""Transformer block, and a stack of them."""

from __future__ import annotations

from typing import Any, Iterable, Optional

import mindspore as ms
from mindspore import Tensor, nn

from ...comm import world
from .attention import Attention
from .cache import KeyValueCache, LayerCache
from .embedding import ParallelEmbedding
from .feedforward import FeedForward
from .norm import RMSNorm
from .positions import Positions
from .rotary import RotaryEmbedding


class TransformerBlock(nn.Cell):
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x)) (ModelCenter: `TransformerBlock`).

    Args:
        dim_model, dim_ff, num_heads, dim_head, num_heads_kv: sizes, see `Attention` and `FeedForward`.
        norm_eps: of the two norms.
        dtype, init_std: of the parameters.
        rotary: see `Attention`.
    """

    def __init__(
        self,
        dim_model: int,
        dim_ff: int,
        num_heads: int,
        dim_head: int,
        num_heads_kv: Optional[int] = None,
        norm_eps: float = 1e-5,
        dtype: Any = ms.float32,
        init_std: float = 0.02,
        rotary: Optional[RotaryEmbedding] = None,
    ):
        super().__init__()
        self.input_layernorm = RMSNorm(dim_model, norm_eps, dtype)
        self.self_attn = Attention(dim_model, num_heads, dim_head, num_heads_kv, dtype=dtype, init_std=init_std, rotary=rotary)
        self.post_attention_layernorm = RMSNorm(dim_model, norm_eps, dtype)
        self.mlp = FeedForward(dim_model, dim_ff, dtype=dtype, init_std=init_std)

    def construct(self, hidden: Tensor, positions: Positions, cache: Optional[LayerCache] = None) -> Tensor:
        """hidden (tokens, dim_model) -> (tokens, dim_model)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Encoder(nn.Cell):
    """A stack of layers and a norm behind it, below a token embedding (ModelCenter: `Encoder`; Hugging Face: `model`).

    Args:
        layers: called as `TransformerBlock` is.
        norm: of what the last one returns.
        embed_tokens: makes hidden states of token ids; None: hidden states are what the encoder is given.
    """

    def __init__(self, layers: Iterable[nn.Cell], norm: nn.Cell, embed_tokens: Optional[nn.Cell] = None):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers: Iterable[nn.Cell] = nn.CellList(list(layers))  # a `TransformerBlockList` after `spread`
        self.norm, self.ranks = norm, 1

    def divide(self, ranks: int) -> None:
        """Have each of the tensor-parallel ranks keep a part of the hidden states' rows between layers (sequence parallelism,
        Korthikanti et al., 2022), and in the result. Layers are divided by themselves."""
        self.ranks = ranks
        if self.embed_tokens is not None:
            self.embed_tokens = ParallelEmbedding.of(self.embed_tokens)

    def embed(self, ids: Tensor, positions: Positions) -> Tensor:
        """ids (tokens,) of int32 -> what the first layer is given: (tokens, dim), or this rank's part of them."""
        assert self.embed_tokens is not None
        return self.embed_tokens(positions.with_padding(ids, -1))

    def construct(self, hidden: Tensor, positions: Positions, cache: Optional[KeyValueCache] = None) -> Tensor:
        """hidden (tokens, dim), or ids (tokens,) of int32 where there is an embedding -> (tokens, dim).

        Divided, it takes all tokens on every rank and returns this rank's part of them; behind the last ones come rows of zeros
        where the ranks do not divide the tokens.
        """
        positions.divide(self.ranks)
        if self.embed_tokens is not None:
            hidden = self.embed(hidden, positions)
        elif self.ranks > 1:
            rows = positions.rows // self.ranks
            first = world().mesh.tp_rank * rows
            hidden = positions.with_padding(hidden)[first : first + rows]
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, positions, None if cache is None else cache.layer(number))
        return self.norm(hidden)
