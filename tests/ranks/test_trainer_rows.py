"""A Trainer whose ranks, and rows computed at a time, have very different numbers of targets learns what one rank learns of all."""

from __future__ import annotations

import functools
import zlib
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SingleEngine, World, use_world
from bmtrain_ms.data import Batch
from bmtrain_ms.model_center import Spread, Stages
from bmtrain_ms.model_center.layer import Embedding
from bmtrain_ms.train import Pretrain, Trainer, TrainSettings
from tests.helpers.layouts import KEPT, VOCAB, Case, model_of, parts, whole
from tests.ranks.test_layouts import compare

Run = Callable[..., list[Any]]
ROWS, LENGTH, STEPS = 8, 6, 5
COUNTS = (0, 0, 1, 0, 6, 6, 2, 5)  # targets of each row: of four ranks the first has none, the second one


class Uneven:
    """Rows with very different numbers of targets, of two documents each; a third of the steps begin with the full rows.

    Where `weighted`, targets count differently too.
    """

    described: dict[str, Any] = {}  # noqa: RUF012 - a protocol's

    def __init__(self, weighted: bool = False):
        self._weighted = weighted

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        random = np.random.default_rng([11, step])
        ids, targets = random.integers(0, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
        weights = random.random((ROWS, LENGTH)).astype(np.float32) if self._weighted else None
        for row, count in zip(targets, COUNTS if step % 3 else COUNTS[::-1]):
            row[random.permutation(LENGTH)[count:]] = -100
        documents = np.tile(np.int32([0, 0, 1, 1, 1, 1]), (ROWS, 1))
        mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        return Batch(ids[mine], targets[mine], None if weights is None else weights[mine], documents[mine])


class Plain(nn.Cell):
    """A model of somebody else's, whose loss is made of its logits."""

    def __init__(self, model: nn.Cell):
        super().__init__()
        self.model = model

    def construct(self, ids: Tensor, documents: Any = None) -> Tensor:
        return self.model(ids, documents=documents)


def train(
    world: World, case: Case, sizes: dict[str, Any], micro: int | None = None, weighted: bool = False, plain: bool = False
) -> dict[str, Any]:
    """As `tests.helpers.layouts.train`, by a Trainer."""
    with use_world(case.world(world)):
        model = model_of(case, sizes)
        params = {p.name: p for p in model.trainable_params()}  # `Plain` renames them
        first = parts({name: (p.layout, p) for name, p in params.items()})
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(list(params.values()), lr=3e-3, weight_decay=0.01))
        settings = TrainSettings(STEPS, clip=1e9, rows=micro)
        trainer = Trainer(Pretrain(Plain(model) if plain else model), Uneven(weighted), manager, settings)
        records, grads = [], {}
        for step in range(STEPS):
            records.append(trainer.train_step())
            if not step:
                scale = 1.0 / manager.grads_scale
                grads = parts({name: (p.layout, manager.grad(p) * scale) for name, p in params.items()})
        trainer.close()
        return {
            "first": first,
            "losses": [record["loss"] for record in records],
            "norms": [record["grad_norm"] for record in records],
            "grads": grads,
            "last": parts({name: (p.layout, p) for name, p in params.items()}),
        }


@functools.cache
def one_rank(sizes: tuple[tuple[str, Any], ...], weighted: bool = False) -> dict[str, Any]:
    with use_world(World(SingleEngine(), Mesh(1, 0))) as one:
        found = train(one, Case(), dict(sizes), weighted=weighted)
    return {**found, **{name: whole([found[name]]) for name in ("first", "grads", "last")}}


DENSE = {"num_heads_kv": 2}
CASES = [
    (Case(tp=2, dp=2, how=KEPT), 2),
    (Case(dp=4, replica=2, how=Spread(zero_level=2)), 1),
    (Case(pp=2, dp=2, stages=Stages(micro_batches=2)), 2),
]


@pytest.mark.parametrize("case, micro", CASES, ids=str)
def test_training_by_some_rows_at_a_time_is_that_of_one_rank(run_ranks: Run, case: Case, micro: int):
    answers = run_ranks(case.ranks, train, case=case, sizes=DENSE, micro=micro)
    compare(answers, one_rank(tuple(DENSE.items())), 2e-5)


