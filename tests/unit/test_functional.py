"""Every operation of nn.functional, forward and gradient, against the formula in float64 NumPy; cross_entropy has its own file."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.model_center.layer import RotaryEmbedding
from bmtrain_ms.nn import functional

pytestmark = pytest.mark.usefixtures("single_world")

TOLERANCE = {np.float32: 2e-5, np.float16: 4e-3}  # of the largest value
BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def finite_differences(function: Callable[..., np.ndarray], inputs: list[np.ndarray], cotangent: np.ndarray) -> list[np.ndarray]:
    """d sum(function(*inputs) * cotangent) / d input, in float64."""
    grads = []
    for x in inputs:
        grad = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            kept = x[i]
            x[i] = kept + 1e-6
            above = (function(*inputs) * cotangent).sum()
            x[i] = kept - 1e-6
            grad[i] = (above - (function(*inputs) * cotangent).sum()) / 2e-6
            x[i] = kept
        grads.append(grad)
    return grads


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max()))


def check(op: Callable[..., Tensor], reference: Callable[..., np.ndarray], *inputs: np.ndarray) -> None:
    """Value and all gradients; results have the dtype of the inputs."""
    tolerance = TOLERANCE[inputs[0].dtype.type]
    wide = [x.astype(np.float64) for x in inputs]
    expected = reference(*wide)
    cotangent = numbers(*expected.shape, seed=99, dtype=inputs[0].dtype)
    weight = Tensor(cotangent.astype(np.float32))
    outputs: list[Tensor] = []

    def loss(*xs: Tensor) -> Tensor:
        out = op(*xs)
        outputs.append(out)
        return (out.astype(ms.float32) * weight).sum()

    grads = ms.value_and_grad(loss, tuple(range(len(inputs))))(*map(Tensor, inputs))[1]
    grads = (grads,) if len(inputs) == 1 else grads
    assert outputs[0].asnumpy().dtype == inputs[0].dtype
    assert_close(outputs[0].asnumpy(), expected, tolerance)
    assert len(grads) == len(inputs)
    for grad, wanted, x in zip(grads, finite_differences(reference, wide, cotangent.astype(np.float64)), inputs):
        assert grad.asnumpy().dtype == x.dtype
        assert_close(grad.asnumpy(), wanted, tolerance)


# linear, embedding #


@BOTH
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,), (1, 1, 2, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear(shape, bias, dtype):
    tensors = [numbers(*shape, dtype=dtype), numbers(3, 4, seed=1, dtype=dtype)]
    if bias:
        tensors.append(numbers(3, seed=2, dtype=dtype))
    check(functional.linear, lambda x, w, *b: x @ w.T + sum(b), *tensors)


@BOTH
@pytest.mark.parametrize("ids", [[0, 2, 4], [[3, 3, 3], [0, 3, 1]]], ids=["once", "repeated"])
def test_embedding(ids, dtype):
    ids = np.array(ids, np.int32)
    check(lambda table: functional.embedding(Tensor(ids), table), lambda table: table[ids], numbers(5, 3, dtype=dtype))


def test_embedding_sums_equal_ids_in_float32():
    """2048 + 1 + 1 is 2048 when summed in float16, which has 11 bits; 4096 rows of 1 would stop at 2048."""
    ids = Tensor(np.zeros(4096, np.int32))
    table = Tensor(np.ones((2, 1), np.float16))
    grad = ms.grad(lambda t: functional.embedding(ids, t).astype(ms.float32).sum())(table)
    assert grad.asnumpy().tolist() == [[4096.0], [0.0]]


# Norms #


def rms_norm(x, w, eps=1e-3):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def layer_norm(x, w, b, eps=1e-3):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b


@BOTH
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 5), (1, 1), (6,)], ids=str)
def test_rms_norm(shape, dtype):
    tensors = [numbers(*shape, dtype=dtype), numbers(shape[-1], seed=1, dtype=dtype)]
    check(lambda x, w: functional.rms_norm(x, w, 1e-3), rms_norm, *tensors)


@BOTH
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 5), (6,)], ids=str)
def test_layer_norm(shape, dtype):
    tensors = [numbers(*shape, dtype=dtype), numbers(shape[-1], seed=1, dtype=dtype), numbers(shape[-1], seed=2, dtype=dtype)]
    check(lambda x, w, b: functional.layer_norm(x, w, b, 1e-3), layer_norm, *tensors)


def test_rms_norm_squares_in_float32():
    """300^2 does not fit into float16."""
    x = np.full((2, 4), 300.0, np.float16)
    out = functional.rms_norm(Tensor(x), Tensor(np.ones(4, np.float16)), 1e-6)
    assert out.asnumpy().tolist() == np.ones((2, 4)).tolist()


# swiglu, rotary #


@BOTH
def test_swiglu(dtype):
    check(functional.swiglu, lambda g, u: g / (1 + np.exp(-g)) * u, numbers(3, 4, dtype=dtype), numbers(3, 4, seed=1, dtype=dtype))


def test_swiglu_far_out():
    """No overflow and no NaN where the exponential is one."""
    gate = np.array([-100.0, -30.0, 0.0, 30.0, 100.0], np.float32)
    up = np.full(5, 2.0, np.float32)
    value, grads = ms.value_and_grad(lambda g, u: functional.swiglu(g, u).sum(), (0, 1))(Tensor(gate), Tensor(up))
    assert value.asnumpy() == pytest.approx(260.0, rel=1e-6)
    np.testing.assert_allclose(grads[0].asnumpy(), [0, 0, 1, 2, 2], atol=1e-5)
    np.testing.assert_allclose(grads[1].asnumpy(), [0, 0, 0, 30, 100], atol=1e-5)


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    first, second = x[:, :half], x[:, half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


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


# Attention #


def attention(q, k, v, mask):
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@BOTH
@pytest.mark.parametrize("queries, keys", [(3, 3), (2, 5), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_attention(queries, keys, masked, dtype):
    mask = np.zeros((2, 2, queries, keys), np.float32)
    if masked:
        mask[:] = functional.causal_mask(2, 2, queries, keys).asnumpy()
        mask[:, :, :, 0] = 0.25  # every row sees something; an additive bias is added
    check(
        lambda q, k, v: functional.attention(q, k, v, Tensor(mask) if masked else None),
        lambda q, k, v: attention(q, k, v, mask.astype(np.float64)),
        numbers(2, 2, queries, 3, dtype=dtype),
        numbers(2, 2, keys, 3, seed=1, dtype=dtype),
        numbers(2, 2, keys, 3, seed=2, dtype=dtype),
    )


def test_grouped_queries_equal_repeated_keys():
    """4 query heads on 2 key heads: the rows of one group are queries of one product."""
    batch, kv, group, length, dim = 2, 2, 2, 3, 4
    q = numbers(batch, kv * group, length, dim)
    k, v = numbers(batch, kv, length, dim, seed=1), numbers(batch, kv, length, dim, seed=2)
    grouped = Tensor(q.reshape(batch, kv, group * length, dim))
    mask = functional.causal_mask(batch, kv, length, length, group)
    out = functional.attention(grouped, Tensor(k), Tensor(v), mask).asnumpy().reshape(q.shape)
    causal = np.where(np.tril(np.ones((length, length))), 0.0, -np.inf)
    expected = attention(q.astype(np.float64), np.repeat(k, group, 1), np.repeat(v, group, 1), causal)
    assert_close(out, expected, 1e-5)


def test_causal_mask():
    mask = functional.causal_mask(2, 3, 2, 4, repeats=2).asnumpy()
    assert mask.shape == (2, 3, 4, 4) and mask.dtype == np.float32
    far = np.float32(-1e30)
    expected = [[0, 0, 0, far], [0, 0, 0, 0]]  # the last query sees all keys
    assert np.array_equal(mask, np.broadcast_to(np.array(expected * 2, np.float32), mask.shape))


def test_masked_keys_have_no_weight_at_all():
    q, k, v = (Tensor(numbers(1, 1, 3, 4, seed=i)) for i in range(3))
    mask = functional.causal_mask(1, 1, 3, 3)
    out = functional.attention(q, k, v, mask).asnumpy()
    other = v.asnumpy().copy()
    other[0, 0, 2] = 1e6
    assert np.array_equal(functional.attention(q, k, Tensor(other), mask).asnumpy()[0, 0, :2], out[0, 0, :2])


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


# Heads #


@pytest.fixture(params=["CPU", "Ascend"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that each device takes, run on CPU."""
    monkeypatch.setattr(functional, "device_target", lambda: request.param)
    return request.param


