"""Every operation, on the host and as on a device, forward and gradient, against the formula in float64 NumPy.

`cross_entropy` has its own file.
"""

from __future__ import annotations

import inspect
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from bmtrain_ms import ops
from bmtrain_ms.compat.device import Device
from bmtrain_ms.compat.runtime import from_host, values
from bmtrain_ms.ops import host, host_attention

pytestmark = pytest.mark.usefixtures("implementation")  # every test twice: on the host, and as on a device

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


def check(op: Callable[..., Tensor], reference: Callable[..., np.ndarray], *inputs: np.ndarray, close: float = 0.0) -> None:
    """Value and all gradients; results have the dtype of the inputs."""
    tolerance = max(close, TOLERANCE[inputs[0].dtype.type])
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
    check(ops.linear, lambda x, w, *b: x @ w.T + sum(b), *tensors)


@BOTH
@pytest.mark.parametrize("biases", [(False, False, False), (True, False, True)], ids=["plain", "two biases"])
def test_linears_are_linear_several_times(biases, dtype):
    """Values, and gradients of parameters, to the bit; those of x are summed, which is rounded once for 16 bits."""
    x, cotangents = numbers(2, 3, 4, dtype=dtype), [Tensor(numbers(2, 3, n, seed=n, dtype=dtype)) for n in (5, 2, 6)]
    weights = [numbers(n, 4, seed=10 + n, dtype=dtype) for n in (5, 2, 6)]
    added = [numbers(n, seed=20 + n, dtype=dtype) if biased else None for n, biased in zip((5, 2, 6), biases)]

    def loss(several: bool, x: Tensor, *parameters: Tensor) -> Tensor:
        x, left = x * 1.0, list(parameters[3:])
        given = [left.pop(0) if biased else None for biased in biases]
        if several:
            outputs = ops.linears(x, parameters[:3], given)
        else:
            outputs = tuple(ops.linear(x, w, b) for w, b in zip(parameters, given))
        return sum(((y * c).astype(ms.float32).sum() for y, c in zip(outputs, cotangents)), Tensor(0.0))

    inputs = [Tensor(x), *map(Tensor, weights), *(Tensor(b) for b in added if b is not None)]
    found, once = (
        ms.value_and_grad(lambda *xs, several=several: loss(several, *xs), tuple(range(len(inputs))))(*inputs)
        for several in (True, False)
    )
    assert found[0].asnumpy() == once[0].asnumpy()
    if dtype is np.float32:
        np.testing.assert_array_equal(found[1][0].asnumpy(), once[1][0].asnumpy())
    assert_close(found[1][0].asnumpy(), once[1][0].asnumpy(), TOLERANCE[dtype])
    for a, b in zip(found[1][1:], once[1][1:]):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy())


def test_linears_of_which_one_is_not_used():
    x, w = numbers(3, 4), [numbers(n, 4, seed=n) for n in (2, 5)]
    grads = ms.grad(lambda x, a, b: ops.linears(x, [a, b], [None, None])[1].sum(), (0, 1, 2))(*map(Tensor, (x, *w)))
    np.testing.assert_allclose(grads[0].asnumpy(), np.ones((3, 5), np.float32) @ w[1], rtol=1e-6)
    assert not grads[1].asnumpy().any()
    np.testing.assert_allclose(grads[2].asnumpy(), np.ones((5, 3), np.float32) @ x, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("ids", [[0, 2, 4], [[3, 3, 3], [0, 3, 1]]], ids=["once", "repeated"])
def test_embedding(ids, dtype):
    ids = np.array(ids, np.int32)
    check(lambda table: ops.embedding(Tensor(ids), table), lambda table: table[ids], numbers(5, 3, dtype=dtype))


def test_embedding_sums_equal_ids_in_float32():
    """2048 + 1 + 1 is 2048 when summed in float16, which has 11 bits; 4096 rows of 1 would stop at 2048."""
    ids = Tensor(np.zeros(4096, np.int32))
    table = Tensor(np.ones((2, 1), np.float16))
    grad = ms.grad(lambda t: ops.embedding(ids, t).astype(ms.float32).sum())(table)
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
    check(lambda x, w: ops.rms_norm(x, w, 1e-3), rms_norm, *tensors)


@BOTH
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 5), (6,)], ids=str)
def test_layer_norm(shape, dtype):
    tensors = [numbers(*shape, dtype=dtype), numbers(shape[-1], seed=1, dtype=dtype), numbers(shape[-1], seed=2, dtype=dtype)]
    check(lambda x, w, b: ops.layer_norm(x, w, b, 1e-3), layer_norm, *tensors)


