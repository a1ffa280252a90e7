"""AdamOptimizer against AdamW in float64; OptimManager: accumulation, scaling, skipping, clipping, its state."""

from __future__ import annotations

import json
import math
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

import bmtrain_ms as bms
from bmtrain_ms.lr_scheduler import Linear, NoDecay
from bmtrain_ms.optim import AdamOptimizer, OptimManager

pytestmark = pytest.mark.usefixtures("single_world")

SHAPES = {"one": (1,), "prime": (7,), "matrix": (3, 5), "deep": (2, 3, 4)}


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def parameters(dtype: Any = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[bms.DistributedParameter]:
    return [bms.DistributedParameter(numbers(*s, seed=i, dtype=dtype), name=n) for i, (n, s) in enumerate(shapes.items())]


def gradients(step: int, dtype: Any = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Of the shards: flat."""
    return [Tensor(numbers(math.prod(s), seed=100 * step + i, dtype=dtype)) for i, s in enumerate(shapes.values())]


class AdamW:
    """Loshchilov and Hutter, 2019, algorithm 2, without a schedule multiplier; float64."""

    def __init__(self, value: np.ndarray, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        self.p = value.astype(np.float64).reshape(-1)
        self.m, self.v, self.t = np.zeros_like(self.p), np.zeros_like(self.p), 0
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay

    def step(self, grad: np.ndarray) -> None:
        self.t += 1
        b1, b2 = self.betas
        g = grad.astype(np.float64).reshape(-1)
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.p = self.p - self.lr * (m_hat / (np.sqrt(v_hat) + self.eps) + self.weight_decay * self.p)


def values(items: Any) -> list[np.ndarray]:
    return [x.asnumpy().copy() for x in items]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))


def states(optimizer: AdamOptimizer) -> list[np.ndarray]:
    """Copies of every tensor of the optimizer."""
    return [x.copy() for p in optimizer.parameters for x in values(optimizer.state_of(p).values())]


# AdamOptimizer #


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
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
    references = [AdamW(p.asnumpy(), **settings) for p in params]
    for step in range(1, 21):
        grads = gradients(step, dtype)
        optimizer(grads)
        for reference, grad in zip(references, grads):
            reference.step(grad.asnumpy())
    for p, reference in zip(params, references):
        state = values(optimizer.state_of(p).values())
        master = state[2] if dtype is np.float16 else p.asnumpy()
        np.testing.assert_allclose(master, reference.p, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(state[0], reference.m, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state[1], reference.v, rtol=1e-4, atol=1e-6)
        assert all(x.dtype == np.float32 for x in state)
        assert p.asnumpy().dtype == dtype and np.array_equal(p.asnumpy(), master.astype(dtype))


def test_state_has_a_master_where_it_is_needed():
    full, half = parameters(shapes={"a": (3,)})[0], parameters(np.float16, {"b": (3,)})[0]
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
    optimizer.step({id(first): Tensor(np.ones(2, np.float32))})
    assert np.array_equal(second.asnumpy(), before)
    assert optimizer.state_dict()["steps"] == [1, 0]


def test_scale_multiplies_the_gradients():
    results = []
    for factor in (1.0, 1024.0):
        params = parameters()
        optimizer = AdamOptimizer(params, lr=0.1)
        for step in range(1, 4):
            optimizer.step({id(p): g * factor for p, g in zip(params, gradients(step))}, 1.0 / factor)
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


def copy_tensors(source: AdamOptimizer, target: AdamOptimizer) -> None:
    for p, q in zip(source.parameters, target.parameters):
        for name, tensor in source.state_of(p).items():
            target.state_of(q)[name].assign_value(Tensor(tensor.asnumpy().copy()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
def test_optimizer_state_round_trip(dtype):
    """3 steps, the state through JSON into an optimizer of other settings, 3 more: bit-equal to 6."""
    params = parameters(dtype)
    optimizer = AdamOptimizer([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.1, weight_decay=0.1)
    for step in range(1, 4):
        optimizer(gradients(step, dtype))
    state = json.loads(json.dumps(optimizer.state_dict()))
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


# OptimManager #


class Setting:
    """A linear layer, its optimizer, schedule and manager, and a loss whose gradient is known: sum(y * c) of y = x Wᵀ + b."""

    def __init__(self, dtype: Any = ms.float32, schedule: bool = True, **manager: Any):
        self.layer = bms.nn.Linear(3, 2, dtype=dtype)
        bms.init_parameters(self.layer)
        self.weight, self.bias = self.layer.parameter("weight"), self.layer.parameter("bias")
        self.optimizer = AdamOptimizer(self.layer.trainable_params(), weight_decay=0.1)
        self.schedule = Linear(self.optimizer, 0.1, 1, 100, num_iter=1) if schedule else None
        self.manager = OptimManager(**manager)
        self.manager.add_optimizer(self.optimizer, self.schedule)
        self.dtype = ms.dtype_to_nptype(dtype)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Small integers: sums of products are exact."""
        random = np.random.default_rng(step)
        return random.integers(1, 5, (4, 3)).astype(self.dtype), random.integers(-4, 5, (4, 2)).astype(self.dtype)

    def backward(self, step: int, factor: float = 1.0) -> Any:
        x, c = map(Tensor, self.batch(step))
        return self.manager.backward(lambda x, c: (self.layer(x) * c).sum().astype(ms.float32) * factor, x, c)

    def gradients(self, step: int) -> list[np.ndarray]:
        x, c = self.batch(step)
        return [(c.T @ x).reshape(-1).astype(np.float32), c.sum(0).astype(np.float32)]

    def grads(self) -> list[np.ndarray]:
        return values(self.manager.grad(p) for p in self.optimizer.parameters)

    def run(self, steps: int) -> None:
        for step in range(steps):
            self.manager.zero_grad()
            self.backward(step)
            self.manager.step()

    def everything(self) -> list[np.ndarray]:
        return values(self.optimizer.parameters) + states(self.optimizer)


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


# Loss scale #


def test_loss_scale_changes_nothing_but_the_range():
    """A power of two is exact: the same bits as without."""
    plain, scaled = Setting(), Setting(loss_scale=1024.0)
    plain.run(3)
    scaled.run(3)
    assert same(plain.everything(), scaled.everything())
    assert same([1024 * g for g in plain.grads()], scaled.grads())
    assert (plain.manager.loss_scale, plain.manager.loss_scale_enabled) == (1.0, False)
    assert (scaled.manager.loss_scale, scaled.manager.loss_scale_enabled) == (1024.0, True)


def test_loss_scale_saves_small_half_gradients():
    """1e-8 is zero in float16; times 1024 it is not."""
    moved = []
    for scale in (None, 1024.0):
        s = Setting(dtype=ms.float16, loss_scale=scale)
        before = s.optimizer.state_of(s.bias)["master"].asnumpy().copy()
        s.backward(0, factor=1e-9)
        s.manager.step()
        moved.append(bool(s.optimizer.state_of(s.bias)["exp_avg"].asnumpy().all()))
        assert not np.array_equal(s.optimizer.state_of(s.bias)["master"].asnumpy(), before) or scale is None
    assert moved == [False, True]


def test_scale_loss():
    assert float(OptimManager(loss_scale=16.0).scale_loss(Tensor(3.0, ms.float32)).asnumpy()) == 48.0
    assert float(OptimManager().scale_loss(Tensor(3.0, ms.float32)).asnumpy()) == 3.0


def test_growth_and_its_limit():
    s = Setting(loss_scale=4.0, loss_scale_factor=4.0, loss_scale_steps=2, max_loss_scale=40.0)
    seen = []
    for step in range(7):
        s.manager.zero_grad()
        s.backward(step)
        assert same(s.grads(), [s.manager.loss_scale * g for g in s.gradients(step)])
        assert s.manager.step() is True
        seen.append((s.manager.loss_scale, s.manager.steps_since_last_scale))
    assert seen == [(4, 1), (16, 0), (16, 1), (40, 0), (40, 1), (40, 0), (40, 1)]


def test_back_off_and_its_limit(capsys):
    s = Setting(loss_scale=16.0, min_loss_scale=3.0, loss_scale_steps=3)
    s.run(2)
    seen = []
    for _ in range(4):
        s.backward(0, factor=math.inf)
        assert s.manager.step() is False
        seen.append((s.manager.loss_scale, s.manager.steps_since_last_scale, s.manager.skipped_steps))
    assert seen == [(8, 0, 1), (4, 0, 2), (3, 0, 3), (3, 0, 4)]
    written = capsys.readouterr().err.splitlines()  # 2.5 adds a stack of its own where a graph changes
    assert [line for line in written if not line.startswith(" ")] == [
        f"Gradient overflow: step skipped, loss scale {change}" for change in ("16 -> 8", "8 -> 4", "4 -> 3", "3 -> 3")
    ]


def test_a_factor_below_one_means_its_inverse():
    s = Setting(loss_scale=16.0, loss_scale_factor=0.25, loss_scale_steps=1)
    s.run(1)
    assert s.manager.loss_scale == 64.0
    s.backward(0, factor=math.nan)
    s.manager.step()
    assert s.manager.loss_scale == 16.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=["fp32", "fp16"])
def test_overflow_skips_everything(single_world, dtype, bad, capsys):
    s = Setting(dtype=dtype, loss_scale=16.0)
    s.run(2)
    before, rate, clock = s.everything(), s.schedule.state_dict(), single_world.engine.clock.step
    settings = s.optimizer.state_dict()
    s.manager.zero_grad()
    s.backward(0)
    s.backward(1, factor=bad)
    assert s.manager.step() is False
    assert same(s.everything(), before)
    assert s.schedule.state_dict() == rate and s.optimizer.state_dict() == settings
    assert s.manager.grad(s.weight) is None and s.manager.grad(s.bias) is None
    assert (s.manager.loss_scale, s.manager.skipped_steps) == (8.0, 1)
    assert single_world.engine.clock.step == clock + 1  # dropout draws anew
    assert "loss scale 16 -> 8" in capsys.readouterr().err
    s.backward(2)
    assert same(s.grads(), [8.0 * g for g in s.gradients(2)])
    assert s.manager.step() is True and not same(s.everything(), before)


def test_half_overflow_by_the_scale_itself(capsys):
    """The gradient fits into float16, times the scale it does not; backing off ends that."""
    s = Setting(dtype=ms.float16, loss_scale=2.0**20)
    updated = []
    while not updated or not updated[-1]:
        s.backward(0)
        updated.append(s.manager.step())
        s.manager.zero_grad()
    assert updated == [False] * (len(updated) - 1) + [True] and len(updated) > 4
    assert s.manager.skipped_steps == len(updated) - 1
    largest = max(g.max() for g in s.gradients(0))
    assert s.manager.loss_scale * largest < 65520 <= 2 * s.manager.loss_scale * largest
    assert capsys.readouterr().err.count("Gradient overflow") == len(updated) - 1


def test_no_check_without_loss_scale():
    """As BMTrain; the training loop has its own."""
    s = Setting()
    s.backward(0, factor=math.nan)
    assert s.manager.step() is True and s.manager.skipped_steps == 0
    assert np.isnan(s.weight.asnumpy()).all()


@pytest.mark.parametrize("bad", [0.0, -8.0, math.inf, math.nan])
def test_bad_loss_scale(bad):
    with pytest.raises(ValueError, match=f"loss_scale must be positive and finite, or None, not {bad}"):
        OptimManager(loss_scale=bad)


@pytest.mark.parametrize("bad", [{"loss_scale_factor": 1.0}, {"loss_scale_factor": -2.0}, {"loss_scale_steps": 0}], ids=str)
def test_bad_growth(bad):
    with pytest.raises(ValueError, match="need a positive loss_scale_factor other than 1 and loss_scale_steps >= 1, not"):
        OptimManager(loss_scale=2.0, **bad)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0), (4.0, 2.0)])
