"""Ranks, and batches of one step, with other numbers of targets than others': the loss is the mean over all targets that count."""

from __future__ import annotations

import functools
from typing import Any, Callable

import numpy as np
import pytest

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SingleEngine, World, use_world
from bmtrain_ms.data import Batch
from bmtrain_ms.model_center import Spread, Stages
from bmtrain_ms.train import Pretrain, Trainer, TrainSettings, share_step
from bmtrain_ms.zero import context_of
from tests.helpers.layouts import BATCH, EXPERTS, LENGTH, SIZES, Case, batch_of, model_of, parts, whole

pytestmark = pytest.mark.ranks

Run = Callable[..., list[Any]]
COUNTS = [  # targets of each of the four rows, step by step
    (0, 0, 5, 6),  # a rank has none
    (0, 1, 6, 6),
    (3, 0, 0, 0),
    (0, 0, 0, 0),  # nobody has any
    (6, 6, 6, 6),
    (6, 5, 1, 0),
]
STEPS = len(COUNTS)


class Rows:
    """The same rows in any layout; the number of their targets changes with the step."""

    described = {"rows": "of the tests"}  # noqa: RUF012 - a protocol's

    def __init__(self, weighted: bool):
        self._weighted = weighted

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        ids, targets = (x.asnumpy().copy() for x in batch_of(step, 0, 1))
        for row, count in zip(targets, COUNTS[step]):
            row[count:] = -100
        weights = np.random.default_rng(step).random(ids.shape).astype(np.float32) if self._weighted else None
        mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        return Batch(ids[mine], targets[mine], None if weights is None else weights[mine])


def trained(world: World, case: Case, sizes: dict[str, Any], weighted: bool = False, batches: int = 1, rows: Any = None) -> Any:
    """What the log says of each step, and the parameters after the last; in `batches` for each step and rank.

    `rows`: see `TrainSettings`.
    """
    with use_world(case.world(world)) as here:
        model = model_of(case, sizes)
        params = model.trainable_params()
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(params, lr=3e-3, weight_decay=0.01))
        data, task = Rows(weighted), Pretrain(model)
        if batches == 1:
            trainer = Trainer(task, data, manager, TrainSettings(STEPS, clip=0.5, rows=rows))
            records = [trainer.train_step() for _ in range(STEPS)]
            said = [(record["loss"], record["grad_norm"]) for record in records]
        else:
            said = [
                accumulated(here, manager, task, data.batch(step, here.mesh.dp_rank, case.dp), batches) for step in range(STEPS)
            ]
        return said, parts({p.name: (p.layout, p) for p in params})


def accumulated(world: World, manager: Any, task: Pretrain, batch: Batch, number: int) -> tuple[float, float]:
    """A step of unequal batches: the first has the rows that the others leave."""
    size = len(batch.ids) // number
    cuts = [slice(0, len(batch.ids) - size * (number - 1))]
    cuts += [slice(cuts[0].stop + i * size, cuts[0].stop + (i + 1) * size) for i in range(number - 1)]
    weights = batch.weights
    divided = [Batch(batch.ids[cut], batch.targets[cut], None if weights is None else weights[cut]) for cut in cuts]
    manager.zero_grad()
    loss = np.sum([manager.backward(task.loss, part).asnumpy().item() for part in share_step(divided, world)])
    norm = manager.clip_grad_norm(manager.parameters, 0.5)
    manager.step()
    mean = world.along("dp").all_reduce([bms.compat.runtime.from_host(np.array([loss], np.float32))], "mean").wait()[0]
    return mean.asnumpy().item(), norm


@functools.cache
def one_rank(sizes: tuple[tuple[str, Any], ...], weighted: bool = False) -> tuple[Any, dict[str, np.ndarray]]:
    with use_world(World(SingleEngine(), Mesh(1, 0))) as one:
        said, last = trained(one, Case(), dict(sizes), weighted)
        return said, whole([last])


def compare(found: list[Any], right: tuple[Any, dict[str, np.ndarray]], close: float = 2e-5) -> None:
    for said, _ in found:
        assert said == found[0][0]  # on all ranks
        np.testing.assert_allclose(np.array(said)[:, 0], np.array(right[0])[:, 0], rtol=close)
        np.testing.assert_allclose(np.array(said)[:, 1], np.array(right[0])[:, 1], rtol=10 * close, atol=1e-7)
    for name, values in whole([last for _, last in found]).items():
        expected = right[1][name]
        np.testing.assert_allclose(values, expected, rtol=0, atol=100 * close * np.abs(expected).max(), err_msg=name)


