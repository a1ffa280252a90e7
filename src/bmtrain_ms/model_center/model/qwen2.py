"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama whose projections of queries, keys and values have biases.

Parameters have the names of Hugging Face's `Qwen2ForCausalLM`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms

from ..layer import Attention, DecoderLayer, FeedForward, RMSNorm, RotaryEmbedding
from ..pretrained.family import Family
from .causal_lm import CausalLM
from .config import WindowedConfig


@dataclass(frozen=True)
class Qwen2Config(WindowedConfig):
    """Sizes of a Qwen2, see `WindowedConfig`."""

    norm_eps: float = 1e-6
    rope_base: float = 1e6


class Qwen2(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = Family(
        ("qwen2",),
        "Qwen2ForCausalLM",
        fixed={"use_mrope": (False,)},
        defaults={"rope_base": 1e4, "window": 4096},
        window="by layer",
    )
    CONFIG = Qwen2Config

    def __init__(self, config: Qwen2Config):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_head, config.rope_base, config.rope_scaling)

        def layer(number: int) -> DecoderLayer:
            sizes = config.dim_model, config.num_heads, config.dim_head, config.num_heads_kv
            more = {"out_bias": False, "window": config.window_of(number)}
            attention = Attention(*sizes, True, **settings, rotary=rotary, **more)
            mlp = FeedForward(config.dim_model, config.dim_ff, **settings)
            return DecoderLayer(attention, mlp, lambda: RMSNorm(config.dim_model, config.norm_eps, dtype))

        layers = (layer(number) for number in range(config.num_layers))
        super().__init__(config, layers, RMSNorm(config.dim_model, config.norm_eps, dtype))
