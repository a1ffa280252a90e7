"""custom_op, vjp and the end-of-backward hooks, against MindSpore's own derivatives."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Callable, Iterator

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from bmtrain_ms import compat
from bmtrain_ms.compat.autograd import backward_hooks, custom_op, no_grad, recording, vjp

pytestmark = pytest.mark.usefixtures("single_world")


def vector(*values: float) -> Tensor:
    return Tensor(np.array(values, np.float32))


def gradients(function: Callable[..., Tensor], *inputs: Tensor, weights: Any = None) -> tuple:
    """Value, and gradients by position (and of the weights) as lists."""
    positions = tuple(range(len(inputs))) or None
    value, grads = ms.value_and_grad(function, positions, weights)(*inputs)
    if weights is not None and positions:
        by_position, by_weight = grads
        return value.asnumpy().tolist(), lists(by_position), lists(by_weight)
    return value.asnumpy().tolist(), lists(grads)


def lists(grads: Any) -> list:
    grads = grads if isinstance(grads, (tuple, list)) else (grads,)
    return [g.asnumpy().tolist() for g in grads]


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x * y with a derivative of our own."""
    return custom_op(lambda a, b: (a * b,), lambda g: (g[0] * y, g[0] * x), x, y)[0]


@pytest.fixture
def ended() -> Iterator[list[BaseException | None]]:
    """What the end-of-backward hook was told."""
    seen: list[BaseException | None] = []
    backward_hooks.append(seen.append)
    yield seen
    backward_hooks.remove(seen.append)


# custom_op #


def test_gradient_is_the_reference():
    x, y = vector(1, 2, 3), vector(4, 5, 6)
    expected = gradients(lambda a, b: (ops.exp(a) * b * b).sum(), x, y)
    assert gradients(lambda a, b: multiply(multiply(ops.exp(a), b), b).sum(), x, y) == expected


def test_backward_is_what_is_given():
    def function(x: Tensor) -> Tensor:
        return custom_op(lambda a: (a * 2,), lambda g: (g[0] * 100,), x)[0].sum()

    assert gradients(function, vector(1, 2)) == (6.0, [[100.0, 100.0]])


