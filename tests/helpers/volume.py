"""What a training step receives, counted, and what it should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import numpy as np

BLOCK = 256  # of int8 gathers


@dataclass(frozen=True)
class Setting:
    """How parameters are sharded and gathered."""

    zero_level: int = 3
    gather_dtype: str | None = None
    shard_size: int | None = None


@dataclass(frozen=True)
class Counted:
    """`bytes` and `scalars` (of the gradient norm) received by a rank in a step; `parameters`: elements of each."""

    bytes: int
    scalars: int
    parameters: list[int]


def received(make: Callable[[], Any], shape: Sequence[int], others: Sequence[Any], ranks: int, setting: Setting) -> Counted:
    """Count a step of the model that `make` makes, on inputs of ones, in a simulated world."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, World, use_world
    from bmtrain_ms.compat.runtime import from_host

    engine = RecordingEngine(SimulatedEngine(ranks - 1, ranks))
    world = World(
        engine,
        Mesh(ranks, ranks - 1, replica=ranks // (setting.shard_size or ranks)),
        gather_dtype=setting.gather_dtype,
    )
    with use_world(world):
        model = make()
        manager = bms.optim.OptimManager()
        optimizer = bms.optim.AdamOptimizer(model.trainable_params())
        manager.add_optimizer(optimizer)
        x = from_host(np.ones(shape, np.float32))
        for _ in range(2):  # the first step learns the order
            engine.events.clear()
            manager.zero_grad()
            manager.backward(lambda: model(x, *others).sum())
            manager.clip_grad_norm(optimizer.param_groups, 1.0)
            manager.step()
    scalars = sum(event.received for event in engine.events if event.label == "grad norm")
    return Counted(sum(event.received for event in engine.events) - scalars, scalars, [p.full_size for p in optimizer.parameters])


def expected(parameters: Sequence[int], ranks: int, setting: Setting) -> int:
    """The formula for float32 parameters that all live in blocks."""
    shards = setting.shard_size or ranks
    replicas = ranks // shards
    total = 0
    for numel in parameters:
        n = -(-numel // shards)
        gathered = {None: 4 * n, "bfloat16": 2 * n, "float16": 2 * n, "int8": -(-n // BLOCK) * (BLOCK + 4)}[setting.gather_dtype]
        total += (setting.zero_level - 1) * (shards - 1) * gathered + (shards - 1) * 4 * n
        total += 2 * (replicas - 1) * 4 * n // replicas
    return total
