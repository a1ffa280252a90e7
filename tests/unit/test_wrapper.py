"""What `BMTrainModelWrapper` keeps, finds and refuses; gradients against an unwrapped twin."""

from __future__ import annotations

from collections import namedtuple

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from tests.helpers.wrapped import (
    WIDTH,
    Layer,
    Stack,
    assert_equal_training,
    built,
    gradients,
    raw,
    square,
    twins,
    whole,
    x_of,
)

Pair = namedtuple("Pair", "first second")


@pytest.fixture(autouse=True)
def _world(single_world):
    yield single_world


def wrap(model, **options):
    return bms.BMTrainModelWrapper(model, verbose=False, **options)


# What is kept #


def test_it_is_the_same_model_with_its_names_values_and_flags(single_world):
    plain, model = built(Stack), built(Stack)
    model.head.bias.requires_grad = plain.head.bias.requires_grad = False
    cells = [cell for _, cell in model.cells_and_names()]
    assert wrap(model) is model
    assert all(a is b for a, (_, b) in zip(cells, model.cells_and_names()))
    assert isinstance(model, Stack) and [type(c).__name__ for c in cells] == [type(c).__name__ for _, c in plain.cells_and_names()]
    for (name, p), (other, q) in zip(plain.parameters_and_names(), model.parameters_and_names()):
        assert isinstance(q, bms.DistributedParameter) and not isinstance(p, bms.DistributedParameter)
        assert (name, p.name, p.requires_grad, p.dtype) == (other, q.name, q.requires_grad, q.dtype)
        assert q.full_shape == p.shape
        np.testing.assert_array_equal(whole(single_world, q), p.asnumpy())
    assert_equal_training(plain, model, square, x_of())


@pytest.mark.parametrize("zero_level", [2, 3])
@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_loss_and_gradients_are_the_twin_s(use_checkpoint, zero_level):
    calls = []

    class Counting(Layer):
        def construct(self, x):
            calls.append(1)
            return super().construct(x)

    plain, model = twins(lambda: Stack(Counting), use_checkpoint=use_checkpoint, zero_level=zero_level)
    calls.clear()
    gradients(plain, square, x_of())
    assert len(calls) == 2
    calls.clear()
    gradients(model, square, x_of())
    assert len(calls) == (4 if use_checkpoint else 2)
    assert_equal_training(plain, model, square, x_of())


class SameParameter(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, WIDTH)
        self.layers = nn.CellList([Layer(), Layer()])
        self.head = nn.Dense(WIDTH, 7, has_bias=False)
        self.head.weight = self.embed.embedding_table
        self.layers[1].a.weight = self.layers[0].a.weight

    def construct(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_parameter_in_several_cells_stays_one():
    plain, model = twins(SameParameter)
    assert raw(model, "head.weight") is raw(model, "embed.embedding_table")
    assert raw(model, "layers.0.a.weight") is raw(model, "layers.1.a.weight")
    assert model.wrap_report.tied == {
        "embed.embedding_table": ["head.weight"],
        "layers.0.a.weight": ["layers.1.a.weight"],
    }
    assert len(model.trainable_params()) == len(plain.trainable_params()) == 8
    assert_equal_training(plain, model, square, Tensor([[0, 3, 6]], ms.int32))


class SameCell(nn.Cell):
    """One embedding for both sides; one layer three times; a norm both in layers and outside of them."""

    def __init__(self):
        super().__init__()
        embed, layer = nn.Embedding(7, WIDTH), Layer()
        self.encoder_embed, self.decoder_embed = embed, embed
        self.layers = nn.CellList([layer, layer, layer])
        self.norm = layer.a

    def construct(self, ids):
        x = self.encoder_embed(ids) + 2 * self.decoder_embed(ids + 1)
        for layer in self.layers:
            x = layer(x)
        return ops.tanh(self.norm(x))


def test_a_cell_in_several_places_stays_one():
    plain, model = twins(SameCell)
    assert model.encoder_embed is model.decoder_embed and model.layers[0] is model.layers[2]
    assert model.wrap_report.blocks == {"layers.0": "Layer"}
    assert_equal_training(plain, model, square, Tensor([[0, 3, 5]], ms.int32))


class Buffered(Layer):
    """Integers, which MindSpore marks as trainable, and a table that is not trained."""

    def __init__(self):
        super().__init__()
        self.ids = Parameter(Tensor([2, 0, 1, 3], ms.int32), name="ids")
        self.table = Parameter(Tensor(np.arange(4, dtype=np.float32)), name="table", requires_grad=False)

    def construct(self, x):
        return super().construct(x)[:, self.ids] + self.table


def test_integers_and_named_parameters_stay_whole():
    plain, model = built(lambda: Stack(Buffered)), built(lambda: Stack(Buffered))
    kept = raw(model, "layers.0.ids"), raw(model, "layers.1.table")
    wrap(model, buffers=["layers.*.table", "head.bias"])
    assert kept[0] is raw(model, "layers.0.ids") and kept[1] is raw(model, "layers.1.table")
    assert model.wrap_report.buffers == ["layers.0.ids", "layers.0.table", "layers.1.ids", "layers.1.table", "head.bias"]
    for p in (*kept, raw(model, "head.bias")):
        assert not isinstance(p, bms.DistributedParameter)
    floats = [p for p in model.trainable_params() if p.dtype == ms.float32]
    assert len(floats) == 10
    loss, expected = ms.value_and_grad(lambda: square(plain, x_of()), None, [raw(plain, p.name) for p in floats])()
    value, got = ms.value_and_grad(lambda: square(model, x_of()), None, floats)()
    assert value.asnumpy() == loss.asnumpy()
    for p, a, b in zip(floats, got, expected):
        np.testing.assert_allclose(a.asnumpy().reshape(b.shape), b.asnumpy(), atol=1e-6, err_msg=p.name)


class Normed(Layer):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=0.75)

    def construct(self, x):
        return self.norm(super().construct(x))


