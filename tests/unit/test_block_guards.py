"""What a Block notices before gradients go wrong, how often it runs its module, and buffers inside of it."""

from __future__ import annotations

import random
import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.zero import context_of
from bmtrain_ms.zero.slots import contents as _contents
from tests.helpers.blocks import MODES, build, x_of
from tests.helpers.models import WIDTH, Dense, Residual


@pytest.fixture(autouse=True)
def _world(single_world):
    yield single_world


def step(module, *inputs, **options):
    """Loss and gradients by name; the loss is of the first output."""

    def loss():
        out = module(*inputs, **options)
        return ((out[0] if isinstance(out, tuple) else out) ** 2).mean()

    params = module.trainable_params()
    value, grads = ms.value_and_grad(loss, None, params)()
    return value.asnumpy().item(), {p.name: g.asnumpy() for p, g in zip(params, grads)}


class Counted(nn.Cell):
    """Dense, counting its calls."""

    def __init__(self):
        super().__init__()
        self.dense, self.calls = Dense(WIDTH, WIDTH, ms.float32), 0

    def construct(self, x):
        self.calls += 1
        return self.dense(x)


# Recomputation is checked, once #


class Random(Counted):
    """A dropout that is a function."""

    rate = 0.5

    def construct(self, x):
        return ops.dropout(super().construct(x), p=self.rate, training=self.training)


class Drifting(Counted):
    """Another result each time."""

    def construct(self, x):
        return super().construct(x) * (1.0 + 0.02 * self.calls)


@pytest.mark.parametrize("kind", [Random, Drifting])
@pytest.mark.parametrize("zero_level", [2, 3])
def test_recomputation_that_differs_is_refused(kind, zero_level):
    block = build(kind(), zero_level=zero_level).set_train()
    text = (
        f"rank 0: recomputing dense ({kind.__name__}) gave other values than its forward pass, so its gradients would be wrong: "
        "something in it is random (a dropout that is a function, not a bmtrain_ms.nn.Dropout) or changes state. Use "
        "Block(use_checkpoint=False) for it"
    )
    with pytest.raises(RuntimeError, match=re.escape(text)):
        step(block, x_of())
    assert context_of(bms.comm.world()).pipeline.meter.current == 0
    step(build(kind(), use_checkpoint=False, zero_level=zero_level).set_train(), x_of())


class Counter(Counted):
    """Counts its batches in a parameter, and lets nobody see it."""

    def __init__(self):
        super().__init__()
        self.seen = Parameter(Tensor([0], ms.int32), name="seen")

    def construct(self, x):
        ops.assign_add(self.seen, Tensor([1], ms.int32))
        return super().construct(x)


class Normed(Counted):
    """Running statistics are not sharded; its scale and shift are frozen, and so a buffer too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.norm.gamma.requires_grad = self.norm.beta.requires_grad = False

    def construct(self, x):
        return self.norm(super().construct(x))


@pytest.mark.parametrize(("kind", "name"), [(Counter, "seen"), (Normed, "norm.moving_mean")])
def test_recomputation_that_changes_a_buffer_again_is_refused(kind, name):
    """BMTrain updates running statistics twice, and says nothing."""
    block = build(kind()).set_train()
    text = f"({kind.__name__}) changed {name} a second time (running statistics, a counter): use Block(use_checkpoint=False) for it"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        step(block, x_of())
    kept = build(kind(), use_checkpoint=False).set_train()
    before = {p.name: p.asnumpy().copy() for p in kept.get_parameters() if not isinstance(p, bms.DistributedParameter)}
    step(kept, x_of())
    assert all(np.abs(p.asnumpy() - before[p.name]).max() > 0 for p in kept.get_parameters() if p.name == name)
    evaluated = build(Normed())
    evaluated.set_train(False)
    step(evaluated, x_of())


class Late(Counted):
    """Differs from its third pass on."""

    def construct(self, x):
        return super().construct(x) * (1.0 + (self.calls > 4) * 0.02 * self.calls)


def test_recomputation_is_compared_in_every_pass():
    block = build(Late()).set_train()
    for _ in range(2):
        step(block, x_of())
    with pytest.raises(RuntimeError, match="gave other values than its forward pass"):
        step(block, x_of())


class OneElement(Counted):
    """One element differs: not what rounding does."""

    def construct(self, x):
        y = super().construct(x)
        if self.calls % 2:
            return y
        mask = np.ones(y.shape, np.float32)
        mask.flat[-2] = 1.5
        return y * Tensor(mask)


def test_a_difference_of_one_element_is_noticed():
    with pytest.raises(RuntimeError, match="gave other values than its forward pass"):
        step(build(OneElement()), Tensor(np.ones((1000, WIDTH), np.float32)))


class Skipping(Counted):
    """Stochastic depth, as it is written with Python's or NumPy's generator."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.drawn = draw, []

    def construct(self, x):
        self.drawn.append(self.draw())
        return x + super().construct(x) if self.drawn[-1] < 0.5 else x


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: random.gauss(0.5, 1.0) + np.random.normal()])
@pytest.mark.parametrize("zero_level", [2, 3])
def test_draws_of_pythons_and_numpys_generators_are_made_again(draw, zero_level):
    random.seed(3)
    np.random.seed(4)
    blocks = [build(Skipping(draw), use_checkpoint, zero_level).set_train() for use_checkpoint in (True, False)]
    for p, q in zip(*(block.get_parameters() for block in blocks)):
        q.set_data(p * 1)
    taken = set()
    for _ in range(12):
        start = random.getstate(), np.random.get_state()
        recomputed, after = step(blocks[0], x_of()), (random.getstate(), np.random.get_state()[2])
        random.setstate(start[0])
        np.random.set_state(start[1])
        plain = step(blocks[1], x_of())
        assert after == (random.getstate(), np.random.get_state()[2])  # as if nothing had been drawn twice
        taken.add(blocks[0].inner.drawn[-1] < 0.5)
        assert blocks[0].inner.drawn[-2] == blocks[0].inner.drawn[-1]
        assert recomputed[0] == plain[0]
        for name, grad in plain[1].items():
            np.testing.assert_allclose(recomputed[1][name], grad, rtol=1e-5, atol=1e-7)
    assert taken == {True, False}