def test_several_inputs_and_outputs():
    seen = []

    def forward(a: Tensor, b: Tensor, c: Tensor) -> tuple:
        return a + b, b * c

    def backward(grads: tuple) -> tuple:
        seen.append(lists(grads))
        return grads[0], grads[0] + grads[1] * 7, grads[1] * 3

    def function(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        total, product = custom_op(forward, backward, a, b, c)
        return (total * 2).sum() + (product * 5).sum()

    value, grads = gradients(function, vector(1, 2), vector(3, 3), vector(7, 7))
    assert value == 2 * (4 + 5) + 5 * (21 + 21)
    assert seen == [[[2.0, 2.0], [5.0, 5.0]]]
    assert grads == [[2.0, 2.0], [37.0, 37.0], [15.0, 15.0]]


def test_outputs_of_different_shapes_and_types():
    def function(x: Tensor) -> Tensor:
        half, total = custom_op(lambda a: (a.astype(ms.float16), a.sum()), lambda g: (g[0].astype(ms.float32) + g[1],), x)
        return half.astype(ms.float32).sum() * 2 + total * 3

    assert gradients(function, vector(1, 2)) == (15.0, [[5.0, 5.0]])


def test_one_output_of_two_is_used():
    seen = []

    def backward(grads: tuple) -> tuple:
        seen.append(lists(grads))
        return (grads[0] * 2 + grads[1] * 3,)

    def function(x: Tensor) -> Tensor:
        return custom_op(lambda a: (a * 2, a * 3), backward, x)[1].sum()

    assert gradients(function, vector(1, 2)) == (9.0, [[3.0, 3.0]])
    assert seen == [[[0.0, 0.0], [1.0, 1.0]]], "an unused output has a gradient of zeros"


def test_parameter_inputs():
    weight = Parameter(vector(2, 3), name="w")
    frozen = Parameter(vector(5, 5), name="f", requires_grad=False)

    def function(x: Tensor) -> Tensor:
        return custom_op(lambda a, w, f: (a * w * f,), lambda g: (g[0] * weight * 5, g[0] * x * 5, None), x, weight, frozen)[
            0
        ].sum()

    x = vector(1, 10)
    assert gradients(function, x, weights=[weight]) == (160.0, [[10.0, 15.0]], [[5.0, 50.0]])


def test_only_a_parameter_needs_a_gradient():
    weight = Parameter(vector(2, 3), name="w")
    x = vector(1, 10)

    def function(x: Tensor) -> Tensor:
        return custom_op(lambda a, w: (a * w,), lambda g: (g[0] * weight, g[0] * x), x, weight)[0].sum()

    value, grads = ms.value_and_grad(function, None, [weight])(x)
    assert (value.asnumpy(), lists(grads)) == (32.0, [[1.0, 10.0]])


def test_one_parameter_used_twice_adds_up():
    weight = Parameter(vector(2, 3), name="w")

    def function(x: Tensor) -> Tensor:
        return multiply(multiply(x, weight), weight).sum()

    assert gradients(function, vector(1, 10), weights=[weight]) == (94.0, [[4.0, 9.0]], [[4.0, 60.0]])


def test_none_stands_for_zeros():
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (custom_op(lambda a, b: (a * b,), lambda g: (None, g[0]), x, y)[0] + x).sum()

    assert gradients(function, vector(1, 2), vector(3, 4)) == (14.0, [[1.0, 1.0], [1.0, 1.0]])


def test_an_input_itself_is_an_output():
    """Derivatives that do something on the way back only, such as a ZeRO block's."""

    def function(x: Tensor) -> Tensor:
        (same,) = custom_op(lambda a: (a,), lambda g: (g[0] * 10,), x * 3)
        return (same * same).sum()

    assert gradients(function, vector(1, 2)) == (45.0, [[180.0, 360.0]])


def test_the_functions_own_argument_is_an_output():
    def function(x: Tensor) -> Tensor:
        (same,) = custom_op(lambda a: (a,), lambda g: (g[0] * 10,), x)
        return (same * same).sum()

    assert gradients(function, vector(1, 2)) == (5.0, [[20.0, 40.0]])


def test_identity_beside_a_computed_output():
    def function(x: Tensor, y: Tensor) -> Tensor:
        same, twice = custom_op(lambda a, b: (a, b * 2), lambda g: (g[0], g[1] * 2), x * 1, y)
        return (same * 3 + twice * 5).sum()

    assert gradients(function, vector(1, 2), vector(3, 4)) == (79.0, [[3.0, 3.0], [10.0, 10.0]])


def weight_of(*values: float) -> Parameter:
    return Parameter(vector(*values), name="weight")


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_a_parameter_comes_out_as_it_went_in(times, others):
    """2.5 gives a Parameter that is its own Cell's output a gradient of zero, from all of its uses."""
    weight = weight_of(1, 2)

    def function() -> Tensor:
        before = (weight**3).sum() if others else 0
        out = custom_op(lambda a: (a,) * times, lambda g: (sum(g) * 10,), weight)
        return before + sum((same**2).sum() for same in out) + ((weight * 7).sum() if others else 0)

    (grad,) = ms.grad(function, None, [weight])()
    expected = times * 10 * 2 * np.array([1.0, 2.0]) + (3 * np.array([1.0, 4.0]) + 7 if others else 0)
    assert grad.asnumpy().tolist() == expected.tolist()


def test_other_uses_of_an_input_that_is_an_output_do_not_go_through_backward():
    """2.5 marks outputs in place: what was used afterwards went through `backward` too."""

    def function(x: Tensor) -> Tensor:
        y = x * 1
        same, twice = custom_op(lambda a: (a, a * 2), lambda g: (g[0] * 10 + g[1] * 2,), y)
        return (same + twice * 5 + y * 100).sum()

    assert gradients(function, vector(1, 2))[1] == [[120.0, 120.0]]


def test_outputs_that_are_one_tensor_have_gradients_of_their_own():
    def function(x: Tensor) -> Tensor:
        a, b = custom_op(lambda x: (x,) * 2, lambda g: (g[0] * 10 + g[1],), x * 1)
        return (a + b * 2).sum()

    assert gradients(function, vector(1, 2))[1] == [[12.0, 12.0]]


def double(x: Tensor) -> Tensor:
    return custom_op(lambda a: (a * 2,), lambda g: (g[0] * 2,), x)[0]


def test_a_gradient_inside_of_a_function_that_is_differentiated_is_refused():
    """It would be a constant, and the gradient of a penalty on it zero."""

    def penalty(w: Tensor) -> Tensor:
        return (ms.grad(lambda x: (double(x) * w).sum(), 0)(vector(3)) ** 2).sum()

    with pytest.raises(RuntimeError, match=r"a gradient was taken inside of a function that is being differentiated.*first, in a"):
        ms.grad(penalty, 0)(vector(2))
    assert lists(ms.grad(lambda x: (double(x) ** 2).sum(), 0)(vector(3))) == [[24.0]]  # and nothing is left of it


def test_a_gradient_of_plain_operations_inside_leaves_the_outer_pass_open():
    """The end of the inner one is not the end of the pass: nothing is let go of."""
    ends = []
    hook = lambda error: ends.append(error)  # noqa: E731
    backward_hooks.append(hook)
    try:

        def function(x: Tensor) -> Tensor:
            y = double(x)
            slope = ms.grad(lambda z: (z**3).sum(), 0)(vector(2))  # 12
            return (double(y) * ops.stop_gradient(slope)).sum()

        assert lists(ms.grad(function, 0)(vector(1))) == [[48.0]]
    finally:
        backward_hooks.remove(hook)
    assert ends == [None]


def test_what_hooks_return_is_applied_to_every_gradient_that_was_asked_for():
    first, second = Parameter(vector(1), name="first"), Parameter(vector(2), name="second")
    added = {id(first): 100.0, id(second): 1000.0}
    hook = lambda error: lambda p, found: found + added[id(p)]  # noqa: E731
    backward_hooks.append(hook)
    try:
        function = lambda x: (first * second * x).sum()  # noqa: E731
        assert lists(ms.grad(function, None, [second, first])(vector(3))) == [[1003.0], [106.0]]
        assert lists(ms.grad(function, None, first)(vector(3))) == [[106.0]]
        inputs, weights = ms.grad(function, 0, [first])(vector(3))
        assert lists(inputs) == [[2.0]] and lists(weights) == [[106.0]]
        assert lists(ms.grad(lambda p, x: (p * x).sum(), 0)(first, vector(3))) == [[103.0]]
        assert lists(ms.grad(lambda x, p: (p * x).sum(), (0, 1))(vector(3), second)) == [[2.0], [1003.0]]
        found = ops.GradOperation(get_all=True)(lambda x, p: (p * x).sum())(vector(3), second)
        assert lists(found) == [[2.0], [1003.0]]
        assert lists(ops.GradOperation(get_by_list=True)(lambda: (first * 5).sum(), [first])()) == [[105.0]]
        _, grads = ms.value_and_grad(function, None, [first, second], has_aux=False)(vector(3))
        assert lists(grads) == [[106.0], [1003.0]]
    finally:
        backward_hooks.remove(hook)


def test_vjp_finds_parameters_that_the_function_was_not_given():
    weight, unused = Parameter(vector(5, 6), name="weight"), Parameter(vector(7), name="unused")
    grads = vjp(lambda a: (a * weight * weight,), [vector(1, 2)], (vector(1, 10),), captured=lambda: [weight, unused])
    assert lists(grads) == [[25.0, 360.0], [10.0, 240.0], [0.0]]


def test_backward_runs_once_and_only_when_needed():
    calls = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        (out,) = custom_op(lambda a: (a * 2,), lambda g: calls.append("y") or (g[0] * 2,), y)
        (out2,) = custom_op(lambda a: (a * 2,), lambda g: calls.append("x") or (g[0] * 2,), x)
        return (out + out2).sum()

    value, grad = ms.value_and_grad(function, 0)(vector(1), vector(2))
    assert (value.asnumpy(), lists(grad), calls) == (6.0, [[2.0]], ["x"])


def test_forward_runs_unrecorded():
    states = []

    def function(x: Tensor) -> Tensor:
        states.append(recording())
        (out,) = custom_op(lambda a: states.append(recording()) or (a * 2,), lambda g: (g[0] * 2,), x)
        states.append(recording())
        return out.sum()

    assert gradients(function, vector(1)) == (2.0, [[2.0]])
    assert states == [True, False, True]
    assert not recording()


def test_outside_a_backward_pass_it_is_the_forward_function():
    out = custom_op(lambda a: (a * 2,), lambda g: pytest.fail("must not be called"), vector(1, 2))
    assert isinstance(out, tuple) and lists(out) == [[2.0, 4.0]]


def test_under_no_grad_it_is_a_constant():
    def function(x: Tensor) -> Tensor:
        with no_grad():
            (constant,) = custom_op(lambda a: (a * 2,), lambda g: pytest.fail("must not be called"), x)
        return (x * constant).sum()

    assert gradients(function, vector(1, 2)) == (10.0, [[2.0, 4.0]])


def test_many_in_a_chain():
    def function(x: Tensor) -> Tensor:
        for _ in range(50):
            (x,) = custom_op(lambda a: (a + 1,), lambda g: (g[0] * 1,), x)
        return (x * x).sum()

    assert gradients(function, vector(0, 1)) == (50.0**2 + 51.0**2, [[100.0, 102.0]])


# vjp #


def test_vjp_of_one_output():
    x, y = vector(1, 2), vector(3, 4)
    grads = vjp(lambda a, b: (a * a * b,), [x, y], (vector(1, 10),))
    assert lists(grads) == [[6.0, 160.0], [1.0, 40.0]]


def test_vjp_of_several_outputs():
    grads = vjp(lambda a, b: (a * b, a + b), [vector(1, 2), vector(3, 4)], (vector(1, 1), vector(10, 10)))
    assert lists(grads) == [[13.0, 14.0], [11.0, 12.0]]


def test_vjp_of_an_unused_input_is_zero():
    grads = vjp(lambda a, b: (a * 2,), [vector(1, 2), Tensor(np.ones((2, 3), np.float32))], (vector(1, 1),))
    assert lists(grads) == [[2.0, 2.0], [[0.0, 0.0, 0.0]] * 2]


def test_vjp_with_a_parameter_input():
    weight = Parameter(vector(3, 4), name="w")
    assert lists(vjp(lambda a, w: (a * w,), [vector(1, 2), weight], (vector(1, 1),))) == [[3.0, 4.0], [1.0, 2.0]]


def test_vjp_of_one_input():
    assert lists(vjp(lambda a: (a * a,), [vector(3)], (vector(1),))) == [[6.0]]


def test_vjp_leaves_its_inputs_alone():
    x = vector(1, 2)
    vjp(lambda a: (a * a,), [x], (vector(1, 1),))
    assert x.asnumpy().tolist() == [1.0, 2.0]
    assert gradients(lambda a: (a * a).sum(), x) == (5.0, [[2.0, 4.0]])


def recompute(function: Callable[..., tuple], *inputs: Tensor) -> tuple:
    """A checkpoint: nothing is kept from forward but the inputs."""
    return custom_op(function, lambda grads: vjp(function, inputs, grads), *inputs)


def test_vjp_inside_backward_is_recomputation():
    weight = Parameter(vector(2, 3), name="w")
    runs = []

    def block(a: Tensor, w: Tensor) -> tuple:
        runs.append(recording())
        return (ops.exp(a * w),)

    def function(x: Tensor) -> Tensor:
        return (recompute(block, x, weight)[0] * x).sum()

    def reference(x: Tensor) -> Tensor:
        return (ops.exp(x * weight) * x).sum()

    x = vector(0.5, 0.25)
    expected = gradients(reference, x, weights=[weight])
    assert gradients(function, x, weights=[weight]) == expected
    assert runs == [False, True]


def test_custom_op_inside_vjp_inside_backward():
    def inner(a: Tensor) -> tuple:
        return custom_op(lambda t: (t * t,), lambda g: (g[0] * 2 * a,), a)

    def middle(a: Tensor) -> tuple:
        return recompute(inner, a * 3)

    def function(x: Tensor) -> Tensor:
        return recompute(middle, x)[0].sum()

    assert gradients(function, vector(1, 2)) == (45.0, [[18.0, 36.0]])


def test_nested_recomputation_of_several_blocks():
    weights = [Parameter(vector(0.5 + i / 4, 0.75), name=f"w{i}") for i in range(3)]

    def block(a: Tensor, w: Tensor) -> tuple:
        return (ops.tanh(a * w) + a,)

    def function(x: Tensor) -> Tensor:
        for weight in weights:
            (x,) = recompute(block, x, weight)
        return x.sum()

    def reference(x: Tensor) -> Tensor:
        for weight in weights:
            (x,) = block(x, weight)
        return x.sum()

    x = vector(0.5, -0.25)
    found, expected = (ms.value_and_grad(f, 0, weights)(x) for f in (function, reference))
    np.testing.assert_array_equal(found[0].asnumpy(), expected[0].asnumpy())
    np.testing.assert_allclose(found[1][0].asnumpy(), expected[1][0].asnumpy(), rtol=1e-6)
    for ours, theirs in zip(found[1][1], expected[1][1]):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-6)
        assert theirs.asnumpy().all()


