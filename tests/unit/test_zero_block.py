"""What a Block accepts, returns and refuses; each gradient against the same module without a Block."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import namedtuple

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.compat.autograd import backward_hooks, no_grad
from bmtrain_ms.zero import context_of
from tests.helpers.blocks import MODES, build, x_of
from tests.helpers.models import INNER, WIDTH, Dense, Residual

Pair = namedtuple("Pair", "left right")


@pytest.fixture(autouse=True)
def _world(single_world):
    yield single_world


def compare(block, forward, *inputs, tolerance=1e-6):
    """`forward(module, *inputs)` gives a scalar; with the Block and with the bare inner module (which gathers on access)."""
    params = block.trainable_params()
    positions = tuple(range(len(inputs)))
    results = []
    for module in (block, block.inner):
        if module is not block:
            for _, cell in module.cells_and_names():
                cell.__dict__.pop("_in_block", None)  # the reference: every access gathers by itself
        value, (input_grads, grads) = ms.value_and_grad(lambda *xs, m=module: forward(m, *xs), positions, params)(*inputs)
        input_grads = input_grads if isinstance(input_grads, tuple) else (input_grads,)
        results.append([a.asnumpy() for a in (value, *input_grads, *grads)])
    assert any(np.abs(a).max() > 0 for a in results[1][1:])
    for got, expected in zip(*results):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


class Options(nn.Cell):
    """Every kind of argument and result."""

    def __init__(self):
        super().__init__()
        self.dense = Dense(WIDTH, WIDTH, ms.float32)

    def construct(self, x, scale=1.0, extra=None, *rest, bias, flag=False, pair=None, **more):
        y = self.dense(x) * scale + bias
        if extra is not None:
            y = y + extra["a"][0] * 2 + extra["a"][1]
        for tensor in rest:
            y = y + tensor
        if flag:
            y = y * 2
        if pair is not None:
            y = y + pair.left - pair.right
        for tensor in more.values():
            y = y * tensor
        return [y, (x + 1, {"ids": Tensor([1, 2], ms.int32), "none": None, "y": y * 3}), "text"]


@MODES
def test_every_kind_of_argument_reaches_the_module_and_gets_its_gradient(use_checkpoint, zero_level):
    block = build(Options(), use_checkpoint, zero_level)
    tensors = [x_of(i) for i in range(7)]

    def forward(m, x, bias, a, b, left, right, more):
        out = m(x, 2.0, {"a": [a, b]}, bias, bias=bias, flag=True, pair=Pair(left, right), more=more)
        y, (shifted, rest), text = out
        assert isinstance(out, (tuple, list)) and text == "text" and rest["none"] is None
        assert rest["ids"].asnumpy().tolist() == [1, 2]
        return (y**2).mean() + (shifted * rest["y"]).mean()

    compare(block, forward, *tensors)


def test_a_keyword_behind_a_skipped_default_is_not_lost():
    """BMTrain keeps only the positional part of the bound arguments."""

    class Skips(nn.Cell):
        def __init__(self):
            super().__init__()
            self.dense = Dense(WIDTH, WIDTH, ms.float32)

        def construct(self, a, b=None, c=None):
            assert b is None and c == 3
            return self.dense(a) * c

    block = build(Skips())
    assert block(x_of(), c=3).shape == (4, WIDTH)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (lambda y: y, lambda out: isinstance(out, Tensor)),
        (lambda y: (y,), lambda out: isinstance(out, tuple) and len(out) == 1),
        (lambda y: (y, y + 1), lambda out: isinstance(out, tuple) and len(out) == 2),
        (lambda y: [y] * 10, lambda out: isinstance(out, tuple) and len(out) == 10),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_result_types(make, check, recorded):
    """Upstream: test_different_output_shape."""

    class Returns(nn.Cell):
        def __init__(self):
            super().__init__()
            self.dense = Dense(WIDTH, WIDTH, ms.float32)

        def construct(self, x):
            return make(self.dense(x))

    block = build(Returns())

    def forward(x):
        out = block(x)
        assert check(out)
        return (out if isinstance(out, Tensor) else out[0]).sum()

    if recorded:
        ms.value_and_grad(forward, None, block.trainable_params())(x_of())
    else:
        forward(x_of())


class Tied(nn.Cell):
    def __init__(self):
        super().__init__()
        self.first, self.second = Dense(WIDTH, WIDTH, ms.float32), Dense(WIDTH, WIDTH, ms.float32)
        self.second.weight = self.first.parameter("weight")

    def construct(self, x):
        return self.second(ops.tanh(self.first(x)))


@MODES
def test_tied_weights_inside_a_block(use_checkpoint, zero_level):
    block = build(Tied(), use_checkpoint, zero_level)
    assert len(block.trainable_params()) == 5  # one weight, two biases, two gains
    compare(block, lambda m, x: (m(x) ** 2).mean(), x_of())


@MODES
def test_a_block_used_twice(use_checkpoint, zero_level):
    block = build(Residual(), use_checkpoint, zero_level)
    compare(block, lambda m, x: (m(ops.tanh(m(x))) ** 2).mean(), x_of())


@MODES
def test_a_weight_shared_between_a_block_and_a_layer_outside(use_checkpoint, zero_level):
    outside = Dense(WIDTH, WIDTH, ms.float32)
    block = build(Residual(inner=WIDTH), use_checkpoint, zero_level)
    outside.weight = block.inner.a.parameter("weight")
    bms.init_parameters(outside)
    outside.parameter("bias").requires_grad = outside.parameter("gain").requires_grad = False
    compare(block, lambda m, x: (ops.tanh(outside(m(x))) ** 2).mean(), x_of())


@MODES
def test_frozen_parameters_and_flags_toggled_later(use_checkpoint, zero_level):
    block = build(Residual(), use_checkpoint, zero_level)
    weight = block.a.parameter("weight")
    for flag in (True, False, True):
        weight.requires_grad = flag
        assert any(p is weight for p in block.trainable_params()) is flag
        compare_again = build(block.inner, use_checkpoint, zero_level) if flag else block
        compare(compare_again, lambda m, x: (m(x) ** 2).mean(), x_of())


@MODES
def test_a_fully_frozen_block_passes_gradients_on(use_checkpoint, zero_level):
    frozen, head = build(Residual(), use_checkpoint, zero_level), Dense(WIDTH, WIDTH, ms.float32)
    head.update_parameters_name("head.")
    bms.init_parameters(head)
    for p in frozen.get_parameters():
        p.requires_grad = False
    calls = []
    original = frozen.inner.construct
    frozen.inner.construct = lambda x: calls.append(1) or original(x)
    params = head.trainable_params()
    with_input, _ = ms.grad(lambda x: (frozen(head(x)) ** 2).mean(), 0, params)(x_of())
    assert np.abs(with_input.asnumpy()).max() > 0
    assert len(calls) == (2 if use_checkpoint else 1)
    calls.clear()
    ms.grad(lambda x: (head(frozen(x)) ** 2).mean(), None, params)(x_of())
    assert len(calls) == 1  # nothing in front of it needs a gradient: no recomputation
    assert context_of(bms.comm.world()).pipeline.meter.current == 0


@MODES
def test_first_block_without_differentiable_input(use_checkpoint, zero_level):
    """Upstream: several outputs of a first block fail."""

    class Two(nn.Cell):
        def __init__(self):
            super().__init__()
            self.dense = Dense(WIDTH, WIDTH, ms.float32)

        def construct(self, ids):
            x = ops.one_hot(ids, WIDTH).astype(ms.float32)
            return self.dense(x), x * 2

    block = build(Two(), use_checkpoint, zero_level)
    ids = Tensor([0, 3, 5], ms.int32)
    params = block.trainable_params()
    grads = ms.grad(lambda ids: (block(ids)[0] * block(ids)[1]).sum(), None, params)(ids)
    assert all(np.abs(g.asnumpy()).max() > 0 for g in grads)


def test_no_grad_and_eval_calls_record_nothing():
    block = build(Residual())
    with no_grad():
        kept = block(x_of())
    np.testing.assert_array_equal(kept.asnumpy(), block(x_of()).asnumpy())
    assert context_of(bms.comm.world()).pipeline.meter.current == 0

    def half_recorded(x):
        with no_grad():
            y = block(x)
        return (block(x) * y).sum()

    grads = ms.grad(half_recorded, None, block.trainable_params())(x_of())
    assert all(np.isfinite(g.asnumpy()).all() for g in grads)


@MODES
def test_an_exception_inside_leaves_a_healthy_engine(use_checkpoint, zero_level):
    class Fails(nn.Cell):
        def __init__(self):
            super().__init__()
            self.dense, self.broken = Dense(WIDTH, WIDTH, ms.float32), False

        def construct(self, x):
            if self.broken:
                raise KeyError("inside the block")
            return self.dense(x)

    block = build(Fails(), use_checkpoint, zero_level)
    params = block.trainable_params()
    run = ms.value_and_grad(lambda x: (block(x) ** 2).mean(), None, params)
    expected = [g.asnumpy() for g in run(x_of())[1]]
    block.inner.broken = True
    with pytest.raises(KeyError, match="inside the block"):
        run(x_of())
    with pytest.raises(KeyError):
        block(x_of())
    block.inner.broken = False
    assert "weight" not in block.inner.dense.__dict__  # the substitution was undone
    for got, want in zip(run(x_of())[1], expected):
        np.testing.assert_array_equal(got.asnumpy(), want)
    assert context_of(bms.comm.world()).pipeline.meter.current == 0


def test_names_attributes_and_modes_are_those_of_the_inner_module():
    plain, wrapped = nn.CellList([Residual(), Residual()]), nn.CellList([bms.Block(Residual()), bms.Block(Residual())])
    names = [p.name for p in plain.get_parameters()]
    assert [p.name for p in wrapped.get_parameters()] == names == sorted(names, key=lambda n: int(n[0]))
    assert [n for n, _ in wrapped.parameters_and_names()] == [n for n, _ in plain.parameters_and_names()]
    block = wrapped[0]
    assert block.a is block.inner.a
    assert block.a.weight is block.a.parameter("weight") and block.a.weight.shape == (35,)  # the bare shard outside a call
    for mode in (True, False):
        wrapped.set_train(mode)
        block(x_of())
        assert block.training is block.inner.training is block.a.training is mode
    assert block.set_train(True) is block and block.a.training
    assert repr(block).startswith("Block(Residual")


def test_what_a_block_refuses():
    class Plain(nn.Cell):
        def __init__(self):
            super().__init__()
            self.dense, self.scale = Dense(WIDTH, WIDTH, ms.float32), Parameter(Tensor([1.0]), name="scale")

    with pytest.raises(ValueError, match=r"^rank 0: parameter scale is a Parameter; all parameters in a Block must be"):
        bms.Block(Plain())
    with pytest.raises(ValueError, match=r"^rank 0: there is a Block inside the Block already"):
        bms.Block(nn.SequentialCell([bms.Block(Residual())]))
    with pytest.raises(ValueError, match="zero_level must be 2 or 3, not 1"):
        bms.Block(Residual(), zero_level=1)
    with pytest.raises(TypeError, match="Block wraps a Cell, not a function"):
        bms.Block(lambda x: x)


def test_mindspore_dropout_in_a_checkpointed_block_is_refused():
    class Drops(nn.Cell):
        def __init__(self):
            super().__init__()
            self.dense, self.drop = Dense(WIDTH, WIDTH, ms.float32), nn.Dropout(p=0.5)

        def construct(self, x):
            return self.drop(self.dense(x))

    block = build(Drops())
    block.set_train(True)
    with pytest.raises(ValueError, match=r"drop is a mindspore.nn.Dropout in a checkpointed Block.*bmtrain_ms.nn.Dropout"):
        ms.grad(lambda x: block(x).sum(), None, block.trainable_params())(x_of())
    block.set_train(False)
    ms.grad(lambda x: block(x).sum(), None, block.trainable_params())(x_of())


class Several(nn.Cell):
    def __init__(self):
        super().__init__()
        self.dense = Dense(WIDTH, WIDTH, ms.float32)

    def construct(self, h1, h2, h3, other, scale=1.0):
        return ops.tanh(self.dense(h1)) + other, h2 * scale + h1, h3 - h2


@MODES
def test_list_with_several_hidden_states(use_checkpoint, zero_level):
    """Upstream: test_multi_return, test_middle_hidden, with gradients compared exactly."""
    cells = [Several() for _ in range(3)]
    blocks = bms.TransformerBlockList([bms.Block(c, use_checkpoint, zero_level) for c in cells], num_hidden=3)
    bms.init_parameters(blocks)
    params = blocks.trainable_params()
    assert [p.name for p in params][:4] == ["0.dense.weight", "0.dense.bias", "0.dense.gain", "1.dense.weight"]
    inputs = [x_of(i) for i in range(4)]

    def by_list(*xs):
        *out, s1, s2, s3 = blocks(*xs, scale=0.5, return_hidden_states=True)
        assert len(out) == 3 and s1.shape == (3, 4, WIDTH)
        return sum((o * o).mean() for o in out) + (s1 * s2).mean() + s3.sum() * 0.1

    def by_hand(*xs):
        hidden, other, seen = xs[:3], xs[3], []
        for block in blocks:
            seen.append(hidden)
            hidden = block(*hidden, other, scale=0.5)
        s1, s2, s3 = (ops.stack(list(s)) for s in zip(*seen))
        return sum((o * o).mean() for o in hidden) + (s1 * s2).mean() + s3.sum() * 0.1

    positions = (0, 1, 2, 3)
    first = ms.value_and_grad(by_list, positions, params)(*inputs)
    second = ms.value_and_grad(by_hand, positions, params)(*inputs)
    for a, b in zip((first[0], *first[1][0], *first[1][1]), (second[0], *second[1][0], *second[1][1])):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy())


def test_list_protocol():
    raw = Residual()
    blocks = bms.TransformerBlockList(cell for cell in (raw, Residual(), raw))
    assert len(blocks) == 3 and blocks[0] is not blocks[2] and blocks[0].inner is blocks[2].inner
    assert blocks["1"] is blocks[1] is blocks[-2] and blocks[1:] == [blocks[1], blocks[2]]
    assert list(blocks) == [blocks[0], blocks[1], blocks[2]]
    assert len(blocks.trainable_params()) == 12  # the shared one counts once
    block = bms.Block(Residual())
    with pytest.raises(AssertionError, match="same Block appears twice"):
        bms.TransformerBlockList([block, block])
    with pytest.raises(ValueError, match="at least one module"):
        bms.TransformerBlockList([])
    with pytest.raises(ValueError, match="3 hidden states are expected as the first arguments, 1 were given"):
        bms.TransformerBlockList([Several()], num_hidden=3)(x_of())


def test_mindspores_own_spelling_gives_finished_gradients():
    from bmtrain_ms.optim import AdamOptimizer

    block = build(Residual())
    optimizer = AdamOptimizer(block.trainable_params(), lr=0.1)
    before = [p.asnumpy().copy() for p in optimizer.parameters]
    _, grads = ms.value_and_grad(lambda x: (block(x) ** 2).mean(), None, optimizer.parameters)(x_of())
    optimizer(grads)
    assert all(np.abs(p.asnumpy() - b).max() > 0 for p, b in zip(optimizer.parameters, before))


def test_a_hook_on_a_parameter_sees_the_reduced_gradient():
    block = build(Residual())
    p = block.a.parameter("weight")
    seen = []
    p.register_hook(lambda g: seen.append(g.asnumpy().copy()) or g)
    grads = ms.grad(lambda x: (block(x) ** 2).mean(), None, [p])(x_of())
    np.testing.assert_array_equal(seen[0], grads[0].asnumpy())


def test_copies_of_a_parameter_and_of_a_module():
    p = Dense(WIDTH, WIDTH, ms.float32).parameter("weight")
    for other in (copy.deepcopy(p), p.clone(), pickle.loads(pickle.dumps(p))):
        assert isinstance(other, bms.DistributedParameter)
        assert other.full_shape == (WIDTH, WIDTH) and other.world is p.world
    duplicate = copy.deepcopy(p)
    duplicate.copy_full(np.ones((WIDTH, WIDTH), np.float32))
    assert not p.asnumpy().any() and duplicate.gather().asnumpy().all()


def test_what_a_parameter_refuses():
    with pytest.raises(ValueError, match=r"a parameter of shape \(3, 0\) has no elements"):
        bms.DistributedParameter(bms.empty(3, 0))
    with pytest.raises(ValueError, match="must be of a floating-point type, not Int32"):
        bms.DistributedParameter(np.ones(3, np.int32))
    p = bms.DistributedParameter(np.arange(6, dtype=np.float32).reshape(2, 3), name="p")
    assert p.gather().asnumpy().tolist() == [[0, 1, 2], [3, 4, 5]] and p.owned == (0, 6)
    assert (p._original_shape, p._start_partition, p._end_partition) == ((2, 3), 0, 6)
    with pytest.raises(ValueError, match=r"parameter p has full shape \(2, 3\), the values \(3, 2\)"):
        p.copy_full(np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"the shard of p is \(6,\) Float32, not \(5,\) Float32"):
        p.set_shard(Tensor(np.ones(5, np.float32)))
    bms.shutdown()
    with pytest.raises(RuntimeError, match=r"call bmtrain_ms.init_distributed\(\) before"):
        bms.DistributedParameter(bms.empty(3))


def test_the_engine_registers_one_hook_only():
    assert len(backward_hooks) == 1


def test_a_parameter_replaced_after_wrapping_is_refused(single_world):
    block = bms.Block(Residual())
    bms.init_parameters(block)
    x = Tensor(np.ones((2, WIDTH), np.float32))
    block(x)
    block.a.weight = bms.DistributedParameter(bms.empty(INNER, WIDTH))
    text = (
        r"^parameter a\.weight of Dense\.weight was replaced after the Block was made, on rank 0: the Block would go on with the "
        r"old one\. Write values into the parameter \(copy_full, set_shard\), or replace it before wrapping$"
    )
    with pytest.raises(ValueError, match=text):
        block(x)


class Viewing(Dense):
    """Multiplies with a view of its weight; does not use its gain."""

    def construct(self, x):
        return ops.matmul(x, self.weight.T) + self.bias


def test_a_weight_that_the_graph_keeps_is_named_once(single_world):
    block = bms.Block(Viewing(WIDTH, WIDTH, ms.float32), use_checkpoint=False)
    bms.init_parameters(block)
    x = Tensor(np.ones((2, WIDTH), np.float32))
    step = ms.value_and_grad(lambda x: block(x).sum(), None, block.trainable_params())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, again = step(x)[1], step(x)[1]
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy())
    texts = [str(w.message) for w in caught if "the recorded graph keeps" in str(w.message)]
    if ms.__version__.startswith("2.5"):
        (text,) = texts
        assert text.startswith(
            "the recorded graph keeps a full copy of weight (in Viewing) until backward: on this MindSpore a view"
        )
        assert "ops.MatMul(transpose_b=True)" in text and "Block(use_checkpoint=True)" in text
    else:
        assert not texts, "a view shares the memory, which is let go of"


def test_no_such_warning_where_nothing_is_kept(single_world):
    x = Tensor(np.ones((2, WIDTH), np.float32))
    for block in (bms.Block(Viewing(WIDTH, WIDTH, ms.float32)), bms.Block(Residual(), use_checkpoint=False)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the recorded graph keeps")
            ms.value_and_grad(lambda x, block=block: block(x).sum(), None, block.trainable_params())(x)
