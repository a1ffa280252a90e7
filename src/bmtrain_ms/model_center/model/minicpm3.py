"""MiniCPM3 (OpenBMB, 2024): MiniCPM's scales around latent attention.

Parameters have the names of Hugging Face's `MiniCPM3ForCausalLM`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Mapping

import mindspore as ms

from bmtrain_ms_base.checks import whole

from ..layer import DecoderLayer, FeedForward, RMSNorm, RotaryEmbedding
from ..layer.latent_attention import LatentAttention
from ..pretrained.family import Family
from .causal_lm import CausalLM
from .minicpm import MiniCPMConfig

_LATENT_EPS = 1e-6  # of the latent vectors' norms, whatever the config says of the others


@dataclass(frozen=True)
class MiniCPM3Config(MiniCPMConfig):
    """Sizes of a MiniCPM3, see `MiniCPMConfig`; defaults are those of the 4B release. `num_heads_kv` and `dim_head` are not used.

    `q_rank`, `kv_rank`, `dim_nope`, `dim_rope`, `dim_value`: see `LatentAttention`.  `dim_value=0`: dim_model / num_heads.
    """

    vocab_size: int = 73448
    dim_model: int = 2560
    num_heads: int = 40
    dim_ff: int = 6400
    num_layers: int = 62
    init_std: float = 0.1
    q_rank: int | None = 768
    kv_rank: int = 256
    dim_nope: int = 64
    dim_rope: int = 32
    dim_value: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dim_value", self.dim_value or self.dim_model // self.num_heads)
        for name in ("kv_rank", "dim_nope", "dim_rope", "dim_value"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))


class _Family(Family):
    """Fields that are null mean something; keys and values have as many heads as queries."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read a `config.json`, see `Family.read`."""
        found = super().read(config)
        if "q_lora_rank" in config and config["q_lora_rank"] is None:
            found["q_rank"] = None
        if "scale_depth" in config and config["scale_depth"] is None:
            found["scale_depth"] = math.sqrt(config.get("num_hidden_layers", MiniCPM3Config.num_layers))
        if "dim_model_base" in config and config["dim_model_base"] is None:
            found["dim_model_base"] = config.get("hidden_size", MiniCPM3Config.dim_model)
        return found

    def write(self, config: Any) -> dict[str, Any]:
        """Write a `config.json`, see `Family.write`."""
        return {**super().write(config), "num_key_value_heads": config.num_heads}  # where it is not there it is 40


class MiniCPM3(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = _Family(
        ("minicpm3",),
        "MiniCPM3ForCausalLM",
        fields={
            "head_dim": None,
            "num_key_value_heads": None,
            "attention_bias": "attention_bias",
            "scale_emb": "scale_emb",
            "scale_depth": "scale_depth",
            "dim_model_base": "dim_model_base",
            "q_lora_rank": "q_rank",
            "kv_lora_rank": "kv_rank",
            "qk_nope_head_dim": "dim_nope",
            "qk_rope_head_dim": "dim_rope",
            "v_head_dim": "dim_value",
        },
        fixed={"mlp_bias": (False,)},
        ignored=("head_dim", "num_key_value_heads", "qk_head_dim"),
    )
    CONFIG = MiniCPM3Config

    def __init__(self, config: MiniCPM3Config):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_rope, config.rope_base, config.rope_scaling)
        scale = config.scale_depth / math.sqrt(config.num_layers)

        def layer() -> DecoderLayer:
            sizes = config.dim_nope, config.dim_rope, config.dim_value, config.q_rank, config.kv_rank
            more = {"norm_eps": _LATENT_EPS, "bias": config.attention_bias, "interleaved": False}
            attention = LatentAttention(config.dim_model, config.num_heads, *sizes, rotary, **more, **settings)
            mlp = FeedForward(config.dim_model, config.dim_ff, **settings)
            return DecoderLayer(attention, mlp, lambda: RMSNorm(config.dim_model, config.norm_eps, dtype), scale=scale)

        super().__init__(
            config,
            (layer() for _ in range(config.num_layers)),
            RMSNorm(config.dim_model, config.norm_eps, dtype),
            embed_scale=config.scale_emb,
            head_scale=config.dim_model_base / config.dim_model,
        )
