"""Transformer block, and a stack of them."""

from __future__ import annotations

from typing import Any, Callable, Iterable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ...comm import world as current_world
from ...compat.runtime import from_host, host_array
from ...nn import MoE, functional
from ...parallel.stage import DRAWS, SPAN
from ...zero import context_of
from .attention import Attention
from .cache import KeyValueCache, LayerCache
from .embedding import ParallelEmbedding
from .feedforward import FeedForward
from .norm import RMSNorm
from .positions import Positions
from .rotary import RotaryEmbedding


class DecoderLayer(nn.Cell):
    """Pre-norm layer of any attention and feed-forward layer: x + scale * attention(norm(x)), then x + scale * mlp(norm(x)).

    Args:
        attention: (hidden, positions, cache) -> hidden.
        mlp: hidden -> hidden; a `MoE` is given the pass's `Routing` too.
        norm: makes a norm.
        scale: of what both add to the hidden states.
        sandwich: what both return goes through a norm too, before it is added (Grok-1).
    """

    def __init__(
        self, attention: nn.Cell, mlp: nn.Cell, norm: Callable[[], nn.Cell], *, scale: float = 1.0, sandwich: bool = False
    ):
        super().__init__()
        self.scale = scale
        self.input_layernorm = norm()
        self.self_attn = attention
        self.attention_out_norm = norm() if sandwich else None
        self.post_attention_layernorm = norm()
        self.mlp = mlp
        self.mlp_out_norm = norm() if sandwich else None

    def construct(self, hidden: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """hidden (tokens, dim_model) -> (tokens, dim_model)."""
        mixed = self.self_attn(self.input_layernorm(hidden), positions, cache)
        hidden = self._added(hidden, mixed, self.attention_out_norm)
        x = self.post_attention_layernorm(hidden)
        out = self.mlp(x, positions.routing) if isinstance(self.mlp, MoE) else self.mlp(x)
        return self._added(hidden, out, self.mlp_out_norm)

    def _added(self, hidden: Tensor, branch: Tensor, norm: nn.Cell | None) -> Tensor:
        branch = branch if norm is None else norm(branch)
        return functional.add(hidden, branch if self.scale == 1.0 else branch * self.scale)


class TransformerBlock(DecoderLayer):
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
        num_heads_kv: int | None = None,
        norm_eps: float = 1e-5,
        dtype: Any = ms.float32,
        init_std: float = 0.02,
        rotary: RotaryEmbedding | None = None,
    ):
        attention = Attention(dim_model, num_heads, dim_head, num_heads_kv, dtype=dtype, init_std=init_std, rotary=rotary)
        mlp = FeedForward(dim_model, dim_ff, dtype=dtype, init_std=init_std)
        super().__init__(attention, mlp, lambda: RMSNorm(dim_model, norm_eps, dtype))


class Encoder(nn.Cell):
    """A stack of layers and a norm behind it, below a token embedding (ModelCenter: `Encoder`; Hugging Face: `model`).

    Args:
        layers: called as `TransformerBlock` is.
        norm: of what the last one returns.
        embed_tokens: makes hidden states of token ids; None: hidden states are what the encoder is given.
        embed_positions: makes what is added to them of the tokens' places in their rows (GPT-2); None: nothing is.
        embed_scale: what hidden states made of token ids are multiplied with.
    """

    def __init__(
        self,
        layers: Iterable[nn.Cell],
        norm: nn.Cell,
        embed_tokens: nn.Cell | None = None,
        embed_positions: nn.Cell | None = None,
        embed_scale: float = 1.0,
    ):
        super().__init__()
        self.embed_tokens, self.embed_positions, self.embed_scale = embed_tokens, embed_positions, embed_scale
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
        if self.ranks > 1 and ids.size and int(host_array(ids).min()) < 0:  # -1 stands for padding, of which there is none yet
            raise ValueError(
                f"ids begin at 0, and the lowest that was given is {int(host_array(ids).min())}: padding has an id too"
            )
        hidden = self.embed_tokens(positions.with_padding(ids, -1))
        if self.embed_scale != 1.0:
            hidden = hidden * self.embed_scale
        if self.embed_positions is not None:
            places = np.zeros(positions.rows, np.int32)
            places[: positions.batch * positions.length] = positions.places().reshape(-1)
            hidden = hidden + self.embed_positions(from_host(places[positions.part]))
        return hidden

    def construct(self, hidden: Tensor, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        """hidden (tokens, dim), or ids (tokens,) of int32 where there is an embedding -> (tokens, dim).

        Divided, it takes all tokens on every rank and returns this rank's part of them; behind the last ones come rows of zeros
        where the ranks do not divide the tokens.
        """
        positions.divide(self.ranks)
        if self.embed_tokens is not None:
            hidden = self.embed(hidden, positions)
        elif self.ranks > 1:
            hidden = positions.with_padding(hidden)[positions.part]
        context = context_of(current_world())
        draws = context.draws
        with context.drawing():
            draws.count = (draws.count // SPAN + 1) * SPAN
            for number, layer in enumerate(self.layers):
                draws.count += DRAWS  # as in stages, whichever has the layer
                with draws.numbered(draws.count):
                    hidden = layer(hidden, positions, None if cache is None else cache.layer(number))
            draws.count += DRAWS  # the head's
        return self.norm(hidden)