def test_rms_norm_squares_in_float32():
    """300^2 does not fit into float16."""
    x = np.full((2, 4), 300.0, np.float16)
    out = ops.rms_norm(Tensor(x), Tensor(np.ones(4, np.float16)), 1e-6)
    assert out.asnumpy().tolist() == np.ones((2, 4)).tolist()


# add, swiglu, rotary #


@BOTH
def test_add(dtype):
    check(ops.add, np.add, numbers(3, 4, dtype=dtype), numbers(3, 4, seed=1, dtype=dtype))


def test_gradients_of_a_sum_stay_apart():
    """Both inputs get the very gradient of the result: what is added to the one must not be seen by the other."""

    def op(x: Tensor, y: Tensor) -> Tensor:
        once = ops.add(x, ops.swiglu(x, y))
        return ops.add(once, ops.add(y, ops.swiglu(once, x)))

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def reference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        once = x + silu(x) * y
        return once + y + silu(once) * x

    check(op, reference, numbers(3, 4), numbers(3, 4, seed=1))


@pytest.mark.parametrize(("shape", "dtype"), [((4,), np.float32), ((3, 4), np.float16)], ids=["shape", "type"])
def test_only_what_is_alike_is_added(shape, dtype):
    with pytest.raises(ValueError, match=r"add takes two tensors of one shape and type, not .*3, 4"):
        ops.add(Tensor(numbers(3, 4)), Tensor(numbers(*shape, dtype=dtype)))


@BOTH
def test_swiglu(dtype):
    check(ops.swiglu, lambda g, u: g / (1 + np.exp(-g)) * u, numbers(3, 4, dtype=dtype), numbers(3, 4, seed=1, dtype=dtype))


def tanh_of_the_device() -> float:
    """How far a rehearsed device's tanh is from right: MindSpore's on CPU."""
    from bmtrain_ms.ops import device

    return 5e-4 if ops.chosen() is device else 0.0


