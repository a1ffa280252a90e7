"""MindSpore's own optimizers under the manager: the bits of the same optimizer alone; errors, rates, state."""

from __future__ import annotations

import json
import pickle
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.experimental import optim as experimental

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import load_training
from bmtrain_ms.comm import World
from bmtrain_ms.lr_scheduler import Cosine, Linear, NoDecay
from bmtrain_ms.optim import AdamOptimizer, Driver, NativeOptimizer, OptimManager
from tests.helpers.native import MAKERS, SHAPES, Managed, Sum, alone, gradient, initial
from tests.helpers.training_v1 import save_training

pytestmark = pytest.mark.usefixtures("single_world")

EVERY = pytest.mark.parametrize("kind", MAKERS)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(value.tobytes() == b[name].tobytes() for name, value in a.items())


@EVERY
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["unscaled", "scaled"])
def test_the_bits_of_the_optimizer_alone(single_world, kind, scale):
    managed = Managed(MAKERS[kind], loss_scale=scale)
    managed.run(range(5))
    assert equal(managed.values(single_world), alone(MAKERS[kind], 5))
    assert not any(np.array_equal(value, initial(name)) for name, value in managed.values(single_world).items())


def test_an_overflow_is_skipped(single_world, capsys):
    managed = Managed(MAKERS["AdamWeightDecay"], loss_scale=64.0)
    managed.run(range(2))
    before, state = managed.values(single_world), managed.driver.state_dict()["tensors"]
    managed.manager.zero_grad()
    managed.manager.backward(managed.model, *(Tensor(np.full(shape, np.inf, np.float32)) for shape in SHAPES.values()))
    assert not managed.manager.step()
    assert equal(managed.values(single_world), before) and equal(managed.driver.state_dict()["tensors"], state)
    managed.run(range(2, 5))
    assert equal(managed.values(single_world), alone(MAKERS["AdamWeightDecay"], 5))
    assert managed.manager.loss_scale == 32.0 and "overflow" in capsys.readouterr().err


def test_next_to_one_of_ours(single_world):
    managed = Managed(MAKERS["SGD"], loss_scale=4.0)
    layer = bms.nn.Linear(2, 2)
    bms.init_parameters(layer)
    own = AdamOptimizer(layer.trainable_params(), lr=0.5)
    managed.manager.add_optimizer(own)
    before = layer.parameter("bias").asnumpy().copy()
    factors = [Tensor(gradient(name, 0)) for name in SHAPES]
    x = Tensor(np.ones((1, 2), np.float32))
    managed.manager.backward(lambda: managed.model(*factors) + layer(x).sum())
    managed.manager.step()
    assert equal(managed.values(single_world), alone(MAKERS["SGD"], 1))
    np.testing.assert_allclose(layer.parameter("bias").asnumpy(), before - 0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="another optimizer has parameter one already: it would be updated twice"):
        managed.manager.add_optimizer(AdamOptimizer(managed.params[:1]))


# Errors #


@pytest.mark.parametrize("kind", ["SGD", "experimental.AdamW"])
def test_every_parameter_needs_a_gradient(single_world, kind):
    managed = Managed(MAKERS[kind])
    managed.params[0].requires_grad = managed.params[2].requires_grad = False
    before = managed.values(single_world)
    name = kind.rpartition(".")[2]
    with pytest.raises(
        ValueError,
        match=rf"^{name} updates all of its parameters, and one has no gradient \(as have 1 others\); give it those that are "
        r"trained, or use bmtrain_ms\.optim\.AdamOptimizer$",
    ):
        managed.run(range(1))
    assert equal(managed.values(single_world), before)


def test_sixteen_bits_are_warned_of():
    model = Sum(ms.float16)
    model.check_names_and_refresh_name()
    manager = OptimManager(loss_scale=8.0)
    optimizer = nn.SGD(model.trainable_params(), 0.5)
    with pytest.warns(
        UserWarning,
        match=r"^SGD keeps Float16 parameters without a float32 copy: small updates are lost to rounding\. Use "
        r"bmtrain_ms\.optim\.AdamOptimizer$",
    ) as seen:
        manager.add_optimizer(optimizer)
    assert [w.filename for w in seen] and len(seen) == 1
    manager.backward(model, *(Tensor(gradient(name, 0).astype(np.float16)) for name in SHAPES))
    manager.step()
    for name, p in zip(SHAPES, model.trainable_params()):
        expected = initial(name) - 0.5 * gradient(name, 0)
        assert p.dtype == ms.float16 and np.array_equal(p.asnumpy().reshape(SHAPES[name]), expected.astype(np.float16))


