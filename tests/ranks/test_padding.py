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
