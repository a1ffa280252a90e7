"""OptimManager: accumulation, several optimizers, clipping, its state."""

from __future__ import annotations

import json
import math
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms import DistributedParameter
from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, SingleEngine, World, use_world, world
from bmtrain_ms.lr_scheduler import NoDecay
from bmtrain_ms.nn import RouterConfig
from bmtrain_ms.optim import AdamOptimizer, GradientOverflowError, OptimManager, StepResult, clip_grad_norm, end_step
from tests.helpers.optim import Setting, copy_tensors, parameters, same, values

pytestmark = pytest.mark.usefixtures("single_world")


def test_backward_returns_the_loss_and_keeps_the_gradients():
    s = Setting()
    x, c = s.batch(0)
    loss = s.backward(0)
    expected = ((x @ s.weight.asnumpy().reshape(2, 3).T + s.bias.asnumpy()) * c).sum()
    assert float(loss.asnumpy()) == pytest.approx(expected, rel=1e-5)
    assert same(s.grads(), s.gradients(0))


def test_backward_calls_add_up():
    s = Setting()
    s.backward(0)
    s.backward(1)
    assert same(s.grads(), [a + b for a, b in zip(s.gradients(0), s.gradients(1))])
    s.manager.zero_grad()
    assert s.manager.grad(s.weight) is None
    s.backward(2)
    assert same(s.grads(), s.gradients(2))


def test_accumulating_equals_the_sum_of_the_losses():
    """Two backward passes and a step are bit-equal to one over both batches (integers: the sums are exact)."""
    apart, together = Setting(), Setting()
    apart.backward(0)
    apart.backward(1)
    apart.manager.step()
    x, c = (Tensor(np.concatenate(pair)) for pair in zip(together.batch(0), together.batch(1)))
    together.manager.backward(lambda: (together.layer(x) * c).sum())
    together.manager.step()
    assert same(apart.everything(), together.everything())


def test_half_gradients_are_accumulated_in_float32():
    """2048 + 1 is 2048 in float16."""
    s = Setting(dtype=ms.float16)
    for factor in (2048.0, 1.0):
        x = Tensor(np.array([[factor, 0, 0]], np.float16))
        s.manager.backward(lambda x: s.layer(x).sum(), x)
    assert s.grads()[0][0] == 2049.0 and s.grads()[0].dtype == np.float32


def test_auxiliary_outputs_come_back():
    s = Setting(loss_scale=8.0)
    marker = object()

    def forward(x: Tensor, *, times: float) -> tuple[Any, ...]:
        y = s.layer(x)
        return y.sum() * times, y, marker

    x = Tensor(s.batch(0)[0])
    loss, y, other = s.manager.backward(forward, x, times=2.0)
    assert other is marker and y.shape == (4, 2)
    assert float(loss.asnumpy()) == pytest.approx(2 * y.asnumpy().sum(), rel=1e-6)  # unscaled
    assert np.array_equal(s.grads()[1], [64.0, 64.0])  # 4 rows, twice, times the scale; y adds nothing


def test_without_optimizer():
    manager = OptimManager()
    with pytest.raises(RuntimeError, match=r"OptimManager\.backward needs an optimizer: call add_optimizer first"):
        manager.backward(lambda: Tensor(1.0))


@pytest.mark.parametrize(
    "wrong, what",
    [
        (lambda y: y, r"a tensor of shape \(4, 2\)"),
        (lambda y: (y, y.sum()), r"a tensor of shape \(4, 2\)"),
        (lambda y: [y.sum()], "list"),
        (lambda y: None, "NoneType"),
        (lambda y: (), "tuple"),
    ],
    ids=["tensor", "tuple", "list", "nothing", "empty"],
)
def test_forward_must_return_a_loss(wrong, what):
    s = Setting()
    x = Tensor(s.batch(0)[0])
    with pytest.raises(TypeError, match=f"forward must return a scalar loss, or a tuple that starts with it, not {what}"):
        s.manager.backward(lambda: wrong(s.layer(x)))
    assert s.manager.grad(s.weight) is None
    s.backward(0)
    assert same(s.grads(), s.gradients(0))


