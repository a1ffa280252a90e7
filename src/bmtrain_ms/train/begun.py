"""What is in a run's folder already: whether a run with these settings may begin there, or go on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from bmtrain_ms_base.config import ConfigError, Settings
from bmtrain_ms_base.data import changes

from ..checkpoint.folder import checkpoint_name, latest_in, steps_in
from ..checkpoint.index import INDEX, read_index
from ..files.errors import CheckpointError
from ..model_center.model import FAMILIES

_FOLDERS = ("like", "pretrained")
_WRITTEN = ("model", "adapters")  # at the end
_ADAPTERS = ("pattern", "rank", "alpha")  # what makes adapters others; dropout is a setting as the rate is one


def begun_otherwise(settings: Settings, resume: str | None = None) -> str:
    """Why a run with these settings can neither begin nor go on in its folder; empty: it can.

    What a run begins from is what it is, as its data are: what is trained already would be exported as if it came of another model.

    Args:
        settings: of the run.
        resume: the checkpoint to go on from, if it is not the latest.
    """
    out = Path(settings.out).expanduser()
    for name in _FOLDERS:
        folder = getattr(settings.model, name)
        for there in (out / written for written in _WRITTEN):
            if folder is not None and _whole(folder).is_relative_to(_whole(there)):
                return f"model.{name}: {folder} is in {there}, which this run would write at its end: choose another out"
    latest = latest_in(out / "checkpoints")
    if latest is None and resume is None:
        full = [folder for folder in (out / name for name in _WRITTEN) if folder.is_dir() and any(folder.iterdir())]
        if full:
            return (
                f"out: {full[0]} is there, of a run whose checkpoints are gone: it would begin again, and replace it; choose "
                "another out, or move it"
            )
    for checkpoint in (latest, None if resume is None else Path(resume)):
        differing = [] if checkpoint is None else _differing(checkpoint, settings.model_dump(mode="json"))
        if differing:
            return f"out: {checkpoint} was saved by a run that began otherwise ({'; '.join(differing)}): choose another out"
    return ""


def named_checkpoint(settings: Settings, name: str) -> Path:
    """The checkpoint that a step, a name or a folder means.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(settings.out).expanduser() / "checkpoints"
    found = folder / (checkpoint_name(int(name)) if name.isascii() and name.isdigit() else name)
    found = found if (found / INDEX).is_file() else Path(name).expanduser()
    if (found / INDEX).is_file():
        return found
    there = ", ".join(map(str, steps_in(folder))) or "none"
    raise ConfigError(f"--resume {name}: there is no such checkpoint; in {folder} there are those of the steps: {there}")


def begun_from(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as checkpoints keep them: with whole paths of what the run begins from, that mean the same in any folder."""
    model = dict(settings["model"])
    for name in _FOLDERS:
        if model.get(name) is not None:
            model[name] = str(_whole(model[name]))
    return {**settings, "model": model}


def _differing(checkpoint: Path, now: dict[str, Any]) -> list[str]:
    before: Any = None
    with contextlib.suppress(CheckpointError, KeyError, TypeError):  # who loads it says that it is damaged
        before = read_index(checkpoint).state["extra"]["settings"]
    if not isinstance(before, dict):  # of the first versions, or of another program
        return []
    then, new = before.get("model") or {}, now["model"]
    found = changes({"model": _origin(then)}, {"model": _origin(new)})
    if not found:
        found = changes({"model": _sizes(then, new)}, {"model": _sizes(new, then)})
    return found + changes({"lora": _adapters(before)}, {"lora": _adapters(now)})


def _origin(model: dict[str, Any]) -> dict[str, Any]:
    folders = {name: None if model.get(name) is None else str(_whole(model[name])) for name in _FOLDERS}
    return {"family": model.get("family"), **folders}


def _sizes(model: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The sizes, those of the family too that were not given. The type is compared by who loads, and may be another.

    The vocabulary that nobody has given is that of the tokens.
    """
    sizes = {name: value for name, value in model.items() if name not in ("family", *_FOLDERS, "dtype")}
    kind = {kind.FAMILY.model_types[0].replace("-", ""): kind for kind in FAMILIES}.get(str(model.get("family")))
    if kind is not None:
        with contextlib.suppress(TypeError, ValueError):
            sizes = dataclasses.asdict(kind.CONFIG(**sizes))
        if "vocab_size" not in model or "vocab_size" not in other:
            sizes.pop("vocab_size", None)
        sizes.pop("dtype", None)
    return sizes


def _adapters(settings: dict[str, Any]) -> dict[str, Any] | None:
    lora = settings.get("lora")
    return None if lora is None else {name: lora.get(name) for name in _ADAPTERS}


def _whole(path: str | Path) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))
