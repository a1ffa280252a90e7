"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any, Callable

import numpy as np
from mindspore import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ...comm import world as current_world
from ...comm.agreement import all_gather_bytes
from ...compat.runtime import from_host, host_array, numpy_dtype
from ...files.entries import model_entries
from ...files.errors import CheckpointError, agree_or_fail
from ...files.gathering import Whole
from ...nn import add_lora
from ...nn.lora import layers_to_adapt

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NEEDED = ("r", "target_modules")
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {  # null is the default where it is not needed
    "r": (lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0, "a whole number of at least 1"),
    "target_modules": (
        lambda x: _is_pattern(x) or (isinstance(x, list) and bool(x) and all(isinstance(name, str) for name in x)),
        "a list of layers' names, or a regular expression",
    ),
    "lora_alpha": (lambda x: _is_number(x) and math.isfinite(x), "a number"),
    "lora_dropout": (lambda x: _is_number(x) and 0 <= x < 1, "a number of at least 0 and below 1"),
    "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
}
_PREFIX = "base_model.model."
_MARK = ".lora_"


def save_adapters(model: nn.Cell, folder: str | Path, base: str = "") -> None:
    """Write what `add_lora` has added, as PEFT's `PeftModel.from_pretrained` reads it; rank 0 writes, all ranks call it together.

    Args:
        model: plain, or spread over any ranks.
        folder: made if it is not there.
        base: the folder or name of the model that the adapters belong to, for those who read them.

    Raises:
        CheckpointError: there are no adapters, or they cannot be written; on every rank.
    """
    world, path = current_world(), Path(folder).expanduser()
    entries = {name: entry for name, entry in model_entries(model).items() if _MARK in name}
    tensors = Whole(entries, world)
    if not tensors.described:
        raise CheckpointError(f"this {type(model).__name__} has no adapters to write: give it some by bmtrain_ms.nn.add_lora")
    found: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in tensors.described.items():
        values = [part for _, part in tensors.pieces(name)]
        if world.everyone.rank == 0:
            whole = np.concatenate(values).reshape(shape)
            found[_PREFIX + name] = whole if numpy_dtype(dtype).isbuiltin == 1 else whole.astype(np.float32)  # bfloat16
    error: BaseException | None = None
    if world.everyone.rank == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write(path / WEIGHTS, save(found, {"format": "pt"}))
            _write(path / CONFIG, json.dumps(_config_of(model, list(tensors.described), base), indent=2).encode() + b"\n")
        except OSError as caught:
            error = caught
    agree_or_fail(world.everyone, error, f"{path} cannot be written")


def load_adapters(model: nn.Cell, folder: str | Path) -> list[str]:
    """Give a model the adapters of a folder of PEFT's, and freeze everything else; before it is spread or after. Every rank reads
    the folder, all call it together.

    Returns:
        The paths of the layers; in a pipeline those of this rank's stages.

    Raises:
        CheckpointError: the folder has no adapters, others than are computed here, or they do not fit the model; on every rank,
            before anything is changed.
        ValueError: they have dropout, and the model has been spread over tensor-parallel ranks.
    """
    path, everyone = Path(folder).expanduser(), current_world().everyone
    config: dict[str, Any] = {}
    there: dict[str, np.ndarray] = {}
    error: BaseException | None = None
    try:
        config = _read_config(path)
        there = _read_weights(path)
        _check_shapes(model, there, config["r"], path)
    except CheckpointError as caught:
        error = caught
    agree_or_fail(everyone, error, f"{path}: its adapters cannot be loaded")
    targets = config["target_modules"]
    pattern = targets if isinstance(targets, str) else rf"(^|\.)({'|'.join(map(re.escape, targets))})$"
    _check_names(model, set(there), pattern, path)
    alpha, dropout = (default if config.get(n) is None else config[n] for n, default in (("lora_alpha", 8), ("lora_dropout", 0.0)))
    paths = add_lora(model, pattern, config["r"], alpha, dropout=dropout, rslora=bool(config.get("use_rslora")))
    for p in model.get_parameters():
        if _MARK in p.name:
            ours: Any = p
            ours.copy_full(from_host(there[p.name].astype(host_array(ours).dtype)))
    return paths


def _config_of(model: nn.Cell, names: list[str], base: str) -> dict[str, Any]:
    layers = [cell for _, cell in model.cells_and_names() if hasattr(cell, "lora_A") and hasattr(cell, "alpha")]
    rank, alpha, rslora, dropout = (getattr(layers[0], name) for name in ("rank", "alpha", "rslora", "dropout"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": sorted({name.split(_MARK)[0].rsplit(".", 1)[-1] for name in names}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _read_config(path: Path) -> dict[str, Any]:
    _refuse_missing(path, CONFIG)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path / CONFIG} is not of LoRA adapters: they are what is computed here")
    other = {"bias": "none", "use_dora": False, "fan_in_fan_out": False}
    wrong = [name for name, value in other.items() if config.get(name, value) not in (value, None)]
    wrong += [name for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform") if config.get(name)]
    if wrong:
        raise CheckpointError(
            f"{path / CONFIG} asks for what is not computed here: {', '.join(f'{n}={config[n]!r}' for n in wrong)}"
        )
    for name, (fits, text) in _VALUES.items():
        if (name in _NEEDED or config.get(name) is not None) and not fits(config.get(name)):
            raise CheckpointError(f"{path / CONFIG}: {name} must be {text}, not {reprlib.repr(config.get(name))}")
    return config


def _refuse_missing(path: Path, file: str) -> None:
    if not (path / file).is_file():
        raise CheckpointError(
            f"{path} has no {file}, so it has no adapters: give the folder that bmtrain_ms.model_center.save_adapters, "
            "bmtrain-ms finetune with a section lora (its out/adapters), or PEFT's save_pretrained wrote"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value)) and bool(value)
    except re.error:
        return False


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    _refuse_missing(path, WEIGHTS)
    try:
        return {name.removeprefix(_PREFIX): values for name, values in load_file(str(path / WEIGHTS)).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS} cannot be read: {error}") from None


def _check_names(model: nn.Cell, there: set[str], pattern: str, path: Path) -> None:
    """Whether the pattern finds the layers, of all ranks, that there are adapters for, and no others."""
    found = {f"{name}.lora_{part}.weight" for name in layers_to_adapt(model, pattern) for part in "AB"}
    of_all = all_gather_bytes(current_world().everyone, json.dumps(sorted(found)).encode(), "layers to adapt")
    odd = sorted(there.symmetric_difference(name for names in of_all for name in json.loads(names)))
    if odd:
        side = "settings, or the model, leave it out" if odd[0] in there else "weights do not have it"
        told = f"{odd[0]} (its {side}) and {len(odd) - 1} more"
        raise CheckpointError(f"{path} has other adapters than its {CONFIG} says of this {type(model).__name__}: {told}")


def _check_shapes(model: nn.Cell, there: dict[str, np.ndarray], rank: int, path: Path) -> None:
    """Refuse adapters whose shapes do not fit the layers of this rank."""
    whole: dict[str, Any] = {p.name: p for p in model.get_parameters()}
    for name, values in there.items():
        layer, _, part = name.partition(_MARK)
        weight = whole.get(f"{layer}.weight")
        if weight is None:
            continue  # another rank's, or nobody's: see `_check_names`
        out_features, in_features = weight.layout.whole
        if values.shape != ((rank, in_features) if part == "A.weight" else (out_features, rank)):
            raise CheckpointError(
                f"{path} has an adapter {name} of shape {values.shape}, and the layer's weight has {(out_features, in_features)}; "
                f"its {CONFIG} says r={rank}"
            )


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