@pytest.mark.parametrize("dtype", [ms.int32, ms.bool_])
def test_a_loss_that_has_no_gradient_is_refused(dtype):
    manager, layer = bms.optim.OptimManager(), bms.nn.Linear(2, 1)
    manager.add_optimizer(bms.optim.AdamOptimizer(layer.trainable_params()))
    with pytest.raises(TypeError, match=r"^the loss is (Int32|Bool), which has no gradient: leave out what made it so"):
        manager.backward(lambda x: layer(x).sum().astype(dtype), Tensor([[1.0, 2.0]]))


def test_several_optimizers_step_together(single_world):
    s = Setting(schedule=False)
    second = Setting(schedule=False)
    second.layer.update_parameters_name("second.")
    schedule = NoDecay(second.optimizer, 0.5, 4, 10, num_iter=1)
    s.manager.add_optimizer(second.optimizer, schedule)
    x, c = map(Tensor, s.batch(0))
    before = values(second.optimizer.parameters)
    s.manager.backward(lambda: (s.layer(x) * c).sum() + (second.layer(x) * c * 2.0).sum())
    assert same(values(map(s.manager.grad, second.optimizer.parameters)), [2 * g for g in s.gradients(0)])
    s.manager.step()
    assert s.optimizer.state_dict()["steps"] == second.optimizer.state_dict()["steps"] == [1, 1]
    for p, old in zip(second.optimizer.parameters, before):  # Adam's first step is the rate times the sign
        np.testing.assert_allclose(p.asnumpy(), old - 0.125 * (1 + 0.1 * old), rtol=1e-5)
    assert (schedule.num_iter, second.optimizer.param_groups[0]["lr"]) == (2, 0.25)
    assert single_world.engine.clock.step == 1


def test_a_parameter_belongs_to_one_optimizer():
    s = Setting()
    with pytest.raises(ValueError, match="another optimizer has parameter bias already: it would be updated twice"):
        s.manager.add_optimizer(AdamOptimizer([s.bias]))
    assert len(s.manager.optimizers) == len(s.manager.lr_schedulers) == 1


def test_frozen_parameters_stay():
    s = Setting(loss_scale=4.0)
    s.weight.requires_grad = False
    before = s.weight.asnumpy().copy(), s.bias.asnumpy().copy()
    s.run(2)
    assert s.manager.grad(s.weight) is None
    assert np.array_equal(s.weight.asnumpy(), before[0]) and not np.array_equal(s.bias.asnumpy(), before[1])
    s.weight.requires_grad = True
    s.run(1)
    assert not np.array_equal(s.weight.asnumpy(), before[0])
    assert s.optimizer.state_dict()["steps"] == [1, 3]


# Clipping #


NORMS = {
    2.0: np.linalg.norm,
    1.0: lambda g: np.abs(g).sum(),
    3.0: lambda g: (np.abs(g) ** 3).sum() ** (1 / 3),
    math.inf: lambda g: np.abs(g).max(),
}


@pytest.mark.parametrize("scale", [None, 64.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("kind", NORMS)
def test_clip_grad_norm(kind, scale):
    s = Setting(loss_scale=scale)
    s.backward(0)
    expected = s.gradients(0)
    whole = NORMS[kind](np.concatenate(expected).astype(np.float64))
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, whole * 1.01, kind) == pytest.approx(whole, rel=1e-6)
    assert same(s.grads(), [g * np.float32(scale or 1) for g in expected])  # within: untouched
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, 2.5, kind) == pytest.approx(whole, rel=1e-6)
    for grad, before in zip(s.grads(), expected):
        np.testing.assert_allclose(grad, before * (scale or 1) * 2.5 / whole, rtol=1e-5)
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, 9.0, kind) == pytest.approx(2.5, rel=1e-5)


