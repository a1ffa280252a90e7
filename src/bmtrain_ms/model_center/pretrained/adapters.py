"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ...comm import world as current_world
from ...comm.agreement import gather_json
from ...compat.runtime import from_host, host_array, numpy_dtype
from ...files.entries import model_entries
from ...files.errors import CheckpointError, agree_or_fail
from ...files.gathering import Whole
from ...nn.lora import Adapter, adapters_of, give_adapters, layers_to_adapt
from .adapter_config import CONFIG, AdapterConfig, config_for

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MARK = ".lora_"


def save_adapters(model: nn.Cell, folder: str | Path, base: str = "") -> None:
    """Write what `add_lora` has added, as PEFT's `PeftModel.from_pretrained` reads it; rank 0 writes, all ranks call it together.

    Args:
        model: plain, or spread over any ranks.
        folder: made if it is not there.
        base: the folder or name of the model that the adapters belong to, for those who read them.

    Raises:
        CheckpointError: there are no adapters, they differ in what the files say once for all (dropout, rslora), or they cannot be
            written; on every rank.
    """
    world, path = current_world(), Path(folder).expanduser()
    entries = {name: entry for name, entry in model_entries(model).items() if _MARK in name}
    tensors = Whole(entries, world)
    config = _config_of(model, base)
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
            _write(path / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
        except OSError as caught:
            error = caught
    agree_or_fail(world.everyone, error, f"{path} cannot be written")


def load_adapters(model: nn.Cell, folder: str | Path) -> list[str]:
    """Give a model the adapters of a folder of PEFT's, and freeze everything else; before it is spread or after. Every rank reads
    the folder, all call it together.

    Returns:
        The paths of the layers; in a pipeline those of this rank's stages.

    Raises:
        CheckpointError: the folder has no adapters, others than are computed here, or they do not fit the model; or it has some
            already; on every rank, before anything is changed.
        ValueError: they have dropout, and the model has been spread over tensor-parallel ranks; or see `add_lora`.
    """
    path, everyone = Path(folder).expanduser(), current_world().everyone
    config: AdapterConfig | None = None
    there: dict[str, np.ndarray] = {}
    error: BaseException | None = None
    try:
        _refuse_adapted(model)
        _refuse_missing(path, CONFIG)
        config = AdapterConfig(path)
        there = _read_weights(path)
        _check_shapes(model, there, config, path)
    except CheckpointError as caught:
        error = caught
    agree_or_fail(everyone, error, f"{path}: its adapters cannot be loaded")
    assert config is not None
    _check_names(model, set(there), config.pattern, path)
    paths = give_adapters(model, config.pattern, config.settings)
    for p in model.get_parameters():
        if _MARK in p.name:
            ours: Any = p
            ours.copy_full(from_host(there[p.name].astype(host_array(ours).dtype)))
    return paths


def _config_of(model: nn.Cell, base: str) -> dict[str, Any]:
    """What the file says of the adapters of all ranks."""
    everybody = gather_json([adapters_of(model), layers_to_adapt(model, "")], current_world().everyone, "settings of adapters")
    adapters = {path: Adapter(*settings) for mine, _ in everybody for path, settings in mine.items()}
    if not adapters:
        raise CheckpointError(f"this {type(model).__name__} has no adapters to write: give it some by bmtrain_ms.nn.add_lora")
    return config_for(adapters, {path for _, others in everybody for path in others}, base)


def _refuse_adapted(model: nn.Cell) -> None:
    for path in adapters_of(model):
        raise CheckpointError(f"{path} has an adapter already: load adapters into a plain model, or merge_lora first")


def _refuse_missing(path: Path, file: str) -> None:
    if not (path / file).is_file():
        raise CheckpointError(
            f"{path} has no {file}, so it has no adapters: give the folder that bmtrain_ms.model_center.save_adapters, "
            "bmtrain-ms finetune with a section lora (its out/adapters), or PEFT's save_pretrained wrote"
        )


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    _refuse_missing(path, WEIGHTS)
    try:
        return {name.removeprefix(_PREFIX): values for name, values in load_file(str(path / WEIGHTS)).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS} cannot be read: {error}") from None


def _check_names(model: nn.Cell, there: set[str], pattern: str, path: Path) -> None:
    """Whether the pattern finds the layers, of all ranks, that there are adapters for, and no others."""
    found = {f"{name}.lora_{part}.weight" for name in layers_to_adapt(model, pattern) for part in "AB"}
    of_all = gather_json(sorted(found), current_world().everyone, "layers to adapt")
    odd = sorted(there.symmetric_difference(name for names in of_all for name in names))
    if odd:
        side = "settings, or the model, leave it out" if odd[0] in there else "weights do not have it"
        told = f"{odd[0]} (its {side}) and {len(odd) - 1} more"
        raise CheckpointError(f"{path} has other adapters than its {CONFIG} says of this {type(model).__name__}: {told}")


def _check_shapes(model: nn.Cell, there: dict[str, np.ndarray], config: AdapterConfig, path: Path) -> None:
    """Refuse adapters whose shapes do not fit the layers of this rank."""
    whole: dict[str, Any] = {p.name: p for p in model.get_parameters()}
    for name, values in there.items():
        layer, _, part = name.partition(_MARK)
        weight, rank = whole.get(f"{layer}.weight"), config.rank(layer)
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