def test_running_statistics_stay_whole_and_are_updated_once():
    plain, model = twins(lambda: Stack(Normed))
    assert model.wrap_report.buffers == [f"layers.{i}.norm.moving_{what}" for i in (0, 1) for what in ("mean", "variance")]
    assert model.wrap_report.not_checkpointed == dict.fromkeys(("layers.0", "layers.1"), "the running statistics of BatchNorm1d")
    assert_equal_training(plain, model, square, x_of())
    for name in model.wrap_report.buffers:
        assert np.abs(raw(model, name).asnumpy() - ("variance" in name)).max() > 0.01, "it moved"
        np.testing.assert_allclose(raw(model, name).asnumpy(), raw(plain, name).asnumpy(), rtol=1e-5, atol=1e-7)


def train(model, steps=2):
    manager = bms.optim.OptimManager()
    manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=0.05))
    for _ in range(steps):
        manager.zero_grad()
        manager.backward(lambda: square(model, x_of()))
        manager.step()


def test_what_is_frozen_is_sharded_and_stays_as_it_is(single_world):
    def build():
        model = Stack(layers=3)
        for p in (*model.layers[0].get_parameters(), model.layers[1].a.weight, model.head.bias):
            p.requires_grad = False
        return model

    plain, model = twins(build)
    assert all(isinstance(p, bms.DistributedParameter) for p in model.get_parameters())
    frozen = [p.name for p in model.get_parameters() if not p.requires_grad]
    assert frozen == [p.name for p in plain.get_parameters() if not p.requires_grad] and len(frozen) == 6
    before = {p.name: whole(single_world, p) for p in model.get_parameters()}
    assert_equal_training(plain, model, square, x_of())
    train(model)
    for p in model.get_parameters():
        assert np.array_equal(before[p.name], whole(single_world, p)) is (p.name in frozen), p.name


class Lora(nn.Cell):
    def __init__(self, dense):
        super().__init__()
        self.dense = dense
        self.down = Parameter(x_of(2, WIDTH, seed=5), name="down")
        self.up = Parameter(x_of(WIDTH, 2, seed=6), name="up")

    def construct(self, x):
        return self.dense(x) + ops.matmul(ops.matmul(x, self.down.T), self.up.T)