# Errors #


def healthy() -> None:
    x, y = vector(1, 2), vector(3, 4)
    assert gradients(lambda a, b: multiply(a, b).sum(), x, y) == (11.0, [[3.0, 4.0], [1.0, 2.0]])
    assert gradients(lambda a: (a * a * a).sum(), x) == (9.0, [[3.0, 12.0]])
    assert not recording()


def fail(message: str) -> Any:
    raise KeyError(message)


def test_exception_in_forward():
    with pytest.raises(KeyError, match="in forward"):
        gradients(lambda x: custom_op(lambda a: fail("in forward"), lambda g: g, x * 2)[0].sum(), vector(1))
    healthy()


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_exception_beside_a_custom_op(where: str):
    def function(x: Tensor) -> Tensor:
        if where == "before":
            fail(where)
        y = multiply(x * 2, x)
        if where == "between":
            fail(where)
        multiply(y, y)
        return fail(where)

    with pytest.raises(KeyError, match=where):
        gradients(function, vector(1))
    healthy()


def test_exception_in_vjp():
    with pytest.raises(KeyError, match="in vjp"):
        vjp(lambda a: fail("in vjp"), [vector(1)], (vector(1),))
    assert not recording()
    assert lists(vjp(lambda a: (multiply(a, a),), [vector(3)], (vector(1),))) == [[6.0]]
    healthy()


