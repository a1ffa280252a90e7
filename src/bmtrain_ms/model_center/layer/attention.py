"""Self-attention with grouped queries."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from ...nn import ColumnParallelLinear, Linear, RowParallelLinear, functional, projections
from .cache import LayerCache
from .norm import RMSNorm
from .positions import Positions
from .rotary import RotaryEmbedding


class Attention(nn.Cell):
    """Causal self-attention (ModelCenter: `Attention`).

    Args:
        dim_in: of the hidden states.
        num_heads: of the queries.
        dim_head: of each head.
        num_heads_kv: heads of keys and values, a divisor of num_heads; fewer than num_heads is GQA (Ainslie et al., 2023).
        bias: of the projections of queries, keys and values.
        dtype: of the parameters.
        init_std: of the projections.
        rotary: rotates queries and keys; None: nothing does.
        out_bias: of the projection of the result; None: as `bias`.
        qk_norm_eps: queries and keys of each head go through an RMSNorm with this eps first (Qwen3); None: they do not.
        scale: what scores are multiplied with; None: 1 / sqrt(dim_head).
        softcap: scores become softcap * tanh(score / softcap) (Grok-1); None: they stay.
        window: a token sees so many tokens at most, itself and those before it (Mistral); None: all before it.
    """

    def __init__(
        self,
        dim_in: int,
        num_heads: int,
        dim_head: int,
        num_heads_kv: int | None = None,
        bias: bool = False,
        dtype: Any = ms.float32,
        init_std: float = 0.02,
        rotary: RotaryEmbedding | None = None,
        *,
        out_bias: bool | None = None,
        qk_norm_eps: float | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ):
        super().__init__()
        self.num_heads, self.dim_head, self.rotary = num_heads, dim_head, rotary
        self.scale, self.softcap, self.window = scale, softcap, window
        self.num_heads_kv = num_heads_kv or num_heads
        if num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads={num_heads} is not a multiple of num_heads_kv={self.num_heads_kv}")
        settings = {"bias": bias, "dtype": dtype, "init_std": init_std}
        self.q_proj: nn.Cell = Linear(dim_in, num_heads * dim_head, **settings)
        self.k_proj = Linear(dim_in, self.num_heads_kv * dim_head, **settings)
        self.v_proj = Linear(dim_in, self.num_heads_kv * dim_head, **settings)
        self.o_proj = Linear(num_heads * dim_head, dim_in, **{**settings, "bias": bias if out_bias is None else out_bias})
        self.q_norm = None if qk_norm_eps is None else RMSNorm(dim_head, qk_norm_eps, dtype)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(dim_head, qk_norm_eps, dtype)

    def divide(self, ranks: int) -> None:
        """Have each of the tensor-parallel ranks compute its share of the heads, from its part of the hidden states' rows to its
        part of the result's. Heads of keys and values that are fewer than the ranks are computed by several.

        Raises:
            ValueError: the heads cannot be shared out.
        """
        shared = min(self.num_heads_kv, ranks)
        if self.num_heads % ranks or self.num_heads_kv % shared or ranks % shared:
            fit = [
                n
                for n in range(1, self.num_heads + 1)
                if self.num_heads % n == 0 and max(n, self.num_heads_kv) % min(n, self.num_heads_kv) == 0
            ]
            raise ValueError(
                f"{self.num_heads} heads, {self.num_heads_kv} of keys and values, cannot be divided over tp_size={ranks}: {fit} can"
            )
        self.q_proj, self.o_proj = ColumnParallelLinear.of(self.q_proj), RowParallelLinear.of(self.o_proj)
        self.k_proj = ColumnParallelLinear.of(self.k_proj, parts=shared)
        self.v_proj = ColumnParallelLinear.of(self.v_proj, parts=shared)
        self.num_heads, self.num_heads_kv = self.num_heads // ranks, self.num_heads_kv // shared

    def construct(self, hidden: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """hidden (tokens, dim_in) -> (tokens, dim_in); with a cache, tokens before these are looked at too."""
        batch, length = positions.batch, positions.length
        angles = None if self.rotary is None else positions.angles(self.rotary)
        q, k, v = map(positions.without_padding, projections(hidden, self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _by_head(self.q_norm, q, self.dim_head), _by_head(self.k_norm, k, self.dim_head)
        q = functional.split_heads(q, batch, self.num_heads, angles)
        k, v = functional.split_heads(k, batch, self.num_heads_kv, angles), functional.split_heads(v, batch, self.num_heads_kv)
        if cache is not None:
            k, v = cache.update(k, v, window=self.window)
        repeats = self.num_heads // self.num_heads_kv
        q = functional.reshape(q, (batch, self.num_heads_kv, repeats * length, self.dim_head))
        mixed = functional.attention(q, k, v, positions.within(self.window), self.scale, self.softcap)
        merged = functional.merge_heads(functional.reshape(mixed, (batch, self.num_heads, length, self.dim_head)))
        return self.o_proj(positions.with_padding(merged))


def _by_head(norm: nn.Cell, x: Tensor, dim_head: int) -> Tensor:
    return functional.reshape(norm(functional.reshape(x, (-1, dim_head))), x.shape)