@pytest.mark.parametrize("kind", ["AdamWeightDecay", "Momentum", "experimental.AdamW"])
def test_loading_after_the_first_step(single_world, kind):
    """MindSpore's compiled optimizers would change memory that is no parameter's any more."""
    managed = Managed(MAKERS[kind])
    managed.params[1].copy_full(initial("prime"))  # before it, nothing is compiled
    managed.run(range(2))
    managed.params[1].copy_full(initial("prime"))
    with pytest.raises(
        RuntimeError,
        match=r"^parameter prime \(and 0 others\) got other memory after \w+'s first step, as loading does, and MindSpore's "
        r"optimizers go on with the old; load before the first step, or make a new optimizer and manager$",
    ):
        managed.run(range(1))
    assert np.array_equal(managed.values(single_world)["prime"], initial("prime"))
    managed.optimizer = MAKERS[kind](managed.params)
    managed.manager = OptimManager()
    managed.manager.add_optimizer(managed.optimizer)
    for name, p in zip(SHAPES, managed.params):
        p.copy_full(initial(name))
    managed.run(range(3))
    assert equal(managed.values(single_world), alone(MAKERS[kind], 3))


@pytest.mark.parametrize(
    "thing, text",
    [
        (
            object(),
            r"^object is neither an optimizer of bmtrain_ms nor one of MindSpore's: it lacks parameters, step, .*",
        ),
        (nn.Cell, r"^type is neither .*: it lacks .*"),
        ({}, r"^dict is neither .*"),
    ],
    ids=["object", "class", "dict"],
)
def test_what_is_no_optimizer(thing, text):
    manager = OptimManager()
    with pytest.raises(TypeError, match=text):
        manager.add_optimizer(thing)
    assert not manager.optimizers and not manager.drivers


def test_what_works_like_ours_is_stepped_as_ours(tmp_path):
    """Its states and its schedule's are taken as they are; a Checkpointer would save a part of it, and says what it lacks."""

    class Descent:
        def __init__(self, params: list[Parameter]):
            self.parameters, self.seen = params, []

        def step(self, grads: list[Tensor], scale: float = 1.0) -> None:
            self.seen.append([float((grad * scale).sum().asnumpy()) for grad in grads])

        def state_dict(self, gather: bool = False, tensors: bool = True) -> dict[str, Any]:
            return {"steps": len(self.seen)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = [[]] * state["steps"]

    class Count:
        def __init__(self, optimizer: Any):
            self.count = 0

        def step(self) -> None:
            self.count += 1

        def state_dict(self) -> int:
            return self.count

        def load_state_dict(self, state: int) -> None:
            self.count = state

    managed = Managed(Descent, Count, loss_scale=16.0)
    managed.run(range(1))
    assert isinstance(managed.driver, Driver) and managed.manager.parameters == managed.params
    assert managed.manager.rate is None
    assert managed.optimizer.seen == [[float(gradient(name, 0).sum()) for name in SHAPES]]
    state = managed.manager.state_dict()
    assert (state["optimizers"], state["lr_schedulers"]) == ([{"steps": 1}], [1])
    again = Managed(Descent, Count, loss_scale=16.0)
    again.manager.load_state_dict(state)
    assert again.optimizer.seen == [[]] and again.manager.lr_schedulers[0].count == 1
    with pytest.raises(TypeError, match=r"^Descent does not say which tensors are its state, .* or save manager\.state_dict\(\)"):
        bms.checkpoint.Checkpointer(tmp_path, managed.model, managed.manager).save(1)


# Rates #


def rates(optimizer: Any) -> list[float]:
    if isinstance(optimizer, nn.Optimizer):
        return [float(x.asnumpy()) for x in (optimizer.learning_rate if optimizer.is_group_lr else [optimizer.learning_rate])]
    return [float(group["lr"].asnumpy()) for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", ["AdamWeightDecay", "Momentum", "experimental.AdamW", "experimental.SGD"])
def test_a_schedule_sets_the_rate(single_world, kind):
    """From construction on; the optimizer's own rate does not matter."""
    managed = Managed(MAKERS[kind], lambda optimizer: Linear(optimizer, 0.25, 2, 6))
    seen = [rates(managed.optimizer)]
    for step in range(5):
        managed.run(range(step, step + 1))
        seen.append(rates(managed.optimizer))
    assert seen == [[0.0], [0.125], [0.25], [0.1875], [0.125], [0.0625]]

    def set_rate(optimizer: Any, step: int) -> None:
        target = optimizer.learning_rate if isinstance(optimizer, nn.Optimizer) else optimizer.param_groups[0]["lr"]
        ops.assign(target, Tensor(seen[step][0], ms.float32))

    assert equal(managed.values(single_world), alone(MAKERS[kind], 5, set_rate))


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.3, 7e-5])
@pytest.mark.parametrize("make", [experimental.AdamW, experimental.SGD])
def test_the_optimizers_rate_is_no_groups_own(make, rate):
    """As a float32 it is another number than the default that it was made from."""
    optimizer = make([Parameter(Tensor(np.ones(2, np.float32)), name="p")], lr=rate)
    NoDecay(optimizer, 0.5, 0, 10)
    assert rates(optimizer) == [0.5]


