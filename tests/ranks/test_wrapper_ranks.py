"""Wrapped models that were not written for us, on real ranks, against unwrapped twins that average their gradients by hand."""

from __future__ import annotations

import functools
import gc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer
from mindspore.experimental.optim import AdamW
from mindspore.nn.utils import no_init_parameters

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.compat.runtime import from_host
from bmtrain_ms.zero import context_of
from tests.helpers.foreign import MODELS, encoder, encoder_batch, encoder_loss
from tests.helpers.models import recorded
from tests.helpers.ranks import RankPool
from tests.helpers.wrapped import Stack, built, raw, square, whole, x_of
from tests.ranks.test_memory import resident

pytestmark = pytest.mark.ranks

ADAM = {"eps": 1e-3, "weight_decay": 0.1}  # a large eps: rounding errors of vanishing gradients stay small


def mean_over_ranks(world: World, grads: list[Tensor]) -> list[np.ndarray]:
    """By NumPy, in rank order."""
    return [np.mean(world.engine.all_gather([g.reshape(-1)]).wait()[0].asnumpy().reshape(-1, *g.shape), 0) for g in grads]


class NumpyAdamW:
    """MindSpore compiles its own for seconds; it is used for one of the models."""

    def __init__(self, params: list[Parameter], lr: float, eps: float, weight_decay: float):
        self.params, self.lr, self.eps, self.decay, self.step = list(params), lr, eps, weight_decay, 0
        self.masters = [p.asnumpy().astype(np.float64) for p in self.params]
        self.moments = [(np.zeros_like(m), np.zeros_like(m)) for m in self.masters]

    def __call__(self, grads: tuple[Tensor, ...]) -> None:
        self.step += 1
        for p, master, (m, v), grad in zip(self.params, self.masters, self.moments, grads):
            g = grad.asnumpy().astype(np.float64)
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            update = m / (1 - 0.9**self.step) / (np.sqrt(v / (1 - 0.999**self.step)) + self.eps)
            master -= self.lr * (update + self.decay * master)
            p.set_data(Tensor(master.astype(np.float32)))


def train_both(world: World, name: str, steps: int = 3, **options: Any) -> dict[str, Any]:
    """Some steps of the wrapped model and of its twin. Asserts equality; tells what was gathered."""
    foreign = MODELS[name]
    plain = built(foreign.build)
    twin = (AdamW if name == "encoder" else NumpyAdamW)(plain.trainable_params(), lr=foreign.lr, **ADAM)
    with use_world(recorded(world)) as here, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the recorded graph keeps")  # nn.MultiheadAttention multiplies with views of weights
        model = built(foreign.build)
        full_bytes = sum(p.nbytes for p in model.get_parameters())
        assert bms.BMTrainModelWrapper(model, verbose=False, **options) is model is not plain
        optimizer = bms.optim.AdamOptimizer(model.trainable_params(), lr=foreign.lr, **ADAM)
        manager = bms.optim.OptimManager()
        manager.add_optimizer(optimizer)
        here.engine.events.clear()
        calls: list[tuple[str, str]] = []
        for step in range(steps):
            batch = foreign.batch(10 * step + world.engine.rank)
            manager.zero_grad()
            first = len(here.engine.events)
            loss = manager.backward(lambda *batch: foreign.loss(model, *batch), *batch)
            calls = here.engine.calls()[first:]
            expected, grads = ms.value_and_grad(lambda *batch: foreign.loss(plain, *batch), None, plain.trainable_params())(*batch)
            np.testing.assert_allclose(loss.asnumpy(), expected.asnumpy(), rtol=1e-5 * 10**step)
            grads = dict(zip((p.name for p in plain.trainable_params()), mean_over_ranks(world, list(grads))))
            assert sorted(grads) == sorted(p.name for p in optimizer.parameters)
            for p in optimizer.parameters:
                got = whole(here, p, manager.grad(p))
                scale = np.abs(grads[p.name]).max()
                assert scale > 0, p.name
                atol = (1e-5 if step == 0 else 1e-3) * max(scale, 1e-2)
                np.testing.assert_allclose(got, grads[p.name], rtol=0, atol=atol, err_msg=f"step {step} {p.name}")
            if step == steps - 1 == 0:
                continue  # a single step is about gradients
            manager.step()
            twin(tuple(Tensor(grads[p.name]) for p in plain.trainable_params()))
        values = {p.name: whole(here, p) for p in model.get_parameters()}
        assert sorted(values) == sorted(p.name for p in plain.get_parameters())
        for p in plain.get_parameters():
            np.testing.assert_allclose(values[p.name], p.asnumpy(), rtol=1e-4, atol=1e-4, err_msg=p.name)
        peak = context_of(here).pipeline.meter.peak
        statistics = {name: values[name] for name in model.wrap_report.buffers}
        return {"report": model.wrap_report, "calls": calls, "peak": peak, "full": full_bytes, "statistics": statistics}


