"""Saved on any layout, loaded on any other: the training goes on as on one rank, to the bit on the layout that saved."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, CheckpointError
from bmtrain_ms.comm import Mesh, SingleEngine, World, use_world
from bmtrain_ms.model_center import Stages
from tests.helpers.layouts import EXPERTS, Case, batch_of, model_of, parts, whole

Run = Callable[..., list[Any]]
SIZES = {"num_heads_kv": 2, "tied": True}
CASES = [Case(), Case(dp=2), Case(tp=2), Case(tp=4), Case(tp=2, dp=2), Case(tp=2, dp=2, replica=2)]
PIPES = [Case(pp=2), Case(pp=2, tp=2), Case(pp=2, dp=2), Case(pp=2, dp=2, replica=2)]
PAIRS = [
    *((Case(tp=2), case) for case in CASES),
    *((case, Case(tp=2)) for case in CASES if case.tp != 2),
    (CASES[4], CASES[5]),
    (CASES[5], CASES[0]),
    *((PIPES[0], case) for case in (CASES[0], PIPES[0], PIPES[2])),
    *((case, PIPES[0]) for case in (CASES[0], PIPES[1], PIPES[3])),
    (PIPES[1], CASES[5]),
    (CASES[1], PIPES[1]),
]
MIXTURES = [
    (Case(dp=2, ep=2), Case()),
    (Case(), Case(tp=2, dp=2, ep=2)),
    (Case(dp=4, ep=4), Case(dp=4, ep=2, replica=2)),
    (Case(pp=2, dp=2, ep=2), Case(dp=2, ep=2)),
    (Case(dp=2), Case(pp=2, dp=2, ep=2)),
    (Case(dp=2, replica=2), Case(dp=4, replica=2)),
    (Case(dp=4, replica=4), Case(dp=2, ep=2)),
    (Case(tp=2, dp=2, replica=2), Case(pp=2, dp=2, replica=2)),
    (Case(pp=2, dp=2, replica=2), Case(tp=2, dp=2, replica=2)),
]


def run(world: World, case: Case, folder: Path, start: int, stop: int, sizes: dict[str, Any] = SIZES) -> dict[str, Any]:
    """Steps from `start`, which a checkpoint has unless it is 0, to `stop`, which is saved."""
    with use_world(case.world(world)) as here:
        model = model_of(case, sizes)
        params = model.trainable_params()
        manager = bms.optim.OptimManager(loss_scale=2.0**10)
        manager.add_optimizer(bms.optim.AdamOptimizer(params, lr=3e-3, weight_decay=0.01))
        checkpointer = Checkpointer(folder, model, manager)
        if start:
            resumed = checkpointer.load()
            assert resumed is not None and resumed.step == start and not resumed.result.missing
        losses = []

        def early(step: int) -> None:
            """A gradient that is there before the step's own, and is in the checkpoint."""
            if step == 2:
                manager.backward(model.loss, *batch_of(100, here.mesh.dp_rank, case.dp))

        for step in range(start, stop):
            if step != start or not start:
                manager.zero_grad()
                early(step)
            value = manager.backward(model.loss, *batch_of(step, here.mesh.dp_rank, case.dp))
            losses.append(bms.sum_loss(value).asnumpy().item())
            manager.clip_grad_norm(manager.optimizers[0].param_groups, 1.0)
            manager.step()
        manager.zero_grad()
        early(stop)
        checkpointer.save(stop, wait=True)
        checkpointer.close()
        bms.save(model, folder / "whole.safetensors")
        state = bms.checkpoint.state_dict(model)
        gathered = manager.state_dict(gather_opt=True)["optimizers"][0]["tensors"]
        return {
            "losses": losses,
            "last": parts({p.name: (p.layout, p) for p in params}),
            "state": state,
            "moments": {name: np.array(x) for name, x in gathered.items() if name.startswith("exp_avg")},
        }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], dict[str, Any]]:
    """What one rank does in one go; of a model with experts, or without."""

    @functools.cache
    def right(experts: bool) -> dict[str, Any]:
        with use_world(World(SingleEngine(), Mesh(1, 0))) as one:
            return run(one, Case(), tmp_path_factory.mktemp("alone"), 0, 4, EXPERTS if experts else SIZES)

    return right


@pytest.mark.parametrize(
    ("first", "second", "sizes"),
    [*((*pair, SIZES) for pair in PAIRS), *((*pair, EXPERTS) for pair in MIXTURES)],
    ids=lambda x: "experts" if x is EXPERTS else "" if x is SIZES else str(x),
)
def test_resumed_on_another_layout(
    run_ranks: Run,
    tmp_path: Path,
    uninterrupted: Callable[[bool], dict[str, Any]],
    first: Case,
    second: Case,
    sizes: dict[str, Any],
):
    right = uninterrupted(sizes is EXPERTS)
    before = run_ranks(first.ranks, run, case=first, folder=tmp_path, start=0, stop=2, sizes=sizes)
    after = run_ranks(second.ranks, run, case=second, folder=tmp_path, start=2, stop=4, sizes=sizes)
    losses = before[0]["losses"] + after[0]["losses"]
    np.testing.assert_allclose(losses, right["losses"], rtol=2e-5)
    last, expected = whole([answer["last"] for answer in after]), whole([right["last"]])
    for name, values in last.items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=2e-4 * np.abs(values).max(), err_msg=name)
        np.testing.assert_array_equal(after[0]["state"][name], values)  # what a whole file has
    for answer in after:
        for name, moment in answer["moments"].items():
            np.testing.assert_allclose(moment, right["moments"][name], rtol=0, atol=1e-3 * np.abs(moment).max(), err_msg=name)
    with use_world(World(SingleEngine(), Mesh(1, 0), seed=5)):
        model = model_of(Case(), sizes)
        bms.load(model, tmp_path / "whole.safetensors")
        for p in model.trainable_params():
            np.testing.assert_array_equal(p.asnumpy()[: p.layout.owned_size].reshape(p.full_shape), last[p.name])


