"""What ranks on several hosts do: `python hosts_job.py MODE '{"disk": ..., "notes": ...}'` on each.

`disk` is the host's own, `notes` a folder that the test reads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import bmtrain_ms as bms
from bmtrain_ms.comm import CommTimeoutError
from tests.helpers.checkpoints import Run
from tests.helpers.models import train_sharded


def noted(notes: str, rank: int, arrays: dict[str, Any]) -> None:
    np.savez(Path(notes, f"rank-{rank}.npz"), **arrays)


def train(disk: str, notes: str) -> None:
    """Train a model that has a twin, then one that saves halfway."""
    world = bms.init_distributed(seed=0, timeout=60)
    found = train_sharded(world, 5, 3, True, False)
    arrays = {f"{kind} {name}": array for kind in ("initial", "grads", "final") for name, array in found[kind].items()}
    run = Run(world, disk, dropout=0.3, shared_storage=False)
    run.train(range(2))
    run.save(2)
    run.close()
    later = run.train(range(2, 5))
    noted(notes, world.engine.rank, {"losses": found["losses"], **arrays, "later": later, **run.everything()})


def resume(disk: str, notes: str) -> None:
    world = bms.init_distributed(seed=0, timeout=60)
    run = Run(world, disk, dropout=0.3, shared_storage=False)
    resumed = run.load()
    later = run.train(range(resumed.step, 5))
    noted(notes, world.engine.rank, {"later": later, **run.everything()})


def forever(disk: str, notes: str, timeout: float = 10.0) -> None:
    world = bms.init_distributed(timeout=timeout)
    rank = world.engine.rank
    loss = np.ones(1, np.float32)
    try:
        while True:
            world.engine.all_reduce([loss], label="loss").wait()
            world.engine.clock.step += 1
            if world.engine.clock.step == 5:
                Path(notes, f"started-{rank}").touch()
    except CommTimeoutError as error:
        Path(notes, f"error-{rank}").write_text(str(error))
        raise


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