@pytest.mark.parametrize("kind, own, default", [("groups", 0, 1), ("experimental groups", 0, 1)])
def test_a_groups_own_rate_is_its_peak(kind, own, default):
    params = [Parameter(Tensor(initial(name)), name=name) for name in SHAPES]
    optimizer = MAKERS[kind](params)
    schedule = Cosine(optimizer, 0.1, 2, 4)
    for share in (0.0, 0.5, 1.0, 0.5, 0.0):
        seen = rates(optimizer)
        assert (seen[own], seen[default]) == pytest.approx((0.5 * share, 0.1 * share), rel=1e-6, abs=1e-9)
        schedule.step()


@pytest.mark.parametrize("kind", ["groups", "experimental groups", "Momentum", "experimental.AdamW"])
def test_a_second_schedule_finds_the_rates_that_were_given(kind):
    """The first has written over them."""
    params = [Parameter(Tensor(initial(name)), name=name) for name in SHAPES]
    optimizer = MAKERS[kind](params)
    own = 0.5 if "groups" in kind else None
    NoDecay(optimizer, 0.3, 10, 20)
    assert set(rates(optimizer)) == {0.0}
    schedule = NoDecay(optimizer, 0.2, 2, 10)
    schedule.step()
    seen = rates(optimizer)
    assert seen[-1] == pytest.approx(0.1) or seen[0] == pytest.approx(0.1)
    assert {round(x, 6) for x in seen} == ({0.1, round(own / 2, 6)} if own else {0.1})


@pytest.mark.parametrize("default", [0.1, 0.7])
def test_groups_without_a_rate_follow_the_schedule(default):
    """Whatever the optimizer's own rate is."""
    params = [Parameter(Tensor(initial(name)), name=name) for name in SHAPES]
    optimizer = nn.Adam([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], default)
    NoDecay(optimizer, 0.2, 0, 10)
    assert rates(optimizer) == pytest.approx([0.5, 0.2, 0.2])


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda params: nn.Lamb(params, 0.1), "Lamb needs whole parameters, and one is sharded; use an optimizer"),
        (lambda params: nn.LARS(nn.Momentum(params, 0.1, 0.9)), "LARS needs whole parameters, and one is sharded"),
        (lambda params: nn.AdaFactor(params, 0.1, relative_step=False), "AdaFactor needs whole parameters, and one is sharded"),
        (
            lambda params: nn.Momentum([{"params": params, "grad_centralization": True}], 0.1, 0.9),
            "grad_centralization needs whole parameters, and one is sharded",
        ),
    ],
    ids=["Lamb", "LARS", "AdaFactor", "centralization"],
)
def test_what_needs_whole_parameters_is_refused(single_world, make, text):
    """Norms and means over a shard are not those of the parameter; also at one rank, where a shard is flat."""
    model = Sum()
    with pytest.raises(ValueError, match=text):
        OptimManager().add_optimizer(make(model.trainable_params()))
    whole = [Parameter(Tensor(initial(name)), name=name) for name in SHAPES]
    OptimManager().add_optimizer(make(whole))


@pytest.mark.parametrize(
    "make",
    [
        lambda params: nn.SGD(params, nn.ExponentialDecayLR(0.1, 0.9, 4)),
        lambda params: nn.Momentum(params, [0.1, 0.2, 0.3], 0.9),
        lambda params: nn.Adam([{"params": params, "lr": nn.ExponentialDecayLR(0.1, 0.9, 4)}]),
    ],
    ids=["schedule", "list", "group"],
)
def test_an_optimizer_with_a_schedule_of_its_own(single_world, make):
    """It cannot be driven, but it can be used."""
    managed = Managed(make)
    name = type(managed.optimizer).__name__
    with pytest.raises(TypeError, match=rf"^this {name} has a schedule of its own; give it a constant learning_rate$"):
        NoDecay(managed.optimizer, 0.1, 0, 10)
    managed.run(range(3))
    assert equal(managed.values(single_world), alone(make, 3))


