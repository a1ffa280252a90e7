"""The trace of a training step: every collective and every block's computation, on every rank, in a file that viewers take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import FabricEngine, Trace, TracingEngine, World, use_world, write_trace
from tests.helpers.models import WIDTH, Residual

pytestmark = pytest.mark.ranks


def traced(world: Any, path: str, use_checkpoint: bool) -> None:
    trace = Trace()
    engine = TracingEngine(FabricEngine(world.engine, 0.002, 1e9), trace)
    with use_world(World(engine, world.mesh, prefetch=0, trace=trace)) as here:
        model = bms.TransformerBlockList(bms.Block(Residual(), use_checkpoint) for _ in range(2))
        bms.init_parameters(model)
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
        x = Tensor(np.ones((2, WIDTH), np.float32))
        manager.backward(lambda: model(x).sum())
        manager.step()
        assert trace.dropped == 0
        write_trace(path, trace, here.engine)


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_a_step_of_two_ranks(run_ranks: Callable, tmp_path: Path, use_checkpoint: bool):
    path = tmp_path / "trace.json"
    run_ranks(2, traced, path=str(path), use_checkpoint=use_checkpoint)
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names[0, None] == "rank 0" and names[1, None] == "rank 1"
    for rank in range(2):
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        by_name: dict[str, list[dict]] = {}
        for e in sorted(spans, key=lambda e: e["ts"]):
            assert e["ts"] >= 0 and e["dur"] >= 0
            by_name.setdefault(e["name"], []).append(e)
        assert {name: len(found) for name, found in by_name.items()} == {
            "all_gather (0)": 2,
            "all_gather (1)": 2,
            "reduce_scatter (0)": 1,
            "reduce_scatter (1)": 1,
            "forward 0": 1,
            "forward 1": 1,
            "backward 0": 1,
            "backward 1": 1,
            "optimizer step": 1,
        }
        assert names[rank, by_name["all_gather (0)"][0]["tid"]] == "gather"
        assert names[rank, by_name["reduce_scatter (0)"][0]["tid"]] == "reduce"
        assert names[rank, by_name["forward 0"][0]["tid"]] == "compute"
        first = by_name["all_gather (0)"][0]
        numel = -(-WIDTH * 5 // 2) * 2 + 5 // 2 + 1 + 7 // 2 + 1 + 2  # one rank's shards of (5, 7), (7, 5), (5,), (7,), (1,), (1,)
        assert first["args"] == {"step": 0, "received": 4 * numel}
        assert first["dur"] >= 2000, "the latency of the fabric"
        order = ["all_gather (0)", "forward 0", "all_gather (1)", "forward 1", "backward 1", "reduce_scatter (1)", "optimizer step"]
        ends = [by_name[name][0]["ts"] + by_name[name][0]["dur"] for name in order]
        assert ends == sorted(ends)


def test_spans_beyond_the_limit_are_counted(single_world: Any):
    trace = Trace(limit=2)
    for i in range(5):
        with trace.measure(str(i), 0):
            ms.Tensor(0)
    assert ([s.name for s in trace.spans], trace.dropped) == (["0", "1"], 3)


def test_the_option(tmp_path: Path):
    world = bms.init_distributed(trace=True)
    try:
        bms.synchronize()
        assert world.trace is not None and [s.name for s in world.trace.spans] == ["barrier (synchronize)"]
        with world.measure("work"):
            bms.synchronize()
        write_trace(tmp_path / "t.json", world.trace, world.engine)
    finally:
        bms.shutdown()
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e["ph"] == "X"] == ["barrier (synchronize)", "barrier (synchronize)", "work"]