def test_a_generator_of_its_own_is_noticed():
    generator = np.random.default_rng(0)
    block = build(Skipping(generator.random)).set_train()
    with pytest.raises(RuntimeError, match="gave other values than its forward pass"):
        for _ in range(50):
            step(block, x_of())


def test_a_counter_that_starts_later_is_noticed():
    """BatchNorm was evaluated first, or its mode changed: the check of the first pass saw nothing."""
    block = build(Normed())
    block.set_train(False)
    step(block, x_of())
    block.set_train()
    with pytest.raises(RuntimeError, match=re.escape("changed norm.moving_mean a second time")):
        step(block, x_of())


# Writing while a Block computes #


class Writes(Counted):
    """Writes its weight, as weight normalisation in place does."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def construct(self, x):
        y = super().construct(x)
        if self.how == "the copy":
            ops.assign(self.dense.weight, self.dense.weight * 0.5)
        elif self.how == "the shard":
            shard = self.dense.parameter("weight")
            ops.assign(shard, shard * 0.5)
        return y


@MODES
@pytest.mark.parametrize("how", ["the copy", "the shard"])
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("before", [0, 2])
def test_writing_a_parameter_while_its_block_computes_is_refused(how, record, before, use_checkpoint, zero_level):
    """In the first call, and in later ones."""
    block = build(Writes(""), use_checkpoint, zero_level)
    for _ in range(before):
        step(block, x_of())
    block.inner.how = how
    text = (
        "parameter dense.weight was written while dense was computing with it, on rank 0: between its gather and the end of the "
        "call, or between forward and backward. Its module has a gathered copy, so the result would be that of neither value. "
        "Write parameters before a forward pass or after backward; what a module updates while it runs (statistics, counters) "
        "belongs in a Parameter with requires_grad=False"
    )
    with pytest.raises(RuntimeError, match=re.escape(text)):
        step(block, x_of()) if record else block(x_of())
    block.inner.how = ""
    step(block, x_of())  # nothing is left of it
    assert context_of(bms.comm.world()).pipeline.meter.current == 0


@MODES
def test_writing_between_forward_and_backward_is_refused(use_checkpoint, zero_level):
    block = build(Counted(), use_checkpoint, zero_level)
    weight = block.inner.dense.parameter("weight")

    def written():
        y = block(x_of())
        ops.assign(weight, weight * 0.5)
        return (y**2).mean()

    with pytest.raises(RuntimeError, match=r"parameter dense\.weight was written while dense was computing with it"):
        ms.value_and_grad(written, None, block.trainable_params())()
    step(block, x_of())


@MODES
def test_writing_before_a_call_and_back_after_it_is_refused_where_it_was_gathered_ahead(use_checkpoint, zero_level):
    """Noise on a weight that hooks of a Block put on and take off: backward alone would not see it."""
    chain = bms.TransformerBlockList([bms.Block(Counted(), use_checkpoint, zero_level) for _ in range(2)])
    bms.init_parameters(chain)
    weight, was = chain[1].inner.dense.parameter("weight"), []

    def before(cell, args):
        was.append(weight.asnumpy().copy())
        ops.assign(weight, weight * 2.0)

    def after(cell, args, out):
        ops.assign(weight, Tensor(was.pop()))

    for _ in range(2):
        step(chain, x_of())
    chain[1].register_forward_pre_hook(before)
    chain[1].register_forward_hook(after)
    with pytest.raises(RuntimeError, match=r"parameter 1\.dense\.weight was written while"):
        step(chain, x_of())


def test_a_recorded_pass_that_nobody_differentiates_is_forgotten():
    """`Cell.set_grad` records; then parameters are written, and trained."""
    chain = bms.PipelineTransformerBlockList([bms.Block(Counted(), mode="PIPE") for _ in range(2)])
    bms.init_parameters(chain)
    step(chain, x_of())
    chain.set_grad()
    chain(x_of())
    chain.set_grad(False)
    for p in chain.trainable_params():
        p.copy_full(np.ones(p.full_shape, np.float32))
    out = chain(x_of()).asnumpy()
    loss, _ = step(chain, x_of())
    np.testing.assert_allclose(loss, (out**2).mean(), rtol=1e-6)


@pytest.mark.parametrize("record", [True, False])
def test_writing_a_later_block_of_a_chain_is_refused(record):
    """It may have been gathered already: nobody looks between the blocks of a list."""

    class Meddles(Counted):
        def construct(self, x):
            if self.calls > 2:
                later = chain[1].inner.dense.parameter("weight")
                ops.assign(later, later * 0.5)
            return super().construct(x)

    chain = bms.TransformerBlockList([bms.Block(Meddles()), bms.Block(Counted())])
    bms.init_parameters(chain)
    chain[0].inner.calls = -10
    for _ in range(3):
        step(chain, x_of()) if record else chain(x_of())
    chain[0].inner.calls = 10
    with pytest.raises(RuntimeError, match=r"parameter 1\.dense\.weight was written while"):
        step(chain, x_of()) if record else chain(x_of())


# What a module was not given #


def test_a_gradient_inside_of_a_block_says_what_to_do():
    class Inner(Counted):
        def construct(self, x):
            return ms.grad(lambda x: super(Inner, self).construct(x).sum(), 0)(x)

    for use_checkpoint in (True, False):
        with pytest.raises(RuntimeError, match="gradient"):
            step(build(Inner(), use_checkpoint), x_of())


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_what_is_not_finite_is_no_difference(value):
    """An overflow is the loss scaler's business."""
    x = np.ones((2, WIDTH), np.float32)
    x[0, 0] = value
    step(build(Counted()), Tensor(x))