@pytest.fixture(scope="module")
def on_two_ranks(run_ranks: Callable[..., list[Any]]) -> Callable[[str], list[dict]]:
    """The answers of `train_both` by rank, once for each model."""
    return functools.cache(lambda name: run_ranks(2, train_both, name=name))


AGREED = " written since it was gathered"  # asked before what was gathered ahead is used: code of the model's ran in between


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_the_unwrapped_twin_s(run_ranks: Callable[..., list[Any]], on_two_ranks: Callable, name: str, ranks: int):
    for answer in on_two_ranks(name) if ranks == 2 else run_ranks(1, train_both, name=name, steps=1):
        report = answer["report"]
        assert Counter(report.blocks.values()) == MODELS[name].blocks
        assert bool(report.not_checkpointed) == (name == "resnet")
        assert 0.9 < report.shard_bytes * ranks / answer["full"] < 1.1
        if len(report.blocks) > 2:
            assert answer["peak"] < 0.95 * answer["full"]
        first, *others = answer["calls"]
        assert {op for op, _ in (first, *others)} - {"all_reduce"} == {"all_gather", "reduce_scatter"}
        assert all(label.endswith(AGREED) for op, label in others if op == "all_reduce")


def test_running_statistics_are_each_rank_s_own(on_two_ranks: Callable[[str], list[dict]]):
    first, second = (answer["statistics"] for answer in on_two_ranks("resnet"))
    assert len(first) == 32
    for name in first:
        assert np.abs(first[name] - second[name]).max() > 0, name


@pytest.mark.parametrize("options", [{"zero_level": 2}, {"use_checkpoint": False}], ids=str)
@pytest.mark.parametrize("name", ["transformer", "vit"])
def test_other_ways_to_run(run_ranks: Callable[..., list[Any]], name: str, options: dict):
    run_ranks(2, train_both, name=name, steps=1, **options)


@pytest.mark.parametrize("zero_level", [2, 3])
def test_collectives_of_a_step(run_ranks: Callable[..., list[Any]], on_two_ranks: Callable, zero_level: int):
    """The norm is outside of Blocks: gathered when it is read."""
    gather, reduce = "all_gather", "reduce_scatter"
    outside = [(gather, "norm.gamma"), (gather, "norm.beta"), (reduce, "norm.beta"), (reduce, "norm.gamma")]
    for answer in on_two_ranks("encoder") if zero_level == 3 else run_ranks(2, train_both, name="encoder", steps=2, zero_level=2):
        calls = [c for c in answer["calls"] if c[0] != "all_reduce"]
        agreed = [label.removesuffix(AGREED) for op, label in answer["calls"] if op == "all_reduce"]
        assert agreed == ["layers.1", "layers.2", "norm.gamma", "norm.beta"]
        assert sorted(c for c in calls if "norm" in c[1].split(".")[0]) == sorted(outside)
        inside = [c for c in calls if c[1].startswith("layers")]
        assert len(inside) + len(outside) == len(calls)
        names = [f"layers.{i}" for i in range(3)]
        if zero_level == 2:
            assert inside == [*((gather, n) for n in names), *((reduce, n) for n in reversed(names))]
        else:
            assert inside == [
                *((gather, n) for n in names),
                (gather, "layers.2"),
                (gather, "layers.1"),
                (gather, "layers.0"),
                (reduce, "layers.2"),
                (reduce, "layers.1"),
                (reduce, "layers.0"),
            ]


def peak_of_equal_layers(world: World, layers: int) -> tuple[int, int]:
    with use_world(recorded(world)) as here:
        model = bms.BMTrainModelWrapper(built(lambda: encoder(layers)), verbose=False)
        batch = encoder_batch(0)
        ms.value_and_grad(lambda: encoder_loss(model, *batch), None, model.trainable_params())()
        report = model.wrap_report
        return context_of(here).pipeline.meter.peak, 4 * (report.elements - report.elements_outside) // layers


def test_at_most_two_layers_are_gathered_at_a_time(run_ranks: Callable[..., list[Any]]):
    for peak, layer in run_ranks(2, peak_of_equal_layers, layers=8):
        assert layer <= peak <= 2.1 * layer


# Values #


def build_differently(world: World) -> str:
    np.random.seed(world.engine.rank)  # what a script does that seeds by rank
    ms.set_seed(1 + world.engine.rank)
    model = Stack()
    raw(model, "head.bias").set_data(Tensor(np.zeros(3, np.float32)))
    try:
        bms.BMTrainModelWrapper(model, verbose=False)
    except ValueError as error:
        return str(error)
    return "not refused"


