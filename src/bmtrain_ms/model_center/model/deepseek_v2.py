"""DeepSeek-V2 and V2-Lite (DeepSeek-AI, 2024): latent attention, experts behind the first layers, shared experts.

Parameters have the names of `DeepseekV2ForCausalLM`; those of the experts of a layer are one each, without the expert's number.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
from mindspore import nn

from bmtrain_ms_base.checks import whole

from ...nn import MoE, RouterConfig
from ..layer import DecoderLayer, FeedForward, RMSNorm, RotaryEmbedding
from ..layer.latent_attention import LatentAttention
from ..pretrained.family import Family, experts
from .causal_lm import CausalLM
from .config import DecoderConfig


@dataclass(frozen=True)
class DeepseekV2Config(DecoderConfig):
    """Sizes of a DeepSeek-V2, see `DecoderConfig`; `num_heads_kv` and `dim_head` are not used.

    `q_rank`, `kv_rank`, `dim_nope`, `dim_rope`, `dim_value`: see `LatentAttention`.  `num_experts`, `top_k`: of them each token
    uses so many; 0 experts: none in any layer.  `num_shared`: experts that all tokens use, which are one layer of so many times the
    size.  `dim_expert`: of an expert's inner layer.  `first_dense`: so many first layers have none.  `groups`, `keep_groups`: see
    `RouterConfig`.  `renormalise`: the weights of a token's experts sum to 1; otherwise they are multiplied with `routed_scale`.
    `balance`, `balance_coef`: see `RouterConfig`.
    """

    vocab_size: int = 102400
    dim_head: int = 64
    norm_eps: float = 1e-6
    q_rank: int | None = None
    kv_rank: int = 512
    dim_nope: int = 128
    dim_rope: int = 64
    dim_value: int = 128
    num_experts: int = 64
    top_k: int = 6
    num_shared: int = 2
    dim_expert: int = 1408
    first_dense: int = 1
    groups: int = 1
    keep_groups: int = 1
    renormalise: bool = False
    routed_scale: float = 1.0
    attention_bias: bool = False
    balance: str | None = None
    balance_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_rank", "dim_nope", "dim_rope", "dim_value"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))

    @property
    def router(self) -> RouterConfig:
        """How experts are chosen."""
        return RouterConfig(
            renormalise=self.renormalise,
            scale=1.0 if self.renormalise else self.routed_scale,
            groups=self.groups,
            keep_groups=self.keep_groups,
            balance=self.balance,
            balance_coef=self.balance_coef,
        )


class _Family(Family):
    """`topk_method` says whether the groups count; the heads' sizes are spelt out."""

    def read(self, config):  # type: ignore[no-untyped-def]
        """Read a `config.json`, see `Family.read`."""
        config = dict(config)
        method = config.pop("topk_method", "greedy")
        found = super().read(config)
        if method == "greedy":
            found["groups"] = found["keep_groups"] = 1
        elif method != "group_limited_greedy":
            from ..pretrained.family import ConfigError

            raise ConfigError(f"topk_method={method!r} is not computed here: greedy and group_limited_greedy are")
        return found

    def write(self, config):  # type: ignore[no-untyped-def]
        """Write a `config.json`, see `Family.write`."""
        return {**super().write(config), "topk_method": "greedy" if config.groups == 1 else "group_limited_greedy"}


class DeepseekV2(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = _Family(
        ("deepseek_v2",),
        "DeepseekV2ForCausalLM",
        fields={
            "head_dim": None,
            "num_key_value_heads": None,
            "attention_bias": "attention_bias",
            "q_lora_rank": "q_rank",
            "kv_lora_rank": "kv_rank",
            "qk_nope_head_dim": "dim_nope",
            "qk_rope_head_dim": "dim_rope",
            "v_head_dim": "dim_value",
            "n_routed_experts": "num_experts",
            "num_experts_per_tok": "top_k",
            "n_shared_experts": "num_shared",
            "moe_intermediate_size": "dim_expert",
            "first_k_dense_replace": "first_dense",
            "n_group": "groups",
            "topk_group": "keep_groups",
            "norm_topk_prob": "renormalise",
            "routed_scaling_factor": "routed_scale",
        },
        fixed={
            "moe_layer_freq": (1,),
            "scoring_func": ("softmax",),
            "mlp_bias": (False,),
            "rope_interleave": (True,),
            "output_router_logits": (False,),
        },
        ignored=("aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "num_key_value_heads", "qk_head_dim"),
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
    CONFIG = DeepseekV2Config

    def __init__(self, config: DeepseekV2Config):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_rope, config.rope_base, config.rope_scaling)

        def feed_forward(number: int) -> nn.Cell:
            if number < config.first_dense or not config.num_experts:
                return FeedForward(config.dim_model, config.dim_ff, **settings)
            shared = FeedForward(config.dim_model, config.num_shared * config.dim_expert, **settings) if config.num_shared else None
            sizes = config.dim_model, config.dim_expert, config.num_experts, config.top_k
            return MoE(*sizes, config.router, shared, **settings)

        def layer(number: int) -> DecoderLayer:
            sizes = config.dim_nope, config.dim_rope, config.dim_value, config.q_rank, config.kv_rank
            bias = config.attention_bias
            attention = LatentAttention(config.dim_model, config.num_heads, *sizes, rotary, bias=bias, **settings)
            return DecoderLayer(attention, feed_forward(number), lambda: RMSNorm(config.dim_model, config.norm_eps, dtype))

        layers = (layer(number) for number in range(config.num_layers))
        super().__init__(config, layers, RMSNorm(config.dim_model, config.norm_eps, dtype))
