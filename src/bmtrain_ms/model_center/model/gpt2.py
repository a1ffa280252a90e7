"""GPT-2 (Radford et al., 2019): LayerNorm, learned positions, biases, GELU.

Parameters have our common names; a file has those of Hugging Face's `GPT2LMHeadModel`, whose matrices lie the other way round.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn

from ...nn import ColumnParallelLinear, Linear, RowParallelLinear, functional
from ..layer import Attention, DecoderLayer, Embedding, LayerNorm
from ..pretrained.family import Family, Piece, Rule, renamed, transposed
from .causal_lm import CausalLM
from .config import DecoderConfig


@dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """Sizes of a GPT-2, see `DecoderConfig`; `rope_base` is not used.

    `max_positions`: rows of the table of positions; longer texts have none.  `dim_ff=0`: 4 * dim_model.
    """

    vocab_size: int = 50257
    dim_model: int = 768
    num_heads: int = 12
    dim_ff: int = 0
    num_layers: int = 12
    tied: bool = True
    max_positions: int = 1024

    def __post_init__(self) -> None:
        if not self.dim_ff:
            object.__setattr__(self, "dim_ff", 4 * self.dim_model)
        super().__post_init__()


class GeluFeedForward(nn.Cell):
    """c_proj(gelu(c_fc x)), with biases.

    Args:
        dim_in, dim_ff: of the hidden states, and of the inner layer.
        dtype, init_std: of the parameters.
    """

    def __init__(self, dim_in: int, dim_ff: int, dtype: object = ms.float32, init_std: float = 0.02):
        super().__init__()
        self.c_fc: nn.Cell = Linear(dim_in, dim_ff, True, dtype, init_std)
        self.c_proj: nn.Cell = Linear(dim_ff, dim_in, True, dtype, init_std)

    def divide(self, ranks: int) -> None:
        """Have each of the tensor-parallel ranks compute a part of the inner layer, from its part of the hidden states' rows to its
        part of the result's."""
        self.c_fc, self.c_proj = ColumnParallelLinear.of(self.c_fc), RowParallelLinear.of(self.c_proj)

    def construct(self, hidden: Tensor) -> Tensor:
        """hidden (tokens, dim_in) -> (tokens, dim_in)."""
        return self.c_proj(functional.gelu(self.c_fc(hidden)))


def _part_of_attention(index: int, pattern: str) -> Rule:
    """Queries, keys or values, which are one matrix there, (in, 3 * out)."""

    def pieces(match: re.Match[str], shape: tuple[int, ...]) -> list[list[Piece]]:
        out, rest = shape[0], shape[1:]
        name = f"transformer.h.{match[1]}.attn.c_attn.{match[2]}"
        ours = tuple(slice(0, n) for n in shape)
        theirs = (*(slice(0, n) for n in rest), slice(index * out, (index + 1) * out))
        return [[Piece(name, ours, theirs, (*rest, 3 * out), len(shape) == 2)]]

    return Rule(pattern, pieces)


class GPT2(CausalLM):
    """The language model; see `CausalLM`."""

    FAMILY = Family(
        ("gpt2",),
        "GPT2LMHeadModel",
        fields={
            "hidden_size": None,
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "head_dim": None,
            "intermediate_size": None,
            "num_hidden_layers": None,
            "rms_norm_eps": None,
            "n_embd": "dim_model",
            "n_head": "num_heads",
            "n_layer": "num_layers",
            "n_inner": "dim_ff",
            "n_positions": "max_positions",
            "layer_norm_epsilon": "norm_eps",
        },
        fixed={
            "activation_function": ("gelu_new",),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
        },
        defaults={"tied": True},
        ignored=(
            "n_ctx",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        ),
        rules=(
            renamed(r"model\.embed_tokens\.weight", "transformer.wte.weight"),
            renamed(r"model\.embed_positions\.weight", "transformer.wpe.weight"),
            renamed(r"model\.norm\.(.*)", "transformer.ln_f.{0}"),
            renamed(r"model\.layers\.(\d+)\.input_layernorm\.(.*)", "transformer.h.{0}.ln_1.{1}"),
            renamed(r"model\.layers\.(\d+)\.post_attention_layernorm\.(.*)", "transformer.h.{0}.ln_2.{1}"),
            *(
                _part_of_attention(index, rf"model\.layers\.(\d+)\.self_attn\.{name}\.(.*)")
                for index, name in enumerate(("q_proj", "k_proj", "v_proj"))
            ),
            transposed(r"model\.layers\.(\d+)\.self_attn\.o_proj\.(.*)", "transformer.h.{0}.attn.c_proj.{1}"),
            transposed(r"model\.layers\.(\d+)\.mlp\.(c_fc|c_proj)\.(.*)", "transformer.h.{0}.mlp.{1}.{2}"),
        ),
    )
    CONFIG = GPT2Config

    def __init__(self, config: GPT2Config):
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}

        def layer() -> DecoderLayer:
            sizes = config.dim_model, config.num_heads, config.dim_head
            attention = Attention(*sizes, bias=True, **settings)
            mlp = GeluFeedForward(config.dim_model, config.dim_ff, **settings)
            return DecoderLayer(attention, mlp, lambda: LayerNorm(config.dim_model, config.norm_eps, dtype))

        super().__init__(
            config,
            (layer() for _ in range(config.num_layers)),
            LayerNorm(config.dim_model, config.norm_eps, dtype),
            embed_positions=Embedding(config.max_positions, config.dim_model, **settings),
        )
