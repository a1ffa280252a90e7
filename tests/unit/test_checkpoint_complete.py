"""What is trained must be what is saved: parameters of other models, of one name, replaced ones; and buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, load_training
from bmtrain_ms.checkpoint.run_state import checked_state, collected_state
from bmtrain_ms.files.errors import CheckpointError
from bmtrain_ms.nn import Router, RouterConfig, Routing, update_router_bias
from bmtrain_ms.optim import AdamOptimizer, OptimManager

pytestmark = pytest.mark.usefixtures("single_world")

X = Tensor(np.ones((2, 4), np.float32))


class Layer(bms.DistributedModule):
    """Its parameter has the same name in every model of this class."""

    def __init__(self, value: float = 0.1):
        super().__init__()
        self.weight = bms.DistributedParameter(np.full((4, 4), value, np.float32))

    def construct(self, x: Any) -> Any:
        return ops.matmul(x, self.weight)


def net(value: float = 0.1) -> Any:
    return bms.TransformerBlockList([bms.Block(Layer(value))])


def managed(*models: Any) -> OptimManager:
    manager = OptimManager()
    for model in models:
        manager.add_optimizer(AdamOptimizer(model.trainable_params(), lr=0.01))
    return manager


@pytest.mark.parametrize("name", ["0.weight", "other.weight"])
def test_another_model_s_parameters_are_refused_by_name(tmp_path, name):
    """A manager that trains two models, e.g. a generator and a discriminator, with a checkpointer for one of them."""
    first, second = net(), net()
    (p,) = second.trainable_params()
    p.name = name
    manager = managed(first, second)
    text = f"the manager trains parameters that the model does not have, which would not be saved: {name}"
    hint = r" \(its 0.weight is another one: replaced since .*\)" if name == "0.weight" else ""
    with pytest.raises(ValueError, match=text + hint + r"\. Give one Cell that has all that is trained, e\.g\. nn\.CellList"):
        Checkpointer(tmp_path, first, manager)
    with pytest.raises(ValueError, match=text):
        load_training(tmp_path / "file", first, manager)
    assert not list(tmp_path.iterdir())


def test_two_models_in_one_cell_come_back(tmp_path):
    def make() -> tuple[Any, OptimManager]:
        both = nn.CellList([net(0.1), net(0.2)])
        return both, managed(*both)

    both, manager = make()
    manager.backward(lambda: both[1](both[0](X)).sum())
    manager.step()
    values = [p.asnumpy().copy() for p in both.get_parameters()]
    checkpoints = Checkpointer(tmp_path, both, manager)
    checkpoints.save(1)
    checkpoints.close()
    other, again = make()
    assert Checkpointer(tmp_path, other, again).load() is not None
    assert all(np.array_equal(p.asnumpy(), value) for p, value in zip(other.get_parameters(), values))
    assert [again.drivers[i].state_dict(tensors=False)["steps"] for i in range(2)] == [[1], [1]]


def test_two_parameters_of_one_name_are_refused(tmp_path):
    class Both(nn.Cell):
        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.first, self.second = nn.Dense(2, 2), nn.Dense(2, 2)

    model = Both()
    with pytest.raises(ValueError, match=r"two parameters of the model are called weight.*check_names_and_refresh_name\(\)"):
        Checkpointer(tmp_path, model, OptimManager())
    model.check_names_and_refresh_name()
    Checkpointer(tmp_path, model, managed(model))


def test_an_optimizer_that_comes_later_is_looked_at(tmp_path):
    model, other = net(), net()
    manager = managed(model)
    checkpoints = Checkpointer(tmp_path, model, manager)
    checkpoints.save(1)
    manager.add_optimizer(AdamOptimizer(other.trainable_params()))
    for call in (lambda: checkpoints.save(2), lambda: checkpoints.save(2, wait=False), checkpoints.load):
        with pytest.raises(ValueError, match="the manager trains parameters that the model does not have"):
            call()
    checkpoints.close()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000001"]


def test_a_parameter_that_was_replaced_is_refused(tmp_path):
    """The optimizer goes on with the old one, which nobody computes with."""
    model = nn.Dense(2, 2)
    manager = managed(model)
    checkpoints = Checkpointer(tmp_path, model, manager)
    model.weight = Parameter(model.weight.clone(), name="weight")
    text = r"would not be saved: weight \(its weight is another one: replaced since the optimizer was made"
    with pytest.raises(ValueError, match=text):
        checkpoints.save(1)
    with pytest.raises(ValueError, match=text):
        Checkpointer(tmp_path, model, manager)
    assert not list(tmp_path.iterdir())


def test_frozen_parameters_and_buffers_come_back(tmp_path):
    """Also those of `register_buffer`, where MindSpore has it."""

    class Model(nn.Cell):
        def __init__(self, value: float):
            super().__init__()
            self.layer = nn.Dense(2, 2)
            self.mean = Parameter(Tensor(np.full(3, value, np.float32)), requires_grad=False)
            if hasattr(self, "register_buffer"):
                self.register_buffer("seen", Tensor(np.full(2, value, np.float32)))
                self.register_buffer("scratch", Tensor(np.full(2, value, np.float32)), persistent=False)

    def values(model: Any) -> list[float]:
        return [float(getattr(model, name).asnumpy()[0]) for name in ("mean", "seen", "scratch") if hasattr(model, name)]

    saved, other = Model(1.0), Model(2.0)
    Checkpointer(tmp_path, saved, managed(saved)).save(1)
    Checkpointer(tmp_path, other, managed(other)).load()
    assert values(other) == [1.0, 1.0, 2.0][: len(values(other))]
    bms.save(saved, Path(tmp_path, "whole"))
    third = Model(3.0)
    bms.load(third, Path(tmp_path, "whole"))
    assert values(third) == [1.0, 1.0, 3.0][: len(values(third))]


class Choosing(bms.DistributedModule):
    """A router whose counts `update_router_bias` waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Router(4, 4, 2, RouterConfig("sigmoid", bias=True))

    def construct(self, x: Any) -> Any:
        return self.gate(x, Routing()).weights[:, 0].sum()


