"""AdamOffloadOptimizer at several ranks: shards, the budget of a host, deltas over all ranks."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import World
from bmtrain_ms.compat.device import on_host
from bmtrain_ms.optim import AdamOffloadOptimizer, AdamOptimizer
from tests.helpers.models import full
from tests.helpers.optim import DTYPES, SHAPES, AdamW, gradients, numbers, parameters

pytestmark = pytest.mark.ranks


def shards(params: list[bms.DistributedParameter], step: int) -> list[Tensor]:
    """This rank's part of gradients that all ranks know, padded with zeros."""
    made = []
    for p, grad in zip(params, gradients(step)):
        start, stop = p.owned
        made.append(Tensor(np.pad(grad.asnumpy()[start:stop], (0, p.shard_length - (stop - start)))))
    return made


def train(world: World, dtype: str, offload: bool) -> dict[str, Any]:
    """Three steps; `full` checks that padding stays zero."""
    params = parameters(DTYPES[dtype])
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2}
    with contextlib.redirect_stderr(io.StringIO()) as written:
        optimizer = AdamOffloadOptimizer(params, record_delta=True, **settings) if offload else AdamOptimizer(params, **settings)
    deltas = []
    for step in range(1, 4):
        optimizer(shards(params, step))
        if isinstance(optimizer, AdamOffloadOptimizer):
            deltas.append((optimizer.get_avg_delta(), optimizer.get_var_delta()))
    moments = {f"{kind} {p.name}": full(world, p, t) for p in params for kind, t in optimizer.state_of(p).items()}
    return {"values": {p.name: full(world, p) for p in params} | moments, "deltas": deltas, "written": written.getvalue()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bits_of_adam(run_ranks, single_world, ranks, dtype):
    """Of one rank, too. On a device MindSpore's operation is the optimizer, which rounds in another order than ours on the host."""
    for offload in (False, True):
        expected = train(single_world, dtype, offload=offload and not on_host())["values"]
        for answer in run_ranks(ranks, train, dtype=dtype, offload=offload):
            assert answer["values"].keys() == expected.keys()
            for name, value in expected.items():
                assert answer["values"][name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_deltas_are_those_of_all_ranks(run_ranks, ranks):
    """Each element once, without padding."""
    references = [AdamW(numbers(*shape, seed=i), 0.1, weight_decay=0.2) for i, shape in enumerate(SHAPES.values())]
    expected = []
    for step in range(1, 4):
        for reference, grad in zip(references, gradients(step)):
            reference.step(grad.asnumpy())
        deltas = np.concatenate([reference.delta for reference in references])
        expected.append((deltas.mean(), deltas.var()))
    for answer in run_ranks(ranks, train, dtype="fp32", offload=True):
        assert np.array(answer["deltas"]) == pytest.approx(np.array(expected), rel=1e-4, abs=1e-6)


def delta_of_little(world: World) -> tuple[float, float]:
    """One element: the last rank owns none."""
    p = bms.DistributedParameter(np.ones(1, np.float32), name="p")
    optimizer = AdamOffloadOptimizer([p], record_delta=True)
    with pytest.raises(RuntimeError, match="no step has been made yet"):
        optimizer.get_avg_delta()
    optimizer([Tensor(np.full(1, 1.0 if world.engine.rank == 0 else 0.0, np.float32))])
    return optimizer.get_avg_delta(), optimizer.get_var_delta()


def test_a_rank_that_owns_nothing(run_ranks):
    for mean, variance in run_ranks(2, delta_of_little, timeout=30):
        assert (mean, variance) == pytest.approx((1.0, 0.0), abs=1e-6)


def test_rank_0_says_the_budget_for_the_host(run_ranks):
    answers = run_ranks(3, train, dtype="bf16", offload=True)
    elements = sum(-(-int(np.prod(shape)) // 3) for shape in SHAPES.values())
    assert (
        f" GiB of host memory for each of 3 ranks of this host (12.0 bytes for each of {elements} elements)"
        in answers[0]["written"]
    )
    assert answers[0]["written"].count("\n") == 1
    assert [a["written"] for a in answers[1:]] == ["", ""]
