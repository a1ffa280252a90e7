"""What `adapter_config.json` says of PEFT's LoRA adapters, and what of that is computed here."""

from __future__ import annotations

import collections
import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any, Callable, Mapping

from ...files.errors import CheckpointError
from ...nn.lora import Adapter

CONFIG = "adapter_config.json"
_NEEDED = ("r", "target_modules")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value)) and bool(value)
    except re.error:
        return False


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(name and _is_pattern(_end(name)) and fits(x) for name, x in value.items())


def _end(name: str) -> str:
    """A regular expression of the paths whose ends a name in a table is."""
    return rf"(.*\.)?({name})$"


_RANK, _NUMBER = "a whole number of at least 1", "a number"
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {  # null is the default where it is not needed
    "r": (_is_rank, _RANK),
    "target_modules": (
        lambda x: _is_pattern(x) or (isinstance(x, list) and bool(x) and all(isinstance(name, str) for name in x)),
        "a list of layers' names, or a regular expression",
    ),
    "lora_alpha": (_is_number, _NUMBER),
    "lora_dropout": (lambda x: _is_number(x) and 0 <= x < 1, "a number of at least 0 and below 1"),
    "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
    "rank_pattern": (lambda x: _is_table(x, _is_rank), f"a table of layers' names, or regular expressions, and {_RANK} for each"),
    "alpha_pattern": (
        lambda x: _is_table(x, _is_number),
        f"a table of layers' names, or regular expressions, and {_NUMBER} for each",
    ),
}
# Which values of a setting have the weights be what is computed here; of one that is not in these tables: null, false, or nothing
# in it, which are PEFT's defaults of settings that ask for more.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # What the two matrices began with. Other ways, as `pissa` and `olora`, have changed the model's weights, too, or compute more.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
# Settings of other libraries, of how adapters were made or for whom they are, and of what another setting asks for.
_WITHOUT_EFFECT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("runtime_config", "exclude_modules"),  # that the layers are those which there are weights for is looked at
}


class AdapterConfig:
    """A file that was read, and of which all is computed here.

    Attributes:
        pattern: a regular expression, to be found in the paths of the layers.

    Raises:
        CheckpointError: it cannot be read, is not of LoRA adapters, or asks for what is not computed here.
    """

    def __init__(self, folder: Path):
        self._said = _read(folder / CONFIG)
        targets = self._said["target_modules"]
        self.pattern: str = targets if isinstance(targets, str) else rf"(^|\.)({'|'.join(map(re.escape, targets))})$"

    def settings(self, path: str) -> Adapter:
        """Those of a layer."""
        alpha = self._of(path, "alpha_pattern", self._given("lora_alpha", 8))
        return Adapter(self.rank(path), float(alpha), float(self._given("lora_dropout", 0.0)), self._given("use_rslora", False))

    def rank(self, path: str) -> int:
        """That of a layer."""
        return self._of(path, "rank_pattern", self._said["r"])

    def _given(self, name: str, default: Any) -> Any:
        return default if self._said.get(name) is None else self._said[name]

    def _of(self, path: str, table: str, default: Any) -> Any:
        """The first entry of a table that fits the end of a path, as PEFT looks for it."""
        fitting = (value for key, value in self._given(table, {}).items() if re.match(_end(key), path))
        return next(fitting, default)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} is not of LoRA adapters: they are what is computed here")
    wrong = [name for name, value in config.items() if not _is_neutral(name, value)]
    if wrong:
        asked = ", ".join(f"{name}={reprlib.repr(config[name])}" for name in wrong)
        raise CheckpointError(f"{path} asks for what is not computed here: {asked}")
    for name, (fits, text) in _VALUES.items():
        if (name in _NEEDED or config.get(name) is not None) and not fits(config.get(name)):
            raise CheckpointError(f"{path}: {name} must be {text}, not {reprlib.repr(config.get(name))}")
    return config


def _is_neutral(name: str, value: Any) -> bool:
    if name in _VALUES or name in _WITHOUT_EFFECT or value is None or value is False:
        return True
    if name in _NEUTRAL:
        return any(value is known or (isinstance(value, str) and value == known) for known in _NEUTRAL[name])
    return isinstance(value, (str, list, dict)) and not value


def config_for(adapters: Mapping[str, Adapter], others: set[str], base: str) -> dict[str, Any]:
    """What the file says of adapters of a model's layers, by their paths.

    Args:
        adapters: one at least.
        others: the paths of layers that might have some, and have none.
        base: the folder or name of the model.

    Raises:
        CheckpointError: they differ in what the file says once for all.
    """
    once = {"lora_dropout": "dropout", "use_rslora": "rslora"}
    for field in once.values():
        first, *rest = sorted({getattr(x, field): path for path, x in sorted(adapters.items(), reverse=True)}.items())
        if rest:
            told = ", ".join(f"{value} of {path}" for value, path in (first, rest[0]))
            raise CheckpointError(f"the files of PEFT have one {field} for all adapters, not {told}: save them apart")
    targets = {path.rsplit(".", 1)[-1] for path in adapters}
    if any(path.rsplit(".", 1)[-1] in targets for path in others):  # last parts would name layers that have no adapter
        targets = set(adapters)
    some = next(iter(adapters.values()))
    rank, ranks = _usual({path: x.rank for path, x in adapters.items()})
    alpha, alphas = _usual({path: x.alpha for path, x in adapters.items()})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        **{name: getattr(some, field) for name, field in once.items()},
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most layers have, and all of them by path where they differ. A key fits the end of a path, and the first one
    that fits counts, so longer paths come first."""
    usual = collections.Counter(value for _, value in sorted(values.items())).most_common(1)[0][0]
    if len(set(values.values())) == 1:
        return usual, {}
    return usual, {path: values[path] for path in sorted(values, key=lambda path: (-len(path), path))}