def test_the_inf_norm_as_a_string():
    s = Setting()
    s.backward(0)
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, 1e9, "inf") == max(np.abs(g).max() for g in s.gradients(0))


@pytest.mark.parametrize("kind", [0.5, 3.0, 6.0, 40.0])
@pytest.mark.parametrize("factor", [2.0**-70, 1.0, 2.0**70])
def test_powers_stay_inside_of_float32(kind, factor):
    """10 * 2^24 to the sixth is more than float32 holds, and 1e-20 cubed less: neither is an overflow, or nothing."""
    s = Setting(loss_scale=2.0**24)
    s.backward(0, factor)
    g = np.abs(np.concatenate(s.gradients(0)).astype(np.float64)) * factor
    expected = g.max() * ((g / g.max()) ** kind).sum() ** (1 / kind)
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, expected / 2, kind) == pytest.approx(expected, rel=1e-5)
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, expected, kind) == pytest.approx(expected / 2, rel=1e-5)


def test_clipping_counts_in_the_step():
    """Adam with eps as large as the gradients is sensitive to their scale."""
    s = Setting(loss_scale=32.0, schedule=False)
    s.optimizer.param_groups[0].update(eps=1.0, lr=0.5, weight_decay=0.0)
    before = s.weight.asnumpy().copy()
    s.backward(0)
    norm = s.manager.clip_grad_norm(s.optimizer.param_groups, 1.0)
    s.manager.step()
    g = s.gradients(0)[0] / norm
    np.testing.assert_allclose(s.weight.asnumpy(), before - 0.5 * g / (g + 1.0), rtol=1e-5)


def test_clip_takes_the_groups_that_it_is_given():
    s = Setting()
    s.backward(0)
    norm = s.manager.clip_grad_norm([{"params": [s.bias]}], 1e-3)
    assert norm == pytest.approx(np.linalg.norm(s.gradients(0)[1]), rel=1e-6)
    assert same(s.grads()[:1], s.gradients(0)[:1])
    assert np.linalg.norm(s.grads()[1]) == pytest.approx(1e-3, rel=1e-3)


def test_clip_uses_eps():
    s = Setting()
    s.backward(0)
    expected = s.gradients(0)[1]
    norm = s.manager.clip_grad_norm(s.optimizer.param_groups, 1.0, eps=10.0)
    np.testing.assert_allclose(s.grads()[1], expected / (norm + 10.0), rtol=1e-6)


@pytest.mark.parametrize("kind", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_not_applied(kind, bad, capsys):
    s = Setting(loss_scale=8.0)
    s.backward(0)
    s.manager.backward(lambda: s.layer(Tensor(np.zeros((1, 3), np.float32)))[0, 1] * bad)  # bias[1] only
    before = s.grads()
    assert math.isnan(before[1][1]) or math.isinf(before[1][1])
    norm = s.manager.clip_grad_norm(s.optimizer.param_groups, 1e-3, kind)
    assert math.isnan(norm) if math.isnan(bad) else not math.isfinite(norm)
    after = s.grads()
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(after, before))
    assert after[1][0] == 8.0 * s.gradients(0)[1][0]
    assert not s.manager.step().updated and s.manager.loss_scale == 4.0
    assert "overflow" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [1.0, 2.0, math.inf])
def test_clip_without_gradients(kind):
    s = Setting(loss_scale=8.0)
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, 1.0, kind) == 0.0
    assert s.manager.step().updated
    assert s.optimizer.state_dict()["steps"] == [0, 0]


# State of the manager #


