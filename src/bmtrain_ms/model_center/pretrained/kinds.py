"""Values in a `config.json` that are of another type than their field, told by the names that the file has."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from typing import Any, Callable, Iterator, Mapping

_WHOLE, _NUMBER, _TRUTH, _TEXT = "a whole number of at least 0", "a number", "true or false", "a text"
_WHOLES, _NUMBERS, _TEXTS, _OBJECT = "a list of whole numbers", "a list of numbers", "a list of texts", "an object"

_CHECKS: dict[str, Callable[[Any], bool]] = {
    _WHOLE: lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0,
    _NUMBER: lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x),
    _TRUTH: lambda x: isinstance(x, bool),
    _TEXT: lambda x: isinstance(x, str),
    _WHOLES: lambda x: isinstance(x, list) and all(map(_CHECKS[_WHOLE], x)),
    _NUMBERS: lambda x: isinstance(x, list) and all(map(_CHECKS[_NUMBER], x)),
    _TEXTS: lambda x: isinstance(x, list) and all(map(_CHECKS[_TEXT], x)),
    _OBJECT: lambda x: isinstance(x, dict),
}
# What a field of our configs is annotated with.
_ANNOTATED = {"int": _WHOLE, "float": _NUMBER, "bool": _TRUTH, "str": _TEXT, "tuple[int, ...]": _WHOLES}
# Fields that are read, and are not fields of our configs as they are.
_READ = {
    "architectures": _TEXTS,
    "model_type": _TEXT,
    "dtype": _TEXT,
    "torch_dtype": _TEXT,
    "layer_types": _TEXTS,
    "sliding_window": _WHOLE,
    "use_sliding_window": _TRUTH,
    "max_window_layers": _WHOLE,
    "max_position_embeddings": _NUMBER,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
}
_ROPE = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"), _NUMBER),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), _NUMBER),
    **dict.fromkeys(("mscale", "mscale_all_dim", "attention_factor"), _NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), _NUMBERS),
}
_OF_ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")  # which stand outside of it, too


def wrong_kinds(given: Mapping[str, Any], names: Mapping[str, str | None], config: type) -> list[str]:
    """What is wrong with the values of a `config.json`, each in some words; null is always right, as it means that nothing is said.

    Args:
        given: what the file says.
        names: its names -> those of our config, or None.
        config: the class of ours, whose annotations say what a value is.
    """
    annotated = {field.name: _ANNOTATED.get(str(field.type).replace(" | None", "")) for field in dataclasses.fields(config)}
    kinds = {theirs: kind for theirs, ours in names.items() if (kind := annotated.get(ours or ""))}
    found = list(_wrong(given, {**kinds, **_READ, **{name: _ROPE[name] for name in _OF_ROPE}}))
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(given.get(name), dict):
            found += [f"{name}.{text}" for text in _wrong(given[name], _ROPE)]
    return found


def with_their_names(text: str, names: Mapping[str, str | None]) -> str:
    """A complaint of one of our configs, and what the fields that it names are called in a `config.json`."""
    theirs = {ours: name for name, ours in names.items() if ours is not None and ours != name}
    told = [f"{word} is {theirs[word]}" for word in dict.fromkeys(re.findall(r"\w+", text)) if word in theirs]
    return f"{text} ({', '.join(told)} there)" if told else text


def _wrong(given: Mapping[str, Any], kinds: Mapping[str, str]) -> Iterator[str]:
    for name, value in given.items():
        if value is not None and name in kinds and not _CHECKS[kinds[name]](value):
            yield f"{name} must be {kinds[name]}, not {reprlib.repr(value)}"
