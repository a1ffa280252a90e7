"""OptimManager: scales that move, steps that are not made, and states and arguments that do not fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from tests.helpers.optim import Setting, same

pytestmark = pytest.mark.usefixtures("single_world")


def test_gradients_keep_their_scale_when_it_has_moved_on():
    """The step raises the scale; what it used is still looked at, and added to, with its own."""
    s = Setting(loss_scale=8.0, loss_scale_steps=1)
    s.backward(0)
    s.manager.step()
    assert (s.manager.loss_scale, s.manager.grads_scale) == (16.0, 8.0)
    row = bms.inspect.inspect_model(s.layer, "bias")[0]
    assert row["grad_mean"] == pytest.approx(s.gradients(0)[1].mean(), rel=1e-6)
    s.backward(1)
    both = [8.0 * (a + b) for a, b in zip(s.gradients(0), s.gradients(1))]
    assert same(s.grads(), both)
    norm = np.sqrt(sum(float(((g / 8.0) ** 2).sum()) for g in both))
    assert s.manager.clip_grad_norm(s.optimizer.param_groups, 1e9) == pytest.approx(norm, rel=1e-6)
    s.manager.zero_grad()
    s.backward(1)
    assert same(s.grads(), [16.0 * g for g in s.gradients(1)]) and s.manager.grads_scale == 16.0


class Dropping(bms.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.p = bms.DistributedParameter(np.ones(64, np.float32))
        self.dropout = bms.nn.Dropout(0.5)

    def construct(self, x: Tensor) -> Tensor:
        return (self.dropout(self.p * x) * x).sum()


@pytest.mark.parametrize("how", ["skip", "discard"])
def test_a_step_that_is_not_made_does_not_shift_the_dropout_masks(single_world, how, capsys):
    """Bit-equal to a run that never saw the batch."""

    def run(events: str) -> bytes:
        bms.shutdown()
        bms.init_distributed(seed=7)
        model = Dropping().set_train(True)
        manager = OptimManager(loss_scale=8.0, hysteresis=9)
        manager.add_optimizer(AdamOptimizer(model.trainable_params(), lr=0.1))
        for event in events:
            bad = event == "!"
            x = Tensor(np.full(64, np.inf if bad and how == "skip" else 1.0, np.float32))
            manager.zero_grad()
            manager.backward(model, x)
            manager.discard_step() if bad and how == "discard" else manager.step()
        return model.p.asnumpy().tobytes()

    assert run("..!.!..") == run(".....") != run("....")


def test_clipping_takes_an_optimizer_or_parameters():
    for what in (lambda s: s.optimizer, lambda s: s.optimizer.parameters, lambda s: s.optimizer.param_groups):
        s = Setting()
        s.backward(0)
        whole = s.manager.clip_grad_norm(what(s), 1e-3)
        assert whole == pytest.approx(np.sqrt(sum((g**2).sum() for g in s.gradients(0))), rel=1e-6)
        assert s.manager.clip_grad_norm(what(s), 1.0) == pytest.approx(1e-3, rel=1e-4)
        assert s.manager.clip_grad_norm(s.bias, 1.0) < 1e-3
    native = nn.Momentum(s.layer.trainable_params(), 0.1, 0.9)
    assert s.manager.clip_grad_norm(native, 1.0) == pytest.approx(1e-3, rel=1e-4)


def test_clipping_refuses_what_it_cannot_do():
    s = Setting()
    s.backward(0)
    for max_norm, kind in ((0.0, 2.0), (-1.0, 2.0), (1.0, 0.0), (math.nan, 2.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="max_norm and norm_type must be positive, not "):
            s.manager.clip_grad_norm(s.optimizer, max_norm, kind)
    with pytest.raises(TypeError, match="clip_grad_norm takes an optimizer, its param_groups or a list of parameters, not dict"):
        s.manager.clip_grad_norm(s.optimizer.param_groups[0], 1.0)


def test_a_schedule_steps_with_one_optimizer():
    a, b = Setting(), Setting()
    manager = OptimManager()
    manager.add_optimizer(a.optimizer, a.schedule)
    with pytest.raises(ValueError, match="this schedule steps with another optimizer already, and would step twice"):
        manager.add_optimizer(b.optimizer, a.schedule)
    assert len(manager.drivers) == 1


@pytest.mark.parametrize("scale", [0.5, 512.0])
def test_the_initial_scale_is_between_its_limits(scale):
    text = f"loss_scale must be from min_loss_scale=1.0 to max_loss_scale=256.0, not {scale}"
    with pytest.raises(ValueError, match=text):
        OptimManager(loss_scale=scale, max_loss_scale=256.0)


def test_limits_are_this_manager_s_not_the_state_s():
    wide, narrow = Setting(loss_scale=2.0**20, hysteresis=5), Setting(loss_scale=2.0, max_loss_scale=64.0, hysteresis=2)
    narrow.manager.load_state_dict(wide.manager.state_dict())
    assert (narrow.manager.loss_scale, narrow.manager.overflows_left) == (64.0, 2)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda s: s.pop("loss_scale"), "this is not the state of an OptimManager: loss_scale is missing, or wrong"),
        (lambda s: s.update(skipped_steps="3"), "skipped_steps is missing, or wrong"),
        (lambda s: s.update(loss_scale=math.nan), "loss_scale is missing, or wrong"),
        (lambda s: s.update(optimizers=None), "optimizers is missing, or wrong"),
        (lambda s: s["optimizers"][0].pop("groups"), "this is not the state of an AdamOptimizer: it has no groups and steps"),
        (lambda s: s["optimizers"][0].update(steps=[1, -1]), r"the state's steps must be numbers of 0 or more, not \[1, -1\]"),
        (lambda s: s["optimizers"][0].update(steps=[1]), "the state has 1 groups and 1 parameters, this optimizer has 1 and 2"),
        (lambda s: s["optimizers"][0]["groups"][0].update(lr=-1.0), "need lr, weight_decay >= 0"),
        (lambda s: s["optimizers"][0]["groups"][0].update(betas=None), "a group of the state has a setting of a wrong type"),
        (lambda s: s["optimizers"][0].update(groups=[3]), "a group of the state is int, not a dictionary of settings"),
        (lambda s: s["lr_schedulers"][0].pop("start_lr"), "this is not the state of a Linear: it has "),
        (lambda s: s["lr_schedulers"][0].update(num_iter=None), "this is not the state of a Linear: num_iter is None"),
        (lambda s: s["optimizers"][0]["tensors"].popitem(), "the optimizer's state does not fit; missing"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, text):
    source, target = Setting(loss_scale=32.0), Setting(loss_scale=4.0)
    source.run(2)
    state = source.manager.state_dict()
    change(state)
    before, scalars = target.everything(), target.manager.state_dict(tensors=False)
    with pytest.raises(ValueError, match=text):
        target.manager.load_state_dict(state)
    assert same(target.everything(), before) and target.manager.state_dict(tensors=False) == scalars


@pytest.mark.parametrize("state", [None, 3, [], {}])
def test_no_state_at_all(state):
    with pytest.raises(ValueError, match="this is not the state of an OptimManager: loss_scale is missing, or wrong"):
        Setting().manager.load_state_dict(state)
