"""What Hugging Face calls a family of models: fields of its `config.json`, names and shapes of its tensors."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Mapping, Sequence

Box = tuple[slice, ...]

# Fields of every family. 5.x writes dtype and rope_parameters where 4.x wrote torch_dtype, rope_theta and rope_scaling.
COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim_model",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_heads_kv",
    "head_dim": "dim_head",
    "intermediate_size": "dim_ff",
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied",
}
# What changes no logits and no gradients of a model that is trained here.
IGNORED = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "max_position_embeddings",  # read where a rope scaling asks for it
    "min_length",
    "model_type",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",  # slices of the same products
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
}
# Fields that would change results, and the only values that are computed here.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "quantization_config": (None,),
}
# Fields that say how a model was trained, which is not done here unless one asks for it: told, and not used.
TRAINING = {"attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout", "router_aux_loss_coef"}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
_OURS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
    "original_max_position_embeddings": "original",
}


WINDOWS = ("always", "asked for", "by layer")
"""A family's sliding window: `sliding_window` alone, of all layers; where `use_sliding_window` asks for it; of those layers that
`layer_types`, or else `max_window_layers`, says."""
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers")


class ConfigError(ValueError):
    """A `config.json` says something that is not computed here; the message names the fields."""


@dataclass(frozen=True)
class Piece:
    """A part of one of our tensors, and where it is in a tensor of Hugging Face's.

    `name`: of that tensor.  `ours`, `theirs`: boxes of the same size, `theirs` in the order of its own dims.  `transposed`: the
    last two dims are exchanged there.  `shape`: of the whole tensor there.
    """

    name: str
    ours: Box
    theirs: Box
    shape: tuple[int, ...]
    transposed: bool = False


Pieces = Callable[[re.Match[str], tuple[int, ...]], list[list[Piece]]]


@dataclass(frozen=True)
class Rule:
    """How the tensors with names that match `pattern` are found: `pieces` gives alternatives, the first of which is written."""

    pattern: str
    pieces: Pieces


@dataclass(frozen=True)
class Family:
    """A family of models as Hugging Face has it.

    Attributes:
        model_types: as `config.json` names it; the first one is written.
        architecture: the class in transformers.
        fields: of `config.json` -> of our config, beside the `COMMON` ones; None instead of a name: such a common one is not used.
        fixed: fields that would change results, and the values of them that are computed here; beside the `FIXED` ones.
        defaults: what a field means that is not there, where that is not our config's default.
        ignored: fields that change nothing, beside the `IGNORED` ones.
        rules: tensors that are not what they are called here; the first that matches counts.
        written: fields with values that are always written.
        window: how a sliding window is spelt, one of `WINDOWS`; "": there is none.
    """

    model_types: tuple[str, ...]
    architecture: str
    fields: Mapping[str, str | None] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: Iterable[str] = ()
    rules: Sequence[Rule] = ()
    written: Mapping[str, Any] = field(default_factory=dict)
    window: str = ""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of our config, of a `config.json`.

        Raises:
            ConfigError: one of another family, or fields that change results and are not known here, or have values that are not
                computed here; all of them are named.
        """
        if config.get("model_type") not in self.model_types:
            raise ConfigError(f"model_type is {config.get('model_type')!r}, not {' or '.join(map(repr, self.model_types))}")
        names = {**COMMON, **self.fields}
        fixed, ignored = {**FIXED, **self.fixed}, IGNORED | set(self.ignored)
        found: dict[str, Any] = dict(self.defaults)
        wrong: list[str] = []
        told: list[str] = []
        for name, value in config.items():
            if name in fixed:
                if value not in fixed[name]:
                    wrong.append(f"{name}={value!r} (computed here: {' or '.join(map(repr, fixed[name]))})")
            elif name == "layer_types":
                if set(value or ()) - ({"full_attention", "sliding_attention"} if self.window else {"full_attention"}):
                    wrong.append(f"layer_types={sorted(set(value))} (computed here: 'full_attention')")
            elif self.window and name in _WINDOW:
                pass
            elif names.get(name) is not None:
                if value is not None:
                    found[names[name]] = value  # type: ignore[index]
            elif name in ("dtype", "torch_dtype"):
                if value is not None:
                    found["dtype"] = str(value).replace("torch.", "")
            elif name in TRAINING:
                if value:
                    told.append(f"{name}={value}")
            elif name not in ignored and name not in _ROPE and not name.startswith("_"):
                wrong.append(f"{name}={value!r} (not known here)")
        if wrong:
            raise ConfigError(f"this {self.model_types[0]} cannot be computed as its config says: {'; '.join(wrong)}")
        if told:
            warnings.warn(f"not used: {', '.join(told)}; a model here has no dropout and no balance loss of its own", stacklevel=3)
        found.update(_rope(config))
        if self.window:
            found.update(_window(config, self.window, found.get("window", 0)))
        return found

    def write(self, config: Any) -> dict[str, Any]:
        """The `config.json` of one of our configs, in the spelling that 4.x and 5.x read."""
        names = {name: ours for name, ours in {**COMMON, **self.fields}.items() if ours is not None}
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_types[0]}
        for name, ours in names.items():
            if hasattr(config, ours):
                value = getattr(config, ours)
                out[name] = list(value) if isinstance(value, tuple) else value
        out.update(self.written)
        if self.window:
            out.update(_window_written(config, self.window))
        out["torch_dtype"] = config.dtype
        if "rope_base" not in names.values() and getattr(config, "rope_base", None) is not None:
            out["rope_theta"] = config.rope_base
            scaling = config.rope_scaling
            if scaling is not None:
                out["rope_scaling"] = _rope_written(scaling)
                if scaling.longest:
                    out["max_position_embeddings"] = scaling.longest
        return out

    def pieces(self, name: str, shape: tuple[int, ...]) -> list[list[Piece]]:
        """Alternatives of where a parameter of ours, with this whole shape, is in Hugging Face's tensors."""
        return pieces_by(self.rules, name, shape)


