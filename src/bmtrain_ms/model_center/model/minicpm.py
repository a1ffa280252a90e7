"""MiniCPM 1B, 2B and 4 (Hu et al., 2024): Llama with the scales of maximal update parametrisation.

Parameters have the names of OpenBMB's `MiniCPMForCausalLM`, which are Llama's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mindspore as ms

from ..layer import Attention, DecoderLayer, FeedForward, RMSNorm, RotaryEmbedding
from ..pretrained.family import Family
from .causal_lm import CausalLM
from .config import DecoderConfig


@dataclass(frozen=True)
class MiniCPMConfig(DecoderConfig):
    """Sizes of a MiniCPM, see `DecoderConfig`.

    `scale_emb`: of the embedding.  `scale_depth`: what a layer adds is multiplied with scale_depth / sqrt(num_layers).
    `dim_model_base`: hidden states are divided by dim_model / dim_model_base before they are projected to the vocabulary.
    """

    tied: bool = True
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: int = 256
    attention_bias: bool = False


class MiniCPM(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = Family(
        ("minicpm",),
        "MiniCPMForCausalLM",
        fields={
            "attention_bias": "attention_bias",
            "scale_emb": "scale_emb",
            "scale_depth": "scale_depth",
            "dim_model_base": "dim_model_base",
        },
        fixed={"sparse_config": (None,), "num_experts": (0, None)},
        defaults={"norm_eps": 1e-6, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1},
        ignored=("mup_denominator",),  # of a later release's rule for learning rates
        written={
            "auto_map": {
                "AutoConfig": "configuration_minicpm.MiniCPMConfig",
                "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
            }
        },
    )
    CONFIG = MiniCPMConfig

    def __init__(self, config: MiniCPMConfig):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_head, config.rope_base, config.rope_scaling)
        scale = config.scale_depth / math.sqrt(config.num_layers)

        def layer() -> DecoderLayer:
            sizes = config.dim_model, config.num_heads, config.dim_head, config.num_heads_kv
            attention = Attention(*sizes, config.attention_bias, **settings, rotary=rotary)
            mlp = FeedForward(config.dim_model, config.dim_ff, **settings)
            return DecoderLayer(attention, mlp, lambda: RMSNorm(config.dim_model, config.norm_eps, dtype), scale=scale)

        super().__init__(
            config,
            (layer() for _ in range(config.num_layers)),
            RMSNorm(config.dim_model, config.norm_eps, dtype),
            embed_scale=config.scale_emb,
            head_scale=config.dim_model_base / config.dim_model,
        )