def test_bad_limits(low, high):
    with pytest.raises(ValueError, match=f"need 0 < min_loss_scale <= max_loss_scale, not {low}, {high}"):
        OptimManager(loss_scale=2.0, min_loss_scale=low, max_loss_scale=high)


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
    assert s.manager.step() is False and s.manager.loss_scale == 4.0
    assert "overflow" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [1.0, 2.0, math.inf])
def test_clip_without_gradients(kind):
    s = Setting(loss_scale=8.0)
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, 1.0, kind) == 0.0
    assert s.manager.step() is True
    assert s.optimizer.state_dict()["steps"] == [0, 0]


# State of the manager #


def test_manager_state_round_trip(capsys):
    """3 steps, one skip, the state through JSON, 3 more in new objects: bit-equal."""
    settings = {"loss_scale_steps": 4, "loss_scale_factor": 2.0}
    first = Setting(loss_scale=16.0, **settings)
    first.backward(0, factor=math.inf)
    first.manager.step()
    first.run(3)
    state = json.loads(json.dumps(first.manager.state_dict()))
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
    assert first.manager.state_dict() == second.manager.state_dict()
    assert first.manager.loss_scale == 16.0 and first.schedule.num_iter == 7
    assert capsys.readouterr().err.count("overflow") == 1


def test_manager_without_schedules_round_trip():
    s = Setting(schedule=False)
    s.run(1)
    state = json.loads(json.dumps(s.manager.state_dict()))
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
