"""What stands in the padding of a shard is nobody's business, and never reaches a gradient or a norm."""

from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world


def penalised(world: World, count: int, use_checkpoint: bool) -> list[float]:
    """Norm, loss and gradient of a penalty that is not differentiable at zero, on a shard of seven elements."""
    with use_world(World(world.everyone, world.mesh)):
        values = np.linspace(0.5, 1.5, count).astype(np.float32)

        class Layer(bms.DistributedModule):
            def __init__(self) -> None:
                super().__init__()
                self.weight = bms.DistributedParameter(values, name="weight")

            def construct(self, x: Tensor) -> Tensor:
                return (x * self.weight).sum()

        block = bms.Block(Layer(), use_checkpoint)
        (p,) = params = block.trainable_params()
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(params))
        x = Tensor(np.ones(count, np.float32))
        manager.backward(lambda: block(x) + ops.sqrt(ops.abs(p)).sum() + (p * ops.log(p * p)).sum())
        norm = manager.clip_grad_norm(params, 100.0)
        grad = manager.grad(p).asnumpy()
        assert not grad[p.layout.owned_size :].any()
        found = world.everyone.all_gather([Tensor(grad)]).wait()[0].asnumpy()[:count]
        right = 1.0 + 0.5 / np.sqrt(values) + np.log(values * values) + 2.0
        np.testing.assert_allclose(found, right, rtol=1e-5)
        np.testing.assert_allclose(norm, np.linalg.norm(right), rtol=1e-5)
        loss, _ = ms.value_and_grad(lambda: block(x), None, params)()
        return [norm, loss.asnumpy().item()]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("size", [1, 7])
def test_a_penalty_that_is_not_finite_at_zero(run_ranks: Callable, ranks: int, size: int):
    for use_checkpoint in (True, False):
        found = run_ranks(ranks, penalised, count=size, use_checkpoint=use_checkpoint)
        assert all(numbers == found[0] and np.isfinite(numbers).all() for numbers in found)


def written(world: World, how: str) -> list[float]:
    """The sum of squares of all shards and the mean that is subtracted, where somebody has written into the padding, too."""
    with use_world(World(world.everyone, world.mesh)):
        p = bms.DistributedParameter(np.full(7, 0.01, np.float32), name="weight")
        optimizer = bms.optim.AdamOffloadOptimizer([p], lr=0.1, weight_decay=0.5, record_delta=True)
        new = ops.clip_by_value(p * 1.0, Tensor(0.5, ms.float32), Tensor(2.0, ms.float32))
        if how == "set_data":
            p.set_data(new)
            assert not p.asnumpy()[p.layout.owned_size :].any()
        else:
            ops.assign(p, new)
        optimizer([Tensor(np.zeros(p.shard_length, np.float32))])
        squares = world.everyone.all_reduce([(p**2).sum().reshape(1)], "sum").wait()[0].asnumpy().item()
        return [squares, optimizer.get_avg_delta()]


@pytest.mark.parametrize("how", ["set_data", "assign"])
def test_what_is_written_into_the_padding_is_no_value(run_ranks: Callable, how: str):
    (right,) = run_ranks(1, written, how=how)
    for ranks in (2, 3):
        for found in run_ranks(ranks, written, how=how):
            np.testing.assert_allclose(found, right, rtol=1e-6)