def test_a_schedule_needs_an_optimizer():
    with pytest.raises(TypeError, match=r"^object has no param_groups: it is not an optimizer that a schedule can drive$"):
        NoDecay(object(), 0.1, 0, 10)


# State #


@EVERY
@pytest.mark.parametrize("gather", [False, True], ids=["shards", "whole"])
def test_state_round_trip(single_world, kind, gather):
    """5 steps, the state into a new optimizer with another rate, 5 more: bit-equal to 10."""
    managed, other = Managed(MAKERS[kind], loss_scale=64.0), Managed(MAKERS[kind], loss_scale=2.0)
    managed.run(range(5))
    state = pickle.loads(pickle.dumps(managed.manager.state_dict(gather_opt=gather)))
    json.dumps(managed.manager.state_dict(tensors=False))
    copy(managed, other)
    for _, set_rate in bms.lr_scheduler.group_rates(other.optimizer):
        set_rate(77.0)  # restored
    other.manager.load_state_dict(state)
    managed.run(range(5, 10))
    other.run(range(5, 10))
    assert equal(other.values(single_world), managed.values(single_world))
    assert equal(other.driver.state_dict()["tensors"], managed.driver.state_dict()["tensors"])


def copy(source: Managed, target: Managed) -> None:
    for p, q in zip(source.params, target.params):
        q.copy_full(p.asnumpy().reshape(q.full_shape).copy())


@pytest.mark.parametrize("kind", ["AdamWeightDecay", "Adam", "experimental.AdamW", "groups"])
def test_training_checkpoint(single_world, tmp_path, kind):
    managed, other = Managed(MAKERS[kind]), Managed(MAKERS[kind])
    managed.run(range(5))
    save_training(tmp_path / "file", managed.model, managed.manager, {"step": 5})
    assert load_training(tmp_path / "file", other.model, other.manager) == {"step": 5}
    managed.run(range(5, 8))
    other.run(range(5, 8))
    assert equal(other.values(single_world), managed.values(single_world))


def test_the_state_of_another_optimizer():
    sgd, adam, own = Managed(MAKERS["SGD"]), Managed(MAKERS["Adam"]), AdamOptimizer([Parameter(Tensor([1.0]), name="p")])
    sgd.run(range(1))
    before = sgd.driver.state_dict()["tensors"]
    with pytest.raises(ValueError, match=r"^the state is that of Adam, this is a SGD$"):
        sgd.driver.load_state_dict(adam.driver.state_dict())
    with pytest.raises(ValueError, match=r"^the state is that of an optimizer of bmtrain_ms, this is a SGD$"):
        sgd.driver.load_state_dict(own.state_dict())
    fewer = NativeOptimizer(nn.SGD(Managed(MAKERS["SGD"]).params[:1], 0.1)).state_dict()
    with pytest.raises(ValueError, match=r"does not fit; missing: \['accum\.matrix', 'accum\.prime', .*\], unexpected: \[\]"):
        sgd.driver.load_state_dict(fewer)
    assert equal(sgd.driver.state_dict()["tensors"], before)
    sgd.driver.load_state_dict(fewer, strict=False)
    after = sgd.driver.state_dict()["tensors"]
    assert equal(after, {name: fewer["tensors"].get(name, before[name]) for name in before})
    assert not np.array_equal(after["accum.one"], before["accum.one"])


def test_moments_are_sharded_as_the_parameters(single_world: World):
    managed = Managed(MAKERS["AdamWeightDecay"])
    tensors = managed.driver.state_tensors()
    sharded = {name for name, (like, _) in tensors.items() if like is not None}
    assert sharded == {f"{kind}.{name}" for kind in ("adam_m", "adam_v") for name in SHAPES}
    assert all(like.full_shape == SHAPES[name.partition(".")[2]] for name, (like, _) in tensors.items() if like is not None)
    assert not {p.name for p in managed.params} & set(tensors)


class Counting(nn.SGD):
    """Somebody's own, which does something around each call."""

    calls = 0

    def __call__(self, *args):
        self.calls += 1
        return super().__call__(*args)


def test_a_class_s_own_call_is_called():
    layer = bms.nn.Linear(2, 1)
    optimizer, manager = Counting(layer.trainable_params(), 0.1), bms.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for _ in range(2):
        manager.zero_grad()
        manager.backward(lambda x: layer(x).sum(), Tensor([[1.0, 2.0]]))
        manager.step()
    assert optimizer.calls == 2