def test_ranks_with_different_values_are_told_so(run_ranks: Callable[..., list[Any]]):
    first, second = run_ranks(2, build_differently)
    assert first == second
    assert first.startswith("parameter layers.0.a.weight has different values on different ranks (as have ")
    assert first.endswith(
        "others): every rank must build the same model. Build it after init_distributed, which seeds the generators, or load the "
        "same weights everywhere first"
    )


class Recurrent(nn.Cell):
    """MindSpore keeps an LSTM's parameters in ParameterTuples: they stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4), nn.Dense(4, 2)


def whole_differently(world: World, frozen: bool = False) -> str:
    model = built(Recurrent)
    for p in model.rnn.get_parameters():
        p.set_data(Tensor(np.full(p.shape, world.engine.rank + 1, np.float32)))
        p.requires_grad = not frozen
    try:
        bms.BMTrainModelWrapper(model, verbose=False)
    except ValueError as error:
        return str(error)
    return "not refused"


def test_trained_parameters_that_stay_whole_are_compared_too(run_ranks: Callable[..., list[Any]]):
    first, second = run_ranks(2, whole_differently)
    assert first == second and first.startswith("parameter rnn.weight_ih_l0 has different values on different ranks (as have 3 ")
    assert run_ranks(2, whole_differently, frozen=True) == ["not refused"] * 2, "statistics and the like are each rank's own"


def lazily(world: World) -> float:
    """The values of a model that is initialised by the wrapper, against those of one that was built whole."""
    plain = built(lambda: Stack(layers=3))

    def build() -> nn.Cell:
        with no_init_parameters():
            return Stack(layers=3)

    model = built(build)
    assert all(p.has_init for p in model.get_parameters())
    bms.BMTrainModelWrapper(model, verbose=False)
    for p in plain.get_parameters():
        np.testing.assert_array_equal(whole(world, raw(model, p.name)), p.asnumpy(), err_msg=p.name)
    return float(square(model, x_of()).asnumpy() - square(plain, x_of()).asnumpy())


def whole_lazily(world: World) -> None:
    """What stays whole is initialised in its turn."""
    plain = built(Stack)

    def build() -> nn.Cell:
        with no_init_parameters():
            return Stack()

    model = bms.BMTrainModelWrapper(built(build), verbose=False, buffers=["layers.0.a.*"])
    for p in plain.get_parameters():
        np.testing.assert_array_equal(whole(world, raw(model, p.name)), p.asnumpy(), err_msg=p.name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_initialised_by_the_wrapper_it_has_the_same_values(run_ranks: Callable[..., list[Any]], ranks: int):
    assert run_ranks(ranks, lazily) == [0.0] * ranks
    run_ranks(ranks, whole_lazily)


SIDE, LAYERS = 1024, 32  # 4 MiB a layer, 128 MiB


class Half(nn.Cell):
    """A matrix of 2 MiB."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.weight = Parameter(initializer(Normal(0.01), (SIDE // 2, SIDE)), name="weight")
        self.multiply = ops.MatMul(transpose_b=transposed)

    def construct(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight)


