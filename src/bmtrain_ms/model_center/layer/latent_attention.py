"""Attention whose keys and values are made of a small latent vector for each token (DeepSeek-AI, 2024: MLA)."""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from ...comm import world as current_world
from ...distributed import all_gather
from ...nn import ColumnParallelLinear, Linear, RowParallelLinear, functional, weight_of
from .cache import LayerCache
from .norm import RMSNorm
from .positions import Positions
from .rotary import RotaryEmbedding, yarn_scale


class LatentAttention(nn.Cell):
    """Causal self-attention with latent keys and values, and rotary parts of their own.

    With a cache only the latent vector and the rotated part of the key are kept, for all heads together; the up-projections then
    multiply queries and results instead of every key and value there is.

    Args:
        dim_in: of the hidden states.
        num_heads: heads.
        dim_nope, dim_rope, dim_value: of a head: of what is not rotated of queries and keys, of what is, of the values.
        q_rank: of the latent vector of queries; None: queries are projected directly.
        kv_rank: of the latent vector of keys and values.
        norm_eps: of the norms of the latent vectors; DeepSeek and MiniCPM have the same one, whatever the other norms'.
        bias: of the projections from the hidden states and to them.
        dtype, init_std: of the parameters.
        rotary: rotates the parts that are, of size dim_rope.
        interleaved: pairs that are rotated together are neighbours, as in DeepSeek's files; otherwise elements of the two halves.
    """

    def __init__(
        self,
        dim_in: int,
        num_heads: int,
        dim_nope: int,
        dim_rope: int,
        dim_value: int,
        q_rank: int | None,
        kv_rank: int,
        rotary: RotaryEmbedding,
        *,
        norm_eps: float = 1e-6,
        bias: bool = False,
        interleaved: bool = True,
        dtype: Any = ms.float32,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.num_heads, self.dim_nope, self.dim_rope, self.dim_value = num_heads, dim_nope, dim_rope, dim_value
        self.kv_rank, self.rotary, self.interleaved, self.ranks = kv_rank, rotary, interleaved, 1
        settings = {"dtype": dtype, "init_std": init_std}
        dim_query = num_heads * (dim_nope + dim_rope)
        self.q_a_proj = None if q_rank is None else Linear(dim_in, q_rank, bias, **settings)
        self.q_a_layernorm = None if q_rank is None else RMSNorm(q_rank, norm_eps, dtype)
        self.q_b_proj = None if q_rank is None else Linear(q_rank, dim_query, False, **settings)
        self.q_proj = Linear(dim_in, dim_query, False, **settings) if q_rank is None else None
        self.kv_a_proj_with_mqa = Linear(dim_in, kv_rank + dim_rope, bias, **settings)
        self.kv_a_layernorm = RMSNorm(kv_rank, norm_eps, dtype)
        self.kv_b_proj: nn.Cell = Linear(kv_rank, num_heads * (dim_nope + dim_value), False, **settings)
        self.o_proj: nn.Cell = Linear(num_heads * dim_value, dim_in, bias, **settings)
        scaling = rotary.scaling
        stretched = yarn_scale(scaling.factor, scaling.mscale_all_dim) if scaling and scaling.mscale_all_dim else 1.0
        self.scale = stretched**2 / math.sqrt(dim_nope + dim_rope)

    def divide(self, ranks: int) -> None:
        """Have each of the tensor-parallel ranks compute its share of the heads, from its part of the hidden states' rows to its
        part of the result's. The latent vectors are computed of the rows, and gathered.

        Raises:
            ValueError: the ranks do not divide the heads.
        """
        if self.num_heads % ranks:
            raise ValueError(f"{self.num_heads} heads of latent attention cannot be divided over tp_size={ranks}")
        self.num_heads, self.ranks = self.num_heads // ranks, ranks
        if self.q_proj is not None:
            self.q_proj = ColumnParallelLinear.of(self.q_proj)
        else:
            self.q_b_proj = ColumnParallelLinear.of(self.q_b_proj)
        self.kv_b_proj = ColumnParallelLinear.of(self.kv_b_proj)
        self.kv_b_proj.gather_input = False  # the latent vectors travel with the rotated part, once
        self.o_proj = RowParallelLinear.of(self.o_proj)

    def construct(self, hidden: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """hidden (tokens, dim_in) -> (tokens, dim_in); with a cache, tokens before these are looked at too."""
        q_plain, q_turned = self._queries(hidden, positions)
        latent, k_turned = self._latent(hidden, positions)
        if cache is None:
            mixed = self._expanded(q_plain, q_turned, latent, k_turned, positions)
        else:
            latents, turned = cache.update(latent[:, None], k_turned)
            mixed = self._absorbed(q_plain, q_turned, latents, turned, positions)
        return self.o_proj(positions.with_padding(functional.merge_heads(mixed)))

    def _queries(self, hidden: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """What is not rotated, (batch, heads, length, dim_nope), and what is, (batch, heads, length, dim_rope)."""
        if self.q_proj is not None:
            q = self.q_proj(hidden)
        else:
            assert self.q_a_proj is not None and self.q_a_layernorm is not None and self.q_b_proj is not None
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        q = positions.without_padding(q).reshape(-1, self.num_heads, self.dim_nope + self.dim_rope)
        batch, heads = positions.batch, self.num_heads
        plain = functional.split_heads(q[..., : self.dim_nope].reshape(-1, heads * self.dim_nope), batch, heads)
        return plain, self._turned(q[..., self.dim_nope :], heads, positions)

    def _latent(self, hidden: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """The latent vectors (batch, length, kv_rank), and the rotated part of the keys (batch, 1, length, dim_rope)."""
        made = self.kv_a_proj_with_mqa(hidden)
        latent, k = self.kv_a_layernorm(made[:, : self.kv_rank]), made[:, self.kv_rank :]
        if self.ranks > 1:
            both = all_gather(ops.cat((latent, k), -1), current_world().along("tp")).reshape(-1, self.kv_rank + self.dim_rope)
            latent, k = both[:, : self.kv_rank], both[:, self.kv_rank :]
        latent, k = positions.without_padding(latent), positions.without_padding(k)
        shape = positions.batch, positions.length, self.kv_rank
        return latent.reshape(shape), self._turned(k[:, None], 1, positions)

    def _turned(self, x: Tensor, heads: int, positions: Positions) -> Tensor:
        """x (tokens, heads, dim_rope) -> (batch, heads, length, dim_rope), rotated; pairs are halves then, in queries and keys
        alike."""
        if self.interleaved:
            x = x.reshape(-1, heads, self.dim_rope // 2, 2).swapaxes(-1, -2)
        halves = x.reshape(-1, heads * self.dim_rope)
        return functional.split_heads(halves, positions.batch, heads, positions.angles(self.rotary))

    def _expanded(self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, positions: Positions) -> Tensor:
        """(batch, heads, length, dim_value): keys and values of all heads, from the latent vectors."""
        batch, heads, length = positions.batch, self.num_heads, positions.length
        made = self.kv_b_proj(latent.reshape(batch * length, self.kv_rank)).reshape(-1, heads, self.dim_nope + self.dim_value)
        k = functional.split_heads(made[..., : self.dim_nope].reshape(-1, heads * self.dim_nope), batch, heads)
        v = functional.split_heads(made[..., self.dim_nope :].reshape(-1, heads * self.dim_value), batch, heads)
        k = ops.cat((k, k_turned.broadcast_to((batch, heads, length, self.dim_rope))), -1)
        return functional.attention(ops.cat((q_plain, q_turned), -1), k, v, positions.seen, self.scale)

    def _absorbed(self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, positions: Positions) -> Tensor:
        """(batch, heads, length, dim_value): queries in the latent vectors' space, which all heads share as one key and value."""
        batch, heads, length = positions.batch, self.num_heads, positions.length
        weight = weight_of(self.kv_b_proj).reshape(heads, self.dim_nope + self.dim_value, self.kv_rank)
        q = ops.matmul(q_plain, weight[None, :, : self.dim_nope])
        q = ops.cat((q, q_turned), -1).reshape(batch, 1, heads * length, self.kv_rank + self.dim_rope)
        k = ops.cat((latent, k_turned), -1)
        mixed = functional.attention(q, k, latent, positions.seen, self.scale)
        return ops.matmul(mixed.reshape(batch, heads, length, self.kv_rank), weight[None, :, self.dim_nope :].swapaxes(-1, -2))
