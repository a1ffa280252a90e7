"""OptimManager's loss scale: growth, back-off, skipped steps."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from bmtrain_ms.optim import AdamOptimizer, GradientOverflowError, OptimManager, StepResult
from tests.helpers.optim import Setting, same

pytestmark = pytest.mark.usefixtures("single_world")


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
        assert s.manager.step().updated
        seen.append((s.manager.loss_scale, s.manager.steps_since_last_scale))
    assert seen == [(4, 1), (16, 0), (16, 1), (40, 0), (40, 1), (40, 0), (40, 1)]


def test_back_off_and_its_limit(capsys):
    s = Setting(loss_scale=16.0, min_loss_scale=3.0, loss_scale_steps=3)
    s.run(2)
    seen = []
    for _ in range(4):
        s.backward(0, factor=math.inf)
        assert not s.manager.step().updated
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
    settings = s.optimizer.state_dict(tensors=False)
    s.manager.zero_grad()
    s.backward(0)
    s.backward(1, factor=bad)
    assert not s.manager.step().updated
    assert same(s.everything(), before)
    assert s.schedule.state_dict() == rate and s.optimizer.state_dict(tensors=False) == settings
    assert s.manager.grad(s.weight) is None and s.manager.grad(s.bias) is None
    assert (s.manager.loss_scale, s.manager.skipped_steps) == (8.0, 1)
    assert single_world.engine.clock.step == clock + 1  # dropout draws anew
    assert "loss scale 16 -> 8" in capsys.readouterr().err
    s.backward(2)
    assert same(s.grads(), [8.0 * g for g in s.gradients(2)])
    assert s.manager.step().updated and not same(s.everything(), before)


def test_half_overflow_by_the_scale_itself(capsys):
    """The gradient fits into float16, times the scale it does not; backing off ends that."""
    s = Setting(dtype=ms.float16, loss_scale=2.0**20)
    updated = []
    while not updated or not updated[-1]:
        s.backward(0)
        updated.append(s.manager.step().updated)
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
    assert s.manager.step().updated and s.manager.skipped_steps == 0
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


def outcomes(s: Setting, events: str) -> list[tuple[float, int]]:
    """Loss scale and steps since it changed, after a step with (`!`) or without (`.`) an overflow."""
    seen = []
    for step, event in enumerate(events):
        s.manager.zero_grad()
        s.backward(step, factor=math.inf if event == "!" else 1.0)
        assert s.manager.step().updated == (event == ".")
        seen.append((s.manager.loss_scale, s.manager.steps_since_last_scale))
    return seen


# Written down from Megatron-LM's DynamicGradScaler: an overflow takes one off; at 0 and below each halves; growth restores it.
HYSTERESIS = [
    (1, "!..!...", [(8, 0), (8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0)]),
    (2, "!.!!...", [(16, 0), (16, 1), (8, 0), (4, 0), (4, 1), (4, 2), (8, 0)]),
    (2, "!!...!...!!", [(16, 0), (8, 0), (8, 1), (8, 2), (16, 0), (16, 0), (16, 1), (16, 2), (32, 0), (32, 0), (16, 0)]),
    (2, "..!...", [(16, 1), (16, 2), (16, 0), (16, 1), (16, 2), (32, 0)]),
    (3, "!!.!..!...!", [(16, 0), (16, 0), (16, 1), (8, 0), (8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0), (8, 0)]),
]


@pytest.mark.parametrize("hysteresis, events, expected", HYSTERESIS)
def test_hysteresis(hysteresis, events, expected, capsys):
    assert outcomes(Setting(loss_scale=16.0, loss_scale_steps=3, hysteresis=hysteresis), events) == expected
    assert capsys.readouterr().err.count("Gradient overflow") == events.count("!")


def test_an_overflow_that_hysteresis_forgives_is_skipped_all_the_same(capsys):
    s = Setting(loss_scale=16.0, hysteresis=2)
    s.run(1)
    before = s.everything()
    s.backward(1, factor=math.nan)
    assert not s.manager.step()
    assert same(s.everything(), before) and s.manager.grad(s.weight) is None
    assert "step skipped, loss scale 16 -> 16" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [{"hysteresis": 0}, {"max_skipped_steps": 0}], ids=str)
def test_bad_counts(bad):
    h, most = {"hysteresis": 1, "max_skipped_steps": 64, **bad}.values()
    with pytest.raises(ValueError, match=f"hysteresis and max_skipped_steps must be at least 1, not {h}, {most}"):
        OptimManager(loss_scale=2.0, **bad)


def test_the_scale_finds_its_level(capsys):
    """From 2**24 a float16 model comes down to the largest scale at which its gradients fit, and tries a larger one later."""
    s = Setting(dtype=ms.float16, loss_scale=2.0**24, loss_scale_steps=4)
    largest = max(np.abs(g).max() for g in s.gradients(0))
    level = 2.0 ** math.floor(math.log2(65504 / largest))
    descent = [2.0**k for k in range(23, int(math.log2(level)) - 1, -1)]
    seen = []
    for _ in range(len(descent) + 10):
        s.manager.zero_grad()
        s.backward(0)
        seen.append(s.manager.step().loss_scale)
    cycle = [level, level, level, 2 * level, level]  # three steps, a fourth that raises it, an overflow
    assert seen == descent + 2 * cycle
    assert s.manager.skipped_steps == len(descent) + 2 == capsys.readouterr().err.count("overflow")
    assert s.optimizer.state_dict(tensors=False)["steps"] == [8, 8]


# Giving up #


@pytest.mark.parametrize("most", [1, 3])
def test_too_many_skips_raise(most, capsys):
    """The last one at a scale that could be lower."""
    s = Setting(loss_scale=1024.0, max_skipped_steps=most)
    before = s.everything()
    for _ in range(most - 1):
        s.backward(0, factor=math.nan)
        assert not s.manager.step()
    s.backward(0, factor=math.nan)
    scale = 1024 >> (most - 1)
    with pytest.raises(
        GradientOverflowError,
        match=rf"^{most} steps in a row were skipped, the last at loss scale {scale} \(least: 1\), because gradients are not "
        r"finite: those of weight, bias\. Start from a lower loss_scale, or raise max_skipped_steps$",
    ):
        s.manager.step()
    assert same(s.everything(), before) and s.manager.skipped_steps == s.manager.skipped_in_a_row == most
    assert isinstance(GradientOverflowError(), ArithmeticError)


def test_at_the_least_scale_the_cause_is_another(capsys):
    """Only one parameter's gradient is bad."""
    s = Setting(loss_scale=2.0, max_skipped_steps=3)
    for _ in range(2):
        s.backward(0, factor=math.nan)
        s.manager.step()
    s.backward(0)
    s.manager.backward(lambda: s.layer.bias.sum() * math.inf)
    with pytest.raises(
        GradientOverflowError,
        match=r"the last at loss scale 1 \(least: 1\), because gradients are not finite: those of bias\. The scale is at its "
        r"least, so it is not the cause: look for NaN in the data and in the loss, lower the learning rate, or train in bfloat16 "
        r"or float32$",
    ):
        s.manager.step()