@BOTH
def test_gelu(dtype):
    def reference(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    check(ops.gelu, reference, 2 * numbers(3, 5, dtype=dtype), close=tanh_of_the_device())


def test_swiglu_far_out():
    """No overflow and no NaN where the exponential is one."""
    gate = np.array([-100.0, -30.0, 0.0, 30.0, 100.0], np.float32)
    up = np.full(5, 2.0, np.float32)
    value, grads = ms.value_and_grad(lambda g, u: ops.swiglu(g, u).sum(), (0, 1))(Tensor(gate), Tensor(up))
    assert value.asnumpy() == pytest.approx(260.0, rel=1e-6)
    np.testing.assert_allclose(grads[0].asnumpy(), [0, 0, 1, 2, 2], atol=1e-5)
    np.testing.assert_allclose(grads[1].asnumpy(), [0, 0, 0, 30, 100], atol=1e-5)


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    first, second = x[:, :half], x[:, half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


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
        mask[:] = ops.causal_mask(2, 2, queries, keys).asnumpy()
        mask[:, :, :, 0] = 0.25  # every row sees something; an additive bias is added
    check(
        lambda q, k, v: ops.attention(q, k, v, Tensor(mask) if masked else None),
        lambda q, k, v: attention(q, k, v, mask.astype(np.float64)),
        numbers(2, 2, queries, 3, dtype=dtype),
        numbers(2, 2, keys, 3, seed=1, dtype=dtype),
        numbers(2, 2, keys, 3, seed=2, dtype=dtype),
    )


@BOTH
@pytest.mark.parametrize("queries, keys, repeats", [(5, 5, 1), (5, 7, 1), (4, 4, 3), (3, 8, 2), (1, 6, 2)], ids=str)
def test_causal_attention_in_blocks(monkeypatch, queries, keys, repeats, dtype):
    """Of two queries each: the last one is smaller, and what nobody of a block sees is not computed."""
    monkeypatch.setattr(host_attention, "BLOCK", 2)
    mask = ops.causal_mask(2, 2, queries, keys, repeats)
    added = np.broadcast_to(mask.asnumpy().astype(np.float64), (2, 2, repeats * queries, keys))
    check(
        lambda q, k, v: ops.attention(q, k, v, mask),
        lambda q, k, v: attention(q, k, v, added),
        numbers(2, 2, repeats * queries, 3, dtype=dtype),
        numbers(2, 2, keys, 3, seed=1, dtype=dtype),
        numbers(2, 2, keys, 3, seed=2, dtype=dtype),
    )


@BOTH
@pytest.mark.parametrize("kind", ["open", "causal", "masked"])
def test_attention_of_capped_scores_and_narrow_values(kind, dtype):
    """Another scale, scores below a cap, and values of another size than keys."""
    mask = {"open": None, "causal": ops.causal_mask(2, 2, 4, 5), "masked": Tensor(-np.abs(numbers(2, 2, 4, 5, seed=3)))}[kind]
    added = 0.0 if mask is None else np.asarray(mask.asnumpy(), np.float64)

    def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        scores = 1.5 * np.tanh(0.7 * (q @ k.swapaxes(-1, -2)) / 1.5) + added
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v

    tensors = numbers(2, 2, 4, 3, dtype=dtype), numbers(2, 2, 5, 3, seed=1, dtype=dtype), numbers(2, 2, 5, 2, seed=2, dtype=dtype)
    check(lambda q, k, v: ops.attention(q, k, v, mask, 0.7, 1.5), reference, *tensors, close=tanh_of_the_device())


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("kind", ["causal", "padded", "documents", "both", "window", "all"])
def test_attention_of_what_is_seen(monkeypatch, kind, keeps):
    """In blocks of two queries; weights are kept for the backward pass, or computed again."""
    monkeypatch.setattr(host_attention, "BLOCK", 2)
    if not keeps:
        monkeypatch.setattr(host_attention, "KEPT", 0)
    random = np.random.default_rng(5)
    real = np.array([[False, True, True, True, False], [True] * 5]) if kind in ("padded", "both", "all") else None
    documents = random.integers(0, 2, (2, 5)) if kind in ("documents", "both", "all") else None
    window = 2 if kind in ("window", "all") else None
    seen = ops.Seen(5, 5, real, documents, window)
    allowed = np.tril(np.ones((5, 5), bool))[None]
    allowed = allowed if window is None else allowed & np.triu(allowed, 1 - window)
    allowed = allowed if documents is None else allowed & (documents[:, :, None] == documents[:, None, :])
    allowed = allowed if real is None else allowed & real[:, None]
    sees = np.tile(np.broadcast_to(allowed, (2, 5, 5)), (1, 3, 1))[:, None]
    there = sees.any(-1, keepdims=True)  # a query that sees nothing is padding itself, whatever its result is

    def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        scores = np.where(sees, q @ k.swapaxes(-1, -2) / np.sqrt(3), -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * sees
        return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30) @ v

    shown = Tensor(there.astype(np.float32))
    tensors = (numbers(2, 2, rows, 3, seed=i) for i, rows in enumerate((15, 5, 5)))
    check(lambda q, k, v: ops.attention(q, k, v, seen) * shown, reference, *tensors)


def test_what_is_outside_of_a_window_is_not_looked_at():
    """On the host a block of a long text has the keys of its window, and no more."""
    seen = ops.Seen(4096, 4096, window=100)
    for rows in (slice(0, 64), slice(2048, 2112), slice(4032, 4096)):
        first, last, allowed = seen.block(rows)
        assert last == rows.stop and first == max(0, rows.start - 99)
        assert allowed is not None and allowed.shape == (1, 64, last - first)
    assert not seen.causal and ops.Seen(5, 5, window=5).causal and ops.Seen(5, 5, window=5).window is None


def test_grouped_queries_equal_repeated_keys():
    """4 query heads on 2 key heads: the rows of one group are queries of one product."""
    batch, kv, group, length, dim = 2, 2, 2, 3, 4
    q = numbers(batch, kv * group, length, dim)
    k, v = numbers(batch, kv, length, dim, seed=1), numbers(batch, kv, length, dim, seed=2)
    grouped = Tensor(q.reshape(batch, kv, group * length, dim))
    mask = ops.causal_mask(batch, kv, length, length, group)
    out = ops.attention(grouped, Tensor(k), Tensor(v), mask).asnumpy().reshape(q.shape)
    causal = np.where(np.tril(np.ones((length, length))), 0.0, -np.inf)
    expected = attention(q.astype(np.float64), np.repeat(k, group, 1), np.repeat(v, group, 1), causal)
    assert_close(out, expected, 1e-5)


def test_causal_mask():
    mask = ops.causal_mask(2, 3, 2, 4, repeats=2).asnumpy()
    assert mask.dtype == np.float32
    far = np.float32(-1e30)
    expected = [[0, 0, 0, far], [0, 0, 0, 0]]  # the last query sees all keys
    assert np.array_equal(np.broadcast_to(mask, (2, 3, 4, 4)), np.broadcast_to(np.array(expected * 2, np.float32), (2, 3, 4, 4)))


def test_masked_keys_have_no_weight_at_all():
    q, k, v = (Tensor(numbers(1, 1, 3, 4, seed=i)) for i in range(3))
    mask = ops.causal_mask(1, 1, 3, 3)
    out = ops.attention(q, k, v, mask).asnumpy()
    other = v.asnumpy().copy()
    other[0, 0, 2] = 1e6
    assert np.array_equal(ops.attention(q, k, Tensor(other), mask).asnumpy()[0, 0, :2], out[0, 0, :2])


# Heads #


@BOTH
@pytest.mark.parametrize("rotated", [True, False])
def test_split_heads(dtype: Any, rotated: bool):
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
    check(lambda x: ops.split_heads(x, batch, heads, given), reference, x)


@BOTH
def test_merge_heads(dtype: Any):
    x = numbers(2, 3, 4, 5, dtype=dtype)  # batch, heads, length, dim
    check(ops.merge_heads, lambda x: x.transpose(0, 2, 1, 3).reshape(8, 15), x)


@BOTH
@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4), (-1, 2), (24,), (3, -1, 2)], ids=str)
def test_reshape(shape, dtype):
    check(lambda x: ops.reshape(x, shape) * 2.0, lambda x: 2.0 * x.reshape(shape), numbers(2, 3, 4, dtype=dtype))