@BOTH
@pytest.mark.parametrize("rotated", [True, False])
def test_split_heads(device: str, dtype: Any, rotated: bool):
    batch, length, heads, dim = 2, 3, 2, 4
    angles = numbers(length, dim // 2, seed=1).astype(np.float64)
    given = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)) if rotated else None

    def reference(x: np.ndarray) -> np.ndarray:
        apart = x.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
        if not rotated:
            return apart
        rows = apart.reshape(-1, length, dim)
        return np.stack([turned(row, angles) for row in rows]).reshape(apart.shape)

    x = numbers(batch * length, heads * dim, dtype=dtype)
    check(lambda x: functional.split_heads(x, batch, heads, given), reference, x)


@BOTH
def test_merge_heads(device: str, dtype: Any):
    x = numbers(2, 3, 4, 5, dtype=dtype)  # batch, heads, length, dim
    check(functional.merge_heads, lambda x: x.transpose(0, 2, 1, 3).reshape(8, 15), x)


@BOTH
@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_devices_compute_the_same(device: str, dtype: Any, op: str):
    x, other = numbers(6, 8, dtype=dtype), numbers(6, 8, seed=1, dtype=dtype)
    if op == "swiglu":
        check(functional.swiglu, lambda g, u: g / (1 + np.exp(-g)) * u, x, other)
    else:
        reference = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w  # noqa: E731
        check(lambda x, w: functional.rms_norm(x, w, 1e-5), reference, x, other[0].copy())


