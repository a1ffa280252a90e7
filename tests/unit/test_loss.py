"""FusedCrossEntropy, the Cell; its numbers are tested with nn.functional.cross_entropy."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms

pytestmark = pytest.mark.usefixtures("single_world")

LOGITS = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
TARGETS = np.array([5, -100, 0, 2], np.int32)


def expected(rows: list[int]) -> float:
    wide = LOGITS.astype(np.float64)
    return float(np.mean([np.log(np.exp(wide[i]).sum()) - wide[i, TARGETS[i]] for i in rows]))


def test_is_a_cell_without_parameters():
    loss = bms.loss.FusedCrossEntropy()
    assert isinstance(loss, nn.Cell) and list(loss.get_parameters()) == []
    assert loss.ignore_index == -100


def test_mean_over_the_rows_that_count():
    loss = bms.loss.FusedCrossEntropy()(Tensor(LOGITS), Tensor(TARGETS))
    assert loss.dtype == ms.float32 and loss.shape == ()
    assert float(loss.asnumpy()) == pytest.approx(expected([0, 2, 3]), rel=1e-6)


def test_ignore_index_is_passed_on():
    targets = np.where(TARGETS == -100, 0, TARGETS)
    loss = bms.loss.FusedCrossEntropy(ignore_index=0)(Tensor(LOGITS), Tensor(targets))
    assert float(loss.asnumpy()) == pytest.approx(expected([0, 3]), rel=1e-6)


def test_differentiable_from_half_logits():
    loss = bms.loss.FusedCrossEntropy()
    value, grad = ms.value_and_grad(lambda x: loss(x, Tensor(TARGETS)))(Tensor(LOGITS.astype(np.float16)))
    assert value.dtype == ms.float32 and grad.dtype == ms.float16
    assert not grad.asnumpy()[1].any() and grad.asnumpy()[0].any()
