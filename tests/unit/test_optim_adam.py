"""AdamOptimizer against AdamW in float64; its groups, errors and state."""

from __future__ import annotations

import json
import pickle

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

import bmtrain_ms as bms
from bmtrain_ms.compat.runtime import numpy_dtype
from bmtrain_ms.optim import AdamOptimizer
from tests.helpers.optim import DTYPES, SHAPES, AdamW, copy_tensors, floats, gradients, numbers, parameters, same, states, values

pytestmark = pytest.mark.usefixtures("single_world")

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


@EVERY_DTYPE
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
        {"lr": 1e-2, "betas": (0.0, 0.0), "eps": 0.1, "weight_decay": 0.1},
    ],
    ids=["plain", "decay", "no-momentum"],
)
def test_adamw(settings, dtype):
    params = parameters(dtype)
    optimizer = AdamOptimizer(params, **settings)
    references = [AdamW(floats(p), **settings) for p in params]
    for step in range(1, 21):
        grads = gradients(step, dtype)
        optimizer(grads)
        for reference, grad in zip(references, grads):
            reference.step(floats(grad))
    for p, reference in zip(params, references):
        state = values(optimizer.state_of(p).values())
        master = p.asnumpy() if dtype == ms.float32 else state[2]
        np.testing.assert_allclose(master, reference.p, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(state[0], reference.m, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state[1], reference.v, rtol=1e-4, atol=1e-6)
        assert all(x.dtype == np.float32 for x in state)
        assert p.dtype == dtype and same([p.asnumpy()], [master.astype(numpy_dtype(dtype))])


def test_state_has_a_master_where_it_is_needed():
    full, half = parameters(shapes={"a": (3,)})[0], parameters(ms.float16, {"b": (3,)})[0]
    optimizer = AdamOptimizer([full, half])
    assert list(optimizer.state_of(full)) == ["exp_avg", "exp_avg_sq"]
    assert list(optimizer.state_of(half)) == ["exp_avg", "exp_avg_sq", "master"]


def test_half_parameters_move_by_less_than_their_resolution():
    """1 + n * 1e-4 in float16 is stuck at 1 without a master: the next number is 1.00098."""
    p = bms.DistributedParameter(np.ones(1, np.float16), name="p")
    optimizer = AdamOptimizer([p], lr=1e-4)
    for _ in range(20):
        optimizer([Tensor(np.full(1, -1.0, np.float16))])
    assert optimizer.state_of(p)["master"].asnumpy()[0] == pytest.approx(1.002, abs=1e-6)
    assert p.asnumpy()[0] == np.float16(1.002)


def test_master_starts_from_what_was_loaded():
    """Not from what the parameter held when the optimizer was made."""
    p = bms.DistributedParameter(np.zeros(2, np.float16), name="p")
    optimizer = AdamOptimizer([p], lr=0.0)
    p.copy_full(np.array([3.0, 4.0], np.float16))
    optimizer([Tensor(np.ones(2, np.float16))])
    assert p.asnumpy().tolist() == [3.0, 4.0]


def test_float64_is_refused():
    p = Parameter(Tensor(np.ones(2, np.float64)), name="wide")
    with pytest.raises(ValueError) as info:
        AdamOptimizer([p])
    assert str(info.value) == (
        "parameter wide is float64, and updates are computed in float32: make it float32, or use an optimizer of MindSpore's"
    )


def test_one_parameter_is_no_list_and_is_a_group_of_one():
    p = parameters(shapes={"a": (3,)})[0]
    with pytest.raises(TypeError, match="params must be a list of parameters or of groups, not one DistributedParameter"):
        AdamOptimizer(p)
    with pytest.raises(TypeError, match="not one dict: put it in a list"):
        AdamOptimizer({"params": [p]})
    with pytest.raises(ValueError, match=r"a parameter group has no params; it has \['lr'\]"):
        AdamOptimizer([{"lr": 1.0}])
    assert AdamOptimizer([{"params": p}]).parameters == [p]


def test_weight_decay_is_decoupled():
    """It shrinks the parameter by lr * decay whatever the gradient, and stays out of the moments."""
    p = bms.DistributedParameter(np.array([2.0, -4.0], np.float32), name="p")
    optimizer = AdamOptimizer([p], lr=0.5, weight_decay=0.5)
    optimizer([Tensor(np.zeros(2, np.float32))])
    assert p.asnumpy().tolist() == [1.5, -3.0]
    assert not any(x.any() for x in states(optimizer))


def test_rate_zero_moves_nothing_but_the_moments():
    params = parameters()
    before = values(params)
    optimizer = AdamOptimizer(params, lr=0.0, weight_decay=0.5)
    grads = gradients(1)
    optimizer(grads)
    assert same(values(params), before)
    for p, grad in zip(params, grads):
        np.testing.assert_allclose(optimizer.state_of(p)["exp_avg"].asnumpy(), 0.1 * grad.asnumpy(), rtol=1e-6)
    optimizer.param_groups[0]["lr"] = 0.1  # the warm-up is over
    optimizer(grads)
    assert not any(np.array_equal(a, b) for a, b in zip(values(params), before))


def test_groups_have_their_own_settings():
    params = parameters()
    own = {"lr": 0.3, "betas": (0.5, 0.75), "eps": 1e-4, "weight_decay": 0.2}
    optimizer = AdamOptimizer(
        [{"params": params[:1]}, {"params": iter(params[1:3]), **own}, {"params": params[3:], "lr": 0.0}],
        lr=0.1,
        weight_decay=0.01,
    )
    assert optimizer.parameters == params
    default = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    references = [AdamW(p.asnumpy(), **s) for p, s in zip(params, [default, own, own, {**default, "lr": 0.0}])]
    for step in range(1, 4):
        grads = gradients(step)
        optimizer(grads)
        for reference, grad in zip(references, grads):
            reference.step(grad.asnumpy())
    for p, reference in zip(params, references):
        np.testing.assert_allclose(p.asnumpy(), reference.p, rtol=1e-5, atol=1e-6)


def test_a_changed_rate_counts_from_the_next_step():
    params = parameters()
    optimizer = AdamOptimizer(params, lr=0.1)
    references = [AdamW(p.asnumpy(), 0.1, (0.9, 0.999), 1e-8, 0.0) for p in params]
    for step in range(1, 5):
        optimizer.param_groups[0]["lr"] = 0.1 / step
        grads = gradients(step)
        optimizer(grads)
        for reference, grad in zip(references, grads):
            reference.lr = 0.1 / step
            reference.step(grad.asnumpy())
    for p, reference in zip(params, references):
        np.testing.assert_allclose(p.asnumpy(), reference.p, rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_stay():
    """Their step count too: it corrects the bias of moments that saw fewer gradients."""
    first, second = parameters(shapes={"a": (2,), "b": (2,)})
    optimizer = AdamOptimizer([first, second], weight_decay=0.5)
    before = second.asnumpy().copy()
    optimizer.step([Tensor(np.ones(2, np.float32)), None])
    assert np.array_equal(second.asnumpy(), before)
    assert optimizer.state_dict()["steps"] == [1, 0]


def test_scale_multiplies_the_gradients():
    results = []
    for factor in (1.0, 1024.0):
        params = parameters()
        optimizer = AdamOptimizer(params, lr=0.1)
        for step in range(1, 4):
            optimizer.step([g * factor for g in gradients(step)], 1.0 / factor)
        results.append(values(params) + states(optimizer))
    assert same(*results)


def test_mindspore_spelling():
    """loss, grads = value_and_grad(forward, None, optimizer.parameters)(...); optimizer(grads)."""
    layer = bms.nn.Linear(4, 3)
    bms.init_parameters(layer)
    optimizer = AdamOptimizer(layer.trainable_params(), lr=0.1)
    reference = AdamW(layer.parameter("weight").asnumpy(), 0.1, (0.9, 0.999), 1e-8, 0.0)
    x = numbers(5, 4)
    _, grads = ms.value_and_grad(lambda x: layer(x).sum(), None, optimizer.parameters)(Tensor(x))
    optimizer(grads)
    reference.step(np.tile(x.sum(0), (3, 1)))
    np.testing.assert_allclose(layer.parameter("weight").asnumpy(), reference.p, rtol=1e-5)
    assert layer.parameter("bias").asnumpy() == pytest.approx([-0.1] * 3, rel=1e-5)
    with pytest.raises(ValueError, match="1 gradients for 2 parameters"):
        optimizer(grads[:1])


def test_plain_parameters_are_updated_too():
    p = Parameter(Tensor(np.ones((2, 2), np.float32)), name="p")
    optimizer = AdamOptimizer([p], lr=0.5)
    optimizer([Tensor(np.full((2, 2), 3.0, np.float32))])
    assert p.asnumpy() == pytest.approx(np.full((2, 2), 0.5), rel=1e-6)


@pytest.mark.parametrize(
    "bad", [{"lr": -1e-3}, {"eps": 0.0}, {"weight_decay": -0.1}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}], ids=str
)
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=r"need lr, weight_decay >= 0, eps > 0 and 0 <= betas < 1, not .*"):
        AdamOptimizer(parameters(), **bad)


