"""What MindSpore does with whole parameters only: refused in one sentence, or made right. What equals a twin goes on doing so."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, amp, nn, ops
from mindspore.train.callback import CheckpointConfig

import bmtrain_ms as bms
from bmtrain_ms.compat import habits

pytestmark = pytest.mark.usefixtures("single_world")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """MindSpore writes what it has rewritten into the working folder."""
    monkeypatch.chdir(tmp_path)


COMPILED = "bmtrain_ms runs in PyNative mode, and a compiled graph cannot gather parameters"
X = Tensor(np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))


class Layer(bms.DistributedModule):
    def __init__(self, jit: bool = False):
        super().__init__()
        self.weight = bms.DistributedParameter(np.full((4, 4), 0.5, np.float32))
        self.act = ms.jit(self._act) if jit else self._act

    def _act(self, x):
        return ops.tanh(x) * 2

    def construct(self, x):
        return self.act(ops.matmul(x, self.weight))


class Chain(nn.Cell):
    """A Cell of MindSpore's, of which no method knows what is in it."""

    def __init__(self, layers: int = 2):
        super().__init__()
        draw = np.random.default_rng(1)
        weights = [Tensor(draw.standard_normal((4, 4)).astype(np.float32)) for _ in range(2 * layers)]
        dense = [nn.Dense(4, 4, weight_init=w, bias_init="zeros") for w in weights]
        self.layers = nn.CellList([nn.SequentialCell(a, nn.LayerNorm((4,)), b) for a, b in zip(dense[::2], dense[1::2])])

    def construct(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def wrapped(**options: Any) -> nn.Cell:
    return bms.BMTrainModelWrapper(Chain(), verbose=False, **options)


def gradients(model: nn.Cell) -> tuple[float, list[np.ndarray]]:
    def loss(x):
        return (model(x).astype(ms.float32) ** 2).mean()

    value, grads = ms.value_and_grad(loss, None, model.trainable_params())(X)
    return float(value.asnumpy()), [g.asnumpy().astype(np.float32).reshape(-1) for g in grads]


def same(a: tuple[float, list[np.ndarray]], b: tuple[float, list[np.ndarray]]) -> bool:
    return a[0] == b[0] and all(np.array_equal(x, y) for x, y in zip(a[1], b[1])) and any(x.any() for x in a[1])


def one_line(error: Any) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Compilation #


@pytest.fixture
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


MODELS: dict[str, Callable[[], nn.Cell]] = {
    "checkpointed": lambda: bms.Block(Layer()),
    "not checkpointed": lambda: bms.Block(Layer(), use_checkpoint=False),
    "list": lambda: bms.TransformerBlockList([bms.Block(Layer())]),
    "module": Layer,
    "wrapped": wrapped,
    "outer cell": lambda: nn.SequentialCell(bms.Block(Layer()), nn.Tanh()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_graph_mode_is_refused_in_evaluation(kind, graph_mode):
    with pytest.raises(RuntimeError, match=COMPILED) as error:
        MODELS[kind]()(X)
    assert "keep ms.set_context(mode=ms.PYNATIVE_MODE)" in one_line(error)


@pytest.mark.parametrize("kind", MODELS)
def test_graph_mode_is_refused_in_training(kind, graph_mode):
    model = MODELS[kind]()
    manager = bms.optim.OptimManager()
    manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
    with pytest.raises(RuntimeError, match=f"OptimManager.backward was called in GRAPH_MODE: {COMPILED}") as error:
        manager.backward(lambda x: model(x).sum(), X)
    one_line(error)

    def loss(x):
        return model(x).sum()

    with pytest.raises(RuntimeError, match=COMPILED) as error:
        ms.value_and_grad(loss, None, model.trainable_params())(X)
    one_line(error)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_under_jit_is_refused(kind):
    model = MODELS[kind]()

    def helper(x):
        return model(x)

    @ms.jit
    def direct(x):
        return model(x).sum()

    @ms.jit
    def indirect(x):
        return helper(x).sum()

    for function in (direct, indirect):
        with pytest.raises(RuntimeError, match=COMPILED) as error:
            function(X)
        one_line(error)
    assert np.isfinite(model(X).asnumpy()).all()  # nothing is left behind


def test_a_layer_that_compiles_itself_is_refused():
    """Its weights would be constants, and have no gradient."""

    class Jitted(Layer):
        @ms.jit
        def construct(self, x):
            return ops.matmul(x, self.weight)

    class Helped(Layer):
        def __init__(self):
            super().__init__(jit=True)

        def _act(self, x):
            return ops.matmul(x, self.weight)

    for layer in (Jitted(), Helped()):
        with pytest.raises(RuntimeError, match=COMPILED) as error:
            bms.Block(layer, use_checkpoint=False)(X)
        one_line(error)


def test_functions_without_parameters_may_be_compiled():
    twin, model = bms.Block(Layer(), use_checkpoint=False), bms.Block(Layer(jit=True), use_checkpoint=False)
    (loss, grads), (twin_loss, twin_grads) = gradients(model), gradients(twin)
    assert loss == pytest.approx(twin_loss, rel=1e-5)
    np.testing.assert_allclose(grads[0], twin_grads[0], rtol=1e-4, atol=1e-6)


def test_a_compiled_function_in_a_checkpointed_block_works_or_says_why_not():
    model, twin = bms.Block(Layer(jit=True)), bms.Block(Layer())
    if ms.__version__.startswith("2.5"):
        with pytest.raises(RuntimeError, match=r"leave @ms.jit out, or use Block\(use_checkpoint=False\)") as error:
            gradients(model)
        one_line(error)
    else:
        np.testing.assert_allclose(gradients(model)[1][0], gradients(twin)[1][0], rtol=1e-4, atol=1e-6)


def test_other_models_compile_as_before(graph_mode):
    assert nn.SequentialCell(nn.Dense(4, 4), nn.Tanh())(X).shape == (3, 4)


# Mixed precision #

PRECISIONS: dict[str, Callable[[nn.Cell], nn.Cell]] = {
    "to_float": lambda model: model.to_float(ms.float16),
    "O1": lambda model: amp.auto_mixed_precision(model, "O1"),
    "O2": lambda model: amp.auto_mixed_precision(model, "O2"),
    "O3": lambda model: amp.auto_mixed_precision(model, "O3"),
    "custom": lambda model: amp.custom_mixed_precision(model, white_list=[nn.Dense]),
}
REWRITTEN = ("O1", "custom")  # others cast where a Cell is called


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_mixed_precision_before_the_wrapper_equals_the_twin(precision, use_checkpoint):
    twin, model = PRECISIONS[precision](Chain()), PRECISIONS[precision](Chain())
    bms.BMTrainModelWrapper(model, verbose=False, use_checkpoint=use_checkpoint)
    assert same(gradients(model), gradients(twin)) and model(X).dtype == twin(X).dtype


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p not in REWRITTEN])
def test_mixed_precision_behind_the_wrapper_equals_the_twin(precision, use_checkpoint):
    twin, model = PRECISIONS[precision](Chain()), PRECISIONS[precision](wrapped(use_checkpoint=use_checkpoint))
    assert same(gradients(model), gradients(twin)) and model(X).dtype == twin(X).dtype


@pytest.mark.parametrize("precision", REWRITTEN)
def test_mixed_precision_that_rewrites_a_sharded_model_is_refused(precision):
    for model in (wrapped(), bms.Block(Layer()), Layer()):
        with pytest.raises(RuntimeError, match=r"call amp.auto_mixed_precision first and BMTrainModelWrapper on what it") as error:
            PRECISIONS[precision](model)
        one_line(error)


# Parallel modes #


@pytest.fixture
def ordinary_parallel_mode():
    yield
    ms.reset_auto_parallel_context()


@pytest.mark.parametrize("mode", ["data_parallel", "semi_auto_parallel", "auto_parallel", "hybrid_parallel"])
def test_parallel_modes_are_refused(mode, ordinary_parallel_mode):
    with pytest.raises(RuntimeError, match=f"parallel_mode='{mode}' makes MindSpore share the work out") as error:
        ms.set_auto_parallel_context(parallel_mode=mode, gradients_mean=True)
    assert "ms.reset_auto_parallel_context()" in one_line(error)
    assert ms.get_auto_parallel_context("parallel_mode") == "stand_alone"
    ms.set_auto_parallel_context(parallel_mode="stand_alone")
    bms.shutdown()
    ms.set_auto_parallel_context(parallel_mode="data_parallel")  # who has no world of ours may
    with pytest.raises(RuntimeError, match="parallel_mode='data_parallel' makes MindSpore"):
        bms.init_distributed(seed=0)
    assert not bms.is_initialized()


# Recomputation #

PLACES: dict[str, Callable[[nn.Cell], nn.Cell]] = {
    "layer": lambda model: model.layers[0],
    "inside a layer": lambda model: model.layers[0][0],
    "model": lambda model: model,
}


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_recompute_before_the_wrapper_is_refused(place, use_checkpoint):
    """It would differentiate the parameters that the cell had: on 2.10 the gradients were 0."""
    model = Chain()
    PLACES[place](model).recompute()
    with pytest.raises(
        ValueError, match=r"was set to recompute\(\) before it was wrapped: leave that out, a Block recomputes"
    ) as error:
        bms.BMTrainModelWrapper(model, verbose=False, use_checkpoint=use_checkpoint)
    one_line(error)


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("place", [*PLACES, "around"])
def test_recompute_behind_the_wrapper_equals_the_twin(place, use_checkpoint):
    model = wrapped(use_checkpoint=use_checkpoint)
    if place == "around":
        called = list(model.layers)
        model.construct = lambda x: ms.recompute(called[1], ms.recompute(called[0], x))
    else:
        PLACES[place](model).recompute()
    assert same(gradients(model), gradients(Chain()))


# MindSpore's checkpoints #


def saved_forms(model: nn.Cell) -> list[Any]:
    named = dict(model.parameters_and_names())
    return [model, named, [{"name": name, "data": p} for name, p in named.items()], nn.SequentialCell(model)]


@pytest.mark.parametrize("kind", MODELS)
def test_a_shard_is_not_saved_as_if_it_were_whole(kind, tmp_path):
    for i, saved in enumerate(saved_forms(MODELS[kind]())):  # nothing is written
        with pytest.raises(TypeError, match=r"ms.save_checkpoint would write this rank's shard of \S+ as if") as error:
            ms.save_checkpoint(saved, str(tmp_path / f"{i}.ckpt"))
        assert "use bms.save(model, path), which all ranks call, or a bms.checkpoint.Checkpointer" in one_line(error)
    assert not list(tmp_path.iterdir())


def test_the_callback_that_saves_is_refused_too(tmp_path):
    model = wrapped()
    saving = ms.ModelCheckpoint("x", str(tmp_path), CheckpointConfig(save_checkpoint_steps=1, integrated_save=False))
    data = ms.dataset.NumpySlicesDataset((X.asnumpy(), X.asnumpy()), shuffle=False).batch(3)
    with pytest.raises(TypeError, match=r"use bms.save\(model, path\)"):
        trained = ms.Model(model, nn.MSELoss(), nn.Momentum(model.trainable_params(), 0.01, 0.9))
        trained.train(1, data, callbacks=[saving], dataset_sink_mode=False)


def test_what_is_whole_is_saved_as_before(tmp_path):
    ms.save_checkpoint(Chain(), str(tmp_path / "x.ckpt"))
    assert ms.load_checkpoint(str(tmp_path / "x.ckpt"))["layers.0.0.weight"].shape == (4, 4)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
def test_whole_parameters_are_loaded_into_shards(tmp_path, dtype):
    whole, model = Chain(), wrapped()
    for p in whole.get_parameters():
        p.set_data((p * 2 + 1).astype(dtype))
    ms.save_checkpoint(whole, str(tmp_path / "x.ckpt"))
    for load in (
        lambda: ms.load_param_into_net(model, ms.load_checkpoint(str(tmp_path / "x.ckpt"))),
        lambda: ms.load_checkpoint(str(tmp_path / "x.ckpt"), net=model),
    ):
        for p in model.get_parameters():
            p.copy_full(np.zeros(p.full_shape, np.float32))
        load()
        for p, q in zip(model.get_parameters(), whole.get_parameters()):
            assert p.dtype == ms.float32 and np.array_equal(p.gather().asnumpy(), q.asnumpy().astype(np.float32))


def test_what_is_not_whole_is_not_loaded():
    model = wrapped()
    name = "layers.0.0.weight"
    for value, text in (
        (Parameter(ops.zeros((16,), ms.float32), name), r"has the full shape \(4, 4\), the values to load \(16,\)"),
        (Parameter(ops.zeros((4, 3), ms.float32), name), r"has the full shape \(4, 4\), the values to load \(4, 3\)"),
        (Parameter(ops.zeros((4, 4), ms.int32), name), r"is Float32, the values to load are Int32"),
    ):
        before = model.layers[0][0].parameter("weight").asnumpy().copy()
        with pytest.raises(RuntimeError, match=f"{name} {text}") as error:
            ms.load_param_into_net(model, {name: value})
        assert "ms.load_param_into_net" in one_line(error)
        assert np.array_equal(model.layers[0][0].parameter("weight").asnumpy(), before)


# The patch #


def test_it_is_put_back():
    wrappers = [(owner, name) for owner, name, _ in habits._originals]
    ours = [vars(owner)[name] for owner, name in wrappers]
    assert len(wrappers) == 9 + 18
    habits.uninstall()
    try:
        assert not any(vars(owner).get(name) is wrapper for (owner, name), wrapper in zip(wrappers, ours))
    finally:
        habits.install()
