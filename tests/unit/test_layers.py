"""Layers: rotary embedding, linear, norms and dropout; the operations that they are made of are in test_ops."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.compat.autograd import no_grad
from bmtrain_ms.compat.cells import evaluating
from bmtrain_ms.model_center.layer import RotaryEmbedding
from bmtrain_ms.nn import projections
from bmtrain_ms.zero import context_of
from tests.unit.test_ops import assert_close, layer_norm, numbers, rms_norm, turned

pytestmark = pytest.mark.usefixtures("single_world")

BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])


def test_rotary_embedding_is_the_formula():
    x = numbers(2, 3, 2, 4)
    out = RotaryEmbedding(4, base=100.0)(Tensor(x), offset=5).asnumpy()
    for b, s, h in np.ndindex(2, 3, 2):
        angles = (5 + s) * 100.0 ** (-np.arange(0, 4, 2) / 4)
        np.testing.assert_allclose(out[b, s, h], turned(x[b, s, h][None].astype(np.float64), angles[None])[0], atol=1e-6)


def test_rotary_embedding_knows_relative_positions_only():
    rotary = RotaryEmbedding(8)
    q, k = numbers(1, 1, 1, 8), numbers(1, 1, 1, 8, seed=1)

    def product(at_q: int, at_k: int) -> float:
        return float((rotary(Tensor(q), at_q).asnumpy().astype(np.float64) * rotary(Tensor(k), at_k).asnumpy()).sum())

    assert product(7, 4) == pytest.approx(product(103, 100), abs=1e-4)
    assert product(7, 4) != pytest.approx(product(7, 5), abs=1e-2)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)


def test_rotary_embedding_far_positions_are_exact():
    """Angles are made in float64: at 100,000 float32 would be off by 0.004."""
    x = np.zeros((1, 1, 1, 2), np.float32)
    x[..., 0] = 1.0
    out = RotaryEmbedding(2)(Tensor(x), offset=100_000).asnumpy().reshape(-1)
    np.testing.assert_allclose(out, [np.cos(1e5), np.sin(1e5)], atol=1e-6)


def test_rotary_embedding_needs_pairs():
    with pytest.raises(ValueError, match="rotary embedding needs an even dim_head, not 5"):
        RotaryEmbedding(5)


# Layers #


def test_linear_layer():
    layer = bms.nn.Linear(4, 3)
    bms.init_parameters(layer)
    assert [(p.name, p.full_shape) for p in layer.get_parameters()] == [("weight", (3, 4)), ("bias", (3,))]
    weight, bias = layer.weight.asnumpy(), layer.bias.asnumpy()
    assert bias.tolist() == [0, 0, 0] and len(np.unique(weight)) == 12
    layer.parameter("bias").copy_full(np.array([1, 2, 3], np.float32))
    x = numbers(2, 5, 4)
    out = layer(Tensor(x))
    assert_close(out.asnumpy(), x @ weight.T.astype(np.float64) + [1, 2, 3], 1e-6)
    grads = ms.grad(lambda x: (layer(x) * out).sum(), None, layer.trainable_params())(Tensor(x))
    rows, slope = x.reshape(-1, 4), out.asnumpy().reshape(-1, 3)
    assert_close(grads[0].asnumpy(), (slope.T @ rows).reshape(-1), 1e-5)
    assert_close(grads[1].asnumpy(), slope.sum(0), 1e-5)


def test_projections_call_a_layer_that_is_more_than_its_construct():
    """Several linear layers of one x are computed as one operation, past their calls: not where a call does more."""
    first, second = bms.nn.Linear(4, 3, bias=False), bms.nn.Linear(4, 2)
    for layer in (first, second):
        bms.init_parameters(layer)
    x = Tensor(numbers(5, 4))
    found = projections(x, first, second)
    for y, layer in zip(found, (first, second)):
        np.testing.assert_array_equal(y.asnumpy(), layer(x).asnumpy())
    second.register_forward_hook(lambda cell, inputs, output: output * 0.0)
    hooked = projections(x, first, second)
    np.testing.assert_array_equal(hooked[0].asnumpy(), found[0].asnumpy())
    assert not hooked[1].asnumpy().any()


def test_linear_layer_options():
    layer = bms.nn.Linear(64, 32, bias=False, dtype=ms.float16, init_std=0.5)
    bms.init_parameters(layer)
    assert layer.bias is None and len(list(layer.get_parameters())) == 1
    weight = layer.weight.asnumpy()
    assert weight.dtype == np.float16
    assert weight.std() == pytest.approx(0.5, rel=0.1)
    xavier = bms.nn.Linear(64, 32)
    bms.init_parameters(xavier)
    assert xavier.weight.asnumpy().std() == pytest.approx((2 / 96) ** 0.5, rel=0.1)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_norm_layers(norm):
    layers = bms.model_center.layer
    layer = layers.RMSNorm(5, eps=1e-3) if norm is rms_norm else layers.LayerNorm(5, eps=1e-3)
    bms.init_parameters(layer)
    x = numbers(2, 3, 5)
    plain = norm(x.astype(np.float64), np.ones(5), *([np.zeros(5)] if norm is layer_norm else []))
    assert_close(layer(Tensor(x)).asnumpy(), plain, 1e-5)


# Dropout #


class Dropped(nn.Cell):
    """A linear layer between two dropouts."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.before, self.behind = bms.nn.Dropout(p), bms.nn.Dropout(p)
        self.layer = bms.nn.Linear(16, 16)

    def construct(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(self.before(x)))


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x = Tensor(numbers(3, 4))
    assert bms.nn.Dropout(0.9).set_train(False)(x) is x
    assert bms.nn.Dropout(0.0).set_train(True)(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_dropout_range(p):
    with pytest.raises(ValueError, match=rf"dropout probability must be in \[0, 1\), not {p}"):
        bms.nn.Dropout(p)


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_passes_whose_gradient_nobody_takes_draw_apart(single_world, use_checkpoint: bool):
    """However many there are between two passes of training, and they differ from each other."""
    x = Tensor(numbers(3, 16))

    def losses(evaluations: int) -> tuple[list[float], list[float]]:
        model = bms.Block(Dropped(), use_checkpoint).set_train(True)
        bms.init_parameters(model)
        context_of(single_world).draws.next_step(made=False)
        step, trained, evaluated = ms.value_and_grad(lambda x: model(x).sum(), None, model.trainable_params()), [], []
        for _ in range(3):
            trained.append(step(x)[0].asnumpy().item())
            evaluated += [model(x).sum().asnumpy().item() for _ in range(evaluations)]
        return trained, evaluated

    (alone, _), (trained, evaluated) = losses(0), losses(2)
    assert trained == alone and len({*trained, *evaluated}) == 9


class Halting(Dropped):
    """One of its dropouts has no gradient."""

    def construct(self, x: Tensor) -> Tensor:
        with no_grad():
            y = self.before(x)
        return self.behind(self.layer(x)) + y


def test_what_a_pass_runs_without_gradients_draws_as_a_part_of_it(single_world):
    """Recorded or computed again: the masks behind it would be others."""
    x, found = Tensor(numbers(3, 16)), []
    for use_checkpoint in (True, False):
        model = bms.Block(Halting(), use_checkpoint).set_train(True)
        bms.init_parameters(model)
        context_of(single_world).draws.next_step(made=False)
        step = ms.value_and_grad(lambda x, model=model: model(x).sum(), None, model.trainable_params())
        for _ in range(2):
            loss, grads = step(x)
            found.append((loss.asnumpy().item(), [g.asnumpy().tobytes() for g in grads]))
    assert found[:2] == found[2:]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_after_an_evaluation_each_cell_is_in_the_mode_that_it_was_in(mode: bool, wrapped: bool):
    model = nn.SequentialCell(bms.Block(Dropped()) if wrapped else Dropped(), Dropped()).set_train(mode)
    part = model[0]
    part.before.set_train(not mode)

    def modes() -> list[bool]:
        inner = [part.inner] if wrapped else []
        return [cell.training for cell in (model, part, *inner, part.before, part.behind, part.layer, model[1], model[1].before)]

    before = modes()
    with pytest.raises(ArithmeticError), evaluating(model):
        assert not any(modes())
        raise ArithmeticError
    assert modes() == before and part.before.training is not mode


@BOTH
def test_dropout_values_and_gradient(dtype):
    dropout = bms.nn.Dropout(0.25).set_train(True)
    x = Tensor(np.full((100, 200), 3.0, dtype))
    seen: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(dropout(x))
        return seen[-1].astype(ms.float32).sum()

    grad = ms.grad(loss)(x).asnumpy()
    out = seen[0].asnumpy()
    factor = dtype(1 / 0.75)
    assert out.dtype == grad.dtype == dtype
    assert sorted(set(out.ravel().tolist())) == [0.0, float(dtype(3) * factor)]
    assert np.array_equal(grad, np.where(out == 0, dtype(0), factor))
    assert (out == 0).mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / out.size) ** 0.5)
    assert out.mean(dtype=np.float64) == pytest.approx(3.0, rel=0.03)


