"""Pipelines whose ranks are all in this process: gradients are those of the whole, and nothing stays."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms_base.schedule import Schedule, gpipe, interleaved_rows, one_f_one_b
from tests.helpers.passes import WIDTH, Layer
from tests.helpers.pipelines import Pipeline, at_once, batches_of

pytestmark = pytest.mark.usefixtures("single_world")


def table_of(p: int, v: int, m: int) -> Schedule:
    """Also for fewer micro-batches than ranks; where they do not make whole groups, they are one."""
    return Schedule("interleaved", p, v, m, interleaved_rows(p, v, m, p if m < p or m % p == 0 else m))


def check(table: Schedule, layers: int, recomputed: int) -> None:
    """`recomputed`: a bit for each layer."""
    pipeline, batches = Pipeline(table, layers, lambda i: bool(recomputed >> i & 1)), batches_of(table.m)
    losses, grads = pipeline.run(batches)
    right_losses, right = at_once(layers, batches)
    np.testing.assert_allclose(losses, right_losses, rtol=1e-5)
    assert sorted(grads) == sorted(right)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, right[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert pipeline.gathered == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 3), st.integers(0, 1 << 16))
def test_any_schedule_gives_the_gradients_of_the_whole(p: int, v: int, m: int, more: int, recomputed: int):
    """Fewer micro-batches than ranks, and no multiple of them; recomputed layers among others."""
    check(table_of(p, v, m), p * v + more, recomputed)


@pytest.mark.parametrize("table", [gpipe(3, 4), one_f_one_b(3, 4), one_f_one_b(4, 2), table_of(2, 2, 4)], ids=str)
@pytest.mark.parametrize("recomputed", [0, -1])
def test_known_schedules(table: Schedule, recomputed: int):
    check(table, 5, recomputed)


class Dropped(Layer):
    """Half of what comes out is dropped."""

    def __init__(self, i: int):
        super().__init__(i)
        self.dropout = bms.nn.Dropout(0.5)

    def construct(self, x: Tensor) -> Tensor:
        return self.dropout(super().construct(x))


def test_what_is_dropped_depends_neither_on_the_stages_nor_on_recomputation():
    found = []
    for table, recompute in (
        (table_of(1, 1, 3), False),
        (table_of(3, 1, 3), False),
        (table_of(3, 1, 3), True),
        (gpipe(2, 3), True),
    ):
        pipeline = Pipeline(table, 4, lambda _, recompute=recompute: recompute, Dropped, seed=7)
        found.append(pipeline.run(batches_of(3)))
        again, _ = pipeline.run(batches_of(3))
        assert again != found[-1][0]  # the next backward pass of a step draws other numbers
    for losses, grads in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-5)
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, found[0][1][name], rtol=1e-4, atol=1e-6)


class Random(Layer):
    def construct(self, x: Tensor) -> Tensor:
        return super().construct(x) * float(ops.rand(1).asnumpy()[0])


def test_a_layer_that_does_something_else_when_it_is_computed_again_is_refused():
    pipeline = Pipeline(one_f_one_b(2, 2), 2, lambda _: True, Random)
    with pytest.raises(RuntimeError, match=r"computing layer 1 again gave other values.*Spread\(recompute=False\)"):
        pipeline.run(batches_of(2))
    assert pipeline.gathered == 0


def test_a_dropout_of_mindspore_is_refused_where_layers_are_recomputed():
    class Other(Layer):
        def __init__(self, i: int):
            super().__init__(i)
            self.dropout = ms.nn.Dropout(p=0.5)

    pipeline = Pipeline(one_f_one_b(1, 2), 2, lambda i: i == 1, Other)
    with pytest.raises(ValueError, match=r"mindspore\.nn\.Dropout in a checkpointed Block"):
        pipeline.stages[0].train(pipeline.table, batches_of(2), pipeline.params[0], Tensor(np.ones(1, np.float32)))


@pytest.mark.parametrize("recompute", [False, True])
def test_an_error_lets_go_of_everything_and_the_next_step_is_right(recompute: bool):
    class Failing(Layer):
        calls = 0

        def construct(self, x: Tensor) -> Tensor:
            Failing.calls += 1
            if Failing.calls == 7:
                raise ArithmeticError("on purpose")
            return super().construct(x)

    pipeline = Pipeline(table_of(2, 2, 4), 4, lambda _: recompute, Failing)
    with pytest.raises(ArithmeticError, match="on purpose"):
        pipeline.run(batches_of(4))
    assert pipeline.gathered == 0
    for world in pipeline.worlds:  # what was on its way
        world.everyone._queues.clear()  # type: ignore[attr-defined]
    _, grads = pipeline.run(batches_of(4))
    _, right = at_once(4, batches_of(4))
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, right[name], rtol=1e-4, atol=1e-5)


def test_parameters_that_are_not_asked_for_get_no_gradient():
    pipeline = Pipeline(one_f_one_b(1, 2), 3, lambda _: False)
    one = Tensor(np.ones(1, np.float32))
    asked = [pipeline.params[0][2]]
    _, (grad,) = pipeline.stages[0].train(pipeline.table, batches_of(2), asked, one)
    np.testing.assert_allclose(grad.asnumpy(), at_once(3, batches_of(2))[1]["2.weight"], rtol=1e-4, atol=1e-6)
    elsewhere = bms.DistributedParameter(np.ones((WIDTH,), np.float32), name="elsewhere")
    _, grads = pipeline.stages[0].train(pipeline.table, batches_of(2), [*asked, elsewhere], one)
    assert not grads[1].asnumpy().any()
