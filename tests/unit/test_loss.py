"""FusedCrossEntropy, the Cell; its numbers are tested with nn.functional.cross_entropy."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.nn.functional import cross_entropy

pytestmark = pytest.mark.usefixtures("single_world")

LOGITS = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
TARGETS = np.array([5, -100, 0, 2], np.int32)
WEIGHT = np.linspace(0.5, 1.5, 6).astype(np.float32)


def expected(rows: list[int]) -> float:
    wide = LOGITS.astype(np.float64)
    return float(np.mean([np.log(np.exp(wide[i]).sum()) - wide[i, TARGETS[i]] for i in rows]))


def test_is_a_cell_without_parameters():
    loss = bms.loss.FusedCrossEntropy()
    assert isinstance(loss, nn.Cell) and list(loss.get_parameters()) == []
    assert (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing) == (None, -100, "mean", 0.0)


def test_mean_over_the_rows_that_count():
    loss = bms.loss.FusedCrossEntropy()(Tensor(LOGITS), Tensor(TARGETS))
    assert loss.dtype == ms.float32 and loss.shape == ()
    assert float(loss.asnumpy()) == pytest.approx(expected([0, 2, 3]), rel=1e-6)


def test_ignore_index_is_passed_on():
    targets = np.where(TARGETS == -100, 0, TARGETS)
    loss = bms.loss.FusedCrossEntropy(ignore_index=0)(Tensor(LOGITS), Tensor(targets))
    assert float(loss.asnumpy()) == pytest.approx(expected([0, 3]), rel=1e-6)


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16, ms.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"weight": Tensor(WEIGHT)},
        {"reduction": "none"},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"weight": Tensor(WEIGHT), "ignore_index": 2, "reduction": "none", "label_smoothing": 0.5},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_are_those_of_the_function(options: dict[str, Any], dtype: Any):
    """For every dtype alike: BMTrain's ignores label_smoothing for half types."""
    targets = np.where(TARGETS == -100, 2, TARGETS) if "ignore_index" in options else TARGETS
    x = Tensor(LOGITS).astype(dtype)
    cell = bms.loss.FusedCrossEntropy(**options)
    results = [
        ms.value_and_grad(lambda x, f=f: f(x).sum())(x)
        for f in (lambda x: cell(x, Tensor(targets)), lambda x: cross_entropy(x, Tensor(targets), **options))
    ]
    for a, b in zip(*results):
        assert a.dtype == b.dtype and np.array_equal(a.astype(ms.float32).asnumpy(), b.astype(ms.float32).asnumpy())
    plain = bms.loss.FusedCrossEntropy(ignore_index=cell.ignore_index)(x, Tensor(targets))
    assert not np.array_equal(results[0][0].asnumpy(), plain.asnumpy())
    assert cell(x, Tensor(targets)).shape == ((4,) if options.get("reduction") == "none" else ())


def test_differentiable_from_half_logits():
    loss = bms.loss.FusedCrossEntropy()
    value, grad = ms.value_and_grad(lambda x: loss(x, Tensor(TARGETS)))(Tensor(LOGITS.astype(np.float16)))
    assert value.dtype == ms.float32 and grad.dtype == ms.float16
    assert not grad.asnumpy()[1].any() and grad.asnumpy()[0].any()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"reduction": "max"}, "reduction must be one of mean, sum, none, not 'max'"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in [0, 1), not 1.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_refused_at_once(options: dict[str, Any], text: str):
    with pytest.raises(ValueError) as info:
        bms.loss.FusedCrossEntropy(**options)
    assert str(info.value) == text


def test_what_is_refused_when_called():
    with pytest.raises(ValueError, match=r"weight must have shape \(6,\), one for each class, not \(2,\)"):
        bms.loss.FusedCrossEntropy(weight=Tensor(WEIGHT[:2]))(Tensor(LOGITS), Tensor(TARGETS))