def pieces_by(rules: Sequence[Rule], name: str, shape: tuple[int, ...]) -> list[list[Piece]]:
    """What the first rule for this name gives; where there is none the tensor is called so there too."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, name)
        if match:
            return rule.pieces(match, shape)
    return [[same(name, shape)]]


def same(name: str, shape: tuple[int, ...]) -> Piece:
    """The whole tensor, of another name maybe."""
    box = tuple(slice(0, n) for n in shape)
    return Piece(name, box, box, shape)


def renamed(pattern: str, name: str) -> Rule:
    """A tensor that only has another name, in which groups of the pattern stand as `{0}`, `{1}` ..."""
    return Rule(pattern, lambda match, shape: [[same(name.format(*match.groups()), shape)]])


def transposed(pattern: str, name: str) -> Rule:
    """A matrix that is written the other way round (GPT-2's Conv1D)."""

    def pieces(match: re.Match[str], shape: tuple[int, ...]) -> list[list[Piece]]:
        turned = shape[::-1]
        ours, theirs = tuple(slice(0, n) for n in shape), tuple(slice(0, n) for n in turned)
        return [[Piece(name.format(*match.groups()), ours, theirs, turned, len(shape) == 2)]]

    return Rule(pattern, pieces)


def experts(pattern: str, single: str, fused: str | None = None, part: tuple[int, int] = (0, 1)) -> Rule:
    """(experts, out, in): a tensor for each expert, called `single` with `{e}` for its number; or one for all, called `fused`,
    whose dim 1 has `part[1]` equal parts, of which this is number `part[0]` (transformers 5, in memory)."""

    def pieces(match: re.Match[str], shape: tuple[int, ...]) -> list[list[Piece]]:
        box = tuple(slice(0, n) for n in shape[1:])
        groups = match.groups()
        one_each = [Piece(single.format(*groups, e=e), (slice(e, e + 1), *box), box, tuple(shape[1:])) for e in range(shape[0])]
        if fused is None:
            return [one_each]
        index, parts = part
        there = (slice(0, shape[0]), slice(index * shape[1], (index + 1) * shape[1]), slice(0, shape[2]))
        whole = (shape[0], parts * shape[1], shape[2])
        return [one_each, [Piece(fused.format(*groups), tuple(slice(0, n) for n in shape), there, whole)]]

    return Rule(pattern, pieces)


def _window(config: Mapping[str, Any], kind: str, default: int) -> dict[str, Any]:
    """The settings `window` and `full_layers` that a `config.json` asks for."""
    asked = kind == "always" or bool(config.get("use_sliding_window", False))
    window = (config.get("sliding_window", default) or 0) if asked else 0
    types = list(config.get("layer_types") or ())
    layers = config.get("num_hidden_layers", len(types))
    if types and len(types) != layers:
        raise ConfigError(f"layer_types has {len(types)} entries, and num_hidden_layers says {layers}")
    if not window:
        if "sliding_attention" in types:
            raise ConfigError("layer_types has 'sliding_attention', and sliding_window, or use_sliding_window, says no window")
        return {"window": 0}
    if kind != "by layer":
        if "full_attention" in types:
            raise ConfigError("layer_types has 'full_attention' beside a sliding_window, which all layers of this family have")
        return {"window": window}
    if not types:
        first = config.get("max_window_layers", 28)  # these have none
        types = ["full_attention" if n < first else "sliding_attention" for n in range(layers)]
    return {"window": window, "full_layers": tuple(n for n, name in enumerate(types) if name == "full_attention")}


def _window_written(config: Any, kind: str) -> dict[str, Any]:
    if kind != "by layer" and config.full_layers:
        raise ConfigError(f"full_layers={config.full_layers} cannot be said in this family's config.json, where all have it")
    out: dict[str, Any] = {} if kind == "always" else {"use_sliding_window": bool(config.window)}
    if config.window or kind == "always":
        out["sliding_window"] = config.window or None
    if config.window and kind == "by layer":
        full = [config.window_of(n) is None for n in range(config.num_layers)]
        out["layer_types"] = ["full_attention" if this else "sliding_attention" for this in full]
        out["max_window_layers"] = full.index(False) if False in full else config.num_layers  # for who does not know layer_types
    return out


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_base` and `rope_scaling` of either spelling."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found: dict[str, Any] = {}
    base = given.pop("rope_theta", config.get("rope_theta"))
    if base is not None:
        found["rope_base"] = float(base)
    if given.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (1, 1.0, None):
        raise ConfigError("partial_rotary_factor: only a part of each head is rotated, which is not computed here")
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind == "default":
        return found
    if kind == "su":  # the name that longrope had first
        kind = "longrope"
    longest = config.get("max_position_embeddings")
    scaling: dict[str, Any] = {"rope_type": kind}
    for name, value in given.items():
        if name == "truncate" and value is True:
            continue
        if name not in _OURS:
            raise ConfigError(f"{name}={value!r} of the rope scaling {kind!r} is not known here")
        if value is not None:
            scaling[_OURS[name]] = tuple(value) if isinstance(value, list) else value
    original = scaling.get("original") or config.get("original_max_position_embeddings") or longest
    if original is not None and kind != "linear":
        scaling["original"] = int(original)
    if longest is not None:
        scaling["longest"] = int(longest)
    if kind == "longrope" and "factor" not in scaling and longest and original:
        scaling["factor"] = max(1.0, longest / original)
    found["rope_scaling"] = scaling
    return found


def _rope_written(scaling: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": scaling.rope_type, "type": scaling.rope_type, "factor": scaling.factor}
    used = {
        "linear": (),
        "dynamic": (),
        "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings"),
        "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    }[scaling.rope_type]
    for name in (*used, "attention_factor"):
        value = getattr(scaling, _OURS[name])
        if value not in (None, ()) and not (name.startswith("mscale") and not value):
            out[name] = list(value) if isinstance(value, tuple) else value
    return out
