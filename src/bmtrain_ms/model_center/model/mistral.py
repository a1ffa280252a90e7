"""Mistral (Jiang et al., 2023): Llama whose tokens see a sliding window.

Parameters have the names of Hugging Face's `MistralForCausalLM`, which are Llama's.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms

from ..layer import Attention, DecoderLayer, FeedForward, RMSNorm, RotaryEmbedding
from ..pretrained.family import Family
from .causal_lm import CausalLM
from .config import WindowedConfig


@dataclass(frozen=True)
class MistralConfig(WindowedConfig):
    """Sizes of a Mistral, see `WindowedConfig`; defaults are those of the first 7B release."""

    num_heads_kv: int = 8
    dim_ff: int = 14336
    window: int = 4096


class Mistral(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = Family(("mistral",), "MistralForCausalLM", defaults={"norm_eps": 1e-6, "window": 4096}, window="always")
    CONFIG = MistralConfig

    def __init__(self, config: MistralConfig):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_head, config.rope_base, config.rope_scaling)

        def layer(number: int) -> DecoderLayer:
            sizes = config.dim_model, config.num_heads, config.dim_head, config.num_heads_kv
            attention = Attention(*sizes, **settings, rotary=rotary, window=config.window_of(number))
            mlp = FeedForward(config.dim_model, config.dim_ff, **settings)
            return DecoderLayer(attention, mlp, lambda: RMSNorm(config.dim_model, config.norm_eps, dtype))

        layers = (layer(number) for number in range(config.num_layers))
        super().__init__(config, layers, RMSNorm(config.dim_model, config.norm_eps, dtype))
