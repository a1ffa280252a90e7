"""Everything that training needs to go on: model, optimizers, schedules, loss scaler; and files of older versions that hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import mindspore as ms
from mindspore import Parameter, nn

from ..comm import world as current_world
from ..files.entries import (
    GRADIENT,
    Described,
    Entry,
    LoadResult,
    companion_entry,
    compare,
    model_entries,
    named_now,
    state_named_now,
)
from ..files.errors import CheckpointError, agree_or_fail
from ..files.format import is_count, parsed_json
from ..optim import OptimManager
from .run_state import RunState, checked_keep, checked_state
from .whole import load_entries, read_headers

_VERSION = 1


def load_training(
    file_name: str | Path, model: nn.Cell, manager: OptimManager, strict: bool = True, keep: str = "own"
) -> dict[str, Any]:
    """Restore what the `save_training` of older versions wrote, at any number of ranks; returns its `extra`.

    The next version will not read it: load it, and save with a `Checkpointer`.

    Nothing is changed unless all ranks can read the file and it fits.

    Args:
        strict: raise where names differ, and if the run that saved had another seed, with which dropout would be another.
        keep: which settings to use where this run's are others: its `own`, or the `saved`; as `OptimManager.load_state_dict` says.

    Raises:
        CheckpointError: unreadable, of another model, or not a training state; on every rank.
    """
    return load_file(file_name, model, manager, strict, keep)[0].extra


def load_file(file_name: str | Path, model: nn.Cell, manager: OptimManager, strict: bool, keep: str) -> tuple[RunState, LoadResult]:
    """Restore an old file as `load_training` does; returns the run's state and what did not match."""
    check_complete(model, manager)
    checked_keep(keep)
    world = current_world()
    metadata, there = read_headers(file_name, world)
    error: BaseException | None = None
    try:
        raw, entries = _state_in(metadata, str(file_name)), training_entries(model, manager)
        renamed = named_now(model, there)
        now = {renamed.get(name, name): what for name, what in there.items()}
        compare(now, entries, strict, str(file_name))  # first: it says best what is different
        state = checked_state(state_named_now(model, raw), model, manager, world, strict, str(file_name))
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    agree_or_fail(world.everyone, error, f"{file_name} cannot be loaded")
    result = load_entries(file_name, entries, world, strict, model)
    manager.restore_gradients({})
    state.restore(manager, world, keep)
    return state, result


def _state_in(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    if "bmtrain_ms" not in metadata:
        raise CheckpointError(f"{where} holds weights only; load it with bmtrain_ms.load(model, ...)")
    try:
        raw = parsed_json(metadata["bmtrain_ms"].encode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: its training state is not JSON: {error}") from error
    version: Any = raw.get("version") if isinstance(raw, dict) else None
    if not (is_count(version) and version >= 1):
        raise CheckpointError(f"{where} is damaged: its training state has the version {version!r}")
    if version > _VERSION:
        raise CheckpointError(f"{where} has format version {version}, this bmtrain_ms reads up to {_VERSION}; upgrade")
    return raw


# Tensors #


def check_complete(model: nn.Cell, manager: OptimManager) -> None:
    """Whether everything that is trained is in the model, under a name of its own.

    Raises:
        ValueError: it is not: it would not be saved, or not be told apart.
    """
    own: dict[str, Parameter] = {}
    for p in model.get_parameters():
        if own.setdefault(p.name, p) is not p:
            raise ValueError(
                f"two parameters of the model are called {p.name}, and a checkpoint tells them apart by their names; call "
                "model.check_names_and_refresh_name() before making optimizers"
            )
    ids = {id(p) for p in own.values()}
    trained = [p for driver in manager.drivers for p in driver.parameters if id(p) not in ids]
    if not trained:
        return
    names = ", ".join(p.name for p in trained[:5]) + (f" and {len(trained) - 5} more" if len(trained) > 5 else "")
    namesakes = [p.name for p in trained if p.name in own]
    hint = ""
    if namesakes:
        hint = f" (its {namesakes[0]} is another one: replaced since the optimizer was made, or that of another model of its class)"
    raise ValueError(
        f"the manager trains parameters that the model does not have, which would not be saved: {names}{hint}. Give one Cell that "
        "has all that is trained, e.g. nn.CellList([first, second]), and make optimizers after it"
    )


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
    """Every tensor of a training state, and the accumulated gradients, by name."""
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
    renamed = named_now(model, there)
    stored = {renamed.get(name, name): name for name in there}
    there = {name: there[source] for name, source in stored.items()}
    likes = manager.parameters_by_name()
    for name in there:
        p = likes.get(name[len(GRADIENT) :]) if name.startswith(GRADIENT) else None
        if p is not None and name not in entries:
            entries[name] = companion_entry(*manager.empty_gradient(p))
    sources = {name: name for name in entries if name in there}
    for name in entries:
        own = of_master(name)
        if name not in there and own in there:
            sources[name] = own  # saved in float32: the parameter was its own master
    for name in there:
        own = of_master(name)
        if name not in entries and own in entries and entries[own].dtype == ms.float32:
            sources[own] = name  # saved in 16 bits: the master is the better parameter
    return entries, {name: stored[source] for name, source in sources.items()}


def of_master(name: str) -> str:
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