def test_adapters_put_in_before_wrapping_are_what_is_trained(single_world):
    def build():
        model = Stack()
        for p in model.get_parameters():
            p.requires_grad = False
        for layer in model.layers:
            layer.a = Lora(layer.a)
        for path, p in model.parameters_and_names():
            p.name = path
        return model

    plain, model = twins(build)
    trained = sorted(f"layers.{i}.a.{name}" for i in (0, 1) for name in ("down", "up"))
    assert sorted(p.name for p in model.trainable_params()) == trained
    assert model.wrap_report.blocks == {"layers.0": "Layer", "layers.1": "Layer"}
    before = {p.name: whole(single_world, p) for p in model.get_parameters()}
    assert_equal_training(plain, model, square, x_of())
    train(model)
    for p in model.get_parameters():
        assert np.array_equal(before[p.name], whole(single_world, p)) is (p.name not in trained), p.name


def test_parameters_of_the_same_name_get_their_paths():
    model = built(Stack)
    for layer in model.layers:
        layer.a = Lora(layer.a)
    assert [p.name for p in model.get_parameters()].count("a.down") == 2
    wrap(model)
    assert all(p.name == path for path, p in model.parameters_and_names())


class Options(Layer):
    """Keyword-only arguments with skipped defaults, and nested results."""

    def construct(self, x, mask=None, scale=1.0, *, bias, pair=None, flag=False, **more):
        y = super().construct(x) * scale + bias
        y = y if mask is None else y * mask
        y = y + pair.first - 2 * pair.second[0]["deep"] + more["extra"]
        return {"y": y * 2 if flag else y, "pair": Pair(y + 1, ([x, y], "text", None)), "list": [y, x]}


class Taking(Stack):
    def construct(self, x, **kwargs):
        for layer in self.layers:
            out = layer(x, scale=0.5, flag=True, **kwargs)
            assert type(out) is dict and type(out["pair"]) is Pair and out["pair"].second[1:] == ("text", None)
            x = out["y"] + out["pair"].first + out["pair"].second[0][0] * out["list"][1]
        return self.head(x)


def test_every_argument_and_result_goes_through_and_gets_its_gradient():
    plain, model = twins(lambda: Taking(Options))
    tensors = [x_of(seed=i) for i in range(6)]

    def forward(model, x, bias, a, b, extra, mask):
        return (model(x, bias=bias, pair=Pair(a, ({"deep": b},)), extra=extra, mask=mask) ** 2).mean()

    assert_equal_training(plain, model, forward, *tensors, tolerance=1e-5)
    wanted, got = (ms.grad(lambda *xs, m=m: forward(m, *xs), tuple(range(6)))(*tensors) for m in (plain, model))
    for a, b in zip(got, wanted):
        assert np.abs(b.asnumpy()).max() > 0
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=1e-4, atol=1e-5)


def test_a_list_as_result_becomes_a_tuple():
    class Returns(Layer):
        def construct(self, x):
            return [super().construct(x), {"x": x}]

    class Opening(Stack):
        def construct(self, x):
            for layer in self.layers:
                self.seen = out = layer(x)
                x = out[0]
            return self.head(x)

    plain, model = twins(lambda: Opening(Returns))
    assert_equal_training(plain, model, square, x_of())
    assert type(plain.seen) is list and type(model.seen) is tuple


def test_callers_of_construct_at_every_level():
    class Direct(Layer):
        def construct(self, x):
            return x + self.b.construct(ops.tanh(self.a.construct(x)))

    class Model(Stack):
        def construct(self, x):
            for layer in self.layers:
                x = layer.construct(x)
            return self.head.construct(x)

    plain, model = twins(lambda: Model(Direct))
    assert_equal_training(plain, model, lambda m, x: (m.construct(x) ** 2).mean(), x_of())


# Which layers are found #


class Other(Layer):
    """Another class."""


class Chain(nn.Cell):
    """Encoders, decoders: a list inside."""

    def __init__(self, layer=Layer, layers=2):
        super().__init__()
        self.layers = nn.CellList([layer() for _ in range(layers)])

    construct = Stack.construct

    def head(self, x):
        return x


class Decoder(Chain):
    """Another class."""


def found(model):
    return wrap(model).wrap_report.blocks


