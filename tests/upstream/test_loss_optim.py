"""BMTrain's test_loss_func and test_optim, against float64."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.compat.runtime import from_host
from tests.helpers.optim import DTYPES, SHAPES, AdamW, floats, numbers, parameters, states, values

pytestmark = pytest.mark.usefixtures("single_world")

SCALE = 32768.0

# test_loss_func #


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, classes", [(16384, 40), (256, 30000)])
def test_loss_func(dtype: str, rows: int, classes: int):
    """Upstream's sizes in each direction, class weights, masked rows: the loss to 1e-5, the gradient to its type's rounding."""
    random = np.random.default_rng(classes)
    logits = Tensor(random.standard_normal((rows, classes), np.float32)).astype(DTYPES[dtype])
    targets = random.integers(0, classes, rows).astype(np.int32)
    targets[random.random(rows) < 0.2] = -100
    weight = random.uniform(0.5, 2.0, classes).astype(np.float32)
    loss_func = bms.loss.FusedCrossEntropy(from_host(weight))
    loss, grad = ms.value_and_grad(lambda x: loss_func(x, Tensor(targets)) * SCALE)(logits)

    wide, counts = floats(logits).astype(np.float64), targets >= 0
    wide -= wide.max(1, keepdims=True)
    probabilities = np.exp(wide)
    sums = probabilities.sum(1)
    probabilities /= sums[:, None]
    places = np.arange(rows), np.maximum(targets, 0)
    share = np.where(counts, weight[places[1]], 0.0)
    share /= share.sum()
    assert float(loss.asnumpy()) / SCALE == pytest.approx(float((share * (np.log(sums) - wide[places])).sum()), abs=1e-5)
    probabilities[places] -= 1.0
    expected = probabilities * share[:, None] * SCALE
    assert grad.dtype == DTYPES[dtype]
    rounding = {"fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    np.testing.assert_allclose(floats(grad), expected, rtol=2 * rounding, atol=2.0**-24)  # the least float16


# test_optim #


@pytest.mark.parametrize("dtype", DTYPES)
def test_optim(dtype: str):
    """100 steps of random gradients at lr=1 under a manager of scale 4: offloaded to the same bits, and as AdamW in float64."""
    kind = DTYPES[dtype]
    managers, optimizers = [], []
    for make in (bms.optim.AdamOptimizer, bms.optim.AdamOffloadOptimizer):
        optimizer: Any = make(parameters(kind), lr=1.0, weight_decay=1e-2)
        manager = bms.optim.OptimManager(loss_scale=4.0)
        manager.add_optimizer(optimizer)
        managers.append(manager)
        optimizers.append(optimizer)
    twins = [AdamW(floats(p), lr=1.0, weight_decay=1e-2) for p in parameters(kind)]
    for step in range(100):
        grads = [numbers(*shape, seed=1000 * step + i).reshape(-1) for i, shape in enumerate(SHAPES.values())]
        for manager, optimizer in zip(managers, optimizers):
            manager.restore_gradients({p.name: from_host(4.0 * g) for p, g in zip(optimizer.parameters, grads)})
            manager.grads_scale = 4.0
            assert manager.step().updated
        for twin, g in zip(twins, grads):
            twin.step(g)
    ours, offloaded = (values(o.parameters) + states(o) for o in optimizers)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, offloaded)) and len(ours) == len(offloaded)
    for p, twin in zip(optimizers[0].parameters, twins):
        exact = optimizers[0].state_of(p)["master"].asnumpy() if "master" in optimizers[0].state_of(p) else p.asnumpy()
        np.testing.assert_allclose(exact.reshape(-1), twin.p, rtol=1e-4, atol=2e-4)  # after steps of up to 1
        np.testing.assert_array_equal(floats(p), floats(from_host(exact).astype(kind)))