def counted() -> tuple[Any, OptimManager, Any]:
    model = Choosing()
    bms.init_parameters(model)
    return model, managed(model), model.gate


def test_what_a_router_has_counted_comes_back(tmp_path):
    """Also between a step and what moves the bias by it; a load forgets what was counted here."""
    model, manager, router = counted()
    manager.backward(model, X)
    checkpoints = Checkpointer(tmp_path, model, manager)
    checkpoints.save(0)
    manager.step()
    checkpoints.save(1)
    update_router_bias(model)
    checkpoints.save(2)
    checkpoints.close()
    other, again, its = counted()
    loads = Checkpointer(tmp_path, other, again)
    loads.load(tmp_path / "step-00000000")
    assert its.seen().sum() == 4
    loads.load(tmp_path / "step-00000001")
    update_router_bias(other)
    assert np.array_equal(its.e_score_correction_bias.asnumpy(), router.e_score_correction_bias.asnumpy())
    assert its.e_score_correction_bias.asnumpy().any()
    again.zero_grad()
    again.backward(other, X)
    loads.load(tmp_path / "step-00000002")
    assert its.counts() is None and not its.seen().any()


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({}, "its counts of routers are no list"),
        ([{"gate.weight": {"step": -1, "own": [0] * 4, "all": [0] * 4}}], "counts of router gate.weight are of no step"),
        ([{"gate.weight": {"step": 0, "own": [0] * 3, "all": [0] * 4}}], "are no numbers of its 4 experts"),
        ([{"gate.weight": {"step": 0, "own": [0] * 4, "all": [0.5] * 4}}], "are no numbers of its 4 experts"),
        ([{"gate.weight": {"step": 0, "own": [0] * 4}}], "has no 'all'"),
    ],
)
def test_counts_that_are_none_are_refused(single_world, counts, text):
    model, manager, router = counted()
    manager.backward(model, X)
    before = router.counts()
    state = json.loads(json.dumps(collected_state(model, manager, single_world, 1, {}, True)))
    state["routers"] = counts
    with pytest.raises(CheckpointError, match=text):
        checked_state(state, model, manager, single_world, True, "it")
    assert router.counts() == before


def test_a_checkpoint_of_before_routers_were_saved_is_loaded(single_world):
    model, manager, router = counted()
    state = json.loads(json.dumps(collected_state(model, manager, single_world, 1, {}, True)))
    del state["routers"]
    manager.backward(model, X)
    checked_state(state, model, manager, single_world, True, "it").restore(manager, single_world, "own")
    assert router.counts() is None