def test_exception_of_mindspore_in_forward():
    with pytest.raises(ValueError, match="MatMul"):
        gradients(lambda x: ops.matmul(x, vector(1, 2, 3)).sum(), vector(1))
    healthy()


def test_exception_in_a_cell():
    class Bad(nn.Cell):
        def construct(self, x: Tensor) -> Tensor:
            return fail("in construct")

    cell = Bad()
    for function in (cell, lambda x: cell(x * 2)):
        with pytest.raises(KeyError, match="in construct"):
            gradients(function, vector(1))
        healthy()


def test_interrupt_in_forward():
    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradients(interrupt, vector(1))
    healthy()


def test_exception_in_backward():
    with pytest.raises(KeyError, match="in backward"):
        gradients(lambda x: custom_op(lambda a: (a * 2,), lambda g: fail("in backward"), x * 2)[0].sum(), vector(1))
    healthy()


def test_exception_in_a_nested_forward():
    def block(a: Tensor) -> tuple:
        if recording():
            fail("in recomputation")
        return (a * a,)

    with pytest.raises(KeyError, match="in recomputation"):
        gradients(lambda x: recompute(block, x * 2)[0].sum(), vector(1))
    healthy()


def test_exception_in_a_nested_backward():
    def block(a: Tensor) -> tuple:
        return custom_op(lambda t: (t * t,), lambda g: fail("in nested backward"), a)

    with pytest.raises(KeyError, match="in nested backward"):
        gradients(lambda x: recompute(block, x * 2)[0].sum(), vector(1))
    healthy()