def test_dropout_of_mindspore_with_keep_prob_is_refused_too():
    class Drops(Counted):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(keep_prob=0.5)

        def construct(self, x):
            return self.drop(super().construct(x))

    with pytest.raises(ValueError, match=r"^drop is a mindspore\.nn\.Dropout in a checkpointed Block"):
        step(build(Drops()).set_train(), x_of())
    step(build(Drops(), use_checkpoint=False).set_train(), x_of())


# Changes after wrapping #


class Lora(nn.Cell):
    def __init__(self, dense):
        super().__init__()
        self.dense = dense
        self.down = bms.DistributedParameter(np.full((2, WIDTH), 0.01, np.float32), name="down")

    def construct(self, x):
        return self.dense(x) + ops.MatMul(transpose_b=True)(x, self.down).sum()


def put_in_lora(block):
    block.inner.a = Lora(block.inner.a)


def exchange(block):
    block.inner.b = Dense(block.inner.b.parameter("weight").full_shape[1], WIDTH, ms.float32)


def take_away(block):
    del block.inner.a.bias
    block.inner.a.__dict__["bias"] = 0.0


def train_the_scale(block):
    block.inner.scale.requires_grad = True


class Scaled(Residual):
    """With a plain parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.scale = Parameter(Tensor([2.0]), name="scale", requires_grad=False)

    def construct(self, x):
        return super().construct(x) * self.scale


@pytest.mark.parametrize("change", [put_in_lora, exchange, train_the_scale])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_module_that_was_changed_after_wrapping_is_refused(change, recorded):
    block = build(Scaled())
    block(x_of())
    change(block)
    text = (
        "rank 0: cells or parameters of Scaled were added, exchanged, removed or, of those that are not sharded, made trainable "
        "after the Block was made: gradients would be lost. Change the module (adapters, pruning) before wrapping it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        step(block, x_of()) if recorded else block(x_of())


def test_adapters_put_in_before_wrapping_are_trained():
    module = Scaled()
    module.a = Lora(module.a)
    _, grads = step(build(module), x_of())
    assert len(grads) == 7 and np.abs(grads["a.down"]).max() > 0


def test_a_parameter_that_was_taken_away_is_named():
    block = build(Residual())
    take_away(block)
    with pytest.raises(ValueError, match=r"^parameter a\.bias of Dense\.bias was replaced after the Block was made, on rank 0"):
        block(x_of())


def test_buffers_may_come_and_go():
    """A cache is nobody's gradient."""
    block = build(Scaled())
    loss, _ = step(block, x_of())
    block.inner.cache = Parameter(Tensor([0.0]), name="cache", requires_grad=False)
    assert step(block, x_of())[0] == loss
    block.inner.scale = Parameter(Tensor([0.0]), name="scale", requires_grad=False)
    assert step(block, x_of())[0] == 0
    assert len(_contents(block.inner)) == 3 + 6


