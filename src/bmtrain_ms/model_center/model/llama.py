"""Llama (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, grouped queries.

Parameters have the names and shapes of Hugging Face's `LlamaForCausalLM`, so that a file of `bmtrain_ms.save` is one of its.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms

from ..layer import Attention, DecoderLayer, FeedForward, RMSNorm, RotaryEmbedding
from ..pretrained.family import Family
from .causal_lm import CausalLM
from .config import DecoderConfig, refusing_what_is_no_size


@refusing_what_is_no_size
@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Sizes of a Llama, see `DecoderConfig`.  `attention_bias`, `mlp_bias`: projections of that kind have biases."""

    attention_bias: bool = False
    mlp_bias: bool = False


class Llama(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = Family(
        ("llama",),
        "LlamaForCausalLM",
        fields={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={"norm_eps": 1e-6},
    )
    CONFIG = LlamaConfig
    EARLIER_NAMES = (
        ("model.embed_tokens.", "input_embedding."),
        ("model.layers.", "encoder.layers."),
        (".input_layernorm.", ".attention_norm."),
        (".self_attn.q_proj.", ".attention.project_q."),
        (".self_attn.k_proj.", ".attention.project_k."),
        (".self_attn.v_proj.", ".attention.project_v."),
        (".self_attn.o_proj.", ".attention.attention_out."),
        (".post_attention_layernorm.", ".ffn_norm."),
        (".mlp.gate_proj.", ".ffn.w_gated."),
        (".mlp.up_proj.", ".ffn.w_in."),
        (".mlp.down_proj.", ".ffn.w_out."),
        ("model.norm.", "encoder.output_norm."),
        ("lm_head.", "output_projection."),
    )

    def __init__(self, config: LlamaConfig):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_head, config.rope_base, config.rope_scaling)

        def layer() -> DecoderLayer:
            sizes = config.dim_model, config.num_heads, config.dim_head, config.num_heads_kv
            attention = Attention(*sizes, config.attention_bias, **settings, rotary=rotary)
            mlp = FeedForward(config.dim_model, config.dim_ff, config.mlp_bias, **settings)
            return DecoderLayer(attention, mlp, lambda: RMSNorm(config.dim_model, config.norm_eps, dtype))

        layers = (layer() for _ in range(config.num_layers))
        super().__init__(config, layers, RMSNorm(config.dim_model, config.norm_eps, dtype))