def test_many_names_are_cut(capsys):
    params = [Parameter(Tensor(np.ones(1, np.float32)), name=f"p{i}") for i in range(8)]
    manager = OptimManager(loss_scale=4.0, max_skipped_steps=1)
    manager.add_optimizer(AdamOptimizer(params))
    manager.backward(lambda: sum((p * (math.inf if i else 1.0)).sum() for i, p in enumerate(params)))
    with pytest.raises(GradientOverflowError, match=r"those of p1, p2, p3, p4, p5 and 2 other parameters\. Start"):
        manager.step()


def test_a_norm_may_overflow_where_no_gradient_does():
    """Squares of 1.5e19 fit into float32, their sum over two parameters does not."""
    params = [Parameter(Tensor(np.ones(1, np.float32)), name=name) for name in "ab"]
    manager = OptimManager(loss_scale=2.0, max_skipped_steps=1)
    manager.add_optimizer(AdamOptimizer(params))
    manager.backward(lambda: sum((p * 0.75e19).sum() for p in params))
    with pytest.raises(GradientOverflowError, match=r"because gradients are not finite: the norm of all of them\. Start from"):
        manager.step()


def test_an_update_starts_the_count_again(capsys):
    s = Setting(loss_scale=2.0**60, max_skipped_steps=3)
    outcomes(s, "!!.!!.!!")
    assert (s.manager.skipped_steps, s.manager.skipped_in_a_row) == (6, 2)
    s.backward(0, factor=math.inf)
    with pytest.raises(GradientOverflowError, match="3 steps in a row"):
        s.manager.step()