def test_manager_state_round_trip(capsys):
    """3 steps, one skip, the state through JSON, 3 more in new objects: bit-equal."""
    settings = {"loss_scale_steps": 4, "loss_scale_factor": 2.0}
    first = Setting(loss_scale=16.0, **settings)
    first.backward(0, factor=math.inf)
    first.manager.step()
    first.run(3)
    state = json.loads(json.dumps(first.manager.state_dict(tensors=False)))
    assert state["loss_scale"] == 8.0 and state["steps_since_last_scale"] == 3 and state["skipped_steps"] == 1
    second = Setting(loss_scale=2.0, **settings)
    for p, q in zip(first.optimizer.parameters, second.optimizer.parameters):
        q.copy_full(p.asnumpy().reshape(q.full_shape).copy())
    copy_tensors(first.optimizer, second.optimizer)
    second.manager.load_state_dict(state)
    for s in (first, second):
        for step in range(3, 6):
            s.manager.zero_grad()
            s.backward(step)
            s.manager.step()
    assert same(first.everything(), second.everything())
    assert first.manager.state_dict(tensors=False) == second.manager.state_dict(tensors=False)
    assert first.manager.loss_scale == 16.0 and first.schedule.num_iter == 7
    assert capsys.readouterr().err.count("overflow") == 1


def test_manager_without_schedules_round_trip():
    s = Setting(schedule=False)
    s.run(1)
    state = json.loads(json.dumps(s.manager.state_dict(tensors=False)))
    assert state["lr_schedulers"] == [None] and state["loss_scale_enabled"] is False
    other = Setting(schedule=False)
    other.manager.load_state_dict(state)
    assert other.optimizer.state_dict()["steps"] == [1, 1]


def with_two() -> OptimManager:
    s = Setting(schedule=False)
    s.manager.add_optimizer(AdamOptimizer(parameters()))
    return s.manager


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Setting(schedule=False).manager, r"has 1 optimizers \(schedule missing: \[True\]\)"),
        (with_two, r"has 2 optimizers \(schedule missing: \[True, True\]\)"),
    ],
    ids=["schedule", "count"],
)
def test_state_of_another_manager(make: Callable[[], OptimManager], text):
    s = Setting(loss_scale=16.0)
    with pytest.raises(ValueError, match=text + r", this manager has 1 \(\[False\]\)"):
        s.manager.load_state_dict(make().state_dict())
    assert s.manager.loss_scale == 16.0


def test_gradients_of_plain_parameters_may_be_one_tensor(single_world):
    """d(a + b) is the same tensor for both; accumulating and clipping in place must not see it twice."""
    a, b = (Parameter(Tensor(np.zeros(3, np.float32)), name=name) for name in "ab")
    optimizer = AdamOptimizer([a, b], lr=0.1)
    manager = OptimManager()
    manager.add_optimizer(optimizer)
    for _ in range(2):
        manager.backward(lambda: ((a + b) * 2.0).sum())
    assert manager.clip_grad_norm(optimizer.param_groups, 1e9) == pytest.approx(4 * 6**0.5)
    for p in (a, b):
        np.testing.assert_array_equal(manager.grad(p).asnumpy(), np.full(3, 4.0))
    manager.clip_grad_norm(optimizer.param_groups, 6**0.5)
    for p in (a, b):
        np.testing.assert_allclose(manager.grad(p).asnumpy(), np.ones(3), rtol=1e-5)


def test_backward_takes_a_function():
    s = Setting()
    with pytest.raises(
        TypeError,
        match=r"^backward takes the function that computes the loss, and its arguments, not the loss: MindSpore differentiates "
        r"functions\. Write manager\.backward\(forward, \*batch\) where BMTrain has manager\.backward\(forward\(\*batch\)\)$",
    ):
        s.manager.backward(s.layer(Tensor(s.batch(0)[0])).sum())
    assert s.manager.grad(s.weight) is None


