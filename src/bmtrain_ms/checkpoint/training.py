"""Everything that training needs to go on, in one file: model, optimizers, schedules, loss scaler, and what the caller adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspore import nn

from ..comm import world
from ..optim import OptimManager
from ..zero import DistributedParameter, context_of
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
        "manager": manager.state_dict(),
        "extra": extra,
    }
    save_entries(file_name, _entries(model, manager), {"format": "pt", "bmtrain_ms": json.dumps(state)}, here)


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
    load_entries(file_name, _entries(model, manager), here)
    manager.load_state_dict(state["manager"])
    here.engine.clock.step = state["clock"]
    context_of(here).draws.count = 0
    return state["extra"]


def _entries(model: nn.Cell, manager: OptimManager) -> dict[str, Entry]:
    entries = model_entries(model)
    for i, optimizer in enumerate(manager.optimizers):
        for p in optimizer.parameters:
            if not isinstance(p, DistributedParameter):
                raise CheckpointError(f"parameter {p.name} is not a DistributedParameter: its optimizer state cannot be saved")
            for name, tensor in optimizer.state_of(p).items():
                entries[f"optimizer.{i}.{name}.{p.name}"] = companion_entry(p, tensor)
    return entries