# Buffers #


def test_buffers_are_saved_and_loaded_with_the_rest(tmp_path):
    """BMTrain never loads them, and strict=True calls what it saved itself unexpected."""
    path = str(tmp_path / "model.safetensors")
    saved, loaded = (build(Scaled()) for _ in range(2))
    saved.inner.scale.set_data(Tensor([5.0]))
    bms.save(saved, path)
    names = [p.name for p in saved.get_parameters()]
    assert "scale" in names and len(names) == 7
    bms.load(loaded, path, strict=True)
    assert loaded.inner.scale.asnumpy().tolist() == [5.0]
    assert step(loaded, x_of())[0] == step(saved, x_of())[0] != step(build(Scaled()), x_of())[0]


@MODES
def test_a_buffer_is_read_and_gets_no_gradient(use_checkpoint, zero_level):
    loss, grads = step(build(Scaled(), use_checkpoint, zero_level), x_of())
    plain, expected = step(build(Residual(), use_checkpoint, zero_level), x_of())
    np.testing.assert_allclose(loss, 4 * plain, rtol=1e-6)
    assert sorted(grads) == sorted(expected)
    for name in grads:
        np.testing.assert_allclose(grads[name], 4 * expected[name], rtol=1e-5, atol=1e-6)


# How often #


@MODES
@pytest.mark.parametrize("where", ["first", "second"])
def test_how_often_a_trainable_block_runs(use_checkpoint, zero_level, where):
    """Forward, and once more if it recomputes. BMTrain runs the first Block twice even without checkpointing."""
    blocks = [build(Counted(), use_checkpoint, zero_level) for _ in range(2)]
    for i, block in enumerate(blocks):
        block.update_parameters_name(f"{i}.")
    block = blocks[where == "second"]
    step(nn.SequentialCell(blocks), x_of())
    assert block.inner.calls == (2 if use_checkpoint else 1)
    block(x_of())
    assert block.inner.calls == (3 if use_checkpoint else 2)


@MODES
def test_a_frozen_block_runs_once_and_a_block_behind_it_gets_gradients(use_checkpoint, zero_level):
    frozen, trained = build(Counted(), use_checkpoint, zero_level), build(Counted(), use_checkpoint, zero_level)
    for p in frozen.get_parameters():
        p.requires_grad = False
    world = bms.comm.world()
    _, grads = step(nn.SequentialCell(frozen, trained), x_of())
    assert frozen.inner.calls == 1 and trained.inner.calls == (2 if use_checkpoint else 1)
    assert len(grads) == 3 and all(np.abs(g).max() > 0 for g in grads.values())
    assert context_of(world).pipeline.meter.current == 0


@MODES
def test_flags_of_a_call_do_not_stick(use_checkpoint, zero_level):
    """BMTrain: once called without differentiable inputs, always. Whether x needs a gradient may change from call to call."""
    block, front = build(Counted(), use_checkpoint, zero_level), build(Counted(), use_checkpoint, zero_level)
    front.update_parameters_name("front.")
    bms.init_parameters(front)
    wanted = step(nn.SequentialCell(front, block), x_of())
    for _ in range(2):
        _, grads = step(block, x_of())  # nothing in front
        again, more = step(nn.SequentialCell(front, block), x_of())
        assert again == wanted[0] and sorted(more) == sorted(wanted[1]) and len(grads) == 3
        for name, grad in more.items():
            np.testing.assert_array_equal(grad, wanted[1][name], err_msg=name)
        by_input = ms.grad(lambda x: (block(x) ** 2).mean())(x_of())
        assert np.abs(by_input.asnumpy()).max() > 0


