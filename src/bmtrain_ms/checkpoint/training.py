"""Everything that training needs to go on: model, optimizers, schedules, loss scaler, and what the caller adds; as one file too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

import mindspore as ms
from mindspore import nn

from ..comm import world
from ..optim import OptimManager
from ..zero import context_of
from .errors import CheckpointError
from .format import is_count
from .run_state import RunState, checked
from .store import (
    Described,
    Entry,
    LoadResult,
    _agree,
    companion_entry,
    compare,
    load_entries,
    model_entries,
    read_headers,
    save_entries,
)

_VERSION = 1
GRADIENT = "gradient."  # what names of accumulated gradients begin with


def save_training(file_name: str | Path, model: nn.Cell, manager: OptimManager, extra: dict[str, Any]) -> None:
    """Write a training state. All ranks call it.

    Args:
        extra: JSON-serialisable; comes back from `load_training`, e.g. the step.

    Raises:
        CheckpointError: it cannot be written.
    """
    here = world()
    state = {
        "version": _VERSION,
        "seed": here.seed,
        "clock": here.engine.clock.step,
        "draw_step": context_of(here).draws.step,
        "manager": manager.state_dict(tensors=False),
        "extra": extra,
    }
    save_entries(file_name, training_entries(model, manager), {"format": "pt", "bmtrain_ms": json.dumps(state)}, here)


def load_training(file_name: str | Path, model: nn.Cell, manager: OptimManager, strict: bool = True) -> dict[str, Any]:
    """Restore what `save_training` wrote, at any number of ranks; returns `extra`.

    Nothing is changed unless all ranks can read the file and it fits.

    Args:
        strict: raise where names differ, and if the run that saved had another seed, with which dropout would be another.

    Raises:
        CheckpointError: unreadable, of another model, or not a training state; on every rank.
    """
    return load_file(file_name, model, manager, strict)[0].extra


def load_file(file_name: str | Path, model: nn.Cell, manager: OptimManager, strict: bool) -> tuple[RunState, LoadResult]:
    """See `load_training`."""
    here = world()
    metadata, there = read_headers(file_name, here)
    error: BaseException | None = None
    try:
        raw, entries = _state_in(metadata, str(file_name)), training_entries(model, manager)
        compare(there, entries, strict, str(file_name))  # first: it says best what is different
        state = checked(raw, manager, here, strict, str(file_name))
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    _agree(here.engine, error, f"{file_name} cannot be loaded")
    result = load_entries(file_name, entries, here, strict)
    manager.restore_gradients({})
    state.restore(manager, here)
    return state, result


def _state_in(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    if "bmtrain_ms" not in metadata:
        raise CheckpointError(f"{where} holds weights only; load it with bmtrain_ms.load(model, ...)")
    try:
        raw = json.loads(metadata["bmtrain_ms"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: its training state is not JSON: {error}") from error
    version: Any = raw.get("version") if isinstance(raw, dict) else None
    if not (is_count(version) and version >= 1):
        raise CheckpointError(f"{where} is damaged: its training state has the version {version!r}")
    if version > _VERSION:
        raise CheckpointError(f"{where} has format version {version}, this bmtrain_ms reads up to {_VERSION}; upgrade")
    return raw


# Tensors #


def training_entries(model: nn.Cell, manager: OptimManager) -> dict[str, Entry]:
    """Every tensor of a training state, by name.

    Raises:
        CheckpointError: a parameter has the name of a tensor of the optimizer's.
    """
    entries = model_entries(model)
    for i, driver in enumerate(manager.drivers):
        for name, (like, tensor) in driver.state_tensors().items():
            _add(entries, f"optimizer.{i}.{name}", companion_entry(like, tensor))
    return entries


def entries_to_save(model: nn.Cell, manager: OptimManager) -> dict[str, Entry]:
    """With the accumulated gradients."""
    entries = training_entries(model, manager)
    for name, (like, tensor) in manager.gradients().items():
        _add(entries, f"{GRADIENT}{name}", companion_entry(like, tensor))
    return entries


def _add(entries: dict[str, Entry], name: str, entry: Entry) -> None:
    if name in entries:
        raise CheckpointError(f"a parameter of the model is called {name}, as a tensor of the training state is; rename it")
    entries[name] = entry


def entries_to_load(model: nn.Cell, manager: OptimManager, there: Described) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries to fill, and what each is read from: masters and 16-bit parameters stand for each other.

    Args:
        there: what is in the checkpoint.
    """
    entries = training_entries(model, manager)
    likes = manager.parameters_by_name()
    for name in there:
        p = likes.get(name[len(GRADIENT) :]) if name.startswith(GRADIENT) else None
        if p is not None and name not in entries:
            entries[name] = companion_entry(*manager.empty_gradient(p))
    sources = {name: name for name in entries if name in there}
    for name in entries:
        own = _of_master(name)
        if name not in there and own in there:
            sources[name] = own  # saved in float32: the parameter was its own master
    for name in there:
        own = _of_master(name)
        if name not in entries and own in entries and entries[own].dtype == ms.float32:
            sources[own] = name  # saved in 16 bits: the master is the better parameter
    return entries, sources


def _of_master(name: str) -> str:
    """The parameter's name in a master's; empty: it is not one's."""
    optimizer, _, own = name.partition(".master.")
    return own if optimizer.startswith("optimizer.") else ""


def as_named_here(there: Described, sources: Mapping[str, str]) -> Described:
    """What is read under the names that it has here, and what nobody reads; a parameter whose master is read is not missed."""
    used = set(sources.values())
    return {
        **{target: there[source] for target, source in sources.items()},
        **{name: what for name, what in there.items() if name not in used and name not in sources},
    }