DENSE = tuple(SIZES.items())
CASES = [
    Case(dp=2),
    Case(dp=4),
    Case(dp=2, replica=2, how=Spread(False, 2)),
    Case(dp=2, tp=2),
    Case(pp=2, dp=2, stages=Stages(micro_batches=2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_the_mean_over_all_ranks_targets(run_ranks: Run, case: Case):
    compare(run_ranks(case.ranks, trained, case=case, sizes=SIZES), one_rank(DENSE))


@pytest.mark.parametrize("case", [Case(dp=2), Case(dp=2, tp=2)], ids=str)
def test_weights_of_targets(run_ranks: Run, case: Case):
    found = run_ranks(case.ranks, trained, case=case, sizes=SIZES, weighted=True)
    compare(found, one_rank(DENSE, True))


@pytest.mark.parametrize("case", [Case(dp=2, ep=2), Case(pp=2, dp=2, ep=2, stages=Stages([1, 2], micro_batches=2))], ids=str)
def test_what_routers_add_is_a_mean_over_tokens(run_ranks: Run, case: Case):
    """And not over targets: a row that teaches nothing is balanced as the others."""
    found = run_ranks(case.ranks, trained, case=case, sizes=EXPERTS)
    compare(found, one_rank(tuple(EXPERTS.items())))


@pytest.mark.parametrize(
    ("case", "batches", "sizes"),
    [
        (Case(), 4, SIZES),
        (Case(), 3, EXPERTS),
        (Case(dp=2), 2, SIZES),
        (Case(dp=2, ep=2), 2, EXPERTS),
        (Case(dp=2, tp=2), 2, SIZES),
        (Case(pp=2, stages=Stages(micro_batches=1)), 3, EXPERTS),
    ],
    ids=lambda x: str(x) if isinstance(x, Case) else "experts" if x is EXPERTS else "dense" if x is SIZES else str(x),
)
def test_gradients_that_are_accumulated(run_ranks: Run, case: Case, batches: int, sizes: dict[str, Any]):
    found = run_ranks(case.ranks, trained, case=case, sizes=sizes, batches=batches)
    compare(found, one_rank(tuple(sizes.items())))


@pytest.mark.parametrize(
    ("case", "rows", "sizes"),
    [
        (Case(dp=2), 1, SIZES),
        (Case(dp=2, ep=2), 1, EXPERTS),
        (Case(pp=2, stages=Stages(micro_batches=1)), 2, EXPERTS),
    ],
    ids=["dp2", "experts", "stages"],
)
def test_rows_that_a_trainer_takes_at_a_time(run_ranks: Run, case: Case, rows: int, sizes: dict[str, Any]):
    compare(run_ranks(case.ranks, trained, case=case, sizes=sizes, rows=rows), one_rank(tuple(sizes.items())))


def shared(world: World, sizes: list[int], tp: int = 1, pp: int = 1) -> tuple[list[tuple[Any, float]], list[tuple[str, str]]]:
    """What each batch is told, and what was moved for it."""
    engine = RecordingEngine(world.everyone)
    here = World(engine, Mesh(2, world.engine.rank, tp=tp, pp=pp))
    if pp > 1:
        context_of(here).divide(rows_differ=True)
    batches = [Batch(np.zeros((n, LENGTH), np.int32), np.zeros((n, LENGTH), np.int32)) for n in sizes[context_of(here).data_rank :]]
    return [(batch.count, batch.part) for batch in share_step(batches, here)], engine.calls()


def test_what_batches_are_told(run_ranks: Run):
    """Ranks may have any rows, in any number of batches."""
    moved = [("all_reduce", "targets that count")]
    found = run_ranks(2, shared, sizes=[3, 1])
    assert found == [([(2.5 * LENGTH, 0.75), (2.5 * LENGTH, 0.25)], moved), ([(2.5 * LENGTH, 1.0)], moved)]
    assert run_ranks(2, shared, sizes=[3, 1], pp=2) == found  # as a PipelineTransformerBlockList has its ranks
    assert run_ranks(2, shared, sizes=[3, 1], tp=2) == [([(4.0 * LENGTH, 0.75), (4.0 * LENGTH, 0.25)], [])] * 2
