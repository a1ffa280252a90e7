"""Fewer bits on the way, and sharding inside a node with replicas across: parity, bits and bytes."""

from __future__ import annotations

from itertools import product
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import load, save
from bmtrain_ms.comm import use_world
from bmtrain_ms.compat.runtime import host_array
from bmtrain_ms.zero.wire import wire_for
from tests.helpers.models import Model, full, recorded, train_sharded, train_twin

pytestmark = pytest.mark.ranks

SETTINGS = list(product((2, 3), (True, False), (False, True)))  # ZeRO level, checkpoint, half


# Hierarchical sharding #


def train_in_nodes(world: Any, shard_size: int) -> dict:
    return {setting: train_sharded(world, 5, *setting, shard_size=shard_size) for setting in SETTINGS}


@pytest.mark.parametrize("ranks, shard_size", [(4, 2), (4, 1), (2, 1)])
def test_parity_with_the_unsharded_twin(run_ranks: Callable, single_world: Any, ranks: int, shard_size: int):
    results = run_ranks(ranks, train_in_nodes, shard_size=shard_size)
    for setting in SETTINGS:
        half = setting[2]
        got = [result[setting] for result in results]
        twin = train_twin(got[0]["initial"], 5, half)
        loss_rtol, grad_atol, final_atol = (2e-3, 2e-3, 2e-2) if half else (1e-6, 1e-6, 2e-5)
        for mine in got:
            assert mine["losses"] == got[0]["losses"], setting
            np.testing.assert_allclose(mine["losses"], twin["losses"], rtol=loss_rtol, err_msg=str(setting))
            for name, expected in twin["grads"].items():
                np.testing.assert_allclose(mine["grads"][name], expected, atol=grad_atol, err_msg=f"{name} {setting}")
            for name, expected in twin["final"].items():
                np.testing.assert_allclose(mine["final"][name], expected, atol=final_atol, err_msg=f"{name} {setting}")
                np.testing.assert_array_equal(mine["final"][name], got[0]["final"][name], err_msg=f"{name} {setting}")


def start(world: Any, shard_size: int | None) -> dict:
    with use_world(recorded(world, shard_size=shard_size)) as here:
        model = Model(3, True, 3, ms.float32)
        bms.init_parameters(model)
        return {p.name: full(here, p) for p in model.get_parameters()}


def test_initialisation_does_not_depend_on_it(run_ranks: Callable):
    expected = run_ranks(4, start, shard_size=None)[0]
    for result in run_ranks(4, start, shard_size=2):
        for name, value in expected.items():
            np.testing.assert_array_equal(result[name], value)


def step_calls(world: Any, shard_size: int) -> list[tuple[str, str]]:
    made = train_sharded(world, 2, 3, True, False, prefetch=0, shard_size=shard_size)
    return made["calls"]


def test_collectives_in_order(run_ranks: Callable):
    """Across nodes the mean of block i travels while block i-1 is differentiated."""
    calls = run_ranks(4, step_calls, shard_size=2)[0]
    step = calls[len(calls) // 2 :]
    assert [call for call in step if call[0] != "all_gather"] == [
        ("reduce_scatter", "head.gain"),
        ("all_reduce", "head.gain"),
        ("reduce_scatter", "head.bias"),
        ("all_reduce", "head.bias"),
        ("reduce_scatter", "head.weight"),
        ("all_reduce", "head.weight"),
        ("reduce_scatter", "layers.2"),
        ("all_reduce", "layers.2"),
        ("reduce_scatter", "layers.1"),
        ("all_reduce", "layers.1"),
        ("reduce_scatter", "layers.0"),
        ("all_reduce", "layers.0"),
    ]
    assert step.index(("all_reduce", "layers.2")) > step.index(("all_gather", "layers.1")), "started when the next block has begun"


def through_a_file(world: Any, path: str) -> None:
    with use_world(recorded(world, shard_size=2)) as here:
        model = Model(3, True, 3, ms.float32)
        bms.init_parameters(model)
        before = {p.name: full(here, p) for p in model.get_parameters()}
        save(model, path)
    for shard_size in (2, None, 1):
        with use_world(recorded(world, shard_size=shard_size)) as here:
            model = Model(3, True, 3, ms.float32)
            load(model, path)
            for p in model.get_parameters():
                np.testing.assert_array_equal(full(here, p), before[p.name])


def test_checkpoints(run_ranks: Callable, tmp_path: Any):
    run_ranks(4, through_a_file, path=str(tmp_path / "model.safetensors"))


def refused(world: Any) -> str:
    with pytest.raises(ValueError) as caught:
        recorded(world, shard_size=3)
    return str(caught.value)


def test_a_size_that_does_not_divide_the_world(run_ranks: Callable):
    text = "shard_size=3 does not divide the 4 ranks; give the number of ranks of a node, or None to shard over all"
    assert run_ranks(4, refused) == [text] * 4


# Fewer bits #


def gathered(world: Any, gather_dtype: str) -> tuple[dict, dict]:
    """Full tensors as layers see them, and as they are stored."""
    with use_world(recorded(world, gather_dtype=gather_dtype)) as here:
        model = Model(3, True, 3, ms.float32)
        bms.init_parameters(model)
        seen = {p.name: host_array(p.gather()).copy() for p in model.get_parameters()}
        return seen, {p.name: full(here, p) for p in model.get_parameters()}


@pytest.mark.parametrize("gather_dtype", ["bfloat16", "float16", "int8"])
def test_every_rank_computes_with_the_same_values(run_ranks: Callable, gather_dtype: str):
    results = run_ranks(3, gathered, gather_dtype=gather_dtype)
    _, stored = results[0]
    wire = wire_for(gather_dtype, ms.float32)
    for name, value in stored.items():
        n = -(-value.size // 3)
        rows = np.zeros((3, n), np.float32)
        rows.reshape(-1)[: value.size] = value.reshape(-1)
        expected = np.empty_like(rows)
        for row, out in zip(rows, expected):
            parts = [np.empty(count, dtype) for count, dtype in wire.sizes(n)]
            wire.encode(row, parts)
            wire.decode([x[None] for x in parts], out[None])
        for other, _ in results:
            np.testing.assert_array_equal(other[name].reshape(-1), expected.reshape(-1)[: value.size], err_msg=name)


def train_with(world: Any, gather_dtype: str | None) -> list[dict]:
    return [train_sharded(world, 5, level, checkpoint, False, gather_dtype=gather_dtype) for level, checkpoint, _ in SETTINGS[::2]]


@pytest.mark.parametrize("gather_dtype, tolerance", [("bfloat16", 1e-2), ("float16", 1e-3), ("int8", 3e-2)])
def test_training_stays_close(run_ranks: Callable, gather_dtype: str, tolerance: float):
    exact = run_ranks(2, train_with, gather_dtype=None)[0][0]
    results = run_ranks(2, train_with, gather_dtype=gather_dtype)
    for rank in results:
        for made in rank:
            assert made["losses"] == results[0][0]["losses"], "level and checkpointing change nothing"
            np.testing.assert_allclose(made["losses"], exact["losses"], rtol=tolerance)
            assert made["losses"] != exact["losses"]