@pytest.mark.parametrize("scale", [None, 64.0])
def test_grad_scale(scale):
    """Divides gradients, not the loss that comes back; growth and norms follow."""
    s = Setting(loss_scale=scale, grad_scale=4.0)
    loss, plain = s.backward(0), Setting().backward(0)
    assert loss.asnumpy() == plain.asnumpy()
    assert same(s.grads(), [g * np.float32((scale or 1.0) / 4) for g in s.gradients(0)])
    assert float(s.manager.scale_loss(Tensor(8.0, ms.float32)).asnumpy()) == 2.0 * (scale or 1.0)
    norm = np.linalg.norm(np.concatenate(s.gradients(0))) / 4
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, 1e9) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_bad_grad_scale(bad):
    with pytest.raises(ValueError, match=f"grad_scale must be positive and finite, or None, not {bad}"):
        OptimManager(grad_scale=bad)


# Counters in the state #


def test_counters_survive(capsys):
    """In the middle of everything: the same scales from there on."""
    settings = {"loss_scale_steps": 3, "hysteresis": 3, "max_skipped_steps": 5}
    first, second = Setting(loss_scale=64.0, **settings), Setting(loss_scale=2.0, **settings)

    def go_on(s: Setting, events: str) -> list[StepResult]:
        results = []
        for event in events:
            s.manager.zero_grad()
            s.backward(0, factor=math.inf if event == "!" else 1.0)
            results.append(s.manager.step())
        return results

    go_on(first, "!..!")
    state = json.loads(json.dumps(first.manager.state_dict(tensors=False)))
    counters = {key: value for key, value in state.items() if key not in ("optimizers", "lr_schedulers")}
    assert counters == {
        "loss_scale": 64.0,
        "loss_scale_enabled": True,
        "steps_since_last_scale": 0,
        "skipped_steps": 2,
        "skipped_in_a_row": 1,
        "overflows_left": 1,
        "grads_scale": 64.0,
    }
    second.manager.load_state_dict(state)
    events = "!..!...!!"
    assert [r.loss_scale for r in go_on(first, events)] == [r.loss_scale for r in go_on(second, events)]
    assert first.manager.state_dict(tensors=False) == second.manager.state_dict(tensors=False)
    go_on(second, "!!")  # five in a row with the two before
    with pytest.raises(GradientOverflowError):
        go_on(second, "!")


def test_a_state_from_before_the_later_counters(capsys):
    s = Setting(loss_scale=64.0, hysteresis=2)
    state = s.manager.state_dict(tensors=False)
    for key in ("skipped_in_a_row", "overflows_left", "grads_scale"):
        del state[key]
    other = Setting(loss_scale=2.0, hysteresis=2)
    other.manager.load_state_dict(json.loads(json.dumps(state)))
    assert (other.manager.loss_scale, other.manager.overflows_left, other.manager.skipped_in_a_row) == (64.0, 2, 0)


@pytest.mark.parametrize("gather", [False, True], ids=["shards", "whole"])
def test_manager_state_with_tensors(gather):
    """Everything but the parameters is in it."""
    first = Setting(loss_scale=64.0)
    first.run(3)
    state = first.manager.state_dict(gather_opt=gather)
    assert [saved["is_whole"] for saved in state["optimizers"]] == [gather]
    assert state["optimizers"][0]["tensors"]["exp_avg.weight"].shape == ((2, 3) if gather else (6,))
    second = Setting(loss_scale=2.0)
    for p, q in zip(first.optimizer.parameters, second.optimizer.parameters):
        q.copy_full(p.asnumpy().reshape(q.full_shape).copy())
    second.manager.load_state_dict(state)
    for s in (first, second):
        s.run(3)
    assert same(first.everything(), second.everything())
    assert first.manager.state_dict(tensors=False) == second.manager.state_dict(tensors=False)


