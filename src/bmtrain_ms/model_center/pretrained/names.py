"""What other programs call the tensors of models that are here: the earlier port, and Megatron's core."""

from __future__ import annotations

import re
from typing import Any, Sequence

from .family import Piece, Rule, experts, pieces_by, renamed, same
from .reading import Names

_LAYER = r"model\.layers\.(\d+)\."
_INNER = (("gate_proj", "w_in.w0"), ("up_proj", "w_in.w1"), ("down_proj", "w_out"))

# github.com/demerzel-iv/bmtrain_mindspore, `mindspore_model.safetensors`
_EARLIER_PORT: dict[str, Sequence[Rule]] = {
    "llama": (
        renamed(r"model\.embed_tokens\.weight", "input_embedding.weight"),
        renamed(r"model\.norm\.weight", "encoder.output_layer_norm.weight"),
        renamed(r"lm_head\.weight", "output_projection.weight"),
        renamed(_LAYER + r"input_layernorm\.weight", "encoder.layers.{0}.self_att.layernorm.weight"),
        renamed(_LAYER + r"post_attention_layernorm\.weight", "encoder.layers.{0}.ffn.layernorm.weight"),
        renamed(_LAYER + r"self_attn\.([qkv])_proj\.weight", "encoder.layers.{0}.self_att.attention.project_{1}.weight"),
        renamed(_LAYER + r"self_attn\.o_proj\.weight", "encoder.layers.{0}.self_att.attention.attention_out.weight"),
        *(renamed(_LAYER + rf"mlp\.{ours}\.weight", f"encoder.layers.{{0}}.ffn.ffn.{theirs}.weight") for ours, theirs in _INNER),
    ),
    "deepseek_v2": (
        renamed(r"model\.embed_tokens\.weight", "input_embedding.weight"),
        renamed(r"model\.norm\.weight", "output_norm.weight"),
        *(
            experts(_LAYER + rf"mlp\.experts\.{ours}\.weight", f"layers.{{0}}.mlp.experts.{{e}}.{theirs}.weight")
            for ours, theirs in _INNER
        ),
        *(
            renamed(_LAYER + rf"mlp\.(shared_experts\.|){ours}\.weight", f"layers.{{0}}.mlp.{{1}}{theirs}.weight")
            for ours, theirs in _INNER
        ),
        renamed(r"model\.(layers\..*)", "{0}"),
    ),
}
_MEGATRON = ("llama", "minicpm", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v2")


def earlier_port(model_type: str) -> Names:
    """The names that bmtrain_mindspore's Llama and DeepSeek-V2-Lite use.

    Raises:
        ValueError: another family.
    """
    if model_type not in _EARLIER_PORT:
        raise ValueError(f"bmtrain_mindspore has no {model_type}: it has {' and '.join(_EARLIER_PORT)}")
    rules = _EARLIER_PORT[model_type]
    return lambda name, shape: pieces_by(rules, name, shape)


def megatron(model_type: str, config: Any, vocab_rows: int) -> Names:
    """The names of Megatron's core, where a file holds whole tensors: queries, keys and values are one, group by group, and so are
    the two matrices in front of an activation.

    Args:
        model_type: a family of Llama's kind.
        config: its sizes.
        vocab_rows: of the embedding there, which may have more rows than there are tokens: they are left out.

    Raises:
        ValueError: another family.
    """
    if model_type not in _MEGATRON:
        raise ValueError(f"Megatron's names of {model_type} are not known here: those of {', '.join(_MEGATRON)} are")
    latent = hasattr(config, "kv_rank")
    rules = [*([] if latent else _fused_attention(config)), *_MEGATRON_RULES, *_ATTENTION_RULES]

    def names(name: str, shape: tuple[int, ...]) -> list[list[Piece]]:
        there = {"model.embed_tokens.weight": "embedding.word_embeddings.weight", "lm_head.weight": "output_layer.weight"}
        if name in there:
            box = tuple(slice(0, n) for n in shape)
            return [[Piece(there[name], box, box, (vocab_rows, *shape[1:]))]]
        return pieces_by(rules, name, shape)

    return names


def _either(pattern: str, *names: str) -> Rule:
    """A tensor that has one of several names."""
    return Rule(pattern, lambda match, shape: [[same(name.format(*match.groups()), shape)] for name in names])


def _half(pattern: str, index: int, *names: str) -> Rule:
    """One of two matrices that are one there, the first above the second; of each expert where `names` have `{e}`."""

    def pieces(match: re.Match[str], shape: tuple[int, ...]) -> list[list[Piece]]:
        rows, columns = shape[-2:]
        there = (slice(index * rows, (index + 1) * rows), slice(0, columns))
        box = (slice(0, rows), slice(0, columns))
        if len(shape) == 2:
            return [[Piece(name.format(*match.groups()), box, there, (2 * rows, columns))] for name in names]
        return [
            [Piece(name.format(*match.groups(), e=e), (slice(e, e + 1), *box), there, (2 * rows, columns)) for e in range(shape[0])]
            for name in names
        ]

    return Rule(pattern, pieces)


def _fused_attention(config: Any) -> list[Rule]:
    """Rows there: for each group of heads those of its queries, then its keys, then its values."""
    head, groups, queries = config.dim_head, config.num_heads_kv, config.num_heads // config.num_heads_kv

    def rule(kind: str, first: int, heads: int) -> Rule:
        def pieces(match: re.Match[str], shape: tuple[int, ...]) -> list[list[Piece]]:
            name = f"decoder.layers.{match[1]}.self_attention.linear_qkv.{match[2]}"
            rest = tuple(slice(0, n) for n in shape[1:])
            found = []
            for group in range(groups):
                start = (group * (queries + 2) + first) * head
                ours, theirs = slice(group * heads * head, (group + 1) * heads * head), slice(start, start + heads * head)
                found.append(Piece(name, (ours, *rest), (theirs, *rest), (groups * (queries + 2) * head, *shape[1:])))
            return [found]

        return Rule(_LAYER + rf"self_attn\.{kind}_proj\.(weight|bias)", pieces)

    return [rule("q", 0, queries), rule("k", queries, 1), rule("v", queries + 1, 1)]


_THERE = "decoder.layers.{0}."
_ATTENTION = (
    ("o_proj", ("linear_proj.weight",)),
    ("q_norm", ("q_layernorm.weight",)),
    ("k_norm", ("k_layernorm.weight",)),
    ("q_proj", ("linear_q_proj.weight",)),  # the rest of latent attention
    ("q_a_proj", ("linear_q_down_proj.weight",)),
    ("q_a_layernorm", ("linear_q_up_proj.layer_norm_weight", "q_layernorm.weight")),
    ("q_b_proj", ("linear_q_up_proj.weight",)),
    ("kv_a_proj_with_mqa", ("linear_kv_down_proj.weight",)),
    ("kv_a_layernorm", ("linear_kv_up_proj.layer_norm_weight", "kv_layernorm.weight")),
    ("kv_b_proj", ("linear_kv_up_proj.weight",)),
)
_FC1 = (f"{_THERE}mlp.experts.linear_fc1.weight{{e}}", f"{_THERE}mlp.experts.local_experts.{{e}}.linear_fc1.weight")
_FC2 = (f"{_THERE}mlp.experts.linear_fc2.weight{{e}}", f"{_THERE}mlp.experts.local_experts.{{e}}.linear_fc2.weight")
_MEGATRON_RULES: Sequence[Rule] = (
    renamed(r"model\.norm\.weight", "decoder.final_layernorm.weight"),
    _either(
        _LAYER + r"input_layernorm\.weight",
        _THERE + "self_attention.linear_qkv.layer_norm_weight",
        _THERE + "input_layernorm.weight",
    ),
    _either(
        _LAYER + r"post_attention_layernorm\.weight",
        _THERE + "mlp.linear_fc1.layer_norm_weight",
        _THERE + "pre_mlp_layernorm.weight",
    ),
    renamed(_LAYER + r"mlp\.gate\.weight", _THERE + "mlp.router.weight"),
    _half(_LAYER + r"mlp\.experts\.gate_proj\.weight", 0, *_FC1),
    _half(_LAYER + r"mlp\.experts\.up_proj\.weight", 1, *_FC1),
    Rule(
        _LAYER + r"mlp\.experts\.down_proj\.weight",
        lambda match, shape: [
            [Piece(name.format(*match.groups(), e=e), (slice(e, e + 1), *box), box, tuple(shape[1:])) for e in range(shape[0])]
            for name in _FC2
            for box in [tuple(slice(0, n) for n in shape[1:])]
        ],
    ),
    _half(_LAYER + r"mlp\.(shared_experts\.|)gate_proj\.weight", 0, _THERE + "mlp.{1}linear_fc1.weight"),
    _half(_LAYER + r"mlp\.(shared_experts\.|)up_proj\.weight", 1, _THERE + "mlp.{1}linear_fc1.weight"),
    renamed(_LAYER + r"mlp\.(shared_experts\.|)down_proj\.weight", _THERE + "mlp.{1}linear_fc2.weight"),
)
_ATTENTION_RULES = tuple(
    _either(_LAYER + rf"self_attn\.{ours}\.weight", *(f"{_THERE}self_attention.{name}" for name in theirs))
    for ours, theirs in _ATTENTION
)
