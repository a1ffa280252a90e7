"""Mixed precision that can be trusted: float16 gets where float32 gets, from a loss scale that is far too large."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.compat.runtime import from_host, host_array
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn.functional import cross_entropy

pytestmark = pytest.mark.ranks

STEPS, LENGTH = 45, 32


def train(world: World, half: bool, scale: float | None) -> dict[str, Any]:
    """A small model of the demo's kind on a text that can be learnt: a token follows from the one before, most of the time."""
    own = World(world.engine, world.mesh, world.seed, world.launch)
    random = np.random.default_rng(7)
    follows = random.permutation(64)
    with use_world(own):
        dtype = "float16" if half else "float32"
        config = LlamaConfig(vocab_size=64, dim_model=32, num_heads=4, num_heads_kv=2, dim_ff=64, num_layers=2, dtype=dtype)
        model = spread(Llama(config))
        bms.init_parameters(model)
        model.set_train(True)
        optimizer = bms.optim.AdamOptimizer(model.trainable_params(), weight_decay=0.01)
        manager = bms.optim.OptimManager(loss_scale=scale)
        manager.add_optimizer(optimizer, bms.lr_scheduler.Cosine(optimizer, 1e-2, 5, STEPS))

        def forward(ids: Any, targets: Any) -> Any:
            return cross_entropy(model(ids).reshape(-1, 64), targets)

        losses: list[float] = []
        updated: list[bool] = []
        while sum(updated) < STEPS:  # a skipped batch comes again: both runs make the same updates
            draws = np.random.default_rng([sum(updated), world.engine.rank])
            rows = [draws.integers(0, 64, 4)]
            for _ in range(LENGTH):
                noise = draws.random(4) < 0.1
                rows.append(np.where(noise, draws.integers(0, 64, 4), follows[rows[-1]]))
            text = np.stack(rows, 1).astype(np.int32)
            manager.zero_grad()
            ids, targets = np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:].reshape(-1))
            loss = manager.backward(forward, from_host(ids), from_host(targets))
            manager.clip_grad_norm(optimizer.param_groups, 1.0)
            updated.append(manager.step().updated)
            losses.append(host_array(bms.sum_loss(loss)).item())
    return {"loss": float(np.mean(losses[-10:])), "first": losses[0], "updated": updated, "scale": manager.loss_scale}


def test_float16_reaches_the_float32_loss(run_ranks):
    reference = run_ranks(2, train, half=False, scale=None)
    assert reference[0]["loss"] < 0.5 * reference[0]["first"]  # it has learnt something
    answers = run_ranks(2, train, half=True, scale=2.0**24)
    assert answers[0]["updated"] == answers[1]["updated"] and answers[0]["scale"] == answers[1]["scale"]
    skipped = answers[0]["updated"].count(False)
    assert 1 <= skipped <= 20 and answers[0]["scale"] == 2.0 ** (24 - skipped)
    assert all(answers[0]["updated"][-20:])  # the scale has found its level
    assert abs(answers[0]["loss"] / reference[0]["loss"] - 1) < 0.01