def test_reshape_of_what_is_used_twice():
    """Results and gradients share memory with what they are made of: the other use must not see it."""

    def op(x: Tensor) -> Tensor:
        y = x * 3.0
        rows = ops.reshape(y, (6, 4))
        return rows * rows + ops.reshape(ops.reshape(y, (24,)), (6, 4)) + y.reshape(6, 4)

    check(op, lambda x: 9 * x.reshape(6, 4) ** 2 + 6 * x.reshape(6, 4), numbers(2, 3, 4))


def test_reshape_on_the_host_copies_nothing():
    x = from_host(numbers(64, 1024))
    assert np.shares_memory(values(host.reshape(x, (8, 8, 1024))), values(x))


def test_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"4, ?2"):
        ops.reshape(Tensor(numbers(2, 3)), (4, 2))


@BOTH
@pytest.mark.parametrize("masked", [True, False])
def test_attention_of_grouped_queries(dtype: Any, masked: bool):
    q, k, v = (numbers(2, 2, rows, 3, seed=i, dtype=dtype) for i, rows in enumerate((4, 5, 5)))  # groups of two queries
    mask = ops.causal_mask(2, 2, 2, 5, repeats=2) if masked else None
    added = 0.0 if mask is None else np.asarray(mask.asnumpy(), np.float64)

    def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(3) + added
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v

    check(lambda q, k, v: ops.attention(q, k, v, mask), reference, q, k, v)


