"""MindSpore's own optimizers over shards: as the same optimizer on full parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bmtrain_ms.comm import World
from bmtrain_ms.lr_scheduler import Linear
from tests.helpers.models import full
from tests.helpers.native import MAKERS, SHAPES, Managed, alone

pytestmark = pytest.mark.ranks


def train(world: World, kind: str, scale: float | None, schedule: bool) -> tuple[dict[str, np.ndarray], list[tuple[int, ...]]]:
    """Parameters after five steps, and the shapes of the sharded moments; `full` checks that their padding is zero."""
    managed = Managed(MAKERS[kind], (lambda optimizer: Linear(optimizer, 0.1, 0, 8)) if schedule else None, loss_scale=scale)
    managed.run(range(5))
    moments = [(like, tensor) for like, tensor in managed.driver.state_tensors().values() if like is not None]
    for like, tensor in moments:
        full(world, like, tensor)
    return managed.values(world), [tuple(tensor.shape) for _, tensor in moments]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["unscaled", "scaled"])
def test_full_parameters_have_the_same_bits(run_ranks, single_world, kind, scale):
    """But for two Adams: MindSpore rounds the elements of a vector register and the others differently."""
    expected = alone(MAKERS[kind], 5)
    for values, shapes in run_ranks(2, train, kind=kind, scale=scale, schedule=False):
        for name in SHAPES:
            if kind in ("Adam", "groups", "experimental groups"):
                np.testing.assert_allclose(values[name], expected[name], rtol=1e-6, atol=1e-7)
            else:
                assert values[name].tobytes() == expected[name].tobytes(), name
        assert set(shapes) == {(1,), (4,), (6,)}  # halves


def test_ranks_that_own_nothing(run_ranks, single_world):
    expected = alone(MAKERS["AdamWeightDecay"], 5)
    for values, _ in run_ranks(3, train, kind="AdamWeightDecay", scale=8.0, schedule=False):
        assert all(values[name].tobytes() == expected[name].tobytes() for name in SHAPES)


def test_a_schedule_sets_the_rate_on_every_rank(run_ranks, single_world):
    expected, _ = train(single_world, "Momentum", None, True)
    unscheduled = alone(MAKERS["Momentum"], 5)
    for values, _ in run_ranks(2, train, kind="Momentum", scale=None, schedule=True):
        assert all(values[name].tobytes() == expected[name].tobytes() for name in SHAPES)
        assert not np.array_equal(values["prime"], unscheduled["prime"])


def missing_gradient(world: World) -> str:
    managed: Any = Managed(MAKERS["SGD"])
    managed.params[1].requires_grad = False
    with pytest.raises(ValueError) as info:
        managed.run(range(1))
    return str(info.value)


def test_a_missing_gradient_is_an_error_on_every_rank(run_ranks):
    for text in run_ranks(2, missing_gradient, timeout=30):
        assert text.startswith("SGD updates all of its parameters, and prime has no gradient (as have 0 others)")