def test_no_parameters_or_one_twice():
    params = parameters()
    for empty in ([], [{"params": []}]):
        with pytest.raises(ValueError, match=r"got no parameters; is everything frozen\?"):
            AdamOptimizer(empty)
    for twice in ([*params, params[0]], [{"params": params}, {"params": params[:1]}]):
        with pytest.raises(ValueError, match="a parameter appears twice"):
            AdamOptimizer(twice)


@EVERY_DTYPE
def test_optimizer_state_round_trip(dtype):
    """3 steps, the state through JSON into an optimizer of other settings, 3 more: bit-equal to 6."""
    params = parameters(dtype)
    optimizer = AdamOptimizer([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.1, weight_decay=0.1)
    for step in range(1, 4):
        optimizer(gradients(step, dtype))
    state = json.loads(json.dumps(optimizer.state_dict(tensors=False)))
    assert state["steps"] == [3] * 4 and [g["lr"] for g in state["groups"]] == [0.1, 0.05]
    others = [bms.DistributedParameter(p.asnumpy().copy(), name=p.name) for p in params]
    other = AdamOptimizer([{"params": others[:2]}, {"params": others[2:]}], lr=9.0, betas=(0.1, 0.1))
    copy_tensors(optimizer, other)
    other.load_state_dict(state)
    assert other.param_groups[1]["betas"] == (0.9, 0.999)
    for step in range(4, 7):
        optimizer(gradients(step, dtype))
        other(gradients(step, dtype))
    assert same(values(params) + states(optimizer), values(others) + states(other))


def test_state_of_another_optimizer():
    params = parameters()
    optimizer = AdamOptimizer(params)
    with pytest.raises(ValueError, match="the state has 1 groups and 3 parameters, this optimizer has 1 and 4"):
        optimizer.load_state_dict(AdamOptimizer(parameters()[:3]).state_dict())
    with pytest.raises(ValueError, match="the state has 2 groups and 4 parameters, this optimizer has 1 and 4"):
        optimizer.load_state_dict(AdamOptimizer([{"params": params[:2]}, {"params": params[2:]}]).state_dict())


# Settings beyond AdamW's #


@EVERY_DTYPE
@pytest.mark.parametrize("hold", [1, 3])
def test_hold_steps(dtype, hold):
    """Exactly `hold` steps leave the parameter and its master alone, the moments move from the first; then it is Adam."""
    params = parameters(dtype)
    before = values(params)
    optimizer = AdamOptimizer(params, lr=0.1, weight_decay=0.2, hold_steps=hold)
    references = [AdamW(floats(p), lr=0.1, weight_decay=0.2, hold_steps=hold) for p in params]
    for step in range(1, hold + 3):
        grads = gradients(step, dtype)
        optimizer(grads)
        for reference, grad in zip(references, grads):
            reference.step(floats(grad))
        assert same(values(params), before) == (step <= hold)
        for p, reference in zip(params, references):
            state = optimizer.state_of(p)
            np.testing.assert_allclose(state["exp_avg"].asnumpy(), reference.m, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(state["exp_avg_sq"].asnumpy(), reference.v, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(floats(state.get("master", p)), reference.p, rtol=1e-5, atol=1e-6)


def test_hold_steps_are_those_of_the_parameter():
    """One that gets its first gradient later is held later."""
    first, second = parameters(shapes={"a": (2,), "b": (2,)})
    optimizer = AdamOptimizer([first, second], hold_steps=2)
    grad = Tensor(np.ones(2, np.float32))
    moved = []
    for step in range(5):
        before = values([first, second])
        optimizer.step([grad, grad if step >= 2 else None])
        moved.append([not np.array_equal(p.asnumpy(), old) for p, old in zip((first, second), before)])
    assert moved == [[False, False], [False, False], [True, False], [True, False], [True, True]]


@EVERY_DTYPE
def test_maximize_is_the_negative_gradient(dtype):
    """Bit for bit, with decay, which goes on to shrink."""
    results = []
    for sign in (1.0, -1.0):
        params = parameters(dtype)
        optimizer = AdamOptimizer(params, lr=0.1, weight_decay=0.2, maximize=sign > 0)
        for step in range(1, 5):
            optimizer([Tensor(floats(grad) * sign).astype(dtype) for grad in gradients(step, dtype)])
        results.append(values(params) + states(optimizer))
    assert same(*results)


def test_maximize_climbs():
    p = bms.DistributedParameter(np.zeros(3, np.float32), name="p")
    optimizer = AdamOptimizer([p], lr=0.5, maximize=True)
    optimizer.step([Tensor(np.array([3.0, -2.0, 0.0], np.float32))], scale=0.25)
    assert p.asnumpy() == pytest.approx([0.5, -0.5, 0.0])


def test_groups_hold_and_maximize_for_themselves():
    held, climbing, plain = parameters(shapes={"a": (3,), "b": (3,), "c": (3,)})
    groups = [
        {"params": [held], "hold_steps": 2, "lr": 0.2},
        {"params": [climbing], "maximize": True, "betas": (0.5, 0.9), "name": "up"},
        {"params": [plain], "weight_decay": 0.3, "group": "decay"},
    ]
    optimizer = AdamOptimizer(groups, lr=0.1)
    references = [
        AdamW(held.asnumpy(), 0.2, hold_steps=2),
        AdamW(climbing.asnumpy(), 0.1, (0.5, 0.9), maximize=True),
        AdamW(plain.asnumpy(), 0.1, weight_decay=0.3),
    ]
    for step in range(1, 5):
        grads = gradients(step, shapes={"a": (3,), "b": (3,), "c": (3,)})
        optimizer(grads)
        for reference, grad in zip(references, grads):
            reference.step(grad.asnumpy())
    for p, reference in zip(optimizer.parameters, references):
        np.testing.assert_allclose(p.asnumpy(), reference.p, rtol=1e-5, atol=1e-6)
    assert [g["own_lr"] for g in optimizer.param_groups] == [0.2, None, None]


@EVERY_DTYPE
@pytest.mark.parametrize("scale", [2.0**-10, 2.0**14], ids=["down", "up"])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(dtype, scale):
    """Float32 gradients, as the manager has them."""
    results = []
    for factor in (1.0, scale):
        params = parameters(dtype)
        optimizer = AdamOptimizer(params, lr=0.1, weight_decay=0.1)
        for step in range(1, 4):
            optimizer.step([g * factor for g in gradients(step)], 1.0 / factor)
        results.append(values(params) + states(optimizer))
    assert same(*results)


def test_unknown_settings_are_refused():
    known = r"\['betas', 'eps', 'hold_steps', 'lr', 'maximize', 'weight_decay'\]"
    group = {"params": parameters(), "weigth_decay": 0.1, "amsgrad": True}
    with pytest.raises(
        ValueError, match=rf"^a parameter group has unknown settings \['amsgrad', 'weigth_decay'\]; known are {known}$"
    ):
        AdamOptimizer([group])


@pytest.mark.parametrize("in_group", [False, True])
def test_negative_hold_steps(in_group):
    params = parameters()
    with pytest.raises(ValueError, match=r"^hold_steps must be 0 or more, not -1$"):
        AdamOptimizer([{"params": params, "hold_steps": -1}] if in_group else params, hold_steps=0 if in_group else -1)


# State as arrays #


@EVERY_DTYPE
@pytest.mark.parametrize("gather", [False, True], ids=["shards", "whole"])
def test_state_dict_round_trip(dtype, gather):
    """10 steps, the state into an optimizer of other settings, 10 more: bit-equal to 20 (BMTrain's test_optim_state)."""
    params = parameters(dtype)
    optimizer = AdamOptimizer([{"params": params[:2], "hold_steps": 12}, {"params": params[2:]}], lr=0.1, weight_decay=0.1)
    for step in range(1, 11):
        optimizer(gradients(step, dtype))
    state = pickle.loads(pickle.dumps(optimizer.state_dict(gather)))
    others = parameters(dtype)
    other = AdamOptimizer([{"params": others[:2]}, {"params": others[2:]}], lr=9.0, betas=(0.1, 0.1), eps=1.0, maximize=True)
    other(gradients(77, dtype))
    for p, q in zip(params, others):
        q.copy_full(p.asnumpy().reshape(q.full_shape))
    other.load_state_dict(state)
    assert same(states(other), states(optimizer))
    for step in range(11, 21):
        optimizer(gradients(step, dtype))
        other(gradients(step, dtype))
    assert same(values(params) + states(optimizer), values(others) + states(other))
    assert optimizer.state_dict(tensors=False) == other.state_dict(tensors=False)


def test_state_dict_is_a_copy():
    params = parameters(ms.float16)
    optimizer = AdamOptimizer(params)
    optimizer(gradients(1, ms.float16))
    saved = optimizer.state_dict()
    before = {name: array.copy() for name, array in saved["tensors"].items()}
    optimizer(gradients(2, ms.float16))
    assert all(np.array_equal(saved["tensors"][name], array) for name, array in before.items())
    assert set(before) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq", "master") for name in SHAPES}


def test_a_state_that_does_not_fit_changes_nothing():
    optimizer = AdamOptimizer(parameters())
    optimizer(gradients(1))
    state, before = optimizer.state_dict(gather=True), states(optimizer)
    other_shape, other_name = ({**state, "tensors": dict(state["tensors"])} for _ in range(2))
    for array in state["tensors"].values():
        array.fill(7.0)
    other_shape["tensors"]["exp_avg_sq.deep"] = np.zeros((2, 3, 5), np.float32)
    with pytest.raises(ValueError, match=r"exp_avg_sq\.deep has shape \(2, 3, 5\) in the state, expected \(2, 3, 4\)"):
        optimizer.load_state_dict(other_shape)
    other_name["tensors"]["exp_avg.wide"] = other_name["tensors"].pop("exp_avg.deep")
    with pytest.raises(ValueError, match=r"does not fit; missing: \['exp_avg\.deep'\], unexpected: \['exp_avg\.wide'\]"):
        optimizer.load_state_dict(other_name)
    assert same(states(optimizer), before) and optimizer.state_dict(tensors=False)["steps"] == [1] * 4


def test_shards_of_another_shape():
    state = AdamOptimizer(parameters(shapes={"a": (6,)})).state_dict()
    with pytest.raises(
        ValueError,
        match=r"exp_avg\.a was saved by rank 0 of 1 \(full shape \(6,\)\), this is rank 0 of 1 \(full shape \(2, 3\)\); "
        r"save with state_dict\(gather=True\), or with a checkpoint\.Checkpointer, to load at another number of ranks",
    ):
        AdamOptimizer(parameters(shapes={"a": (2, 3)})).load_state_dict(state)


@pytest.mark.parametrize("gather", [False, True])
def test_the_state_of_a_plain_parameter_keeps_its_shape(gather):
    """One element would be broadcast."""

    def plain(*shape: int) -> AdamOptimizer:
        return AdamOptimizer([Parameter(Tensor(np.ones(shape, np.float32)), name="p")])

    state = plain(1).state_dict(gather)
    state["tensors"]["exp_avg.p"][:] = 3.0
    optimizer = plain(2, 2)
    with pytest.raises(ValueError, match=r"exp_avg\.p has shape \(1,\) in the state, expected \(2, 2\)"):
        optimizer.load_state_dict(state)
    assert not any(x.any() for x in states(optimizer))


def test_two_parameters_of_one_name():
    optimizer = AdamOptimizer([bms.DistributedParameter(np.ones(2, np.float32), name="twin") for _ in range(2)])
    with pytest.raises(ValueError, match=r"two parameters are called twin; call model\.check_names_and_refresh_name\(\)"):
        optimizer.state_dict()


def test_a_state_from_before_hold_steps():
    """The settings that it lacks stay."""
    optimizer = AdamOptimizer(parameters(), hold_steps=3)
    state = optimizer.state_dict(tensors=False)
    for group in state["groups"]:
        del group["hold_steps"], group["maximize"]
    optimizer.load_state_dict({**state, "groups": [{**g, "lr": 0.5} for g in state["groups"]]})
    assert (optimizer.param_groups[0]["hold_steps"], optimizer.param_groups[0]["lr"]) == (3, 0.5)