def test_dropout_draws_differ_within_a_step_and_between_steps(single_world):
    dropout = bms.nn.Dropout(0.5).set_train(True)
    x = Tensor(np.ones(64, np.float32))
    first, second = dropout(x).asnumpy(), dropout(x).asnumpy()
    assert not np.array_equal(first, second)
    single_world.engine.clock.step += 1
    assert not any(np.array_equal(dropout(x).asnumpy(), seen) for seen in (first, second))


def test_dropout_repeats_with_seed_and_step():
    x = Tensor(np.ones(64, np.float32))

    def draws(seed: int) -> np.ndarray:
        bms.shutdown()
        bms.init_distributed(seed=seed)
        dropout = bms.nn.Dropout(0.5).set_train(True)
        return np.stack([dropout(x).asnumpy() for _ in range(2)])

    assert np.array_equal(draws(0), draws(0))
    assert not np.array_equal(draws(0), draws(1))


def two_steps_with_dropout(use_checkpoint: bool) -> list[list[np.ndarray]]:
    """Loss and all gradients of two passes through two blocks: recomputation takes the blocks in the opposite order."""
    bms.shutdown()
    bms.init_distributed(seed=3)
    blocks = bms.TransformerBlockList([bms.Block(Dropped(), use_checkpoint) for _ in range(2)])
    blocks.set_train(True)
    bms.init_parameters(blocks)
    differentiated = ms.value_and_grad(lambda x: (blocks(x) ** 2).sum(), 0, blocks.trainable_params())
    steps = []
    for _ in range(2):
        value, (by_x, by_weight) = differentiated(Tensor(numbers(8, 16)))
        steps.append([g.asnumpy() for g in (value, by_x, *by_weight)])
    return steps


def test_recomputed_dropout_draws_the_same_mask():
    plain, recomputed = two_steps_with_dropout(False), two_steps_with_dropout(True)
    for expected, actual in zip(plain, recomputed):
        assert all(np.array_equal(a, b) for a, b in zip(expected, actual))
    assert plain[0][0] != plain[1][0]  # other masks in the second pass
    assert all(np.abs(g).max() > 0 for g in plain[0])
