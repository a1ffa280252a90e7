"""The manager's state as a dictionary: shards for as many ranks, whole for any; training goes on (BMTrain's test_optim_state)."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from bmtrain_ms.comm import World
from bmtrain_ms.lr_scheduler import Linear
from bmtrain_ms.optim import AdamOffloadOptimizer, AdamOptimizer
from tests.helpers.native import SHAPES, Managed

pytestmark = pytest.mark.ranks

# as a run has them, and as the one that goes on is made; MindSpore's own keep their settings, but for the rate, to themselves
OWN = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1, "hold_steps": 12}
OTHER = {"lr": 5.0, "betas": (0.1, 0.2), "eps": 1.0, "weight_decay": 0.0, "maximize": True}
MAKERS: dict[str, tuple[Callable, Callable]] = {
    "adam": (lambda p: AdamOptimizer(p, **OWN), lambda p: AdamOptimizer(p, **OTHER)),
    "offload": (lambda p: AdamOffloadOptimizer(p, **OWN), lambda p: AdamOffloadOptimizer(p, **OTHER)),
    "native": (lambda p: nn.AdamWeightDecay(p, 0.1, weight_decay=0.1), lambda p: nn.AdamWeightDecay(p, 5.0, weight_decay=0.1)),
}
CASES = pytest.mark.parametrize(
    "kind, half",
    [("adam", False), ("adam", True), ("offload", False), ("offload", True), ("native", False)],
    ids=["adam-fp32", "adam-fp16", "offload-fp32", "offload-fp16", "native"],
)


def start(kind: str, half: bool) -> Managed:
    dtype = ms.float16 if half else ms.float32
    return Managed(MAKERS[kind][0], lambda o: Linear(o, 0.1, 2, 30), dtype, loss_scale=64.0, loss_scale_steps=7)


def go_on(world: World, kind: str, half: bool, values: dict[str, np.ndarray], state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Steps 10 to 20 from a state, in new objects of other settings."""
    dtype = ms.float16 if half else ms.float32
    managed = Managed(MAKERS[kind][1], lambda o: Linear(o, 9.0, 0, 3), dtype, loss_scale=2.0, loss_scale_steps=7)
    for name, p in zip(SHAPES, managed.params):
        p.copy_full(values[name])
    managed.manager.load_state_dict(state)
    managed.run(range(10, 20))
    return managed.values(world)


def states(world: World, managed: Managed, steps: int) -> dict[str, Any]:
    """Parameters, and both kinds of state, after some steps."""
    managed.run(range(steps))
    whole, shards = managed.manager.state_dict(gather_opt=True), managed.manager.state_dict()
    return {"values": managed.values(world), "whole": whole, "shards": shards}


def run(world: World, kind: str, half: bool) -> dict[str, Any]:
    """20 steps; what was there after 10, and what becomes of it in new objects."""
    managed = start(kind, half)
    saved = states(world, managed, 10)
    managed.run(range(10, 20))
    again = [go_on(world, kind, half, saved["values"], saved[state]) for state in ("whole", "shards")]
    return {**saved, "final": managed.values(world), "again": again}


def few(world: World, kind: str, half: bool) -> dict[str, Any]:
    return states(world, start(kind, half), 2)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(x.tobytes() == b[name].tobytes() for name, x in a.items())


@CASES
def test_going_on_from_a_state(run_ranks, single_world, kind, half):
    """At 2 ranks bit-equal to not stopping, at 1 and 3 within the rounding of the reduction."""
    answers = run_ranks(2, run, kind=kind, half=half)
    first = answers[0]
    for answer in answers:
        assert same(answer["final"], first["final"]) and all(same(again, answer["final"]) for again in answer["again"])
        saved, mine = answer["whole"]["optimizers"][0]["tensors"], first["whole"]["optimizers"][0]["tensors"]
        assert same(saved, mine)
    assert not any(np.array_equal(first["values"][name], first["final"][name]) for name in SHAPES)
    others = run_ranks(3, go_on, kind=kind, half=half, values=first["values"], state=first["whole"])
    others.append(go_on(single_world, kind, half, first["values"], first["whole"]))
    for other in others:
        for name, value in first["final"].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-3 if half else 1e-5, atol=1e-6, err_msg=name)


def test_a_whole_state_is_whole(run_ranks):
    """Shapes are those of the parameters; each rank's shards are its own."""
    answers = run_ranks(3, few, kind="adam", half=True)
    for rank, answer in enumerate(answers):
        whole, shards = answer["whole"]["optimizers"][0], answer["shards"]["optimizers"][0]
        assert (whole["is_whole"], shards["is_whole"]) == (True, False)
        for name, array in whole["tensors"].items():
            shape = SHAPES[name.partition(".")[2]]
            length = -(-array.size // 3)
            assert array.shape == shape and shards["tensors"][name].shape == (length,)
            mine = array.reshape(-1)[rank * length : (rank + 1) * length]
            assert np.array_equal(shards["tensors"][name], np.pad(mine, (0, length - mine.size)))
        assert whole["steps"] == [2] * 3 and whole["tensors"]["exp_avg_sq.prime"].any()


def refusal(world: World, kind: str, state: dict[str, Any]) -> str:
    managed = start(kind, False)
    before = managed.driver.state_dict()["tensors"]
    with pytest.raises(ValueError) as info:
        managed.manager.load_state_dict(state)
    assert same(managed.driver.state_dict()["tensors"], before) and managed.manager.steps_since_last_scale == 0
    return str(info.value)


@pytest.mark.parametrize("kind, tensor", [("adam", "exp_avg.one"), ("offload", "exp_avg.one"), ("native", "adam_m.one")])
def test_shards_are_for_their_rank_of_as_many(run_ranks, single_world, kind, tensor):
    states = [answer["shards"] for answer in run_ranks(2, few, kind=kind, half=False)]
    advice = "save with state_dict(gather=True), or with a checkpoint.Checkpointer, to load at another number of ranks"
    texts = [refusal(single_world, kind, states[0]), *run_ranks(3, refusal, kind=kind, state=states[0])]
    for text, here in zip(texts, ["rank 0 of 1", "rank 0 of 3", "rank 1 of 3", "rank 2 of 3"]):
        assert text == f"{tensor} was saved by rank 0 of 2 (full shape (1,)), this is {here} (full shape (1,)); {advice}"
