"""Groups that are added to an optimizer in the middle of a run: state, schedules, checkpoints, and what `append` misses."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, ops
from mindspore.experimental import optim as experimental

import bmtrain_ms as bms
from bmtrain_ms.lr_scheduler import Linear, NoDecay
from bmtrain_ms.optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager
from tests.helpers.optim import AdamW, gradients, numbers, parameters

pytestmark = pytest.mark.usefixtures("single_world")
OURS = [AdamOptimizer, AdamOffloadOptimizer]
SHAPES = {"one": (1,), "prime": (7,), "matrix": (3, 5), "deep": (2, 3, 4)}


def step(optimizer: Any, number: int, dtype: Any = ms.float32) -> None:
    """Of the parameters that the optimizer has."""
    given = dict(zip(SHAPES, gradients(number, dtype)))
    optimizer.step([given.get(p.name) for p in optimizer.parameters])


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("make", OURS)
def test_a_group_that_is_added_is_trained_from_then_on(make, dtype):
    """As by an optimizer that is made for it at that time, with its own settings or the defaults."""
    params, others = parameters(dtype), parameters(dtype)
    optimizer = make(params[:2], lr=0.1, weight_decay=0.1)
    first = make(others[:2], lr=0.1, weight_decay=0.1)
    step(optimizer, 0, dtype)
    step(first, 0, dtype)
    optimizer.add_param_group({"params": params[2], "lr": 0.5, "betas": (0.5, 0.5)})
    optimizer.add_param_group({"params": params[3:], "weight_decay": 0.0, "name": "last"})
    second, third = make(others[2:3], lr=0.5, betas=(0.5, 0.5), weight_decay=0.1), make(others[3:], lr=0.1)
    for number in (1, 2):
        for each in (optimizer, first, second, third):
            step(each, number, dtype)
    assert [p.name for p in optimizer.parameters] == list(SHAPES)
    for p, q in zip(params, others):
        assert np.array_equal(p.asnumpy(), q.asnumpy())
    assert optimizer.state_dict(tensors=False)["steps"] == [3, 3, 2, 2]


def test_the_numbers_of_an_added_group():
    p, q = parameters(shapes={"one": (1,), "prime": (7,)})
    optimizer, exact = AdamOptimizer([p], lr=0.1), AdamW(q.asnumpy(), lr=0.1)
    optimizer.add_param_group({"params": [q]})
    for number in range(3):
        grad = numbers(7, seed=number)
        optimizer([Tensor(np.zeros(1, np.float32)), Tensor(grad)])
        exact.step(grad)
    np.testing.assert_allclose(q.asnumpy(), exact.p, rtol=1e-5)


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize(
    "group, kind, text",
    [
        (lambda p: {"params": [p[0]]}, ValueError, "a parameter appears twice in the optimizer's groups"),
        (lambda p: {"params": [p[2], p[2]]}, ValueError, "a parameter appears twice in the optimizer's groups"),
        (lambda p: {"params": [p[2]], "rate": 1.0}, ValueError, "unknown settings"),
        (lambda p: {"params": [p[2]], "lr": -1.0}, ValueError, "need lr, weight_decay >= 0"),
        (lambda p: {"params": [p[2]], "lr": "0.1"}, ValueError, "a setting of a parameter group is of a wrong type"),
        (lambda p: {"params": [p[2]], "betas": 0.9}, ValueError, "a setting of a parameter group is of a wrong type"),
        (lambda p: {"params": []}, ValueError, "the parameter group has no parameters"),
        (lambda p: {"lr": 0.1}, ValueError, "a parameter group has no params"),
        (lambda p: {"params": ["weight"]}, TypeError, "an optimizer takes Parameters, not a str"),
        (lambda p: [p[2]], TypeError, "a parameter group is a dict with params and settings, not list"),
        (lambda p: {"params": [Parameter(ops.zeros((2,), ms.float64), "wide")]}, ValueError, "parameter wide is float64"),
    ],
)
def test_a_group_that_does_not_fit_changes_nothing(make, group, kind, text):
    params = parameters()
    optimizer = make(params[:2])
    before = optimizer.state_dict(tensors=False)
    with pytest.raises(kind, match=text):
        optimizer.add_param_group(group(params))
    assert optimizer.state_dict(tensors=False) == before
    step(optimizer, 0)


@pytest.mark.parametrize("group", [lambda p: {"params": [p]}, lambda p: {"params": [p], "lr": 0.1}, lambda p: {"lr": 0.1}])
@pytest.mark.parametrize("make", OURS)
def test_a_group_that_is_appended_is_named_at_the_next_step(make, group):
    """And nothing is updated: it has no state, and maybe no settings."""
    params = parameters()
    optimizer = make(params[:2])
    manager = OptimManager()
    manager.add_optimizer(optimizer)
    optimizer.param_groups.append(group(params[2]))
    before = [p.asnumpy().copy() for p in params]
    for use in (lambda: step(optimizer, 0), manager.state_dict, optimizer.state_tensors, lambda: optimizer.state_of(params[2])):
        with pytest.raises(ValueError, match=r"was put into param_groups, .*call optimizer.add_param_group\(group\)"):
            use()
    assert all(np.array_equal(a, p.asnumpy()) for a, p in zip(before, params))
    optimizer.add_param_group(optimizer.param_groups.pop()) if "params" in group(params[2]) else optimizer.param_groups.pop()
    step(optimizer, 0)


def test_groups_may_go_and_parameters_may_move():
    params = parameters()
    optimizer = AdamOptimizer([{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}])
    step(optimizer, 0)
    optimizer.param_groups.pop()
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
    step(optimizer, 1)
    optimizer.param_groups[0]["params"].append(params[1])
    with pytest.raises(ValueError, match="a parameter appears twice"):
        step(optimizer, 2)


@pytest.mark.parametrize("make", OURS)
def test_schedules_cover_an_added_group(make):
    """From its first step: a group without a rate goes with the others, one with a rate gets its share."""
    params = parameters()
    optimizer = make(params[:1], lr=1.0)
    manager = OptimManager()
    manager.add_optimizer(optimizer, Linear(optimizer, 1.0, 0, 4))

    def rates() -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    manager.step()
    assert rates() == [0.75]
    optimizer.add_param_group({"params": params[1:2]})
    optimizer.add_param_group({"params": params[2:3], "lr": 0.1})
    assert rates() == [0.75, 0.75, 0.1]
    used: list[list[float]] = []
    update = optimizer._update
    optimizer._update = lambda *args: (used.append(rates()), update(*args))[1]
    manager.step()
    assert used == [pytest.approx([0.75, 0.75, 0.075])] and rates() == pytest.approx([0.5, 0.5, 0.05])


def test_a_schedule_covers_a_group_added_to_mindspore_s_optimizer():
    a, b, c = (Parameter(ops.ones((2,), ms.float32), name=name) for name in "abc")
    optimizer = experimental.SGD([a], lr=1.0)
    schedule = Linear(optimizer, 1.0, 0, 4)
    optimizer.add_param_group({"params": [b], "lr": 1.0})
    optimizer.add_param_group({"params": [c], "lr": 0.1})
    schedule.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.75, 0.75, 0.075])


def test_a_parameter_of_another_optimizer_is_refused_at_the_next_pass():
    params = parameters()
    first, second = AdamOptimizer(params[:1]), AdamOptimizer(params[1:2])
    manager = OptimManager()
    manager.add_optimizer(first)
    manager.add_optimizer(second)
    first.add_param_group({"params": params[1:2]})
    with pytest.raises(ValueError, match="another optimizer has parameter prime already: it would be updated twice"):
        manager.backward(lambda: (params[0] ** 2).sum())


class Chain(bms.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (bms.DistributedParameter(np.full((4, 4), x, np.float32)) for x in (0.3, 0.4))

    def construct(self, x):
        return ops.matmul(ops.matmul(x, self.a), self.b)


def run(make: Callable, folder: Any, stop: int | None, resume: bool) -> list[np.ndarray]:
    """Trains `b`, and from step 2 on `a` too."""
    model = Chain()
    optimizer = make([model.parameter("b")], lr=0.01)
    manager = OptimManager(loss_scale=8.0)
    manager.add_optimizer(optimizer, NoDecay(optimizer, 0.01, 3, 9))
    checkpoints = bms.checkpoint.Checkpointer(folder, model, manager)
    if resume:
        optimizer.add_param_group({"params": [model.parameter("a")], "lr": 0.02})
        resumed = checkpoints.load()
        assert resumed is not None and resumed.step == 3
    for number in range(3 if resume else 0, stop or 6):
        if number == 2:
            optimizer.add_param_group({"params": [model.parameter("a")], "lr": 0.02})
        manager.zero_grad()
        manager.backward(lambda x: (model(x) ** 2).mean(), Tensor(numbers(3, 4, seed=number)))
        manager.clip_grad_norm(optimizer, 1.0)
        assert manager.step()
    if stop:
        checkpoints.save(stop, {})
    checkpoints.close()
    return [x.asnumpy() for p in optimizer.parameters for x in (p, *optimizer.state_of(p).values())]


@pytest.mark.parametrize("make", OURS)
def test_a_run_with_an_added_group_goes_on_from_its_checkpoint(make, tmp_path):
    whole = run(make, tmp_path / "whole", None, resume=False)
    run(make, tmp_path / "parts", 3, resume=False)
    again = run(make, tmp_path / "parts", None, resume=True)
    assert len(whole) == len(again) == 6 and all(np.array_equal(x, y) for x, y in zip(whole, again))