@BOTH
@pytest.mark.parametrize("masked", [True, False])
def test_attention_on_devices(device: str, dtype: Any, masked: bool, no_cached_mask: None):
    q, k, v = (numbers(2, 2, rows, 3, seed=i, dtype=dtype) for i, rows in enumerate((4, 5, 5)))  # groups of two queries
    mask = functional.causal_mask(2, 2, 2, 5, repeats=2) if masked else None
    added = 0.0 if mask is None else np.asarray(mask.asnumpy(), np.float64)

    def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(3) + added
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v

    check(lambda q, k, v: functional.attention(q, k, v, mask), reference, q, k, v)


@pytest.fixture
def no_cached_mask():
    functional.causal_mask.cache_clear()
    yield
    functional.causal_mask.cache_clear()


def test_overflow_is_inf_without_a_warning():
    """What a loss scaler looks for. Warnings are errors here."""
    big = np.full((2, 4), 6e4, np.float16)
    for op in (
        lambda x: functional.swiglu(x, x),
        lambda x: functional.rms_norm(x, Tensor(big[0]), 1e-5),
        lambda x: functional.split_heads(x, 1, 1, (np.ones((2, 2), np.float32), -np.ones((2, 2), np.float32))),
    ):
        value, _ = ms.value_and_grad(lambda x, op=op: (op(x) * Tensor(np.float16(6e4))).astype(ms.float32).sum())(Tensor(big))
        assert np.isinf(value.asnumpy())
