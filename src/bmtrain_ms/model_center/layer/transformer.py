"""Transformer block, and a stack of them."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import mindspore as ms
from mindspore import Tensor, nn

from ...zero import Block, TransformerBlockList
from .attention import Attention, KeyValue
from .feedforward import FeedForward
from .norm import RMSNorm
from .rotary import RotaryEmbedding


class TransformerBlock(nn.Cell):
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x)) (ModelCenter: `TransformerBlock`).

    Args:
        dim_model, dim_ff, num_heads, dim_head, num_heads_kv: sizes, see `Attention` and `FeedForward`.
        norm_eps: of the two norms.
        dtype, init_std: of the parameters.
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
    ):
        super().__init__()
        self.attention_norm = RMSNorm(dim_model, norm_eps, dtype)
        self.attention = Attention(dim_model, num_heads, dim_head, num_heads_kv, dtype=dtype, init_std=init_std)
        self.ffn_norm = RMSNorm(dim_model, norm_eps, dtype)
        self.ffn = FeedForward(dim_model, dim_ff, dtype=dtype, init_std=init_std)

    def construct(
        self,
        hidden: Tensor,
        position_bias: RotaryEmbedding,
        padding: Optional[Tensor] = None,
        past_key_value: Optional[KeyValue] = None,
        use_cache: bool = False,
    ) -> Any:
        """(batch, length, dim_model) -> the same, or (the same, (keys, values)) with `use_cache`; see `Attention`."""
        mixed = self.attention(self.attention_norm(hidden), position_bias, padding, past_key_value, use_cache)
        mixed, cache = mixed if use_cache else (mixed, None)
        hidden = hidden + mixed
        hidden = hidden + self.ffn(self.ffn_norm(hidden))
        return (hidden, cache) if use_cache else hidden


class Encoder(nn.Cell):
    """A stack of blocks, each in a `Block`, and a norm behind it (ModelCenter: `Encoder`).

    Args:
        num_layers: how many.
        use_checkpoint, zero_level: of each `Block`.
        dim_model, norm_eps, dtype, block: passed on to `TransformerBlock`.
    """

    def __init__(
        self,
        num_layers: int,
        dim_model: int,
        norm_eps: float = 1e-5,
        dtype: Any = ms.float32,
        use_checkpoint: bool = True,
        zero_level: int = 3,
        **block: Any,
    ):
        super().__init__()
        self.layers = TransformerBlockList(
            Block(TransformerBlock(dim_model, norm_eps=norm_eps, dtype=dtype, **block), use_checkpoint, zero_level)
            for _ in range(num_layers)
        )
        self.output_norm = RMSNorm(dim_model, norm_eps, dtype)

    def construct(
        self,
        hidden: Tensor,
        position_bias: RotaryEmbedding,
        padding: Optional[Tensor] = None,
        past_key_values: Optional[Sequence[KeyValue]] = None,
        use_cache: bool = False,
    ) -> Any:
        """(batch, length, dim_model) -> the same, or (the same, keys and values of every layer) with `use_cache`."""
        if not use_cache:
            return self.output_norm(self.layers(hidden, position_bias, padding))
        caches = []
        for i, block in enumerate(self.layers):
            past = past_key_values[i] if past_key_values is not None else None
            hidden, cache = block(hidden, position_bias, padding, past_key_value=past, use_cache=True)
            caches.append(cache)
        return self.output_norm(hidden), tuple(caches)
