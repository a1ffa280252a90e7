"""Several passes open at once: each backward pass reads what its own forward pass left."""

from __future__ import annotations

import gc

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SingleEngine, World
from bmtrain_ms.compat.autograd import record, recording
from bmtrain_ms.zero import Pass, context_of
from tests.helpers.passes import Layer, equal, gradients, schedule

pytestmark = pytest.mark.usefixtures("single_world")
OLD = ms.__version__.startswith("2.5")


def alone() -> World:
    return World(SingleEngine(), Mesh(1, 0))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 6), max_size=12), st.sampled_from([2, 3]), st.sampled_from([0, 1, 2]))
def test_any_order_of_micro_batches(forwards: int, choices: list[int], zero_level: int, prefetch: int):
    assert equal(gradients(alone(), schedule(forwards, choices, youngest_first=False), False, zero_level, prefetch))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 6), max_size=9), st.sampled_from([2, 3]))
def test_recomputation_where_the_youngest_comes_first(forwards: int, choices: list[int], zero_level: int):
    assert equal(gradients(alone(), schedule(forwards, choices, youngest_first=True), True, zero_level, 1))


def test_recomputation_in_an_older_pass():
    """2.5 forgets the younger graphs then; 2.10 does not."""
    order = [("F", 0), ("F", 1), ("B", 0), ("B", 1)]
    if OLD:
        with pytest.raises(RuntimeError, match=r"MindSpore 2\.5 loses functions.*use_checkpoint=False\), or let backward"):
            gradients(alone(), order, True, 3, 1)
        gc.collect()
    else:
        assert equal(gradients(alone(), order, True, 3, 1))
    assert equal(gradients(alone(), order, False, 3, 1))  # nothing of the failure is left


def test_between_recording_and_differentiating_nothing_is_recorded():
    block = bms.Block(Layer(0), use_checkpoint=False)
    x = Tensor(np.ones((2, 5), np.float32))
    recorded = record(lambda x: (block(x),), [x])
    assert not recording()
    np.testing.assert_array_equal(block(x).asnumpy(), recorded.outputs[0].asnumpy())  # an evaluation
    (found,) = recorded.pull((Tensor(np.ones((2, 5), np.float32)),))
    assert np.abs(found.asnumpy()).min() > 0


def test_a_pass_that_fails_lets_go_of_its_copies_and_the_others_say_that_they_are_lost():
    context = context_of(bms.comm.world())
    block, bad = bms.Block(Layer(0), use_checkpoint=False, zero_level=2), bms.Block(Layer(1), use_checkpoint=False, zero_level=2)
    x, ones = Tensor(np.ones((2, 5), np.float32)), (Tensor(np.ones((2, 5), np.float32)),)
    first, second = Pass(), Pass()
    with context.within(first):
        recorded = record(lambda x: (block(x),), [x])
    held = context.pipeline.meter.current
    assert held > 0

    def fail(x: Tensor) -> tuple[Tensor]:
        bad(x)
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError), context.within(second):
        record(fail, [x])
    assert context.pipeline.meter.current == held
    with pytest.raises(RuntimeError, match="an error in another one, since it was recorded"), context.within(first):
        recorded.pull(ones)  # MindSpore has forgotten it
    assert context.pipeline.meter.current == 0


def test_gradients_made_elsewhere_are_accumulated_as_those_of_backward():
    def losses(by_hand: bool) -> list[bytes]:
        block = bms.Block(Layer(0), use_checkpoint=False)
        params = block.trainable_params()
        manager = bms.optim.OptimManager(loss_scale=8.0)
        manager.add_optimizer(bms.optim.AdamOptimizer(params, lr=0.1))
        for i in range(2):
            x = Tensor(np.full((2, 5), 0.1 + i, np.float32))
            if by_hand:
                scale = manager.scale_to_accumulate
                recorded = record(lambda x: (block(x).sum().reshape(1),), [x])
                grads = list(recorded.pull((Tensor(np.full(1, scale, np.float32)),), params))[1:]
                manager.accumulate(params, grads)
                assert not grads
            else:
                manager.backward(lambda x: block(x).sum(), x)
        assert manager.step()
        return [p.asnumpy().tobytes() for p in params]

    assert losses(True) == losses(False)


def test_recording_inside_of_what_is_differentiated_is_refused():
    """It would end the recording of the outer function: gradients of zero, without a word."""
    weight = ms.Parameter(Tensor(np.ones(2, np.float32)), name="weight")

    def loss(x: Tensor) -> Tensor:
        y = (x * weight).sum()
        record(lambda x: (x * 2,), [x])
        return y + (x * weight).sum()

    with pytest.raises(RuntimeError, match="call record outside of value_and_grad"):
        ms.value_and_grad(loss, None, [weight])(Tensor(np.ones(2, np.float32)))


def test_a_function_is_differentiated_once():
    recorded = record(lambda x: (x * 2,), [Tensor(np.ones(2, np.float32))])
    ones = (Tensor(np.ones(2, np.float32)),)
    recorded.pull(ones)
    with pytest.raises(RuntimeError, match="differentiated already, and its record is gone"):
        recorded.pull(ones, [ms.Parameter(ones[0], name="weight")])


def test_there_must_be_something_to_differentiate():
    recorded = record(lambda: (Tensor(np.ones(1, np.float32)) * 2,), [])
    with pytest.raises(ValueError, match="neither an input nor a parameter"):
        recorded.pull((Tensor(np.ones(1, np.float32)),))


def test_what_a_failed_pass_has_held_is_gathered_again_when_it_was_written():
    """A list of pipeline Blocks keeps what it gathered until a backward pass, which never comes after an error."""
    chain = bms.PipelineTransformerBlockList([Layer(i) for i in range(2)])
    x = Tensor(np.ones((2, 5), np.float32))

    def fail(x: Tensor) -> Tensor:
        chain(x)
        raise KeyError("of the user's")

    with pytest.raises(KeyError):
        ms.value_and_grad(fail, 0, chain.trainable_params())(x)
    assert context_of(bms.comm.world()).pipeline.meter.current > 0
    for p in chain.trainable_params():
        p.copy_full(np.zeros((5, 5), np.float32))
    assert not chain(x).asnumpy().any()
    ms.value_and_grad(lambda x: chain(x).sum(), 0, chain.trainable_params())(x)
    assert context_of(bms.comm.world()).pipeline.meter.current == 0