def test_layers_in_every_container():
    assert found(Stack(layers=3)) == {f"layers.{i}": "Layer" for i in range(3)}
    sequential = nn.SequentialCell(nn.Dense(WIDTH, WIDTH), Layer(), nn.Tanh(), Layer())
    plain, model = twins(lambda: nn.SequentialCell(nn.Dense(WIDTH, WIDTH), Layer(), nn.Tanh(), Layer()))
    assert found(sequential) == model.wrap_report.blocks == {"1": "Layer", "3": "Layer"}
    assert_equal_training(plain, model, square, x_of())

    class ByName(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layers = nn.CellDict([["first", Layer()], ["second", Layer()]])

        def construct(self, x):
            return self.layers["second"](self.layers["first"](x))

    plain, model = twins(ByName)
    assert model.wrap_report.blocks == {"layers.first": "Layer", "layers.second": "Layer"}
    assert_equal_training(plain, model, square, x_of())


def test_the_outermost_layers_are_taken():
    plain, model = twins(lambda: nn.SequentialCell(Chain(), Chain(), nn.SequentialCell(Chain(layers=1), nn.Dense(WIDTH, 2))))
    assert model.wrap_report.blocks == {"0": "Chain", "1": "Chain", "2.0": "Chain"}
    assert model.wrap_report.elements_outside == 2 * WIDTH + 2
    assert_equal_training(plain, model, square, x_of())


def test_a_single_member_is_looked_into():
    plain, model = twins(lambda: nn.SequentialCell(Chain(), Decoder(), Other()))
    assert model.wrap_report.blocks == {f"{i}.layers.{j}": "Layer" for i in (0, 1) for j in (0, 1)}
    assert_equal_training(plain, model, square, x_of())


def test_a_class_once_in_each_of_several_containers():
    build = lambda: nn.SequentialCell(nn.SequentialCell(Layer(), Other()), nn.SequentialCell(Layer()))  # noqa: E731
    plain, model = twins(build)
    assert model.wrap_report.blocks == {"0.0": "Layer", "1.0": "Layer"}, "Other is there once"
    assert_equal_training(plain, model, square, x_of())


def test_nothing_repeated_is_no_error():
    plain, model = twins(lambda: nn.SequentialCell(Layer(), Other(), nn.Dense(WIDTH, 2), nn.Dense(2, 2)))
    assert model.wrap_report.blocks == {}, "and a single Dense is not worth a Block"
    assert_equal_training(plain, model, square, x_of())


@pytest.mark.parametrize(
    ("patterns", "blocks"),
    [
        (["layers.*"], {"layers.0", "layers.1", "layers.2"}),
        (["layers.[02]"], {"layers.0", "layers.2"}),
        (["layers.?.a"], {"layers.0.a", "layers.1.a", "layers.2.a"}),
        (["layers.1", "*.b", "head"], None),
        (["layers.1", "layers.[02].b", "head"], {"layers.1", "layers.0.b", "layers.2.b", "head"}),
        ([""], {""}),
        ([], set()),
    ],
)
def test_patterns(patterns, blocks):
    if blocks is None:
        with pytest.raises(ValueError, match=r"^layers: layers\.1\.b is inside layers\.1; a Block cannot be inside another"):
            wrap(Stack(layers=3), layers=patterns)
        return
    plain, model = twins(lambda: Stack(layers=3), layers=patterns)
    assert set(model.wrap_report.blocks) == blocks
    assert_equal_training(plain, model, square, x_of())


def test_patterns_that_are_refused_leave_the_model_as_it_was():
    model = Stack()
    for options, text in (
        ({"layers": ["encoder.*"]}, r"^layers: no cell with parameters matches 'encoder\.\*'; paths are as in model\.cells"),
        ({"layers": ["layers"]}, r"^layers: layers is a CellList, which is never called; name its members: 'layers\.\*'$"),
        ({"buffers": ["*.scale"]}, r"^buffers: no parameter matches '\*\.scale'; names are as in model\.parameters_and_names"),
    ):
        with pytest.raises(ValueError, match=text):
            wrap(model, **options)
        assert not any(isinstance(p, bms.DistributedParameter) for p in model.get_parameters())
    with pytest.raises(TypeError, match=r"^BMTrainModelWrapper wraps a Cell, not a function$"):
        wrap(lambda x: x)
