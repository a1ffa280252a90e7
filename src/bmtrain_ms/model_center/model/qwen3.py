"""Qwen3 (Yang et al., 2025), dense and with experts: Llama whose queries and keys are normed, with heads of any size.

Parameters have the names of Hugging Face's `Qwen3ForCausalLM` and `Qwen3MoeForCausalLM`; those of the experts of a layer are one
each, without the expert's number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mindspore as ms
from mindspore import nn

from bmtrain_ms_base.checks import whole

from ...nn import ROUTERS, MoE
from ..layer import Attention, DecoderLayer, FeedForward, RMSNorm, RotaryEmbedding
from ..pretrained.family import Family, experts
from .causal_lm import CausalLM
from .config import WindowedConfig


@dataclass(frozen=True)
class Qwen3Config(WindowedConfig):
    """Sizes of a Qwen3, see `WindowedConfig`."""

    norm_eps: float = 1e-6
    rope_base: float = 1e6
    dim_head: int = 128
    attention_bias: bool = False


class Qwen3(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = Family(
        ("qwen3",),
        "Qwen3ForCausalLM",
        fields={"attention_bias": "attention_bias"},
        defaults={"rope_base": 1e4, "window": 4096},
        window="by layer",
    )
    CONFIG = Qwen3Config

    def __init__(self, config: Qwen3Config):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_head, config.rope_base, config.rope_scaling)

        def layer(number: int) -> DecoderLayer:
            sizes = config.dim_model, config.num_heads, config.dim_head, config.num_heads_kv
            more = {"qk_norm_eps": config.norm_eps, "window": config.window_of(number)}
            attention = Attention(*sizes, config.attention_bias, **settings, rotary=rotary, **more)
            return DecoderLayer(attention, self._mlp(config, number), lambda: RMSNorm(config.dim_model, config.norm_eps, dtype))

        layers = (layer(number) for number in range(config.num_layers))
        super().__init__(config, layers, RMSNorm(config.dim_model, config.norm_eps, dtype))

    def _mlp(self, config: Qwen3Config, number: int) -> nn.Cell:
        return FeedForward(config.dim_model, config.dim_ff, dtype=getattr(ms, config.dtype), init_std=config.init_std)


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Sizes of a Qwen3 with experts, see `WindowedConfig`.

    `num_experts`, `top_k`: of them each token uses so many.  `dim_expert`: of an expert's inner layer.  `renormalise`: the weights
    of a token's experts sum to 1.  `sparse_step`: each so-many-th layer has experts.  `dense_layers`: those that have none
    all the same.  `balance`, `balance_coef`: see `RouterConfig`.
    """

    dim_ff: int = 6144
    num_experts: int = 128
    top_k: int = 8
    dim_expert: int = 768
    renormalise: bool = True
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()
    balance: str | None = None
    balance_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sparse_step", whole("sparse_step", self.sparse_step, 1))
        object.__setattr__(self, "dense_layers", tuple(whole("dense_layers", n, 0) for n in self.dense_layers))

    def has_experts(self, number: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return number not in self.dense_layers and (number + 1) % self.sparse_step == 0


class Qwen3Moe(Qwen3):
    """The language model; see `CausalLM`."""

    FAMILY = Family(
        ("qwen3_moe",),
        "Qwen3MoeForCausalLM",
        fields={
            "attention_bias": "attention_bias",
            "num_experts": "num_experts",
            "num_local_experts": "num_experts",  # 5.x writes both
            "num_experts_per_tok": "top_k",
            "moe_intermediate_size": "dim_expert",
            "norm_topk_prob": "renormalise",
            "decoder_sparse_step": "sparse_step",
            "mlp_only_layers": "dense_layers",
        },
        fixed={"output_router_logits": (False,)},
        defaults={"renormalise": False, "rope_base": 1e4, "window": 4096},
        window="asked for",
        rules=tuple(
            experts(
                rf"(.*\.mlp\.experts)\.{name}\.weight",
                f"{{0}}.{{e}}.{name}.weight",
                "{0}.down_proj" if name == "down_proj" else "{0}.gate_up_proj",
                part,
            )
            for name, part in (("gate_proj", (0, 2)), ("up_proj", (1, 2)), ("down_proj", (0, 1)))
        ),
    )
    CONFIG = Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig):
        super().__init__(config)

    def _mlp(self, config: Qwen3MoeConfig, number: int) -> nn.Cell:
        if not config.has_experts(number):
            return super()._mlp(config, number)
        router = replace(
            ROUTERS["qwen3-moe"], renormalise=config.renormalise, balance=config.balance, balance_coef=config.balance_coef
        )
        sizes = config.dim_model, config.dim_expert, config.num_experts, config.top_k
        return MoE(*sizes, router, dtype=getattr(ms, config.dtype), init_std=config.init_std)