def test_exception_again_and_again():
    for _ in range(3):
        with pytest.raises(KeyError, match="each time"):
            gradients(lambda x: custom_op(lambda a: (a * 2,), lambda g: fail("each time"), x)[0].sum(), vector(1))
        healthy()


# backward_hooks #


def test_hook_fires_once_per_backward(ended: list):
    x = vector(1, 2)
    gradients(lambda a: (a * a).sum(), x)
    assert ended == [None]
    gradients(lambda a: multiply(a, a).sum(), x)
    assert ended == [None, None]


def test_hook_does_not_fire_for_nested_backwards(ended: list):
    during = []

    def block(a: Tensor) -> tuple:
        during.append(len(ended))
        return (a * a,)

    def function(x: Tensor) -> Tensor:
        return recompute(lambda a: recompute(block, a), recompute(block, x)[0])[0].sum()

    assert gradients(function, vector(1, 2)) == (17.0, [[4.0, 32.0]])
    assert ended == [None]
    assert set(during) == {0} and len(during) > 3


def test_hook_does_not_fire_without_backward(ended: list):
    custom_op(lambda a: (a * 2,), lambda g: g, vector(1))
    (vector(1) * 2).asnumpy()
    assert ended == []


def test_hook_gets_the_exception(ended: list):
    with pytest.raises(KeyError, match="reason") as caught:
        gradients(lambda x: custom_op(lambda a: (a * 2,), lambda g: fail("reason"), x)[0].sum(), vector(1))
    assert len(ended) == 1 and ended[0] is caught.value
    healthy()
    assert ended[1:] == [None, None]


