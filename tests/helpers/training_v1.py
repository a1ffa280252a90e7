"""A training state in one file, as versions before format 3 of checkpoints wrote it; it is read still."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspore import nn

from bmtrain_ms.checkpoint.training import training_entries
from bmtrain_ms.checkpoint.whole import save_entries
from bmtrain_ms.comm import world
from bmtrain_ms.optim import OptimManager
from bmtrain_ms.zero import context_of


def save_training(file_name: str | Path, model: nn.Cell, manager: OptimManager, extra: dict[str, Any]) -> None:
    """All ranks call it."""
    here = world()
    state = {
        "version": 1,
        "seed": here.seed,
        "clock": here.engine.clock.step,
        "draw_step": context_of(here).draws.step,
        "manager": manager.state_dict(tensors=False),
        "extra": extra,
    }
    metadata = {"format": "pt", "bmtrain_ms": json.dumps(state)}
    save_entries(file_name, training_entries(model, manager), metadata, here)
