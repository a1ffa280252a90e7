"""Mixtral (Jiang et al., 2024): Llama with experts.

Parameters have the names of Hugging Face's `MixtralForCausalLM` but for the experts: `mlp.gate.weight`, and
`mlp.experts.gate_proj.weight` and so on, (experts, out, in).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mindspore as ms

from ...nn import ROUTERS, MoE
from ..layer import Attention, DecoderLayer, RMSNorm, RotaryEmbedding
from ..pretrained.family import Family, experts, renamed
from .causal_lm import CausalLM
from .config import WindowedConfig


@dataclass(frozen=True)
class MixtralConfig(WindowedConfig):
    """Sizes of a Mixtral, see `WindowedConfig`.

    `dim_ff`: of an expert's inner layer.  `num_experts`, `top_k`: of them each token uses so many.  `balance`, `balance_coef`: see
    `RouterConfig`.
    """

    dim_ff: int = 14336
    num_heads_kv: int = 8
    rope_base: float = 1e6
    num_experts: int = 8
    top_k: int = 2
    balance: str | None = None
    balance_coef: float = 0.0


class Mixtral(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = Family(
        ("mixtral",),
        "MixtralForCausalLM",
        fields={"num_local_experts": "num_experts", "num_experts_per_tok": "top_k"},
        fixed={"output_router_logits": (False,), "router_jitter_noise": (0, 0.0)},
        window="always",
        rules=(
            renamed(r"(.*)\.mlp\.gate\.weight", "{0}.block_sparse_moe.gate.weight"),
            *(
                experts(
                    rf"(.*)\.mlp\.experts\.{ours}\.weight",
                    f"{{0}}.block_sparse_moe.experts.{{e}}.{theirs}.weight",
                    "{0}.mlp.experts.down_proj" if ours == "down_proj" else "{0}.mlp.experts.gate_up_proj",
                    part,
                )
                for ours, theirs, part in (("gate_proj", "w1", (0, 2)), ("up_proj", "w3", (1, 2)), ("down_proj", "w2", (0, 1)))
            ),
        ),
    )
    CONFIG = MixtralConfig

    def __init__(self, config: MixtralConfig):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_head, config.rope_base, config.rope_scaling)
        router = replace(ROUTERS["mixtral"], balance=config.balance, balance_coef=config.balance_coef)

        def layer(number: int) -> DecoderLayer:
            sizes = config.dim_model, config.num_heads, config.dim_head, config.num_heads_kv
            attention = Attention(*sizes, **settings, rotary=rotary, window=config.window_of(number))
            mlp = MoE(config.dim_model, config.dim_ff, config.num_experts, config.top_k, router, **settings)
            return DecoderLayer(attention, mlp, lambda: RMSNorm(config.dim_model, config.norm_eps, dtype))

        layers = (layer(number) for number in range(config.num_layers))
        super().__init__(config, layers, RMSNorm(config.dim_model, config.norm_eps, dtype))
