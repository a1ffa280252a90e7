"""The whole of it: a Llama trained, evaluated and sampled at several ranks does what it does at one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.data import TokenSampler
from bmtrain_ms.model_center import Spread, spread
from bmtrain_ms.model_center.generation import generate
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.train import read_log
from tests.helpers.adapters import adapted
from tests.helpers.models import full
from tests.helpers.trainers import pretrainer

pytestmark = pytest.mark.ranks

SIZES = {"vocab_size": 37, "dim_model": 20, "num_heads": 2, "num_heads_kv": 1, "dim_ff": 27, "num_layers": 2}
TOKENS = np.random.default_rng(0).integers(0, 37, 600).astype(np.int32)
HELD_OUT = np.random.default_rng(1).integers(0, 37, 7 * 9 + 1).astype(np.int32)  # seven windows: uneven over 2 and 3 ranks
PROMPTS = [[3, 1, 4], [9], [2, 6, 5, 3, 5]]


def train(world: World, **options: Any) -> dict[str, Any]:
    """Three steps at a global batch of 6; what came of it."""
    here = World(world.engine, world.mesh, seed=7, launch=world.launch, prefetch=options.pop("prefetch", 1))
    world.engine.clock.step = 0
    scale, how = options.pop("loss_scale", None), options.pop("how", Spread())
    make = adapted if options.pop("adapters", False) else Llama
    with use_world(here):
        model = make(LlamaConfig(**SIZES, init_std=0.1, **options))
        if how is not None:
            spread(model, how)
        bms.init_parameters(model)
        trainer = pretrainer(model, TokenSampler(TOKENS, 8, 6), 3, lr=0.01, warmup=1, loss_scale=scale)
        before = trainer.evaluate(HELD_OUT, 9, rows=2)
        records = [trainer.train_step() for _ in range(3)]
        return {
            "losses": [before, *(r["loss"] for r in records), trainer.evaluate(HELD_OUT, 9, rows=2)],
            "norms": [r["grad_norm"] for r in records],
            "updated": [not r["skipped"] for r in records],
            "params": {p.name: full(here, p) for p in model.get_parameters()},
            "greedy": generate(model, PROMPTS, 6),
            "sampled": generate(model, PROMPTS, 6, temperature=1.0, top_k=20, top_p=0.9, seed=3),
        }


def assert_alike(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=tolerance)
    np.testing.assert_allclose(a["norms"], b["norms"], rtol=10 * tolerance)
    assert a["updated"] == b["updated"] and a["params"].keys() == b["params"].keys()
    for name, values in a["params"].items():
        # Adam divides by the root of the second moment: where a gradient is next to 0, rounding becomes a step
        np.testing.assert_allclose(values, b["params"][name], atol=100 * tolerance, err_msg=name)


def assert_same(results: list[dict[str, Any]]) -> None:
    """All ranks have the same bits, but each samples texts of its own."""
    first = {name: x for name, x in results[0].items() if name != "sampled"}
    for other in results[1:]:
        np.testing.assert_equal({name: x for name, x in other.items() if name != "sampled"}, first)
        assert other["sampled"] != results[0]["sampled"]


@pytest.fixture
def trained(run_ranks, single_world) -> Callable[..., list[dict[str, Any]]]:
    """`trained(ranks, **options)`: results of `train` by rank; each setting is trained once."""

    def run(ranks: int, **options: Any) -> list[dict[str, Any]]:
        key = run_ranks, ranks, tuple(options.items())  # rehearsed ones are others
        if key not in _trained:
            _trained[key] = [train(single_world, **options)] if ranks == 1 else run_ranks(ranks, train, **options)
        return _trained[key]

    return run


_trained: dict[Any, list[dict[str, Any]]] = {}

OPTIONS = [
    {},
    {"how": Spread(zero_level=2), "prefetch": 0},
    {"how": Spread(recompute=False), "prefetch": 2},
    {"how": None},
    {"how": Spread(recompute=False, zero_level=2), "tied": True},
    {"tied": True},
    {"adapters": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_ranks_train_as_one(trained, options):
    (alone,), results = trained(1, **options), trained(2, **options)
    assert_same(results)
    assert_alike(results[0], alone)
    assert results[0]["greedy"] == alone["greedy"] and results[0]["sampled"] == alone["sampled"]
    assert len({tuple(row) for row in alone["sampled"]}) > 1


def test_three_ranks_train_as_one(trained):
    results = trained(3)
    assert_same(results)
    assert_alike(results[0], trained(1)[0])


def test_options_do_not_change_the_result(trained):
    """Level, recomputation, prefetch and no spread at all move data at other times; the sums are the same, in the same order."""
    for options in OPTIONS[1:4]:
        np.testing.assert_equal(trained(2, **options)[0], trained(2)[0])


def test_half_with_loss_scale(trained):
    (alone,), results = (trained(ranks, dtype="float16", loss_scale=256.0) for ranks in (1, 2))
    assert_same(results)
    assert results[0]["updated"] == [True] * 3
    np.testing.assert_allclose(results[0]["losses"], alone["losses"], rtol=2e-3)


def fit_with_log(world: World, log: str) -> list[int]:
    """Only rank 0 writes the log."""
    with use_world(World(world.engine, world.mesh, seed=7, launch=world.launch)):
        model = spread(Llama(LlamaConfig(**SIZES)))
        bms.init_parameters(model)
        trainer = pretrainer(model, TokenSampler(TOKENS, 8, 6), 2, log=Path(log))
        trainer.fit()
        world.engine.barrier().wait()
        return [r["step"] for r in read_log(log)]


def test_one_rank_logs(run_ranks, tmp_path):
    assert run_ranks(2, fit_with_log, log=str(tmp_path / "log")) == [[1, 2], [1, 2]]


def batch_of_five(world: World) -> str:
    with pytest.raises(ValueError) as info:
        TokenSampler(TOKENS, 8, 5).batch(0, world.engine.rank, world.engine.size)
    return str(info.value)


def test_a_batch_that_does_not_divide(run_ranks):
    assert run_ranks(2, batch_of_five) == ["a global batch of 5 cannot be split evenly over 2 ranks"] * 2


def sample(world: World, counts: list[int], **options: Any) -> list[list[int]]:
    """Continuations of this rank's part of four prompts, `counts` of which each rank has."""
    with use_world(World(world.everyone, world.mesh, seed=7)):
        model = spread(Llama(LlamaConfig(**SIZES, init_std=0.1)))
        bms.init_parameters(model)
        first = sum(counts[: world.mesh.rank])
        return generate(model, [*PROMPTS, [4, 4]][first : first + counts[world.mesh.rank]], 6, **options)


@pytest.mark.parametrize("counts", [[2, 2], [1, 3], [3, 1]])
def test_prompts_that_are_divided_are_continued_as_on_one_rank(run_ranks: Callable[..., list[Any]], counts: list[int]):
    for options in ({"temperature": 1.0, "seed": 3}, {"temperature": 2.0, "num_return_sequences": 2, "eos_id": 5}, {}):
        [whole] = run_ranks(1, sample, counts=[4], **options)
        assert [row for rows in run_ranks(2, sample, counts=counts, **options) for row in rows] == whole
    assert len(set(map(tuple, whole))) > 1