@MODES
def test_trained_or_not_is_asked_at_each_call(use_checkpoint, zero_level):
    """Upstream: requires_grad_ after construction is honoured."""
    block = build(Residual(), use_checkpoint, zero_level)
    weight = block.inner.a.parameter("weight")
    wanted, grads = step(block, x_of())
    for flag in (False, True, False, True):
        weight.requires_grad = flag
        loss, got = step(block, x_of())
        assert loss == wanted and ("a.weight" in got) is flag and len(got) == 5 + flag
        for name, grad in got.items():
            np.testing.assert_array_equal(grad, grads[name], err_msg=name)


class Many(Counted):
    """Several outputs of inputs that need no gradient; keyword-only arguments behind skipped defaults."""

    def construct(self, ids, a=None, b=None, *, scale, **more):
        assert a is None
        x = ops.one_hot(ids, WIDTH).astype(ms.float32)
        return super().construct(x) * scale + b + more["late"], x, {"ids": ids}


@MODES
def test_keywords_and_several_outputs_of_a_first_block(use_checkpoint, zero_level):
    block = build(Many(), use_checkpoint, zero_level)
    bias, late = x_of(1, rows=3), x_of(2, rows=3)
    options = {"b": bias, "scale": 2.0, "late": late}
    ids = Tensor([0, 3, 5], ms.int32)
    y, x, rest = block(ids, **options)
    full = {name: block.inner.dense.parameter(name).gather().asnumpy() for name in ("weight", "bias", "gain")}
    dense = (x.asnumpy() @ full["weight"].T + full["bias"]) * full["gain"]
    np.testing.assert_allclose(y.asnumpy(), 2 * dense + bias.asnumpy() + late.asnumpy(), rtol=1e-5, atol=1e-6)
    assert rest["ids"] is ids
    _, grads = step(block, ids, **options)
    slope = 2 * y.asnumpy() / y.size * 2 * full["gain"]
    np.testing.assert_allclose(grads["dense.weight"].reshape(WIDTH, WIDTH), slope.T @ x.asnumpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads["dense.bias"], slope.sum(0), rtol=1e-5, atol=1e-6)


# Lists #


def test_a_raw_module_twice_shares_what_it_has_and_adds_its_gradients():
    raw = Counted()
    blocks = bms.TransformerBlockList([raw, raw])
    bms.init_parameters(blocks)
    assert blocks[0] is not blocks[1] and len(blocks.trainable_params()) == 3
    _, grads = step(blocks, x_of())
    single = build(Counted())
    for p, q in zip(single.get_parameters(), blocks.get_parameters()):
        p.set_data(q * 1)
    params = single.trainable_params()
    expected = ms.grad(lambda: (single(single(x_of())) ** 2).mean(), None, params)()
    for g, e in zip(grads.values(), expected):
        np.testing.assert_array_equal(g, e.asnumpy())


def test_lists_take_any_iterable_and_have_slices_and_modes():
    blocks = bms.TransformerBlockList(Counted() for _ in range(4))
    assert len(blocks) == 4 and blocks[-1] is blocks[3] and blocks[1:3] == [blocks[1], blocks[2]]
    assert blocks[::-1][0] is blocks["3"] and list(blocks)[-1] is blocks[-1]
    assert blocks.set_train() is blocks and all(b.set_train(False) is b and not b.training for b in blocks)
    with pytest.raises(IndexError):
        blocks[4]
    with pytest.raises(KeyError):
        blocks["4"]


def test_a_hook_on_a_parameter_that_a_block_gathers_itself():
    """Its gradient is real there, and no part of it is lost."""

    class Borrows(Counted):
        def construct(self, x):
            return super().construct(x) + shared.gather()

    shared = bms.DistributedParameter(np.full((1, WIDTH), 0.5, np.float32), name="shared")
    block, seen = build(Borrows()), []

    def gradient():
        return ms.grad(lambda: (block(x_of()) ** 2).sum(), None, [shared])()[0].asnumpy()

    expected = gradient()
    shared.register_hook(lambda grad: seen.append(grad.asnumpy().copy()) or grad)
    np.testing.assert_array_equal(gradient(), expected)
    assert np.abs(expected).min() > 0 and any(np.array_equal(x, expected) for x in seen)