@pytest.mark.parametrize("weighted, micro", [(False, None), (True, 2)])
def test_a_model_that_gives_logits(run_ranks: Run, weighted: bool, micro: int | None):
    answers = run_ranks(2, train, case=Case(dp=2), sizes=DENSE, micro=micro, weighted=weighted, plain=True)
    compare(answers, one_rank(tuple(DENSE.items()), weighted), 2e-5)


def staged(world: World, pipe: int) -> tuple[list[float], list[np.ndarray]]:
    """Losses, and the table after some steps, of a model with BMTrain's list: ranks of a pipeline read rows of their own."""
    with use_world(World(world.everyone, Mesh(world.everyone.size, world.mesh.rank, pp=pipe), seed=5)):

        class Layer(bms.DistributedModule):
            def __init__(self) -> None:
                super().__init__()
                method = bms.ParameterInitializer(bms.init.normal_, std=0.2)
                self.weight = bms.DistributedParameter(bms.empty(8, 8), init_method=method)

            def construct(self, x: Tensor) -> Tensor:
                return x + ms.ops.tanh(ms.ops.matmul(x, self.weight))

        class Model(nn.Cell):
            def __init__(self) -> None:
                super().__init__()
                self.embed = Embedding(VOCAB, 8)
                self.layers = bms.PipelineTransformerBlockList([Layer() for _ in range(3)])

            def construct(self, ids: Tensor, documents: Any = None) -> Tensor:
                return self.embed.projection(self.layers(self.embed(ids)))

        model = Model()
        bms.init_parameters(model)
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=3e-3))
        trainer = Trainer(Pretrain(model), Uneven(), manager, TrainSettings(STEPS, clip=1e9))
        losses = [trainer.train_step()["loss"] for _ in range(STEPS)]
        trainer.close()
        return losses, [p.gather().asnumpy().copy() for p in model.embed.get_parameters()]


@pytest.mark.parametrize("pipe", [1, 2])
def test_stages_that_read_rows_of_their_own(run_ranks: Run, pipe: int):
    (right, table), *_ = run_ranks(1, staged, pipe=1)
    for losses, values in run_ranks(2, staged, pipe=pipe):
        np.testing.assert_allclose(losses, right, rtol=2e-5)
        np.testing.assert_allclose(values[0], table[0], rtol=1e-3, atol=1e-5)


def issued(world: World, micro: int | None) -> tuple[list[str], int]:
    engine = RecordingEngine(world.everyone)
    with use_world(World(engine, Mesh(2, world.mesh.rank), seed=5)):
        model = model_of(Case(dp=2), DENSE)
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-3))
        trainer = Trainer(Pretrain(model), Uneven(), manager, TrainSettings(2, rows=micro))
        engine.events.clear()
        trainer.train_step()
        trainer.close()
        labels = [event.label for event in engine.events]
        return labels, next(event.received for event in engine.events if event.label == "targets that count")


@pytest.mark.parametrize("micro", [None, 1])
def test_it_costs_one_number_a_step(run_ranks: Run, micro: int | None):
    for labels, size in run_ranks(2, issued, micro=micro):
        assert labels.count("targets that count") == 1 and size == 8


def dropped(world: World, case: Case, rows: int | None) -> list[float]:
    """Losses and norms of two steps with a dropout in front of adapters, whose B is not zero."""
    with use_world(case.world(world)):
        model = model_of(case, {})
        bms.nn.add_lora(model, "q_proj|down_proj", rank=2, alpha=32, dropout=0.4)
        for p in (p for p in model.trainable_params() if "lora_B" in p.name):
            number = zlib.crc32(p.name.encode())
            p.copy_full(np.random.default_rng(number).normal(size=p.layout.whole).astype(np.float32))
        model.set_train(True)
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=3e-3))
        trainer = Trainer(Pretrain(model), Uneven(), manager, TrainSettings(2, clip=1e9, rows=rows))
        records = [trainer.train_step() for _ in range(2)]
        trainer.close()
        return [record[name] for record in records for name in ("loss", "grad_norm")]


def test_rows_at_a_time_change_no_mask(run_ranks: Run):
    (right,) = run_ranks(1, dropped, case=Case(), rows=None)
    for case, rows in (
        (Case(), 2),
        (Case(), 1),
        (Case(dp=2), 1),
        (Case(pp=2, stages=Stages(micro_batches=2)), 4),
    ):
        for found in run_ranks(case.ranks, dropped, case=case, rows=rows):
            np.testing.assert_allclose(found, right, rtol=2e-4, err_msg=f"{case} {rows}")
