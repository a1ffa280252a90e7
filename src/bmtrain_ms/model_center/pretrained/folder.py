"""What lies beside the weights in a folder of Hugging Face's: the config, and files that are copied as they are."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Mapping, TypeVar

from ...files.errors import CheckpointError
from ...files.format import RegularFile, parsed_json
from ...files.replacing import replace_text
from .differences import PretrainedError
from .family import COMMON, ConfigError, Family
from .kinds import with_their_names, wrong_kinds

Config = TypeVar("Config")

CONFIG = "config.json"
# Of tokenizers, chat templates, generation; and the code of models that transformers does not have (`auto_map`).
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)
_LARGEST = 1 << 24  # bytes of a config
_RESTATED = ("dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters", "layer_types")  # of either spelling
_HEADS = ("ForCausalLM", "LMHeadModel", "Model")


def read_json(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`.

    Raises:
        CheckpointError: missing, or damaged.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the one that config.json and the weights are in")
    with RegularFile(path, links=True) as file:
        if file.size > _LARGEST:
            raise CheckpointError(f"{path} is {file.size} bytes long, which no config is")
        text = file.read(0, file.size)
    try:
        found = parsed_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it is not an object")
    return found


def config_of(
    family: Family, kind: type[Config], given: Mapping[str, Any], path: Path, changes: Mapping[str, Any] | None = None
) -> Config:
    """One of our configs, of a `config.json` that says what is computed here; `changes`: fields of ours that are to be others.

    Raises:
        PretrainedError: it is of another family, a value has another type than its field, or it says something else.
        TypeError, ValueError: the changes do not fit.
    """
    names = {**COMMON, **family.fields}
    wrong = wrong_kinds(given, names, kind)
    if wrong:
        raise PretrainedError(f"{path / CONFIG}: {'; '.join(wrong)}")
    fields = _fields_of(family, given, path)
    try:
        return kind(**{**fields, **(changes or {})})
    except (TypeError, ValueError) as error:
        if any(name in str(error) for name in changes or {}):
            raise
        there = {name: ours for name, ours in names.items() if name in given}
        raise PretrainedError(f"{path / CONFIG}: {with_their_names(str(error), there)}") from error


def _fields_of(family: Family, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    architectures = given.get("architectures") or []
    if architectures and not any(str(name).endswith(_HEADS) for name in architectures):
        raise PretrainedError(
            f"{path / CONFIG} is of {', '.join(map(str, architectures))}, which predicts no next token: give one of "
            f"{family.architecture}"
        )
    try:
        return family.read(given)
    except ConfigError as error:
        raise PretrainedError(f"{path / CONFIG}: {error}") from error


def config_json(family: Family, config: Any, source: Path | None) -> dict[str, Any]:
    """The `config.json` of one of our configs: that of `source`, as far as it says the same.

    Raises:
        PretrainedError: that of `source` is of another family.
        CheckpointError: it cannot be read.
    """
    ours = family.write(config)
    if source is None:
        return ours
    given = read_json(source)
    found = config_of(family, type(config), given, source)
    if replace(found, dtype=config.dtype) == config:
        return {**given, "dtype" if "dtype" in given else "torch_dtype": config.dtype}
    return {**{name: value for name, value in given.items() if name not in _RESTATED}, **ours}


def write_beside(folder: Path, config: Mapping[str, Any], source: Path | None) -> None:
    """Write the config, and copy from `source` what belongs beside a model's weights. A file appears complete or not at all."""
    if source is not None:
        copy_beside(folder, source)
    replace_text(folder / CONFIG, json.dumps(dict(config), indent=2) + "\n")


def copy_beside(folder: Path, source: Path) -> None:
    """Copy what belongs beside a model's weights, but its config. A file appears complete or not at all."""
    for pattern in _BESIDE if source.resolve() != folder.resolve() else ():
        for path in sorted(source.glob(pattern)):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            new = target.with_name(f".{target.name}.new")
            shutil.copyfile(path, new)
            new.replace(target)