class Big(nn.Cell):
    """Two of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Half(True), Half(False)

    def construct(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


class Tower(nn.Cell):
    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.CellList([Big() for _ in range(layers)])

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def wrap_tower(layers: int) -> None:
    with no_init_parameters():
        model = Tower(layers)
    bms.BMTrainModelWrapper(model, verbose=False)
    x = from_host(np.full((2, SIDE), 0.1, np.float32))
    ms.value_and_grad(lambda: model(x), None, model.trainable_params()[:1])()
    assert len(model.wrap_report.blocks) == layers


def peak_of_wrapping(world: World) -> int:
    """Resident memory at most beyond what it was before, without the shards."""
    wrap_tower(2)  # what MindSpore makes once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident()
    wrap_tower(LAYERS)
    return resident("VmHWM") - before - LAYERS * (SIDE * SIDE * 4) // 2


def test_no_rank_ever_holds_a_model_that_was_not_initialised():
    pool = RankPool(2)  # new processes: what others have left behind would count
    try:
        peaks = pool.run(peak_of_wrapping)
    finally:
        pool.kill()
    print(f"MiB beyond the shards: {[round(peak / 2**20, 1) for peak in peaks]}")
    assert all(peak < 24 << 20 for peak in peaks), "the other half of the model is 64 MiB"


class Borrows(Stack):
    """Divides by the norm of a layer's weight, and uses another layer's weight in the head."""

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        x = ops.matmul(x, self.layers[1].b.weight)
        return self.head(x / ops.sqrt((self.layers[0].a.weight ** 2).sum()))


def borrowed(world: World) -> None:
    """Weights of Blocks that are read through their cells: whole while the model runs, and the parameter itself otherwise."""
    x, plain = x_of(seed=world.everyone.rank), built(Borrows)
    with use_world(recorded(world)):
        model = bms.BMTrainModelWrapper(built(Borrows), verbose=False)
        assert len(model.wrap_report.blocks) == 2
        for penalty in (False, True):  # a loss reads weights too

            def forward(cell: nn.Cell, penalty: bool = penalty) -> Tensor:
                loss = square(cell, x)
                return loss + 0.1 * (cell.layers[1].a.weight ** 2).sum() if penalty else loss

            loss, grads = ms.value_and_grad(lambda: forward(model), None, list(model.trainable_params()))()
            expected, theirs = ms.value_and_grad(lambda: forward(plain), None, list(plain.trainable_params()))()
            np.testing.assert_allclose(loss.asnumpy(), expected.asnumpy(), rtol=1e-6)
            for p, grad, mean in zip(model.trainable_params(), grads, mean_over_ranks(world, list(theirs))):
                start, stop = p.owned
                got = grad.asnumpy().reshape(-1)[: stop - start]
                np.testing.assert_allclose(got, mean.reshape(-1)[start:stop], rtol=1e-5, atol=1e-6, err_msg=p.name)
        np.testing.assert_allclose(model(x).asnumpy(), plain(x).asnumpy(), rtol=1e-6, atol=1e-7)  # an evaluation
        frozen = model.layers[0].a.weight
        assert isinstance(frozen, bms.DistributedParameter)
        frozen.requires_grad = False
        assert len(model.trainable_params()) == len(plain.trainable_params()) - 1


def test_weights_of_blocks_that_others_read(run_ranks):
    run_ranks(1, borrowed)
    run_ranks(2, borrowed)


class Centred(nn.Cell):
    """A centre and a counter that forward updates, outside of Blocks."""

    def __init__(self, update: Callable[[Any], None]):
        super().__init__()
        self.head = nn.Dense(4, 4)
        self.center = Parameter(Tensor(np.zeros(4, np.float32)), name="center", requires_grad=False)
        self.count = Parameter(Tensor(np.zeros(1, np.float32)), name="count", requires_grad=False)
        self.update = update

    def construct(self, x: Tensor) -> Tensor:
        y = self.head(x) - self.center
        self.update(self)
        return y

    def scaled(self, x: Tensor) -> Tensor:
        """A method that reads parameters while the model does not run."""
        return ops.matmul(x, self.head.weight) * (self.count + 2)


def outside(world: World) -> None:
    """Weights outside of Blocks, and those who freeze them, write them, or compute with them."""
    x = x_of(5, 4)
    refusals = {
        "center": [
            lambda m: ops.assign(m.center, m.center * 0.9 + 0.1),
            lambda m: m.center.__setitem__(slice(None), 1.0),
            lambda m: setattr(m, "center", m.center * 0.9 + 0.1),
        ],
        "count": [lambda m: setattr(m, "count", m.count + 1)],  # a shard of it has its own shape
    }
    for name, updates in refusals.items():
        for update in updates:
            model = bms.BMTrainModelWrapper(built(lambda update=update: Centred(update)), verbose=False)
            with pytest.raises(RuntimeError, match=f"^each rank has a shard of {name}, "):
                model(x)
            named = bms.BMTrainModelWrapper(built(lambda update=update: Centred(update)), verbose=False, buffers=["c*"])
            plain = built(lambda update=update: Centred(update))
            for _ in range(2):
                np.testing.assert_allclose(named(x).asnumpy(), plain(x).asnumpy(), rtol=1e-5, atol=1e-6)
    plain, model = built(lambda: Centred(id)), bms.BMTrainModelWrapper(built(lambda: Centred(id)), verbose=False)
    with pytest.raises(RuntimeError, match=r"^each rank has a shard of head\.weight, "):
        model.head.weight = ops.zeros((4, 4))
    with pytest.raises(ValueError, match=r"^the shard of head\.weight is \(8,\), "):
        model.head.parameter("weight").set_data(ops.zeros((4, 4)))
    np.testing.assert_allclose(model(x).asnumpy(), plain(x).asnumpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(model.scaled(x).asnumpy(), plain.scaled(x).asnumpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(model.construct(x).asnumpy(), plain.construct(x).asnumpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(model.head.weight.asnumpy(), plain.head.weight.asnumpy())
    model.head.weight.requires_grad = False
    assert [p.name for p in model.trainable_params()] == ["head.bias"]


def test_weights_outside_of_blocks_that_are_frozen_written_and_read(run_ranks):
    run_ranks(2, outside)