@pytest.mark.parametrize("case", [Case(tp=2), Case(tp=2, dp=2), Case(pp=2, dp=2), Case(dp=2, ep=2)], ids=str)
def test_the_same_layout_goes_on_to_the_bit(run_ranks: Run, tmp_path: Path, case: Case):
    sizes = EXPERTS if case.ep > 1 else SIZES
    through = run_ranks(case.ranks, run, case=case, folder=tmp_path / "through", start=0, stop=4, sizes=sizes)
    run_ranks(case.ranks, run, case=case, folder=tmp_path / "stopped", start=0, stop=2, sizes=sizes)
    resumed = run_ranks(case.ranks, run, case=case, folder=tmp_path / "stopped", start=2, stop=4, sizes=sizes)
    for a, b in zip(through, resumed):
        assert a["losses"][2:] == b["losses"]
        for name, (layout, values) in a["last"].items():
            assert b["last"][name][0] == layout
            np.testing.assert_array_equal(b["last"][name][1], values, err_msg=name)


def uneven(world: World, folder: Path) -> str:
    """The first stage alone has a group for its embedding."""
    with use_world(Case(pp=2).world(world)):
        model = model_of(Case(pp=2), {**SIZES, "tied": False})
        params = model.trainable_params()
        groups = [{"params": [p for p in params if ("embed" in p.name) is chosen]} for chosen in (True, False)]
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer([group for group in groups if group["params"]]))
        with pytest.raises(CheckpointError) as caught:
            Checkpointer(folder / "run", model, manager)
    return str(caught.value)


def test_groups_that_not_all_stages_have_are_refused_before_training(run_ranks: Run, tmp_path: Path):
    text = "optimizer 0 has [1, 2] groups on different ranks: make as many on each, empty where a stage has no parameter of one"
    assert run_ranks(2, uneven, folder=tmp_path) == [text] * 2


WITH_COUNTS = {**EXPERTS, "num_layers": 2, "dense_layers": (), "balance": "global_batch"}
ONE_PIECE = Stages(micro_batches=1)  # the balance over what a step has so far depends on its pieces


def accumulating(world: World, case: Case, folder: Path, start: int, stop: int) -> dict[str, Any]:
    """Backward passes from `start` to `stop` of a second step of three, saved behind each; losses, norms, what routers count."""
    with use_world(case.world(world)) as here:
        model = model_of(case, WITH_COUNTS)
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-2))
        checkpointer = Checkpointer(folder, model, manager)
        routers = {cell.weight.name: cell for _, cell in model.cells_and_names() if isinstance(cell, bms.nn.Router)}
        if start:
            checkpointer.load()
        else:
            manager.backward(model.loss, *batch_of(9, here.mesh.dp_rank, case.dp))
            manager.step()
            manager.zero_grad()
        losses = []
        for i in range(start, stop):
            loss = manager.backward(model.loss, *batch_of(i, here.mesh.dp_rank, case.dp))
            losses.append(bms.sum_loss(loss).asnumpy().item())
            checkpointer.save(i + 1)
        checkpointer.close()
        norm = manager.clip_grad_norm(manager.optimizers[0].param_groups, 1.0)
        seen = {name: router.seen().copy() for name, router in routers.items()}
        manager.step()
        return {"losses": losses, "norm": norm, "seen": seen}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Case(), Case()),
        (Case(dp=2), Case(dp=2)),
        (Case(dp=2), Case()),
        (Case(), Case(dp=2, ep=2)),
        (Case(pp=2, stages=ONE_PIECE), Case(pp=2, stages=ONE_PIECE)),
        (Case(tp=2), Case(pp=2, stages=ONE_PIECE)),
        (Case(pp=2, stages=ONE_PIECE), Case(pp=2, stages=Stages([0, 2], micro_batches=1))),
    ],
    ids=str,
)
def test_a_step_under_way_goes_on_with_the_counts_of_routers(run_ranks: Run, tmp_path: Path, first: Case, second: Case):
    right = run_ranks(1, accumulating, case=Case(), folder=tmp_path / "alone", start=0, stop=3)[0]
    before = run_ranks(first.ranks, accumulating, case=first, folder=tmp_path / "run", start=0, stop=2)
    after = run_ranks(second.ranks, accumulating, case=second, folder=tmp_path / "run", start=2, stop=3)
    np.testing.assert_allclose(before[0]["losses"] + after[0]["losses"], right["losses"], rtol=2e-5)
    np.testing.assert_allclose(after[0]["norm"], right["norm"], rtol=1e-4)
    for name, counts in right["seen"].items():
        assert sum(answer["seen"].get(name, 0) for answer in after).tolist() == counts.tolist()
    if first == second:
        through = run_ranks(first.ranks, accumulating, case=first, folder=tmp_path / "through", start=0, stop=3)
        for a, b in zip(after, through):
            assert a["norm"] == b["norm"]
            assert all(np.array_equal(a["seen"][name], b["seen"][name]) for name in b["seen"])
