"""Ranks that differ along tp or pp only, and are given different batches, get an error that says so, on every rank."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import CommError, World, use_world
from bmtrain_ms.model_center import Stages
from bmtrain_ms.model_center.generation import generate
from tests.helpers.layouts import VOCAB, Case, model_of
from tests.ranks.test_disagreement import make_engine

pytestmark = pytest.mark.ranks
Run = Callable[..., list[Any]]
CASES = [Case(tp=2), Case(pp=2, stages=Stages(micro_batches=2))]
GIVEN = {
    "ids": "input ids",
    "length": "input ids",
    "targets": "targets",
    "ignored": "targets",
    "weight": "weight of the loss",
    "padding": "padding",
    "documents": "documents",
    "prompts": "input ids",
    "evaluated": "input ids",
}


def batch(what: str, odd: bool) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of the loss; `odd`: of the rank that is given something else."""
    random = np.random.default_rng(0)
    ids, targets = random.integers(0, VOCAB, (2, 4, 6)).astype(np.int32)
    padding, documents = np.ones((4, 6), bool), np.zeros((4, 6), np.int32)
    if odd and what in ("ids", "evaluated"):
        ids[3, 2] = (ids[3, 2] + 1) % VOCAB
    if odd and what == "targets":
        targets[3, 2] = (targets[3, 2] + 1) % VOCAB
    if odd and what == "ignored":
        targets[3, 2] = -100
    padding[0, 0], documents[1, 3:] = not (odd and what == "padding"), int(odd and what == "documents")
    arrays = [ids, targets, padding, documents]
    if odd and what == "length":
        arrays = [np.ascontiguousarray(x[:, 1:]) for x in arrays]
    if what == "length":
        arrays = arrays[:2]
    return [Tensor(x) for x in arrays], {"weight": 1.5 if odd and what == "weight" else 1.0}


def said(world: World, case: Case, what: str) -> str:
    """The error of a step in which rank 1 is given something else, behind one in which it is not."""
    engine = make_engine("node")
    with use_world(case.world(World(engine, world.mesh))) as here:
        model, odd = model_of(case, {}), here.mesh.rank == 1
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
        arrays, weight = batch(what, False)
        assert np.isfinite(manager.backward(model.loss, *arrays, **weight).asnumpy())
        arrays, weight = batch(what, odd)
        with pytest.raises(CommError) as error:
            if what == "prompts":
                generate(model, [[1, 2, 3 + odd]], 2)
            elif what == "evaluated":
                model.loss(*arrays, **weight)
            else:
                manager.backward(model.loss, *arrays, **weight)
    engine.close()
    return str(error.value)


@pytest.mark.parametrize("what", GIVEN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_that_are_given_other_rows_than_each_other(run_ranks: Run, case: Case, what: str):
    for text in run_ranks(2, said, case=case, what=what):
        assert (
            f" was given other {GIVEN[what]} than this rank: ranks that differ along tp or pp only must be given the same" in text
        )
        assert text.endswith("Choose rows by world().mesh.dp_rank of mesh.dp, not by the global rank")


def wrong_ids(world: World, case: Case) -> list[str]:
    """What is said of ids that are none: one is negative, and they are no whole numbers."""
    texts = []
    for what in ("negative", "fractions", "truths"):
        engine = make_engine("node") if case.ranks > 1 else world.everyone
        with use_world(case.world(World(engine, world.mesh))):
            model, ids = model_of(case, {}), np.ones((4, 6), np.int32)
            ids[3, 2] = -1 if what == "negative" else 1
            with pytest.raises((ValueError, TypeError)) as error:
                given = ids.astype({"negative": np.int32, "fractions": np.float32, "truths": bool}[what])
                model.loss(Tensor(given), Tensor(np.ones((4, 6), np.int32)))
        if engine is not world.everyone:
            engine.close()
        texts.append(f"{type(error.value).__name__}: {error.value}")
    return texts


@pytest.mark.parametrize("case", [Case(), Case(dp=2), Case(tp=2)], ids=str)
def test_ids_that_are_none_are_refused_in_every_layout(run_ranks: Run, case: Case):
    for negative, fractions, truths in run_ranks(case.ranks, wrong_ids, case=case):
        assert negative.startswith("ValueError: ids ")
        assert "-1" in negative
        assert (
            fractions
            == "TypeError: ids are whole numbers, of type int32 or int64, not Float32: convert them with ids.astype(ms.int32)"
        )
        assert truths.startswith("TypeError: ids are whole numbers, of type int32 or int64, not Bool:")