def test_overflow_is_inf_without_a_warning():
    """What a loss scaler looks for. Warnings are errors here."""
    big = np.full((2, 4), 6e4, np.float16)
    for op in (
        lambda x: ops.swiglu(x, x),
        lambda x: ops.rms_norm(x, Tensor(big[0]), 1e-5),
        lambda x: ops.split_heads(x, 1, 1, (np.ones((2, 2), np.float32), -np.ones((2, 2), np.float32))),
    ):
        value, _ = ms.value_and_grad(lambda x, op=op: (op(x) * Tensor(np.float16(6e4))).astype(ms.float32).sum())(Tensor(big))
        assert np.isinf(value.asnumpy())


# Awkward inputs #


@BOTH
def test_no_rows(dtype, implementation):
    """A rank may have nothing to do."""
    if implementation == "device":
        pytest.skip("MindSpore's kernels on CPU refuse what is empty")
    w, b = Tensor(numbers(4, 4, dtype=dtype)), Tensor(numbers(4, dtype=dtype))
    empty = lambda *shape: Tensor(np.zeros(shape, dtype)) * 1.0  # noqa: E731
    for op, shape in (
        (lambda x: ops.linear(x, w, b), (0, 4)),
        (lambda x: ops.rms_norm(x, b, 1e-5), (0, 4)),
        (lambda x: ops.layer_norm(x, b, b, 1e-5), (0, 4)),
        (lambda x: ops.swiglu(x, x), (0, 4)),
    ):
        assert op(empty(*shape)).shape == shape
        grad = ms.grad(lambda x, op=op: op(x).astype(ms.float32).sum())(empty(*shape))
        assert grad.shape == shape


VIEWS = {"columns": lambda x: x[:, 2:6], "every other": lambda x: x[::2, :4], "transposed": lambda x: x.T[:4].T}


@pytest.mark.parametrize("name", VIEWS)
def test_inputs_that_are_views(name):
    view, whole, w, gain = VIEWS[name], numbers(6, 8), numbers(4, 4, seed=1), numbers(4, seed=2)
    for op, reference in (
        (lambda x: ops.linear(x, Tensor(w)), lambda x: x @ w.T.astype(np.float64)),
        (lambda x: ops.rms_norm(x, Tensor(gain), 1e-3), lambda x: rms_norm(x, gain.astype(np.float64))),
        (lambda x: ops.swiglu(x, x), lambda x: x / (1 + np.exp(-x)) * x),
        (lambda x: ops.split_heads(x, 1, 2), lambda x: x.reshape(1, -1, 2, 2).transpose(0, 2, 1, 3)),
        (lambda x: ops.reshape(x, (-1, 2)), lambda x: x.reshape(-1, 2)),
        (lambda x: ops.add(x, x), lambda x: x + x),
    ):
        check(lambda x, op=op: op(view(x)), lambda x, reference=reference: reference(view(x)), whole)


