"""A Block whose parameters are sharded along different axes: one group each, gathered and reduced among its own ranks."""

from __future__ import annotations

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, SingleEngine, World, use_world
from bmtrain_ms.zero import context_of

pytestmark = pytest.mark.usefixtures("single_world")


class Both(nn.Cell):
    """x W_shared W_own + b, the second of an expert."""

    def __init__(self) -> None:
        super().__init__()
        eye = np.eye(3, dtype=np.float32)
        self.own = bms.DistributedParameter(eye * 3, along="edp", name="own")
        self.shared = bms.DistributedParameter(eye * 2, name="shared")
        self.bias = bms.DistributedParameter(np.ones(3, np.float32), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(ops.matmul(x, self.shared), self.own) + self.bias


def world(**axes: int) -> World:
    return World(RecordingEngine(SimulatedEngine(1, 4)), Mesh(4, 1, **axes), prefetch=0)


@pytest.mark.parametrize(("use_checkpoint", "zero_level"), [(True, 2), (True, 3), (False, 2), (False, 3)])
def test_each_group_travels_among_its_own_ranks(use_checkpoint: bool, zero_level: int):
    here = world(ep=2)
    with use_world(here):
        block = bms.Block(Both(), use_checkpoint, zero_level)
        own, both = block.groups
        assert [p.name for p in own.params] == ["own"] and [p.name for p in both.params] == ["shared", "bias"]
        assert (own.engine.size, both.engine.size) == (2, 4) and both.engine is here.along("shard")
        x = Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
        params = block.trainable_params()
        out = block(x).asnumpy()
        _, grads = ms.value_and_grad(lambda x: block(x).sum(), None, params)(x)
    # what the simulated ranks give is what this one gives: only its own elements are real, and these are what is looked at
    assert out.shape == (2, 3)
    by_name = {p.name: (p, g) for p, g in zip(params, grads)}
    assert {name: g.size for name, (_, g) in by_name.items()} == {"own": 5, "shared": 3, "bias": 1}
    assert not by_name["bias"][1].asnumpy()[by_name["bias"][0].layout.owned_size :].any()


def test_an_experts_gradient_is_divided_by_all_data_parallel_ranks():
    """On one rank of ep=2 and edp=1 the sum over its tokens, by two."""
    with use_world(World(SimulatedEngine(0, 2), Mesh(2, 0, ep=2))):
        expert = bms.DistributedParameter(np.ones(3, np.float32), along="edp")
        group = bms.zero.ParamGroup([expert], "expert")
        (grad,) = group.reduce([0], [Tensor(np.array([2.0, 4.0, 6.0], np.float32))]).wait()
    assert expert.size == 3 and grad.asnumpy().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("use_checkpoint", "zero_level"), [(True, 2), (True, 3), (False, 2), (False, 3)])
def test_gradients_of_several_groups_equal_those_of_one(use_checkpoint: bool, zero_level: int):
    x = Tensor(np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32))
    block = bms.Block(Both(), use_checkpoint, zero_level)
    assert len(block.groups) == 2
    own, shared, bias = (getattr(block, name) for name in ("own", "shared", "bias"))
    value, (of_x, of_params) = ms.value_and_grad(lambda x: (block(x) ** 2).sum(), 0, [own, shared, bias])(x)

    def twin(x: Tensor, own: Tensor, shared: Tensor, bias: Tensor) -> Tensor:
        return ((ops.matmul(ops.matmul(x, shared), own) + bias) ** 2).sum()

    whole = [Tensor(p.asnumpy().reshape(p.full_shape)) for p in (own, shared, bias)]
    expected, grads = ms.value_and_grad(twin, (0, 1, 2, 3))(x, *whole)
    assert value.asnumpy() == expected.asnumpy()
    for found, right in zip((of_x, *of_params), grads):
        np.testing.assert_array_equal(found.asnumpy().reshape(-1), right.asnumpy().reshape(-1))


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_a_gather_that_fails_leaves_nothing_behind(use_checkpoint: bool, monkeypatch: pytest.MonkeyPatch):
    block = bms.Block(Both(), use_checkpoint)
    x = Tensor(np.ones((2, 3), np.float32))
    meter = context_of(block.own.world).pipeline.meter

    def fail(*_: object) -> None:
        raise ConnectionError("on purpose")

    broken = copy.copy(block.groups[1].engine)
    monkeypatch.setattr(broken, "all_gather", fail)
    monkeypatch.setattr(block.groups[1], "engine", broken)
    for run in (lambda: block(x), lambda: ms.value_and_grad(lambda x: block(x).sum(), 0)(x)):
        with pytest.raises(ConnectionError, match="on purpose"):
            run()
        assert meter.current == 0


