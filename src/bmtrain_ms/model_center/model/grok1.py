"""Grok-1 (xAI, 2024, `model.py` of the release): experts, a norm before and behind each part of a layer, capped scores.

Parameters have our common names; a file has those of `hpcai-tech/grok-1`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import mindspore as ms

from ...nn import ROUTERS, MoE
from ..layer import Attention, DecoderLayer, RMSNorm, RotaryEmbedding
from ..pretrained.family import Family, experts, renamed
from .causal_lm import CausalLM
from .config import DecoderConfig

_NORMS = (
    ("input_layernorm", "pre_attn_norm"),
    ("attention_out_norm", "post_attn_norm"),
    ("post_attention_layernorm", "pre_moe_norm"),
    ("mlp_out_norm", "post_moe_norm"),
)


@dataclass(frozen=True)
class Grok1Config(DecoderConfig):
    """Sizes of a Grok-1, see `DecoderConfig`; defaults are those of the release.

    `dim_ff`: of an expert's inner layer.  `num_experts`, `top_k`: of them each token uses so many, with their probabilities among
    all; `renormalise`: which are made to sum to 1 (ModelLink's variant).  `activation`: of the experts, `gelu_tanh`, or `silu`
    (ModelLink's).  `attention_scale`: of the scores; 0: 1 / sqrt(dim_head).  `softcap`: scores become
    softcap * tanh(score / softcap); 0: they stay (ModelLink's).  `embed_scale`: of the embedding; 0: sqrt(dim_model).
    `output_scale`: of the logits.  `balance`, `balance_coef`: see `RouterConfig`.
    """

    vocab_size: int = 131072
    dim_model: int = 6144
    num_heads: int = 48
    num_heads_kv: int = 8
    dim_head: int = 128
    dim_ff: int = 32768
    num_layers: int = 64
    tied: bool = True
    num_experts: int = 8
    top_k: int = 2
    renormalise: bool = False
    activation: str = "gelu_tanh"
    attention_scale: float = 0.0
    softcap: float = 30.0
    embed_scale: float = 0.0
    output_scale: float = 0.5773502691896257
    balance: str | None = None
    balance_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", 1.0 / math.sqrt(self.dim_head))
        if not self.embed_scale:
            object.__setattr__(self, "embed_scale", math.sqrt(self.dim_model))


class Grok1(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = Family(
        ("grok-1", "grok"),
        "Grok1ModelForCausalLM",
        fields={
            "num_experts": "num_experts",
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "top_k",
            "attn_output_multiplier": "attention_scale",
            "max_attn_value": "softcap",
            "embedding_multiplier_scale": "embed_scale",
            "output_multiplier_scale": "output_scale",
        },
        fixed={
            "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
            "attention_bias": (False,),
            "output_router_logits": (False,),
        },
        defaults={"tied": True},
        rules=(
            renamed(r"(model\.layers\.\d+)\.self_attn\.(.*)", "{0}.attn.{1}"),
            *(renamed(rf"(model\.layers\.\d+)\.{ours}\.weight", f"{{0}}.{theirs}.scale") for ours, theirs in _NORMS),
            renamed(r"model\.norm\.weight", "model.norm.scale"),
            renamed(r"(.*)\.mlp\.gate\.weight", "{0}.moe_block.gate.weight"),
            *(
                experts(rf"(.*)\.mlp\.experts\.{ours}\.weight", f"{{0}}.moe_block.experts.{{e}}.{theirs}.weight")
                for ours, theirs in (("gate_proj", "linear"), ("up_proj", "linear_v"), ("down_proj", "linear_1"))
            ),
        ),
    )
    CONFIG = Grok1Config

    def __init__(self, config: Grok1Config):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_head, config.rope_base, config.rope_scaling)
        balance = {"balance": config.balance, "balance_coef": config.balance_coef}
        router = replace(ROUTERS["grok-1"], renormalise=config.renormalise, **balance)

        def layer() -> DecoderLayer:
            sizes = config.dim_model, config.num_heads, config.dim_head, config.num_heads_kv
            scores = {"scale": config.attention_scale, "softcap": config.softcap or None}
            experts = config.dim_ff, config.num_experts, config.top_k
            return DecoderLayer(
                Attention(*sizes, **settings, rotary=rotary, **scores),
                MoE(config.dim_model, *experts, router, **settings, activation=config.activation),
                lambda: RMSNorm(config.dim_model, config.norm_eps, dtype),
                sandwich=True,
            )

        super().__init__(
            config,
            (layer() for _ in range(config.num_layers)),
            RMSNorm(config.dim_model, config.norm_eps, dtype),
            embed_scale=config.embed_scale,
            head_scale=config.output_scale,
        )
