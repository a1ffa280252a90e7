"""Looking at parameters and tensors over several ranks, against NumPy over the whole tensors."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.inspect import format_summary, inspect_model, inspect_tensor, record_tensor
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from bmtrain_ms.store import broadcast_object, state_dict
from tests.helpers.inspected import NAMES, WAYS, batch, build, reference, train
from tests.helpers.models import recorded, share

pytestmark = pytest.mark.ranks

Run = Callable[..., list[Any]]
# Of 3 ranks the last two own nothing of `one`, the last nothing of `two`; `prime` has padding on the last.
SHAPES = {"one": (1,), "two": (2,), "prime": (7,), "deep": (2, 3, 5)}


class Odd(nn.Cell):
    """All values far from 0, so that padding would show; and a Parameter that is whole on every rank."""

    def __init__(self) -> None:
        super().__init__()
        for name, values in full_values().items():
            p = Parameter(Tensor(values), name=name) if name == "whole" else bms.DistributedParameter(values, name=name)
            setattr(self, name, p)


def full_values() -> dict[str, np.ndarray]:
    shapes = {**SHAPES, "whole": (4,)}
    return {name: (np.random.default_rng(i).random(s) + 5).astype(np.float32) for i, (name, s) in enumerate(shapes.items())}


def full_grads(ranks: int) -> dict[str, np.ndarray]:
    """Of the mean over the ranks of sum(p * c) * (rank + 1); also far from 0."""
    factor = sum(range(1, ranks + 1)) / ranks
    return {name: (coefficients(name) * factor).astype(np.float64) for name in full_values()}


def coefficients(name: str) -> np.ndarray:
    return full_values()[name] - 2


def statistics(values: np.ndarray, grads: np.ndarray) -> dict[str, float]:
    numbers = {}
    for prefix, x in (("", values.astype(np.float64)), ("grad_", grads.astype(np.float64))):
        numbers[f"{prefix}std"] = x.std(ddof=1) if x.size > 1 else 0.0
        numbers[f"{prefix}mean"] = x.mean()
    return {**numbers, "max": values.max(), "min": values.min()}


def check_row(row: dict[str, Any], shape: tuple[int, ...], values: np.ndarray, grads: np.ndarray) -> None:
    assert row["shape"] == shape
    for name, number in statistics(values, grads).items():
        assert row[name] == pytest.approx(number, rel=1e-5, abs=1e-6), (row["name"], name)


# Parameters #


def inspect_odd(world: World, frozen: str = "", shard_size: int | None = None) -> tuple[list[dict], list[dict], list]:
    """Summaries before and after a pass, and the collectives of one of them."""
    with use_world(recorded(world, shard_size=shard_size)) as here:
        model = Odd()
        params = {p.name: p for p in model.get_parameters()}
        manager = OptimManager(loss_scale=256.0)
        manager.add_optimizer(AdamOptimizer(model.trainable_params()))
        before = inspect_model(model, "*")
        if frozen:
            params[frozen].requires_grad = False
        scale = world.engine.rank + 1.0

        def loss() -> Tensor:
            full = {name: p.gather() if isinstance(p, bms.DistributedParameter) else p for name, p in params.items()}
            return sum((x * Tensor(coefficients(name))).sum() for name, x in full.items()) * scale

        manager.backward(loss)
        engine = here.engine
        seen = len(engine.calls())
        after = inspect_model(model, "*")
        return before, after, engine.calls()[seen:]


@pytest.mark.parametrize("ranks, shard_size", [(2, None), (3, None), (2, 1)], ids=["2", "3", "2 replicas"])
def test_parameters_over_all_ranks(run_ranks: Run, ranks: int, shard_size: int | None):
    """Neither padding nor empty shards enter; replicas count once; nothing is gathered."""
    answers = run_ranks(ranks, inspect_odd, shard_size=shard_size)
    values, grads = full_values(), full_grads(ranks)
    for before, after, calls in answers:
        assert [row["name"] for row in before] == [row["name"] for row in after] == list(values)
        for row in before:
            check_row(row, values[row["name"]].shape, values[row["name"]], np.zeros(1))
        for row in after:
            check_row(row, values[row["name"]].shape, values[row["name"]], grads[row["name"]])
        assert calls == [("all_reduce", "inspect")] * 4
    assert all(answer[:2] == answers[0][:2] for answer in answers)  # the same numbers everywhere


@pytest.mark.parametrize("frozen", ["one", "deep", "whole"])
def test_frozen_parameters(run_ranks: Run, frozen: str):
    grads = full_grads(2)
    for _, after, _ in run_ranks(2, inspect_odd, frozen=frozen):
        for row in after:
            grad = np.zeros(1) if row["name"] == frozen else grads[row["name"]]
            check_row(row, full_values()[row["name"]].shape, full_values()[row["name"]], grad)
            assert format_summary([row]).endswith("      0.0000      0.0000") == (row["name"] == frozen)


# Recorded tensors #


def record(world: World, way: str) -> tuple[list[dict], list[tuple], dict[str, np.ndarray]]:
    """The summary, this rank's tensors and gradients, and the parameters."""
    with use_world(recorded(world)):
        model = build(way)
        inspector, _, _ = train(model, share(world, batch()))
        own = [(r.name, r.group, r.tensor.asnumpy(), r.grad.asnumpy()) for r in inspector.records]
        return inspector.get_summary(), own, broadcast_object(state_dict(model))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_tensors_in_every_kind_of_block(run_ranks: Run, ranks: int, way: str):
    """Each rank records its own rows; the summary is over all of them (BMTrain: an average of the ranks' statistics)."""
    answers = run_ranks(ranks, record, way=way)
    values, grads = reference(answers[0][2], batch())
    for rank, (_, own, _) in enumerate(answers):
        assert [(name, group) for name, group, _, _ in own] == NAMES
        for (_, _, value, grad), x, g in zip(own, values, grads):
            rows = slice(rank * len(value), (rank + 1) * len(value))
            np.testing.assert_allclose(value, x[rows], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(grad, g[rows], rtol=1e-5, atol=2e-6)
    for summary, *_ in answers:
        assert summary == answers[0][0]
        for row, x, g in zip(summary, values, grads):
            check_row(row, x.shape, x, g)


def record_ranks(world: World) -> list[dict]:
    """A number, and a tensor with a gradient on rank 0 only."""

    def loss(x: Tensor) -> Tensor:
        record_tensor(x, "number", group="g")
        y = x * Tensor(np.array([1.0, 2.0], np.float32))
        record_tensor(y, "vector")
        return y.sum() if world.engine.rank == 0 else x * 2.0

    with use_world(world):
        with inspect_tensor() as inspector:
            ms.grad(loss)(Tensor(np.float32(world.engine.rank + 1)))
        return inspector.get_summary()


def test_shapes_of_all_ranks_together(run_ranks: Run):
    first, second = run_ranks(2, record_ranks)
    assert first == second
    number, vector = first
    assert (number["name"], number["shape"], number["mean"], number["min"], number["max"]) == ("g.number", (2,), 1.5, 1.0, 2.0)
    assert (vector["name"], vector["shape"], vector["mean"]) == ("vector", (4,), 2.25)
    assert number["grad_mean"] == 2.5 and vector["grad_mean"] == 0.5