@pytest.mark.parametrize("most, last", [(None, 70), (..., 63)], ids=["never", "default"])
def test_how_long_it_tries(most, last, capsys):
    s = Setting(loss_scale=2.0, **({} if most is ... else {"max_skipped_steps": most}))
    for count in range(1, last + 1):
        s.backward(0, factor=math.inf)
        assert s.manager.step().skipped_in_a_row == count
    if most is ...:
        s.backward(0, factor=math.inf)
        with pytest.raises(GradientOverflowError, match="64 steps in a row"):
            s.manager.step()


# What a step says #


def test_step_result_without_scale():
    s = Setting()
    s.backward(0)
    assert s.manager.step() == StepResult(True, None, 1.0, 0, 0)
    norm = s.manager.clip_grad_norm(s.optimizer.param_groups, 1.0)
    result = s.manager.step()
    assert result.grad_norm == norm and bool(result) is True


@pytest.mark.parametrize("kind", [1.0, 2.0, math.inf])
def test_step_result_has_the_norm_that_clipping_returned(kind):
    s = Setting(loss_scale=64.0)
    s.backward(0)
    norm = s.manager.clip_grad_norm(s.optimizer.param_groups, 0.5, kind)
    assert norm > 0.5 and s.manager.step() == StepResult(True, norm, 64.0, 0, 0)


def test_step_result_with_scale(capsys):
    """Without clipping: the 2-norm, unscaled, of this step's gradient."""
    s = Setting(loss_scale=64.0, loss_scale_steps=2)
    for step, scale in ((0, 64.0), (1, 128.0)):
        s.manager.zero_grad()
        s.backward(step)
        result = s.manager.step()
        norm = np.linalg.norm(np.concatenate(s.gradients(step)).astype(np.float64))
        assert result == StepResult(True, pytest.approx(norm, rel=1e-6), scale, 0, 0)
    for row, factor in enumerate((math.inf, math.nan), 1):
        s.backward(0, factor=factor)
        result = s.manager.step()
        assert not result.grad_norm < math.inf and bool(result) is False
        assert result == StepResult(False, result.grad_norm, 128.0 / 2**row, row, row)
    s.backward(0)
    assert s.manager.step() == StepResult(True, pytest.approx(np.linalg.norm(np.concatenate(s.gradients(0)))), 32.0, 2, 0)


def test_a_norm_is_that_of_its_step():
    """Not of one that was clipped before more was accumulated, nor of a step that was forgotten."""
    s = Setting(loss_scale=4.0)
    s.backward(0)
    s.manager.clip_grad_norm(s.optimizer.param_groups, 1e9)
    s.backward(1)
    whole = np.linalg.norm(np.concatenate([a + b for a, b in zip(s.gradients(0), s.gradients(1))]))
    assert s.manager.step().grad_norm == pytest.approx(whole, rel=1e-6)
    s.manager.zero_grad()
    assert s.manager.step().grad_norm == 0.0
