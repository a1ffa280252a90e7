"""Rows that go to experts and come back, on the host and as on a device, against the formula in float64 NumPy."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from bmtrain_ms import ops
from tests.unit.test_ops import BOTH, check, numbers

pytestmark = pytest.mark.usefixtures("implementation")  # every test twice: on the host, and as on a device


@pytest.mark.parametrize("index", [[2, 0, 2, -1, 1], [-1], [0, 1, 2]], ids=str)
@BOTH
def test_pick_rows(index, dtype):
    index = np.array(index, np.int32)
    found = [np.flatnonzero(index == i) for i in range(3)]
    places = np.array([[*places, -1, -1][:2] for places in found], np.int32)
    check(
        lambda x: ops.pick_rows(x, index, places), lambda x: np.where(index[:, None] < 0, 0, x[index]), numbers(3, 4, dtype=dtype)
    )


@BOTH
def test_combine_rows(dtype):
    places, slots = np.array([[3, 0], [-1, 1], [-1, -1]]), np.array([1, 3, -1, 0])
    weights = numbers(3, 2, seed=1)

    def right(y: np.ndarray) -> np.ndarray:
        picked = np.where(places[..., None] < 0, 0, y[places])
        return (picked * weights[..., None]).sum(1)

    check(lambda y: ops.combine_rows(y, Tensor(weights), places, slots), right, numbers(4, 5, dtype=dtype))


def test_weights_have_gradients_where_an_expert_was_asked():
    places, slots, y = np.array([[3, 0], [-1, 1]]), np.array([1, 3, -1, 0]), numbers(4, 5)
    grad = ms.grad(lambda w: ops.combine_rows(Tensor(y), w, places, slots).sum())(Tensor(numbers(2, 2)))
    np.testing.assert_allclose(grad.asnumpy(), [[y[3].sum(), y[0].sum()], [0, y[1].sum()]], rtol=1e-5)


def test_what_is_not_finite_does_not_reach_rows_of_zeros():
    x = Tensor(np.full((2, 3), np.nan, np.float32))
    assert ops.pick_rows(x, np.array([-1]), np.array([[-1], [-1]])).asnumpy().tolist() == [[0, 0, 0]]
    out = ops.combine_rows(x, Tensor(np.ones((1, 1), np.float32)), np.array([[-1]]), np.array([-1, -1]))
    assert out.asnumpy().tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [5, 0, 0], [1, 1, 1]], ids=str)
@BOTH
def test_grouped_linear(counts, dtype):
    """Rows behind the last group are there in two cases; groups without rows have gradients of zero, which `check` compares."""

    def right(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        group = np.repeat(np.arange(3), counts)
        out = np.zeros((len(x), w.shape[1]))
        out[: len(group)] = np.einsum("ri,roi->ro", x[: len(group)], w[group])
        return out

    inputs = numbers(5, 4, dtype=dtype), numbers(3, 2, 4, seed=1, dtype=dtype)
    check(lambda x, w: ops.grouped_linear(x, w, np.array(counts)), right, *inputs)


def test_equal_scores_give_the_lowest_number():
    scores = np.array([[1, 2, 2, 2, 0], [0, 0, 0, 0, 0], [3, 1, 3, 1, 3]], np.float32)
    assert ops.choose_experts(Tensor(scores), 3).asnumpy().tolist() == [[1, 2, 3], [0, 1, 2], [0, 2, 4]]


def test_trap_11_group_score_max_vs_sum():
    """Groups (.30, .01) (.01, .20) (.19, .02) (.15, .12): by the largest 0 and 1 are kept, by the sum of two 0 and 3."""
    scores = Tensor(np.array([[0.30, 0.01, 0.01, 0.20, 0.19, 0.02, 0.15, 0.12]], np.float32))
    assert ops.choose_experts(scores, 2, 4, 2, best=1).asnumpy().tolist() == [[0, 3]]
    assert ops.choose_experts(scores, 2, 4, 2, best=2).asnumpy().tolist() == [[0, 6]]
    assert ops.choose_experts(scores, 4, 4, 2, best=2).asnumpy().tolist() == [[0, 6, 7, 1]]


def test_experts_of_other_groups_are_not_chosen_though_all_scores_are_negative():
    scores = Tensor(np.array([[-3.0, -2.0, -0.5, -9.0]], np.float32))
    assert ops.choose_experts(scores, 2, 2, 1, best=1).asnumpy().tolist() == [[2, 3]]