def test_frozen_and_thawed_groups():
    block = bms.Block(Both())
    x = Tensor(np.ones((2, 3), np.float32))
    for frozen in ("own", "shared", "bias"):
        for p in block.get_parameters():
            p.requires_grad = p.name != frozen
        params = block.trainable_params()
        _, grads = ms.value_and_grad(lambda x: block(x).sum(), None, params)(x)
        assert [p.name for p in params] == [name for name in ("own", "shared", "bias") if name != frozen]
        assert all(np.abs(g.asnumpy()).max() > 0 for g in grads)


def test_a_copy_of_a_block_has_groups_of_its_own():
    block = bms.Block(Both())
    assert block.groups
    other = copy.deepcopy(block)
    assert [p.name for group in other.groups for p in group.params] == ["own", "shared", "bias"]
    assert all(a is not b for a, b in zip(block.get_parameters(), (p for group in other.groups for p in group.params)))


def test_parameters_of_two_worlds_in_one_block_are_refused():
    other = World(SingleEngine(), Mesh(1, 0))
    cell = Both()
    cell.bias = bms.DistributedParameter(np.ones(3, np.float32), in_world=other, name="bias")
    with pytest.raises(ValueError, match=r"parameters own and bias of one Block are in different worlds.*same in_world"):
        bms.Block(cell)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="sharded along shard or edp, not along 'tp'"):
        bms.DistributedParameter(np.ones(3, np.float32), along="tp")


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_groups_of_a_block_are_gathered_ahead_together(use_checkpoint: bool):
    """Both of the next Block's, while one computes: otherwise the second would wait behind this one's reduces."""
    here = World(RecordingEngine(SingleEngine()), Mesh(1, 0), prefetch=1)
    with use_world(here):
        blocks = bms.TransformerBlockList(bms.Block(Both(), use_checkpoint, 3) for _ in range(3))
        blocks.update_parameters_name("")
        params, x = blocks.trainable_params(), Tensor(np.ones((2, 3), np.float32))
        for _ in range(2):
            here.engine.events.clear()
            context_of(here).pipeline.meter.reset_peak()
            ms.value_and_grad(lambda x: blocks(x).sum(), None, params)(x)
    steps = "g0 g0 g1 g1 g2 g2 | g2 g2 g1 g1 g0 g0 r2 r2 r1 r1 r0 r0".replace("| ", "").split()
    operations = {"g": "all_gather", "r": "reduce_scatter"}
    assert here.engine.calls() == [(operations[step[0]], step[1]) for step in steps]
    assert context_of(here).pipeline.meter.peak == 2 * sum(group.full_nbytes for group in blocks[0].groups)


def test_a_group_whose_copy_stays_is_passed_over():
    """What lies behind it is gathered ahead once, though it is walked over again when a call ends."""
    here = World(RecordingEngine(SingleEngine()), Mesh(1, 0), prefetch=2)
    with use_world(here):
        blocks = bms.TransformerBlockList(bms.Block(Both()) for _ in range(4))
        blocks.update_parameters_name("")
        x = Tensor(np.ones((2, 3), np.float32))
        blocks(x)
        with context_of(here).pipeline.hold(blocks[1].groups):
            blocks(x)
            here.engine.events.clear()
            blocks(x)
    assert [label for _, label in here.engine.calls()] == ["0", "0", "2", "2", "3", "3"]
