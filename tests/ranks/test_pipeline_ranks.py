"""Pipelines: training in stages is that of one rank, whatever the schedule, the stages and what else ranks divide."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Callable

import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.data import TokenSampler
from bmtrain_ms.model_center import Spread, Stages
from bmtrain_ms.model_center.generation import generate
from tests.helpers.layouts import KEPT, PIPELINES, Case, batch_of, masked, model_of, train, whole
from tests.helpers.trainers import pretrainer
from tests.ranks.test_layouts import STEPS, compare

Run = Callable[..., list[Any]]
SIZES = {"num_layers": 5, "num_heads_kv": 2}
_alone: dict[str, dict[str, Any]] = {}


def one_rank(run_ranks: Run, sizes: dict[str, Any], **options: Any) -> dict[str, Any]:
    key = f"{sizes}{options}"
    if key not in _alone:
        found = run_ranks(1, train, case=Case(), steps=STEPS, sizes=sizes, **options)[0]
        _alone[key] = {**found, **{name: whole([found[name]]) for name in ("first", "grads", "last")}}
    return _alone[key]


@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_training_in_stages_is_that_of_one_rank(run_ranks: Run, case: Case):
    compare(run_ranks(case.ranks, train, case=case, steps=STEPS, sizes=SIZES, timeout=300), one_rank(run_ranks, SIZES), 2e-5)


TIED = [
    Case(pp=2, stages=Stages(micro_batches=3)),
    Case(pp=3, how=KEPT, stages=Stages(micro_batches=4)),
    Case(pp=2, how=Spread(zero_level=2), stages=Stages(chunks=2, micro_batches=2)),
    Case(pp=1, stages=Stages(micro_batches=4)),
    Case(pp=2, tp=2, stages=Stages(micro_batches=2)),
]


@pytest.mark.parametrize("case", TIED, ids=str)
def test_a_tied_table_on_two_stages_and_micro_batches_with_different_numbers_of_tokens(run_ranks: Run, case: Case):
    sizes = {**SIZES, "tied": True}
    right = one_rank(run_ranks, sizes, uneven=True)
    compare(run_ranks(case.ranks, train, case=case, steps=STEPS, sizes=sizes, uneven=True, timeout=300), right, 2e-5)


def test_a_tied_table_that_is_sharded_on_both_stages(run_ranks: Run):
    sizes, case = {**SIZES, "tied": True}, Case(pp=2, dp=2, stages=Stages(micro_batches=2))
    compare(run_ranks(4, train, case=case, steps=STEPS, sizes=sizes, timeout=300), one_rank(run_ranks, sizes), 2e-5)


def evaluate(world: World, case: Case, sizes: dict[str, Any]) -> dict[str, Any]:
    """Losses and logits, and what is generated."""
    with use_world(case.world(world)):
        model = model_of(case, sizes)
        ids, targets = masked(batch_of(0, 0, 1), uneven=True)
        padding = np.ones(ids.shape, bool)
        padding[1, :2] = False
        return {
            "mean": model.loss(ids, targets, Tensor(padding)).asnumpy(),
            "sum": model.loss(ids[:1], targets[:1] + 0, reduction="sum").asnumpy(),
            "none": model.loss(ids, targets, reduction="none").asnumpy(),
            "logits": model(ids, Tensor(padding)).asnumpy(),
            "tokens": generate(model, [[1, 2, 3], [4, 5], [6]], 4),
            "sampled": generate(model, [[1, 2, 3]], 4, temperature=1.0, seed=3),
        }


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, stages=Stages(micro_batches=3)),
        Case(pp=3, stages=Stages("E|ttttt|L")),
        Case(pp=2, how=Spread(zero_level=2), stages=Stages(chunks=2, micro_batches=2)),
        Case(pp=2, tp=2),
    ],
    ids=str,
)
def test_evaluation_and_generation(run_ranks: Run, case: Case):
    (right,) = run_ranks(1, evaluate, case=Case(), sizes=SIZES)
    for answer in run_ranks(case.ranks, evaluate, case=case, sizes=SIZES):
        for name in ("mean", "sum", "none", "logits"):
            assert answer[name].shape == right[name].shape and answer[name].dtype == right[name].dtype, name
            np.testing.assert_allclose(answer[name], right[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert (answer["tokens"], answer["sampled"]) == (right["tokens"], right["sampled"])


def first_only(world: World, case: Case) -> list[float]:
    """Losses of a training whose batches the first rank of a pipeline has, and what is refused."""
    with use_world(case.world(world)) as here:
        model = model_of(case, SIZES)
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-2))
        losses, has = [], here.along("pp").rank == 0
        for step in range(3):
            batch = masked(batch_of(step, here.mesh.dp_rank, case.dp), uneven=True)
            documents = Tensor(np.repeat(np.arange(2), batch[0].shape[1] // 2)[None].repeat(len(batch[0]), 0).astype(np.int32))
            given: list[Any] = [*batch, None, documents]
            given = given if has or case.stages is None or case.stages.batches == "all" else [None] * 4
            manager.zero_grad()
            losses.append(bms.sum_loss(manager.backward(model.loss, *given)).asnumpy().item())
            losses.append(bms.sum_loss(model.loss(*given)).asnumpy().item())
            manager.step()
        if case.stages is not None and case.stages.batches == "first":
            with pytest.raises(ValueError, match=r"a batch was given to rank\(s\) \[1\], too, of a pipeline with batches='first'"):
                model.loss(*batch)
            with pytest.raises(ValueError, match="no batch was given to the first rank of a pipeline with batches='first'"):
                model.loss(None, None)
        return losses


@pytest.mark.parametrize("case", [Case(pp=2, how=KEPT), Case(pp=2, dp=2), Case(pp=2, tp=2)], ids=str)
def test_only_the_first_rank_of_a_pipeline_has_a_batch(run_ranks: Run, case: Case):
    right = run_ranks(case.ranks, first_only, case=case)
    stages = Stages(micro_batches=2, batches="first")
    assert run_ranks(case.ranks, first_only, case=replace(case, stages=stages)) == right


def overflow(world: World) -> tuple[list[tuple[bool, float, float]], str]:
    """Steps (made, norm, loss scale) in float16, and the error that ends a run whose gradients never are finite."""
    case = Case(pp=2, stages=Stages(micro_batches=2))
    with use_world(case.world(world)) as here:
        model = model_of(case, {**SIZES, "dtype": "float16"})
        manager = bms.optim.OptimManager(loss_scale=2.0**18, max_skipped_steps=30)
        optimizer = bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-3)
        manager.add_optimizer(optimizer)
        steps = []
        for step in range(8):
            manager.zero_grad()
            manager.backward(model.loss, *batch_of(step, here.mesh.dp_rank, 1))
            norm = manager.clip_grad_norm(optimizer.param_groups, 1.0)
            steps.append((bool(manager.step()), norm, manager.loss_scale))
        bad = bms.optim.OptimManager(loss_scale=1.0, max_skipped_steps=1)
        bad.add_optimizer(optimizer)
        if here.mesh.pp_rank == 1:  # only the last stage is not finite at first, and then its gradients reach the first
            norm_weight = next(p for p in model.trainable_params() if p.name == "model.norm.weight")
            norm_weight.set_data(Tensor(np.full(tuple(norm_weight.shape), math.nan, np.float16)))
        bad.backward(model.loss, *batch_of(0, 0, 1))
        with pytest.raises(bms.optim.GradientOverflowError) as info:
            bad.step()
        return steps, str(info.value)


def test_all_stages_decide_alike(run_ranks: Run):
    (steps, text), (others, other_text) = run_ranks(2, overflow)
    assert steps == others and text == other_text
    made = [step[0] for step in steps]
    assert made[-1] and all(math.isfinite(norm) for ok, norm, _ in steps if ok)
    assert "model.embed_tokens.weight" in text and " other parameters" in text  # of the first stage, and of both


def loop(world: World, case: Case) -> tuple[list[float], float]:
    """Losses of the training loop, which cannot know of stages, and that of held-out text."""
    with use_world(case.world(world)) as here:
        text = np.random.default_rng(1).integers(0, 37, 400).astype(np.int32)
        sampler = TokenSampler(text, length=6, global_batch=4)
        trainer = pretrainer(model_of(case, SIZES), sampler, 3, lr=0.01, warmup=1)
        if case.pp > 1:
            batch = sampler.batch(0, here.mesh.dp_rank, here.mesh.dp)
            with pytest.raises(ValueError, match=r"^the loss of a model in pipeline stages takes no weights of targets: leave"):
                trainer.task.loss(replace(batch, weights=np.ones(batch.ids.shape, np.float32)))
        with trainer:
            losses = [trainer.train_step()["loss"] for _ in range(3)]
            return losses, trainer.evaluate(text[:100], 6, rows=4)


def test_the_training_loop(run_ranks: Run):
    (right,) = run_ranks(1, loop, case=Case())
    for losses, held_out in run_ranks(4, loop, case=Case(pp=2, dp=2, stages=Stages(micro_batches=2))):
        np.testing.assert_allclose([*losses, held_out], [*right[0], right[1]], rtol=1e-5)


def frozen(world: World) -> list[Any]:
    """Only the last layer is trained, so that the first stage trains nothing."""
    case = Case(pp=2, dp=1, stages=Stages(micro_batches=2))
    with use_world(case.world(world)):
        model = model_of(case, SIZES)
        for p in model.get_parameters():
            p.requires_grad = p.name.startswith("model.layers.4.")
        params = model.trainable_params()
        manager = bms.optim.OptimManager()
        optimizer = bms.optim.AdamOptimizer(params, lr=1e-2)
        manager.add_optimizer(optimizer, bms.lr_scheduler.NoDecay(optimizer, 1e-2, 0, 10))
        losses = []
        for _ in range(3):
            manager.zero_grad()
            losses.append(manager.backward(model.loss, *batch_of(0, 0, 1)).asnumpy().item())
            manager.clip_grad_norm(optimizer.param_groups, 1.0)
            manager.step()
        with pytest.raises(RuntimeError, match=r"pipe_size=2 the loss is made micro-batch.*with its loss and no function"):
            manager.backward(lambda *batch: model.loss(*batch), *batch_of(0, 0, 1))
        with pytest.raises(ValueError, match=r"^a batch of 1 row cannot be divided into 2 micro-batches"):
            manager.backward(model.loss, *(x[:1] for x in batch_of(0, 0, 1)))
        return [len(params), losses]


def test_a_stage_may_train_nothing(run_ranks: Run):
    (nothing, losses), (some, others) = run_ranks(2, frozen)
    assert nothing == 0 < some and losses == others
    assert losses[2] < losses[1] < losses[0]
