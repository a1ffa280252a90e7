"""Which collectives a step issues, in which order, and how much gathered memory is alive: exact lists."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SingleEngine, World, use_world
from bmtrain_ms.comm.wrappers import Around
from bmtrain_ms.compat.autograd import no_grad
from bmtrain_ms.compat.runtime import from_host, overwrite
from bmtrain_ms.model_center.layer import RMSNorm
from bmtrain_ms.zero import context_of
from tests.helpers.models import WIDTH, Dense, Residual

GATHER, REDUCE = "all_gather", "reduce_scatter"


@contextmanager
def recording_world(single_world, prefetch=1):
    world = World(RecordingEngine(SingleEngine()), Mesh(1, 0), prefetch=prefetch)
    with use_world(world):
        yield world


class Chain(nn.Cell):
    def __init__(self, layers, use_checkpoint=True, zero_level=3, width=WIDTH):
        super().__init__()
        self.layers = bms.TransformerBlockList(bms.Block(Residual(width=width), use_checkpoint, zero_level) for _ in range(layers))

    def construct(self, x):
        return (self.layers(x) ** 2).mean()


def one_step(model, x):
    return ms.value_and_grad(model, None, model.trainable_params())(x)


def x_of(width=WIDTH):
    return Tensor(np.random.RandomState(0).randn(4, width).astype(np.float32))


def test_zero3_two_gathers_and_one_reduce_per_block(single_world):
    for use_checkpoint in (True, False):
        with recording_world(single_world, prefetch=0) as world:
            model = Chain(3, use_checkpoint)
            for _ in range(2):
                world.engine.events.clear()
                one_step(model, x_of())
                assert world.engine.calls() == [
                    (GATHER, "layers.0"),
                    (GATHER, "layers.1"),
                    (GATHER, "layers.2"),
                    (GATHER, "layers.2"),
                    (REDUCE, "layers.2"),
                    (GATHER, "layers.1"),
                    (REDUCE, "layers.1"),
                    (GATHER, "layers.0"),
                    (REDUCE, "layers.0"),
                ]


def test_zero3_with_prefetch_gathers_the_next_block_before_it_is_needed(single_world):
    for use_checkpoint in (True, False):
        with recording_world(single_world, prefetch=1) as world:
            model = Chain(3, use_checkpoint)
            one_step(model, x_of())  # learns the order
            world.engine.events.clear()
            one_step(model, x_of())
            assert world.engine.calls() == [
                (GATHER, "layers.0"),
                (GATHER, "layers.1"),
                (GATHER, "layers.2"),
                (GATHER, "layers.2"),
                (GATHER, "layers.1"),
                (GATHER, "layers.0"),  # before the reduce, in the room that its Block's copy had
                (REDUCE, "layers.2"),
                (REDUCE, "layers.1"),
                (REDUCE, "layers.0"),
            ]


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_a_large_reduce_does_not_keep_the_gathers_of_the_next_blocks_waiting(single_world, use_checkpoint):
    """That of an output projection, which is gathered outside of a Block and reduced first."""

    class Headed(nn.Cell):
        def __init__(self):
            super().__init__()
            self.chain, self.head = Chain(3, use_checkpoint), bms.nn.Linear(WIDTH, 3 * WIDTH, bias=False)

        def construct(self, x):
            return (self.head(self.chain.layers(x)) ** 2).mean()

    with recording_world(single_world, prefetch=1) as world:
        model = Headed()
        one_step(model, x_of())
        world.engine.events.clear()
        one_step(model, x_of())
        steps = [f"{op} {label}" for op, label in world.engine.calls() if op in (GATHER, REDUCE)]
        g, r, layer = f"{GATHER} ", f"{REDUCE} ", "chain.layers."
        assert steps[3:] == [
            *(g + "head.weight", g + layer + "2", g + layer + "1"),
            *(r + "head.weight", g + layer + "0"),
            *(r + layer + "2", r + layer + "1", r + layer + "0"),
        ]
        sizes = [sum(p.full_size * 4 for p in part.get_parameters()) for part in (model.chain.layers[0], model.head)]
        assert context_of(world).pipeline.meter.peak == sum(sizes)  # in forward; it does not grow


class Waiting(Around):
    """Notes which reduces are issued, and waited for."""

    def __init__(self, inner, events):
        super().__init__(inner)
        self.events = events

    def _around(self, op, label, tensors, received, work):
        if op != REDUCE:
            return work
        self.events.append(f"{label}")
        wait = work.wait
        work.wait = lambda: (self.events.append(f"wait {label}"), wait())[1]
        return work

    def _rewrap(self, inner):
        return Waiting(inner, self.events)


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_reduces_stay_in_flight_that_are_little_larger_than_the_largest(single_world, use_checkpoint):
    class Headed(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layers = bms.TransformerBlockList(bms.Block(Residual(), use_checkpoint) for _ in range(4))
            self.norm, self.head = RMSNorm(WIDTH), bms.nn.Linear(WIDTH, 5 * WIDTH, bias=False)

        def construct(self, x):
            return (self.head(self.norm(self.layers(x))) ** 2).mean()

    events = []
    with use_world(World(Waiting(SingleEngine(), events), Mesh(1, 0))):
        model = Headed()
        one_step(model, x_of())
        events.clear()
        one_step(model, x_of())
    three, two, one, zero = (f"layers.{i}" for i in (3, 2, 1, 0))
    first = ["head.weight", "norm.weight", three, "wait head.weight", two, one, zero]  # 245, 7 and three times 84 parameters
    assert events == [*first, "wait norm.weight", *(f"wait {layer}" for layer in (three, two, one, zero))]


def test_zero2_one_gather_and_one_reduce_per_block(single_world):
    for use_checkpoint in (True, False):
        with recording_world(single_world) as world:
            model = Chain(3, use_checkpoint, zero_level=2)
            for _ in range(2):
                world.engine.events.clear()
                one_step(model, x_of())
                assert world.engine.calls() == [
                    *((GATHER, f"layers.{i}") for i in (0, 1, 2)),
                    *((REDUCE, f"layers.{i}") for i in (2, 1, 0)),
                ]
            assert context_of(world).pipeline.meter.current == 0  # dropped before the optimizer's step


def test_evaluation_gathers_once_per_block(single_world):
    with recording_world(single_world) as world:
        model = Chain(3)
        for _ in range(3):
            world.engine.events.clear()
            model(x_of())
            assert world.engine.calls() == [(GATHER, f"layers.{i}") for i in (0, 1, 2)]


def test_a_group_travels_in_one_collective(single_world):
    with recording_world(single_world) as world:
        model = Chain(1)
        one_step(model, x_of())
        assert [event.tensors for event in world.engine.events] == [6, 6, 6]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_gathered_bytes_never_exceed_one_plus_prefetch_blocks(single_world, prefetch, use_checkpoint):
    with recording_world(single_world, prefetch) as world:
        model = Chain(8, use_checkpoint)
        block = sum(p.full_size * 4 for p in model.layers[0].get_parameters())
        pipeline = context_of(world).pipeline
        for _ in range(3):
            one_step(model, x_of())
        assert pipeline.meter.peak == (1 + prefetch) * block
        assert pipeline.meter.current == 0


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_resident_memory_of_gathered_blocks_is_bounded(single_world, use_checkpoint):
    """Not only by our own accounts: pages of 8 blocks of 8 MiB, gathered one at a time, must not stay."""
    width = 1024

    class Wide(nn.Cell):
        def __init__(self):
            super().__init__()
            self.big = bms.nn.Linear(width, 2 * width, bias=False)
            self.small = bms.nn.Linear(2 * width, 1, bias=False)

        def construct(self, x):
            return x + self.small(self.big(x)).mean()

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    with recording_world(single_world, prefetch=0):
        model = bms.TransformerBlockList(bms.Block(Wide(), use_checkpoint) for _ in range(8))
        x = x_of(width)
        seen = []

        class Spy(nn.Cell):
            def construct(self, x):
                x = model(x)
                seen.append(resident())
                return x.mean()

        run = ms.value_and_grad(Spy(), None, model.trainable_params()[-1:])
        run(x)
        before = resident()
        run(x)
        assert seen[-1] - before < 4 * 8  # one block gathered, and slack; eight would be 64


def test_changed_order_is_noticed_and_costs_only_a_gather(single_world):
    with recording_world(single_world) as world:
        blocks = [bms.Block(Residual()) for _ in range(3)]
        for i, block in enumerate(blocks):
            block.update_parameters_name(f"{i}.")
        params = [p for block in blocks for p in block.trainable_params()]

        def run(order):
            def forward(x):
                for i in order:
                    x = blocks[i](x)
                return (x**2).mean()

            world.engine.events.clear()
            value, grads = ms.value_and_grad(forward, None, params)(x_of())
            return value.asnumpy(), [g.asnumpy() for g in grads], world.engine.calls()

        for block in blocks:
            bms.init_parameters(block)
        run((0, 1, 2))
        value, grads, calls = run((0, 2, 1))
        gathers = [label for op, label in calls if op == GATHER]
        #  wanted:     0       2       1      | 1       2            0
        #  for nothing:   1       2       2      0       1    2
        assert gathers == ["0", "1", "2", "2", "1", "2", "1", "0", "2", "1", "2", "0"]
        assert [c for c in calls if c[0] == REDUCE] == [(REDUCE, "1"), (REDUCE, "2"), (REDUCE, "0")]
        again = run((0, 2, 1))
        np.testing.assert_array_equal(again[0], value)
        for a, b in zip(again[1], grads):
            np.testing.assert_array_equal(a, b)
        assert [label for op, label in again[2] if op == GATHER] == ["0", "2", "1", "1", "2", "0"]  # learnt
        agreed = "{} written since it was gathered"  # outside of a list anybody may write between two Blocks
        assert [label for op, label in again[2] if op == "all_reduce"] == [agreed.format(2), agreed.format(1)]
        assert context_of(world).pipeline.meter.peak <= 2 * sum(p.full_size * 4 for p in blocks[0].get_parameters())


def test_nothing_is_gathered_ahead_across_an_update(single_world):
    """The first block of a sequence is gathered when it is called: the parameters may have changed since the last one."""
    with recording_world(single_world) as world:
        model = Chain(2)
        bms.init_parameters(model)
        for _ in range(2):
            one_step(model, x_of())
        before = model(x_of()).asnumpy()
        world.engine.events.clear()
        for p in model.get_parameters():
            p.copy_full(p.gather().asnumpy() * 2)
        assert not np.array_equal(model(x_of()).asnumpy(), before)
        doubled = model(x_of()).asnumpy()
        np.testing.assert_array_equal(model(x_of()).asnumpy(), doubled)


def test_buffers_are_recycled(single_world):
    for use_checkpoint, expected in ((True, 2), (False, None)):
        with recording_world(single_world) as world:
            model = Chain(8, use_checkpoint)
            for _ in range(3):
                one_step(model, x_of())
            counts = list(context_of(world).pool.sizes().values())
            assert counts == [2] if expected else counts[0] <= 3, counts


def test_a_view_that_somebody_keeps_is_not_overwritten(single_world):
    with recording_world(single_world):
        blocks = [bms.Block(Residual()) for _ in range(4)]
        for i, block in enumerate(blocks):
            block.update_parameters_name(f"{i}.")
            bms.init_parameters(block)

        class Leak(nn.Cell):
            def __init__(self):
                super().__init__()
                self.dense = blocks[0].inner.a

            def construct(self, x):
                return x * 1.0, self.dense.weight

        leak = bms.Block(Leak())
        expected = leak.dense.parameter("weight").asnumpy().copy()
        _, kept = leak(x_of())
        for block in blocks:
            block(x_of())
        np.testing.assert_array_equal(kept.asnumpy().reshape(-1), expected)


# What is gathered ahead is never old #


def evaluate(model, x):
    with no_grad():
        return float(model(x).asnumpy().sum())


class Headed(nn.Cell):
    """A parameter outside of blocks, before and behind them."""

    def __init__(self):
        super().__init__()
        self.before, self.layers, self.behind = Dense(WIDTH, WIDTH, ms.float32), Chain(2).layers, Dense(WIDTH, 3, ms.float32)

    def construct(self, x):
        return self.behind(self.layers(self.before(x)))


@pytest.mark.parametrize("write", ["set_shard", "copy_full", "set_data", "init_parameters", "load"])
def test_parameters_written_between_evaluations(single_world, write, tmp_path):
    """Two models in turn, so that the first group of one follows the last group of the other."""
    with recording_world(single_world, prefetch=2):
        one, other, fresh = Headed(), Headed(), Headed()
        for model in (one, other):
            bms.init_parameters(model)
        x = x_of()
        for _ in range(3):
            evaluate(one, x)
            evaluate(other, x)
            evaluate(one, x)  # gathers ahead what comes next
            for p in other.get_parameters():
                values = np.full(p.full_shape, 0.1 * (1 + p.full_size % 3), np.float32)
                if write == "set_shard":
                    p.set_shard(from_host(values.reshape(-1).copy()))
                elif write == "copy_full":
                    p.copy_full(values)
                elif write == "set_data":
                    p.set_data(from_host(values.reshape(-1).copy()))
            if write == "load":
                bms.save(one, tmp_path / "one.safetensors")
                bms.load(other, tmp_path / "one.safetensors")
            elif write == "init_parameters":
                bms.init_parameters(other)
            for p, q in zip(fresh.get_parameters(), other.get_parameters()):
                p.set_shard(from_host(q.asnumpy().copy()))
            assert evaluate(other, x) == evaluate(fresh, x)


def test_parameters_stepped_between_evaluations(single_world):
    with recording_world(single_world, prefetch=2):
        model, fresh = Headed(), Headed()
        bms.init_parameters(model)
        x = x_of()
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=0.1))
        for _ in range(3):
            manager.zero_grad()
            manager.backward(lambda: model(x).sum())
            before = evaluate(model, x)
            manager.step()
            after = evaluate(model, x)
            for p, q in zip(fresh.get_parameters(), model.get_parameters()):
                p.set_shard(from_host(q.asnumpy().copy()))
            assert after == evaluate(fresh, x) != before


def test_a_model_that_is_gone_is_forgotten(single_world):
    with recording_world(single_world):
        alive = []
        for _ in range(3):
            model = Headed()
            bms.init_parameters(model)
            evaluate(model, x_of())
            alive.append(weakref.ref(model.before.parameter("weight")))
        del model
        evaluate(Headed(), x_of())
        gc.collect()
        assert [p() is None for p in alive] == [True] * 3


def test_copies_gather_their_own_values(single_world):
    p = bms.DistributedParameter(np.ones((2, 3), np.float32), name="p")
    p.gather()
    for copied in (p.clone(), copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        for value in (4.0, 5.0):
            overwrite(copied, from_host(np.full(6, value, np.float32)))
            assert copied.gather().asnumpy().tolist() == [[value] * 3] * 2
            assert p.gather().asnumpy().tolist() == [[1.0] * 3] * 2
        copied.copy_full(np.full((2, 3), 6.0, np.float32))
        assert copied.gather().asnumpy().tolist() == [[6.0] * 3] * 2
    model = Chain(2)
    bms.init_parameters(model)
    one_step(model, x_of())
    copied = copy.deepcopy(model)
    np.testing.assert_array_equal(copied(x_of()).asnumpy(), model(x_of()).asnumpy())