def test_weights_that_are_views():
    whole, x = numbers(6, 8), numbers(3, 6, seed=1)
    check(lambda x, w: ops.linear(x, w.T), lambda x, w: x @ w, x, whole)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), dim=st.integers(1, 300), seed=st.integers(0, 1 << 16), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_any_size(rows, dim, seed, scale):
    """Compiled loops have a part that fills vector registers and one that does not."""
    x, g = (scale * numbers(rows, dim, seed=seed + i) for i in range(2))
    gain, slope = numbers(dim, seed=seed + 2), numbers(rows, dim, seed=seed + 3)
    wide, wide_gain = x.astype(np.float64), gain.astype(np.float64)
    loss = lambda op: lambda *xs: (op(*xs) * Tensor(slope)).sum()  # noqa: E731
    root = np.sqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)
    _, (dx, dw) = ms.value_and_grad(loss(lambda x, w: ops.rms_norm(x, w, 1e-5)), (0, 1))(Tensor(x), Tensor(gain))
    along = (slope * wide_gain * wide).mean(-1, keepdims=True) / root**3
    straight = slope * wide_gain / root
    np.testing.assert_allclose(dx.asnumpy(), straight - wide * along, rtol=0, atol=1e-5 * np.abs(straight).max())
    assert_close(dw.asnumpy(), (slope * wide / root).sum(0), 1e-4)
    sigmoid = 1 / (1 + np.exp(-wide))
    _, (da, db) = ms.value_and_grad(loss(ops.swiglu), (0, 1))(Tensor(x), Tensor(g))
    assert_close(da.asnumpy(), slope * g * sigmoid * (1 + wide * (1 - sigmoid)), 1e-5)
    assert_close(db.asnumpy(), slope * wide * sigmoid, 1e-5)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("op", ["linear", "rms_norm", "layer_norm", "swiglu", "attention"])
def test_what_is_not_finite_comes_out_not_finite(op, bad):
    """Where it is, and nowhere else: a loss scaler looks for it."""
    x = numbers(3, 4)
    x[1, 2] = bad
    ones, zeros = Tensor(np.ones(4, np.float32)), Tensor(np.zeros(4, np.float32))
    q, k = Tensor(x[None, None]), Tensor(numbers(1, 1, 3, 4, seed=1))
    run = {
        "linear": lambda: ops.linear(Tensor(x), Tensor(np.eye(4, dtype=np.float32) + 1)),
        "rms_norm": lambda: ops.rms_norm(Tensor(x), ones, 1e-5),
        "layer_norm": lambda: ops.layer_norm(Tensor(x), ones, zeros, 1e-5),
        "swiglu": lambda: ops.swiglu(Tensor(x), Tensor(x)),
        "attention": lambda: ops.attention(q, k, k, None).reshape(3, 4),
    }
    with np.errstate(all="ignore"):
        finite = np.isfinite(run[op]().asnumpy())
    assert finite[[0, 2]].all() and not finite[1].all()


@pytest.mark.parametrize("ids", [[0, 5], [-1, 2]], ids=str)
def test_an_id_outside_of_the_table(ids, implementation):
    if implementation == "device":
        pytest.skip("a device is not asked to look: it would have to wait")
    with pytest.raises(ValueError, match="the table has 5 rows"):
        ops.embedding(Tensor(np.array(ids, np.int32)), Tensor(numbers(5, 3)))


def test_types_do_not_mix(implementation):
    with pytest.raises(TypeError):
        ops.linear(Tensor(numbers(2, 3)), Tensor(numbers(4, 3, dtype=np.float16))).asnumpy()


# The two implementations #


def test_both_have_the_signatures_of_the_contracts():
    from bmtrain_ms.ops import device, host

    assert host.__all__ == device.__all__
    for name in host.__all__:
        assert inspect.signature(getattr(host, name)) == inspect.signature(getattr(device, name)), name
        if hasattr(ops, name):  # others are what contracts are made of
            contract = inspect.signature(getattr(ops, name))  # which alone has defaults
            plain = [p.replace(default=inspect.Parameter.empty) for p in contract.parameters.values()]
            assert inspect.signature(getattr(host, name)) in (contract, contract.replace(parameters=plain)), name


def test_no_third_implementation():
    with pytest.raises(ValueError, match="'host' or on a 'device', not on 'Ascend'"):
        ops.use("Ascend")


def test_chosen_as_everything_else_is(monkeypatch):
    from bmtrain_ms.ops import device, host

    monkeypatch.setattr(ops._Choice, "implementation", None)  # before init_distributed
    for chosen, module in ((Device("CPU"), host), (Device("Ascend"), device), (Device("CPU", rehearsed=True), device)):
        monkeypatch.setattr(Device, "chosen", chosen)
        ops.use_default()
        assert ops.chosen() is module
        ops._Choice.implementation = None
        assert ops.chosen() is module
