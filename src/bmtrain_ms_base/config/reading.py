"""Settings of a file and of the command line: read, checked all at once, and written as they came out."""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from pydantic import BaseModel, ValidationError

from ..shortening import shortened, shown
from .fitting import problems
from .sections import Settings

_LONGEST = 1000  # characters of a line about a setting
_RANGE = re.compile(r"Input should be (.*)")


class ConfigError(ValueError):
    """Settings that are wrong; its message is a line for each of them."""


def read_settings(path: str | None, overrides: Sequence[str], ranks: int, tuning: bool = False) -> Settings:
    """The settings of a run.

    Args:
        path: a TOML or YAML file; None: all are of the command line.
        overrides: `section.key=value`, which count more than the file; values as TOML writes them, or plain text.
        ranks: how many a launcher has started; 0: as many as the settings say.
        tuning: whether a model that is there is trained on.

    Raises:
        ConfigError: the file cannot be read, or settings are unknown, wrong, or do not fit together: all of them at once.
    """
    values = {} if path is None else _of_file(Path(path).expanduser())
    for text in overrides:
        _override(values, text)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_lines(_line(found) for found in _telling(error.errors()))) from error
    found = problems(settings, ranks or settings.layout.ranks or 1, tuning)
    if found:
        raise ConfigError(_lines(found))
    return settings


def _lines(problems: Iterable[str]) -> str:
    return "\n".join(shortened(line, _LONGEST) for line in problems)


def _of_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of the encoding
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        values = _parsed(path.suffix.lower(), text)
    except RecursionError as error:
        raise ConfigError(f"{path}: its brackets are nested too deep to be settings") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not sections with settings")
    return values


def _parsed(suffix: str, text: str) -> Any:
    if suffix == ".toml":
        return _toml().loads(text)
    if suffix == ".json":
        return json.loads(text, object_pairs_hook=_once_each)
    if suffix not in (".yaml", ".yml"):
        raise ValueError("the name ends neither in .toml nor in .yaml nor in .json")
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers: 1e-3 is one, which PyYAML takes for a text. No name twice, of which PyYAML takes the last."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)  # as it is written: `<<` has not brought names of others yet
            _once_each([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return node

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|INF)$|^\.(nan|NAN)$"),
        "-+0123456789.",
    )
    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error


def _once_each(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Names and values, as a dict.

    Raises:
        ValueError: a name is there twice.
    """
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if str(name) in map(str, found):
            raise ValueError(f"{name!r} is there twice: leave one of them out")
        found[str(name)] = value
    return found


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    import tomli

    return tomli


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise ConfigError(f"{shown(text)}: write section.key=value, as train.steps=1000")
    *sections, key = name.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{name}: {section} is no section")
        values = inner
    values[key] = _value(value)


def _value(text: str) -> Any:
    try:
        found = _toml().loads(f"value = {text}")
        if set(found) != {"value"}:  # further lines, which say more than one setting
            return text
        return found["value"]
    except ValueError:
        return None if text in ("null", "none", "None") else text  # a path or a word


def _telling(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Errors, but for those of the other types that a value might have had, where it is wrong for its own."""
    own = {_place(found) for found in errors if not found["type"].endswith("_type")}
    return [found for found in errors if _place(found) not in own or not found["type"].endswith("_type")]


def _place(found: Mapping[str, Any]) -> str:
    kinds = ("constrained", "str", "list[", "function", "int", "float")  # of a union, no names
    return shortened(".".join(str(part) for part in found["loc"] if not str(part).startswith(kinds)))


def _line(found: Mapping[str, Any]) -> str:
    """What pydantic has found, as we say it."""
    place = _place(found)
    kind, given = found["type"], found["input"]
    if kind == "extra_forbidden":
        known = _names(found["loc"][:-1])
        near = difflib.get_close_matches(str(found["loc"][-1]), known, 1)
        return f"{place}: there is no such setting; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
    if kind == "missing":
        return f"{place}: is missing"
    if kind in ("model_type", "model_attributes_type"):
        return f"{place}: is a section, with settings of its own, not {shown(given)}"
    wanted = _RANGE.sub(r"must be \1", found["msg"])
    return f"{place}: {wanted}, not {shown(given)}"


def _names(place: Sequence[str | int]) -> list[str]:
    section: Any = Settings
    for part in place:
        section = section.model_fields[part].annotation
        section = next((x for x in getattr(section, "__args__", ()) if isinstance(x, type) and issubclass(x, BaseModel)), section)
    return list(section.model_fields)


def to_toml(settings: Settings) -> str:
    """All settings, those that were not given too, as a file that says the same."""
    import tomli_w

    return tomli_w.dumps(_without_none(settings.model_dump(mode="json")))


def _without_none(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without_none(value) for name, value in values.items() if value is not None}
    return [_without_none(x) for x in values] if isinstance(values, list) else values


def schema(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of the file, for editors.

    Args:
        sizes: what else `model` may hold: JSON Schemas by name.
    """
    made = Settings.model_json_schema()
    made["$schema"], made["title"] = "https://json-schema.org/draft/2020-12/schema", "bmtrain-ms pretrain"
    model = made["$defs"]["ModelSection"]
    model["properties"].update(sizes)
    model["additionalProperties"] = False
    return made
