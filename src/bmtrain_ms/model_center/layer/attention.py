"""Self-attention with grouped queries and a key-value cache."""

from __future__ import annotations

from typing import Any, Optional

import mindspore as ms
from mindspore import Tensor, nn, ops

from ...nn import Linear, functional
from .rotary import RotaryEmbedding

KeyValue = tuple[Tensor, Tensor]  # each (batch, kv heads, length, dim_head); keys already rotated


class Attention(nn.Cell):
    """Causal self-attention (ModelCenter: `Attention`).

    Args:
        dim_in: of the hidden states.
        num_heads: of the queries.
        dim_head: of each head.
        num_heads_kv: heads of keys and values, a divisor of num_heads; fewer than num_heads is GQA (Ainslie et al., 2023).
        bias: of the four projections.
        dtype: of the parameters.
        init_std: of the projections.
    """

    def __init__(
        self,
        dim_in: int,
        num_heads: int,
        dim_head: int,
        num_heads_kv: Optional[int] = None,
        bias: bool = False,
        dtype: Any = ms.float32,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.num_heads, self.dim_head = num_heads, dim_head
        self.num_heads_kv = num_heads_kv or num_heads
        if num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads={num_heads} is not a multiple of num_heads_kv={self.num_heads_kv}")
        settings = {"bias": bias, "dtype": dtype, "init_std": init_std}
        self.project_q = Linear(dim_in, num_heads * dim_head, **settings)
        self.project_k = Linear(dim_in, self.num_heads_kv * dim_head, **settings)
        self.project_v = Linear(dim_in, self.num_heads_kv * dim_head, **settings)
        self.attention_out = Linear(num_heads * dim_head, dim_in, **settings)

    def construct(
        self,
        hidden: Tensor,
        position_bias: RotaryEmbedding,
        padding: Optional[Tensor] = None,
        past_key_value: Optional[KeyValue] = None,
        use_cache: bool = False,
    ) -> Any:
        """
        Args:
            hidden: (batch, length, dim_in).
            position_bias: rotates queries and keys; positions continue after the past.
            padding: (batch, past + length) bool, True where a key may be looked at; None: everywhere.
            past_key_value: keys and values of the positions before.
            use_cache: also return the keys and values, past ones included.

        Returns:
            (batch, length, dim_in), or (that, (keys, values)) with `use_cache`.
        """
        batch, length, dim_in = hidden.shape
        flat = hidden.reshape(batch * length, dim_in)
        past = past_key_value[0].shape[2] if past_key_value is not None else 0
        angles = position_bias.angles(past, length)
        q = functional.split_heads(self.project_q(flat), batch, self.num_heads, angles)
        k = functional.split_heads(self.project_k(flat), batch, self.num_heads_kv, angles)
        v = functional.split_heads(self.project_v(flat), batch, self.num_heads_kv)
        if past_key_value is not None:
            k = ops.cat((past_key_value[0], k), axis=2)
            v = ops.cat((past_key_value[1], v), axis=2)
        repeats = self.num_heads // self.num_heads_kv
        q = q.reshape(batch, self.num_heads_kv, repeats * length, self.dim_head)
        mixed = functional.attention(q, k, v, self._mask(batch, length, k.shape[2], repeats, padding))
        mixed = functional.merge_heads(mixed.reshape(batch, self.num_heads, length, self.dim_head))
        out = self.attention_out(mixed).reshape(batch, length, dim_in)
        return (out, (k, v)) if use_cache else out

    def _mask(self, batch: int, length: int, keys: int, repeats: int, padding: Optional[Tensor]) -> Optional[Tensor]:
        if length == 1 and padding is None:
            return None  # the last position sees everything
        mask = functional.causal_mask(batch, self.num_heads_kv, length, keys, repeats)
        if padding is None:
            return mask
        return mask + (1.0 - padding.astype(ms.float32).reshape(batch, 1, 1, keys)) * -1e30