def test_hook_gets_the_exception_of_a_nested_backward_once(ended: list):
    def block(a: Tensor) -> tuple:
        return custom_op(lambda t: (t * t,), lambda g: fail("nested"), a)

    with pytest.raises(KeyError, match="nested"):
        gradients(lambda x: recompute(block, x * 2)[0].sum(), vector(1))
    assert len(ended) == 1 and "nested" in str(ended[0])


def test_hooks_may_be_removed_while_they_run(ended: list):
    def once(error: BaseException | None) -> None:
        backward_hooks.remove(once)
        fired.append(error)

    fired: list = []
    backward_hooks.insert(0, once)
    gradients(lambda a: (a * a).sum(), vector(1))
    gradients(lambda a: (a * a).sum(), vector(1))
    assert fired == [None]
    assert ended == [None, None]


def test_uninstalled_hooks_are_silent(ended: list):
    compat.uninstall()
    try:
        gradients(lambda a: (a * a).sum(), vector(1))
        assert ended == []
    finally:
        compat.install()
    gradients(lambda a: (a * a).sum(), vector(1))
    assert ended == [None]


# Memory #


class Witness:
    """Lives as long as the function that holds it."""


def run_with_witness(function: Callable[[Tensor, Witness], Tensor], fails: bool = False) -> weakref.ref:
    witness = Witness()
    alive = weakref.ref(witness)
    try:
        gradients(lambda x: function(x, witness), vector(1, 2))
    except KeyError:
        assert fails
    else:
        assert not fails
    return alive


def used(witness: Witness, value: Any) -> Any:
    assert isinstance(witness, Witness)
    return value


def test_custom_ops_are_freed():
    def function(x: Tensor, witness: Witness) -> Tensor:
        (y,) = custom_op(lambda a: (a * 2,), lambda g: used(witness, (g[0] * 2,)), x)
        return recompute(lambda a: used(witness, (a * a,)), y)[0].sum()

    alive = run_with_witness(function)
    gc.collect()
    assert alive() is None


def test_custom_ops_without_backward_are_freed():
    def function(x: Tensor, witness: Witness) -> Tensor:
        custom_op(lambda a: (a * 2,), lambda g: used(witness, (g[0] * 2,)), x)
        return (x * x).sum()

    alive = run_with_witness(function)
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_custom_ops_are_freed_after_an_exception(where: str):
    def function(x: Tensor, witness: Witness) -> Tensor:
        (y,) = custom_op(lambda a: (a * 2,), lambda g: used(witness, fail(where)), x)
        return fail(where) if where == "forward" else y.sum()

    alive = run_with_witness(function, fails=True)
    healthy()
    gc.collect()
    assert alive() is None


def test_activations_are_freed():
    refs = []

    def forward(a: Tensor) -> tuple:
        out = a * 2
        refs.append(weakref.ref(out))
        return (out,)

    gradients(lambda x: custom_op(forward, lambda g: (g[0] * 2,), x)[0].sum(), vector(1, 2))
    gc.collect()
    assert refs[0]() is None