def test_a_manager_of_another_world_steps_among_its_ranks():
    """The current world has one rank; what is told, counted and cleared belongs to the one that was given."""
    given = World(RecordingEngine(SimulatedEngine(0, 2)), Mesh(2, 0))
    p = DistributedParameter(np.ones(4, np.float32), in_world=given, name="p")
    manager = OptimManager(in_world=given)
    manager.add_optimizer(AdamOptimizer([p], lr=0.5))
    manager.backward(lambda: (p.gather() * 3.0).sum())
    # this rank's half of the gradient, which is 3 everywhere: a simulated rank gets back what it gave
    assert manager.clip_grad_norm(manager.optimizers[0].param_groups, 1.0) == pytest.approx(3 * 2**0.5)
    before = world().everyone.clock.step
    assert manager.step()
    np.testing.assert_allclose(p.asnumpy(), 0.5, rtol=1e-5)
    assert [name for name, _ in given.everyone.calls()] == ["all_gather", "reduce_scatter", "all_reduce"]
    assert (given.everyone.clock.step, world().everyone.clock.step) == (1, before)


def test_a_parameter_that_is_given_twice_is_clipped_once():
    once, twice = Setting(), Setting()
    for s, params in (
        (once, [once.weight, once.bias]),
        (twice, [{"params": [twice.weight]}, {"params": [twice.weight, twice.bias]}]),
    ):
        s.backward(0)
        assert s.manager.clip_grad_norm(params, 0.5) > 0.5
    assert same(once.grads(), twice.grads())


class Mixture(bms.DistributedModule):
    """What has another state in every step: a router balanced over the step's tokens, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = bms.nn.Router(4, 4, 2, RouterConfig(balance="global_batch", balance_coef=0.5))
        self.drop, self.out = bms.nn.Dropout(0.3), bms.nn.Linear(4, 4)
        bms.init_parameters(self)
        self.set_train()

    def construct(self, x: Tensor) -> Tensor:
        told = bms.nn.Routing()
        return told.add_losses((self.drop(self.out(x)) ** 2).mean() + self.gate(x, told).weights[:, 0].mean())


def trained(own: bool, kinds: Callable[..., Any] = AdamOptimizer) -> list[float]:
    """Losses of four steps of two micro-batches each; `own`: as MindSpore spells it, with two optimizers."""
    with use_world(World(SingleEngine(), Mesh(1, 0), seed=5)) as here:
        model, found, random = Mixture(), [], np.random.default_rng(1)
        params = [model.gate.trainable_params(), model.out.trainable_params()]
        optimizers, manager = [kinds(x, lr=0.1) if own else AdamOptimizer(x, lr=0.1) for x in params], OptimManager()
        for optimizer in () if own else optimizers:
            manager.add_optimizer(optimizer)
        for step in range(4):
            manager.zero_grad()
            total: Any = None
            for _ in range(2):
                x = Tensor(random.normal(size=(5, 4)).astype(np.float32))
                if not own:
                    found.append(manager.backward(model, x).asnumpy().item())
                    continue
                loss, grads = ms.value_and_grad(model, None, [*params[0], *params[1]])(x)
                found.append(loss.asnumpy().item())
                total = grads if total is None else [a + b for a, b in zip(total, grads)]
            if own:
                grads, _ = clip_grad_norm([*params[0], *params[1]], total, 1e9)
                optimizers[0](grads[: len(params[0])])
                optimizers[1](grads[len(params[0]) :])
                if kinds is not AdamOptimizer:
                    end_step()
            else:
                manager.step()
            assert here.everyone.clock.step == step + 1
        return found


def test_an_optimizer_that_steps_by_itself_ends_the_step_once():
    """For routers and dropout, as the manager does, which does it once, too."""
    assert trained(own=True) == trained(own=False)


def test_the_step_of_another_optimizer_is_ended_by_who_calls_it():
    other, right = trained(own=True, kinds=lambda params, lr: nn.SGD(params, lr)), trained(own=False)
    assert other[:2] == right[:2] and len(set(other)) == 8  # then parameters are others


def test_a_step_that_is_left_out_draws_the_same_again(single_world):
    drop, x = bms.nn.Dropout(0.5).set_train(), Tensor(np.ones(64, np.float32))
    first = drop(x).asnumpy()
    end_step(made=False)
    assert np.array_equal(drop(x).asnumpy(), first)
    end_step()
    assert not np.array_equal(drop(x).asnumpy(), first)
