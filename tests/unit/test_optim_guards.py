"""OptimManager: scales that move, steps that are not made, and states and arguments that do not fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from tests.helpers.optim import Setting, numbers, parameters, same, states

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


def test_gradients_are_a_list_in_the_order_of_the_parameters():
    p = bms.DistributedParameter(np.ones(3, np.float32), name="p")
    optimizer, grad = AdamOptimizer([p]), Tensor(np.ones(3, np.float32))
    with pytest.raises(TypeError, match=r"^gradients are a list in the order of optimizer\.parameters, None where .*, not a dict$"):
        optimizer.step({id(p): grad})
    with pytest.raises(ValueError, match=r"^2 gradients for 1 parameters$"):
        optimizer.step([grad, grad])
    assert np.array_equal(p.asnumpy(), np.ones(3))


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


@pytest.mark.parametrize("given", ["abc", ["w"], [Tensor([1.0])]], ids=["text", "names", "tensors"])
def test_clipping_takes_nothing_but_parameters(given: Any):
    """It found no gradients of such things, and clipped nothing without a word."""
    manager = bms.optim.OptimManager()
    with pytest.raises(TypeError, match=r"^clip_grad_norm takes Parameters, not a (str|Tensor): give it model.trainable_par"):
        manager.clip_grad_norm(given, 1.0)
    with pytest.raises(TypeError, match=r"^clip_grad_norm takes Parameters, not a Block: give it"):
        manager.clip_grad_norm(bms.TransformerBlockList([bms.Block(bms.nn.Linear(2, 2))]), 1.0)


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
        (
            lambda s: s["optimizers"][0]["groups"][0].update(names=[[], {}]),
            r"a group of the state has parameters called \[\[\], {}\]",
        ),
        (lambda s: s["optimizers"][0]["groups"][0].update(names=["bias"] * 2), r"2 steps, for parameters called \[{'bias'}\]"),
        (
            lambda s: s["optimizers"][0]["groups"][0].update(names=["bias", "x"]),
            r"group of the parameters \['bias', 'x'\], this optim",
        ),
        (
            lambda s: s["optimizers"][0]["groups"][0].update(params=[]),
            r"unknown settings \['params'\]; known are \['betas', 'eps', ",
        ),
        (lambda s: s["optimizers"][0]["groups"][0].update(lr=10**400), "need lr, weight_decay >= 0"),
        (lambda s: s["optimizers"][0]["groups"][0].update(hold_steps=math.nan), "hold_steps must be 0 or more"),
        (lambda s: s["optimizers"][0].update(steps=[1, 10**400]), r"the state's steps must be numbers of 0 or more"),
        (lambda s: s.update(loss_scale=0), "loss_scale is missing, or wrong"),
        (
            lambda s: s["lr_schedulers"][0].update(num_iter=10**400),
            "this is not the state of a Linear: no rate follows from .*num_iter",
        ),
        (lambda s: s["lr_schedulers"][0].update(start_lr=math.inf), "no rate follows from .*: the rate is not finite"),
        (lambda s: s["lr_schedulers"][0].update(warmup_iter=0, num_iter=-1), "no rate follows from .*division by zero"),
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


def test_the_last_optimizer_s_tensors_are_looked_at_before_the_first_s_are_changed():
    def managers() -> tuple[OptimManager, list[AdamOptimizer]]:
        made = [AdamOptimizer([p]) for p in parameters(shapes={"first": (3,), "last": (4,)})]
        manager = OptimManager()
        for optimizer in made:
            manager.add_optimizer(optimizer)
            optimizer([Tensor(np.ones(optimizer.parameters[0].size, np.float32))])
        return manager, made

    (source, _), (target, optimizers) = managers(), managers()
    state = source.state_dict(gather_opt=True)
    for array in state["optimizers"][0]["tensors"].values():
        array.fill(7.0)
    state["optimizers"][1]["tensors"]["exp_avg.last"] = np.zeros(5, np.float32)
    before = [x for optimizer in optimizers for x in states(optimizer)]
    with pytest.raises(ValueError, match=r"exp_avg\.last has shape \(5,\) in the state, expected \(4,\)"):
        target.load_state_dict(state)
    assert same([x for optimizer in optimizers for x in states(optimizer)], before)


@pytest.mark.parametrize("gather", [False, True])
def test_without_strict_what_is_new_keeps_what_it_has(gather):
    """Steps and settings go by name."""

    def made(**shapes: tuple[int, ...]) -> AdamOptimizer:
        return AdamOptimizer([{"params": [p], "lr": 0.5} for p in parameters(shapes=shapes)])

    source, target = made(gone=(3,), kept=(4,)), made(new=(2,), kept=(4,))
    for optimizer, steps in ((source, 3), (target, 1)):
        for step in range(steps):
            optimizer([Tensor(numbers(p.size, seed=step)) for p in optimizer.parameters])
    source.param_groups[1]["lr"] = 0.25
    state = source.state_dict(gather)
    with pytest.raises(ValueError, match=r"the state has a group of the parameters \['gone'\], this optimizer has not"):
        target.load_state_dict(state)
    before = states(target)
    target.load_state_dict(state, strict=False)
    assert same(states(target), before[:2] + states(source)[2:])
    assert target.state_dict(tensors=False)["steps"] == [1, 3]
    assert [group["lr"] for group in target.param_groups] == [0.5, 0.25]
    one = made(kept=(4,))
    one.load_state_dict(state, strict=False)
    assert same(states(one), states(source)[2:]) and one.state_dict(tensors=False)["steps"] == [3]
    assert one.param_groups[0]["lr"] == 0.25
    for group in state["groups"]:
        del group["names"]  # as earlier versions wrote it
    with pytest.raises(ValueError, match="the state has 2 groups and 2 parameters, this optimizer has 1 and 1"):
        one.load_state_dict(state, strict=False)


def test_groups_and_steps_go_by_name():
    """Not by their order."""

    def made(order: str) -> tuple[AdamOptimizer, dict[str, dict]]:
        ps = dict(zip("ab", parameters(shapes={"a": (3,), "b": (4,)})))
        groups = {"a": {"params": [ps["a"]], "lr": 0.1}, "b": {"params": [ps["b"]], "lr": 0.3, "weight_decay": 0.5}}
        optimizer = AdamOptimizer([groups[name] for name in order])
        return optimizer, {name: optimizer.param_groups[order.index(name)] for name in order}

    (source, _), (target, groups) = made("ab"), made("ba")
    p = source.parameters[0]
    source.step([Tensor(np.ones(3, np.float32)) if q is p else None for q in source.parameters])  # of a alone
    source.param_groups[0]["lr"] = 0.2
    target.load_state_dict(source.state_dict())
    assert (groups["a"]["lr"], groups["a"]["weight_decay"]) == (0.2, 0.0)
    assert (groups["b"]["lr"], groups["b"]["weight_decay"]) == (0.3, 0.5)
    assert target.state_dict(tensors=False)["steps"] == [0, 1] and all(len(g["params"]) == 1 for g in groups.values())
    together = AdamOptimizer(parameters(shapes={"a": (3,), "b": (4,)}))
    with pytest.raises(ValueError, match="the state has 2 groups and 2 parameters, this optimizer has 1 and 2"):
        together.load_state_dict(source.state_dict())
    together.load_state_dict(source.state_dict(), strict=False)
    assert together.param_groups[0]["lr"] == 1e-3  # neither of the two is more right
    assert together.state_dict(tensors=False)["steps"] == [1, 0]


@pytest.mark.parametrize("mine, theirs, expected", [(1024.0, None, 1024.0), (None, 64.0, 1.0), (1024.0, 64.0, 64.0)])
def test_whether_losses_are_scaled_is_this_manager_s(mine, theirs, expected):
    """A float16 run that goes on from a float32 one would write NaN into its parameters at the first overflow."""
    source, target = Setting(loss_scale=theirs), Setting(loss_scale=mine)
    source.run(2)
    target.manager.load_state_dict(source.manager.state_dict())
    assert (target.manager.loss_scale_enabled, target.manager.loss_scale) == (mine is not None, expected)


@pytest.mark.parametrize("state", [None, 3, [], {}])
def test_no_state_at_all(state):
    with pytest.raises(ValueError, match="this is not the state of an OptimManager: loss_scale is missing, or wrong"):
        Setting().manager.load_state_dict(state)
