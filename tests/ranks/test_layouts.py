"""Any layout, one result: initial values, losses, gradients, norms and updates of every layout are those of one rank."""

from __future__ import annotations

import functools
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SingleEngine, World, use_world
from bmtrain_ms.model_center import Spread, Stages
from bmtrain_ms.model_center.generation import generate
from bmtrain_ms.model_center.layer import KeyValueCache, Positions
from bmtrain_ms.nn import Router
from tests.helpers.layouts import (
    BATCH,
    EXPERTS,
    KEPT,
    LAYOUTS,
    LENGTH,
    MANY,
    MIXTURES,
    VOCAB,
    Case,
    alone,
    batch_of,
    model_of,
    parts,
    train,
    whole,
)

Run = Callable[..., list[Any]]
STEPS = 20


@functools.cache
def one_rank(sizes: tuple[tuple[str, Any], ...], steps: int, uneven: bool = False) -> dict[str, Any]:
    found = alone(steps, dict(sizes), uneven)
    return {**found, **{name: whole([found[name]]) for name in ("first", "grads", "last")}}


def compare(answers: list[dict[str, Any]], right: dict[str, Any], close: float) -> None:
    first, grads, last = (whole([answer[name] for answer in answers]) for name in ("first", "grads", "last"))
    assert sorted(first) == sorted(right["first"])
    for name, values in first.items():
        np.testing.assert_array_equal(values, right["first"][name], err_msg=name)
    largest = {name: np.abs(grad).max() for name, grad in right["grads"].items()}
    noise = 1e-6 * max(largest.values())  # a bias of keys has no effect without rotation: its gradient is rounding
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, right["grads"][name], rtol=0, atol=max(noise, close * largest[name]), err_msg=name)
    for answer in answers:
        assert answer["losses"] == answers[0]["losses"]  # all ranks say the same
        assert answer["norms"] == answers[0]["norms"]
    np.testing.assert_allclose(answers[0]["losses"], right["losses"], rtol=close)
    np.testing.assert_allclose(answers[0]["norms"], right["norms"], rtol=10 * close)
    for name, values in last.items():
        if largest[name] < noise:
            continue
        np.testing.assert_allclose(values, right["last"][name], rtol=0, atol=100 * close * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_training_is_that_of_one_rank(run_ranks: Run, case: Case):
    sizes = {"num_heads_kv": 3 if case.tp == 3 else 2}
    right = one_rank(tuple(sizes.items()), STEPS)
    compare(run_ranks(case.ranks, train, case=case, steps=STEPS, sizes=sizes), right, 2e-5)


@pytest.mark.parametrize("case", MIXTURES + MANY, ids=str)
def test_training_of_experts_is_that_of_one_rank(run_ranks: Run, case: Case):
    right = one_rank(tuple(EXPERTS.items()), STEPS)
    compare(run_ranks(case.ranks, train, case=case, steps=STEPS, sizes=EXPERTS), right, 2e-5)


def looked_at(world: World, case: Case, looks: bool) -> list[float]:
    """Losses, norms and what routers have counted; where it looks, it evaluates and calls the model before every backward pass."""
    with use_world(case.world(world)) as here:
        model = model_of(case, {**EXPERTS, "num_layers": 2, "dense_layers": (), "balance": "global_batch"})
        manager = bms.optim.OptimManager()
        optimizer = bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-2)
        manager.add_optimizer(optimizer)
        found: list[float] = []
        for step in range(2):
            manager.zero_grad()
            for part in range(2):
                if looks:
                    held = batch_of(100, here.mesh.dp_rank, case.dp)
                    model.loss(*held)
                    model(held[0])
                batch = batch_of(2 * step + part, here.mesh.dp_rank, case.dp)
                found.append(manager.backward(model.loss, *batch).asnumpy().item())
            counts = [cell.seen() for _, cell in model.cells_and_names() if isinstance(cell, Router)]
            assert all(seen.sum() == 2 * BATCH * LENGTH * 3 // case.dp for seen in counts)
            found += [manager.clip_grad_norm(optimizer.param_groups, 1.0), *np.concatenate(counts).tolist()]
            manager.step()
        return found


@pytest.mark.parametrize(
    "case",
    [Case(), Case(how=KEPT), Case(dp=2), *(Case(pp=2, how=how, stages=Stages(micro_batches=1)) for how in (Spread(), KEPT))],
    ids=str,
)
def test_looking_at_a_model_with_experts_does_not_change_its_training(run_ranks: Run, case: Case):
    assert run_ranks(case.ranks, looked_at, case=case, looks=True) == run_ranks(case.ranks, looked_at, case=case, looks=False)


def padded(world: World, case: Case, balance: str, reduction: str) -> dict[str, Any]:
    """The loss, the norm and gradients of rows of unequal lengths, weighed by their targets; and the mean of evaluations."""
    lengths = np.array([6, 5, 1, 2])
    ids = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    real = np.arange(LENGTH) < lengths[:, None]
    targets = np.where(real, ids, -100).astype(np.int32)
    with use_world(case.world(world)) as here:
        rank, dp = here.mesh.dp_rank, case.dp
        model = model_of(case, {**EXPERTS, "balance": balance, "balance_coef": 0.5})
        manager = bms.optim.OptimManager()
        params = model.trainable_params()
        manager.add_optimizer(bms.optim.AdamOptimizer(params))
        mine = [Tensor(np.ascontiguousarray(x[rank * BATCH // dp :][: BATCH // dp])) for x in (ids, targets, real)]
        share = lengths.reshape(dp, -1).sum(1)[rank] * dp / lengths.sum()  # of this rank's mean
        evaluated = model.loss(*mine) * float(share)
        if reduction == "mean":
            loss = manager.backward(model.loss, *mine, None, float(share))
        else:
            loss = manager.backward(model.loss, *mine, None, 1.0, reduction="sum") * float(dp / lengths.sum())
        scale = 1.0 if reduction == "mean" else dp / lengths.sum()
        return {
            "loss": here.along("dp").all_reduce([loss.reshape(1)], "mean").wait()[0].asnumpy().item(),
            "evaluated": here.along("dp").all_reduce([evaluated.reshape(1)], "mean").wait()[0].asnumpy().item(),
            "norm": manager.clip_grad_norm(params, 1e9) * scale,
            "grads": parts({p.name: (p.layout, manager.grad(p) * float(scale / manager.grads_scale)) for p in params}),
        }


PADDED = [
    (Case(dp=2), "sequence"),
    (Case(dp=2, ep=2), "global_batch"),
    (Case(tp=2), "sequence"),
    (Case(tp=2, dp=2, ep=2), "sequence"),
    (Case(pp=2, stages=Stages(micro_batches=2)), "sequence"),
    (Case(pp=2, dp=2, stages=Stages(micro_batches=2)), "sequence"),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("case", "balance"), PADDED, ids=str)
def test_unequal_numbers_of_tokens_are_balanced_as_on_one_rank(run_ranks: Run, case: Case, balance: str, reduction: str):
    right = run_ranks(1, padded, case=Case(), balance=balance, reduction="mean")[0]
    answers = run_ranks(case.ranks, padded, case=case, balance=balance, reduction=reduction)
    for answer in answers:
        assert answer["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert answer["norm"] == pytest.approx(right["norm"], rel=1e-5)
        if balance == "sequence":  # evaluating does not ask other ranks
            assert answer["evaluated"] == pytest.approx(right["evaluated"], rel=1e-5)
    found, expected = whole([answer["grads"] for answer in answers]), whole([right["grads"]])
    largest = max(np.abs(grad).max() for grad in expected.values())
    for name, grad in found.items():
        np.testing.assert_allclose(grad, expected[name], rtol=0, atol=2e-5 * largest, err_msg=name)


@pytest.mark.parametrize("case", [Case(tp=2), Case(tp=4), Case(tp=2, dp=2)], ids=str)
def test_tied_embeddings_and_the_loss_of_all_logits(run_ranks: Run, case: Case):
    right = one_rank((("tied", True),), STEPS)
    for logits in (False, True):
        compare(run_ranks(case.ranks, train, case=case, steps=STEPS, sizes={"tied": True}, logits=logits), right, 2e-5)


def dropped(world: World, case: Case) -> np.ndarray:
    """This rank's rows after two dropouts, the second in a checkpointed Block."""
    with use_world(case.world(world)) as here:

        class Layer(bms.DistributedModule):
            def __init__(self) -> None:
                super().__init__()
                self.weight = bms.DistributedParameter(np.ones(5, np.float32), name="weight")
                self.drop = bms.nn.Dropout(0.4)

            def construct(self, x: Tensor) -> Tensor:
                return self.drop(x * self.weight)

        block, first = bms.Block(Layer()), bms.nn.Dropout(0.2)
        for cell in (block, first):
            cell.set_train()
        rows = 12 // case.dp
        x = Tensor(np.arange(1, 61, dtype=np.float32).reshape(12, 5)[here.mesh.dp_rank * rows :][:rows])
        grad = ms.grad(lambda x: (block(first(x)) * x).sum())(x)
        return grad.asnumpy()


def test_dropout_draws_the_mask_of_one_rank(run_ranks: Run):
    right = dropped(World(SingleEngine(), Mesh(1, 0)), Case())
    assert 0 < np.count_nonzero(right) < right.size
    for case in (Case(dp=2), Case(dp=3), Case(tp=2), Case(tp=2, dp=2)):
        answers = run_ranks(case.ranks, dropped, case=case)
        np.testing.assert_array_equal(np.concatenate(answers[:: case.tp]), right)
        np.testing.assert_array_equal(np.concatenate(answers[case.tp - 1 :: case.tp]), right)


def generated(world: World, case: Case, sizes: dict[str, Any]) -> list[list[list[int]]]:
    """Of this rank's prompts, the continuations that are sampled, and those that are searched for."""
    with use_world(case.world(world)) as here:
        model = model_of(case, sizes)
        prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
        prompts = prompts[4 // case.dp * here.mesh.dp_rank :][: 4 // case.dp]
        beams = generate(model, prompts, 6, num_beams=3, eos_id=7)
        return [generate(model, prompts, 6, temperature=0.7, top_k=5, seed=3), beams]


LEARNED = {"family": "GPT2", "max_positions": 24}  # positions are looked up where the embedding is, which may have no layers


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        *((case, {"num_heads_kv": 2}) for case in (Case(tp=2), Case(tp=4), Case(tp=2, dp=2), Case(pp=2))),
        *((Case(pp=2, stages=Stages(plan)), LEARNED) for plan in ("E|ttL", "Et|tL", "Ett|L")),
        (Case(pp=2, tp=2, stages=Stages("E|ttL")), LEARNED),
    ],
    ids=str,
)
def test_generation_is_that_of_one_rank(run_ranks: Run, case: Case, sizes: dict[str, Any]):
    right = generated(World(SingleEngine(), Mesh(1, 0)), Case(), sizes)
    answers = run_ranks(case.ranks, generated, case=case, sizes=sizes)
    alike = case.tp * case.pp  # ranks with the same prompts
    for first in range(alike):
        for kind, rows in enumerate(right):
            assert [row for answer in answers[first::alike] for row in answer[kind]] == rows


def too_long(world: World) -> str:
    """What is said of more tokens than a cache has room for, and whether it goes on."""
    case = Case(pp=2, stages=Stages("E|ttL"))
    with use_world(case.world(world)):
        model, cache = model_of(case, LEARNED), KeyValueCache(5)
        ids = Tensor(np.ones((2, 3), np.int32))
        model(ids, None, cache)
        with pytest.raises(ValueError) as error:
            model(ids, None, cache)
        return str(error.value)


def test_a_cache_without_room_is_refused_on_every_stage(run_ranks: Run):
    """Also on that of the embedding, which has no layers to hold anything."""
    text = "a KeyValueCache of capacity 5 that holds 3 positions has no room for 3 more: KeyValueCache(6) has"
    assert run_ranks(2, too_long) == [text] * 2


def halves(world: World, case: Case) -> tuple[list[bool], list[float]]:
    """Whether each step of a float16 model was made, and the loss scale after it, from one that overflows.

    A data-parallel rank's loss is the mean over its own rows, so its gradients are `dp` times as large: scales are counted for one.
    """
    with use_world(case.world(world)) as here:
        model = model_of(case, {"dtype": "float16", "num_heads_kv": 2})
        manager = bms.optim.OptimManager(loss_scale=2.0**18 / case.dp, loss_scale_steps=3)
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-3))
        made, scales = [], []
        for step in range(8):
            manager.zero_grad()
            manager.backward(model.loss, *batch_of(step, here.mesh.dp_rank, case.dp))
            made.append(manager.step().updated)
            scales.append(manager.loss_scale * case.dp)
        return made, scales


def test_the_same_steps_are_skipped_in_float16(run_ranks: Run):
    right = halves(World(SingleEngine(), Mesh(1, 0)), Case())
    assert True in right[0] and False in right[0]
    for case in (Case(tp=2), Case(tp=2, dp=2), Case(tp=4), Case(pp=2)):
        assert run_ranks(case.ranks, halves, case=case) == [right] * case.ranks


def collectives(world: World, how: Spread) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, int]]]:
    """Of two tensor-parallel ranks, a layer's forward and backward: what is issued, and how many bytes come in."""
    engine = RecordingEngine(world.everyone)
    with use_world(World(engine, Mesh(2, world.mesh.rank, tp=2))):
        model = model_of(Case(tp=2, how=how), {"num_layers": 1})
        layer, x = next(iter(model.model.layers)), Tensor(np.ones((BATCH * LENGTH // 2, 24), np.float32))
        positions = Positions(BATCH, LENGTH)
        positions.divide(2)
        params = layer.trainable_params()
        engine.events.clear()
        seen = []

        def loss(x: Tensor) -> Tensor:
            y = layer(x, positions)
            seen.extend((e.op, e.label, e.received) for e in engine.events)
            engine.events.clear()
            return y.sum()

        ms.value_and_grad(loss, 0, params)(x)
        return seen, [(e.op, e.label, e.received) for e in engine.events]


@pytest.mark.parametrize("recompute", [False, True])
def test_collectives_of_a_layer(run_ranks: Run, recompute: bool):
    """Rows are gathered in front of attention and of the feed-forward layer, and summed and scattered behind them; that is all.

    Backward does the opposite, and gathers what was not kept; gradients of the norms, which both ranks have, are averaged.
    """
    part = BATCH * LENGTH // 2 * 24 * 4  # bytes of a rank's rows
    gather, scatter = ("all_gather", "linear, input", part), ("reduce_scatter", "linear, output", part)
    of_product = [("all_gather", "linear, gradient", part)]
    of_products = [("all_gather", "linear, input again", part), ("reduce_scatter", "linear, gradient", part)]
    forward = [gather, scatter] * 2
    norms = ("all_reduce", "model.layers.0", 2 * 24 * 4)
    for seen, backward in run_ranks(2, collectives, how=Spread(recompute=recompute)):
        assert seen == forward
        assert backward == [*(forward if recompute else []), *(of_product + of_products) * 2, norms]
