"""Everything that training needs to go on, in one file: model, optimizers, schedules, loss scaler, and what the caller adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspore import nn

from ..comm import world
from ..optim import OptimManager
from ..zero import context_of
from .errors import CheckpointError
from .store import Entry, companion_entry, load_entries, model_entries, read_metadata, save_entries

_VERSION = 1


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


def load_training(file_name: str | Path, model: nn.Cell, manager: OptimManager) -> dict[str, Any]:
    """Restore what `save_training` wrote, at any number of ranks; returns `extra`.

    Raises:
        CheckpointError: unreadable, of another model, or not a training state.
    """
    here = world()
    metadata = read_metadata(file_name, here)
    if "bmtrain_ms" not in metadata:
        raise CheckpointError(f"{file_name} holds weights only; load it with bmtrain_ms.load(model, ...)")
    state = json.loads(metadata["bmtrain_ms"])
    if state["version"] > _VERSION:
        raise CheckpointError(f"{file_name} has format version {state['version']}, this bmtrain_ms reads up to {_VERSION}; upgrade")
    load_entries(file_name, training_entries(model, manager), here)
    manager.load_state_dict(state["manager"])
    here.engine.clock.step = state["clock"]
    draws = context_of(here).draws
    draws.count, draws.step = 0, state.get("draw_step", state["clock"])
    return state["extra"]


def training_entries(model: nn.Cell, manager: OptimManager) -> dict[str, Entry]:
    """Every tensor of a training state, by name."""
    entries = model_entries(model)
    for i, driver in enumerate(manager.drivers):
        for name, (like, tensor) in driver.state_tensors().items():
            entries[f"optimizer.{i}.{name}"] = companion_entry(like, tensor)
    return entries
