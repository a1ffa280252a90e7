"""The operations that a transformer spends its time in, each with its own derivative.

Written with few, large, contiguous operations. On CPU a broadcast or a reduction over the last dim costs 10 to 30 times an
element-wise operation on equal shapes (measured in `docs/decisions.md`), so there row sums and row scalings are matrix products
with ones; on other devices they are what they look like. Norms, softmax, angles and the loss are computed in float32 whatever the
dtype of the tensors.
"""

from __future__ import annotations

import functools
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..compat.autograd import custom_op
from ..compat.runtime import addressed, device_target, from_host, numpy_dtype, values
from .cross_entropy import check_cross_entropy_options, cross_entropy  # noqa: F401  (operations in a file of their own)

Angles = tuple[np.ndarray, np.ndarray]

_quiet = np.errstate(all="ignore")  # inf and nan are answers: a loss scaler looks for them

_matmul = ops.MatMul()
_matmul_t = ops.MatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()
_batch_matmul_t = ops.BatchMatMul(transpose_b=True)
_batch_t_matmul = ops.BatchMatMul(transpose_a=True)
_softmax = ops.Softmax(-1)
_gather = ops.Gather()
_segment_sum = ops.UnsortedSegmentSum()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out), in the dtype of the inputs."""
    flat = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    y = _matmul_t(flat, weight)
    if bias is not None:
        y = ops.bias_add(y, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0]) if x.ndim != 2 else y


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """ids (...) of int, table (vocab, dim) -> (..., dim). Gradients of equal ids are summed in float32, in order."""
    vocab, dim = table.shape

    def forward(table: Tensor) -> tuple[Tensor]:
        return (_gather(table, ids, 0),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        rows = grads[0].reshape(-1, dim).astype(ms.float32)
        return (_segment_sum(rows, ids.reshape(-1), vocab).astype(table.dtype),)

    return custom_op(forward, backward, table)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich, 2019); x (..., dim), weight (dim,)."""
    if device_target() == "CPU":
        return _rms_norm_on_host(x, weight, eps)
    dim, shape = x.shape[-1], x.shape
    saved: list[Tensor] = []

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        x32 = x.reshape(-1, dim).astype(ms.float32)
        scale = _rows(1.0 / ops.sqrt(_row_sum(x32 * x32) * (1.0 / dim) + eps), dim)
        normed = x32 * scale
        gain = _columns(weight.astype(ms.float32), x32.shape[0])
        saved.extend((scale, normed, gain))
        return ((normed * gain).astype(x.dtype).reshape(shape),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        scale, normed, gain = saved
        grad = grads[0].reshape(-1, dim).astype(ms.float32)
        weight_grad = _column_sum(grad * normed)
        grad = grad * gain
        along = _rows(_row_sum(grad * normed) * (1.0 / dim), dim)
        return (scale * (grad - normed * along)).astype(x.dtype).reshape(shape), weight_grad.astype(weight.dtype)

    return custom_op(forward, backward, x, weight)[0]


def _rms_norm_on_host(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in few passes of NumPy: MindSpore's CPU operations take four times as long."""
    dim, saved = x.shape[-1], []

    @_quiet
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        wide = values(x).reshape(-1, dim).astype(np.float32, copy=False)
        gain = values(weight).astype(np.float32, copy=False)
        scale = 1.0 / np.sqrt(np.einsum("ij,ij->i", wide, wide)[:, None] * np.float32(1.0 / dim) + np.float32(eps))
        normed = wide * scale
        saved.extend((scale, normed, gain))
        return (_back(normed * gain, x),)

    @_quiet
    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        scale, normed, gain = saved
        grad = values(grads[0]).reshape(-1, dim).astype(np.float32, copy=False)
        weight_grad = np.einsum("ij,ij->j", grad, normed)
        grad = grad * gain
        along = np.einsum("ij,ij->i", grad, normed)[:, None] * np.float32(1.0 / dim)
        x_grad = normed * -along
        x_grad += grad
        x_grad *= scale
        return _back(x_grad, x), addressed(_back(weight_grad, weight))

    return custom_op(forward, backward, x, weight)[0]


def _back(array: np.ndarray, like: Tensor) -> Tensor:
    """A tensor of the shape and type of `like`."""
    return from_host(array.reshape(like.shape).astype(numpy_dtype(like.dtype), copy=False))


def split_heads(x: Tensor, batch: int, heads: int, angles: Angles | None = None) -> Tensor:
    """(batch * length, heads * dim) -> (batch, heads, length, dim), rotated by the angles if there are any.

    Args:
        angles: cos and sin, each (length, dim / 2) float32, of rotary position embedding (Su et al., 2021), halves paired.
    """
    length, dim = x.shape[0] // batch, x.shape[1] // heads
    if device_target() != "CPU":
        apart = x.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
        if angles is None:
            return apart
        cos, sin = (Tensor(np.concatenate([a, a], axis=1)) for a in angles)
        wide = apart.astype(ms.float32)
        return (wide * cos + ops.matmul(wide, _quarter_turn(dim)) * sin).astype(x.dtype)

    @_quiet
    def forward(x: Tensor) -> tuple[Tensor]:
        apart = values(x).reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
        out = np.empty(apart.shape, apart.dtype)
        _turn(apart, angles, 1, out)
        return (from_host(out),)

    @_quiet
    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        grad = values(grads[0])
        out = np.empty((batch, length, heads, dim), grad.dtype)
        _turn(grad, angles, -1, out.transpose(0, 2, 1, 3))
        return (from_host(out.reshape(x.shape)),)

    return custom_op(forward, backward, x)[0]


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, dim) -> (batch * length, heads * dim)."""
    batch, heads, length, dim = x.shape
    if device_target() != "CPU":
        return x.transpose(0, 2, 1, 3).reshape(batch * length, heads * dim)

    def forward(x: Tensor) -> tuple[Tensor]:
        return (from_host(values(x).transpose(0, 2, 1, 3).reshape(batch * length, heads * dim)),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        apart = values(grads[0]).reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
        return (from_host(np.ascontiguousarray(apart)),)

    return custom_op(forward, backward, x)[0]


def _turn(x: np.ndarray, angles: Angles | None, sign: int, out: np.ndarray) -> None:
    """Rotate pairs of the last dim of x (..., length, dim) by sign * angles into `out`."""
    if angles is None:
        out[...] = x
        return
    cos, sin = angles[0], angles[1] if sign > 0 else -angles[1]
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]  # a 16-bit x is computed with in float32
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim (Ba et al., 2016); x (..., dim), weight and bias (dim,)."""
    dim, shape = x.shape[-1], x.shape
    saved: list[Tensor] = []

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        x32 = x.reshape(-1, dim).astype(ms.float32)
        centred = x32 - _rows(_row_sum(x32) * (1.0 / dim), dim)
        scale = _rows(1.0 / ops.sqrt(_row_sum(centred * centred) * (1.0 / dim) + eps), dim)
        normed = centred * scale
        gain = _columns(weight.astype(ms.float32), x32.shape[0])
        saved.extend((scale, normed, gain))
        out = normed * gain + _columns(bias.astype(ms.float32), x32.shape[0])
        return (out.astype(x.dtype).reshape(shape),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        scale, normed, gain = saved
        grad = grads[0].reshape(-1, dim).astype(ms.float32)
        weight_grad, bias_grad = _column_sum(grad * normed), _column_sum(grad)
        grad = grad * gain
        along = _rows(_row_sum(grad * normed) * (1.0 / dim), dim)
        mean = _rows(_row_sum(grad) * (1.0 / dim), dim)
        x_grad = scale * (grad - mean - normed * along)
        return x_grad.astype(x.dtype).reshape(shape), weight_grad.astype(weight.dtype), bias_grad.astype(bias.dtype)

    return custom_op(forward, backward, x, weight, bias)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, "GLU variants improve transformer", 2020); equal shapes."""
    if device_target() == "CPU":
        return _swiglu_on_host(gate, up)
    saved: list[Tensor] = []

    def forward(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        gate32 = gate.astype(ms.float32)
        sigmoid = ops.sigmoid(gate32)
        silu = gate32 * sigmoid
        saved.extend((sigmoid, silu))
        return ((silu * up.astype(ms.float32)).astype(up.dtype),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        sigmoid, silu = saved
        grad = grads[0].astype(ms.float32)
        slope = sigmoid + silu - silu * sigmoid  # silu' = s (1 + x (1 - s))
        return (grad * up.astype(ms.float32) * slope).astype(gate.dtype), (grad * silu).astype(up.dtype)

    return custom_op(forward, backward, gate, up)[0]


def _swiglu_on_host(gate: Tensor, up: Tensor) -> Tensor:
    """The same with few temporary arrays; the sigmoid is MindSpore's, whose exponential is faster than NumPy's."""
    saved: list[np.ndarray] = []

    @_quiet
    def forward(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        sigmoid = values(ops.sigmoid(gate.astype(ms.float32)))
        silu = values(gate).reshape(sigmoid.shape) * sigmoid
        saved.extend((sigmoid, silu))
        return (_back(silu * values(up), up),)

    @_quiet
    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        sigmoid, silu = saved
        grad = values(grads[0]).astype(np.float32, copy=False)
        slope = 1.0 - silu  # silu' = s + silu (1 - s) = silu + s (1 - silu)
        slope *= sigmoid
        slope += silu
        slope *= grad
        slope *= values(up)
        return _back(slope, gate), _back(silu * grad, up)

    return custom_op(forward, backward, gate, up)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(dim) + mask) v, softmax in float32.

    Grouped queries (Ainslie et al., 2023) need no repeated keys: the queries of one group are more rows of the same product.

    Args:
        q: (batch, kv heads, queries of the group, dim).
        k, v: (batch, kv heads, keys, dim).
        mask: float32, added to the scores: broadcastable to (batch, kv heads, queries, keys); on CPU give it that shape.

    Returns:
        As `q`.
    """
    scale = 1.0 / math.sqrt(q.shape[-1])
    saved: list[Tensor] = []

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        scores = _batch_matmul_t(q * scale, k).astype(ms.float32)
        weights = _softmax(scores if mask is None else scores + mask).astype(q.dtype)
        saved.append(weights)
        return (_batch_matmul(weights, v),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        (weights,), (grad,) = saved, grads
        v_grad = _batch_t_matmul(weights, grad)
        weights32 = weights.astype(ms.float32)
        slope = weights32 * _batch_matmul_t(grad, v).astype(ms.float32)
        keys = slope.shape[-1]
        total = _rows(_row_sum(slope.reshape(-1, keys)), keys)
        total = total.reshape((*slope.shape[:-1], total.shape[-1]))  # one column where the device broadcasts
        scores_grad = ((slope - weights32 * total) * scale).astype(q.dtype)
        return _batch_matmul(scores_grad, k), _batch_t_matmul(scores_grad, q), v_grad

    return custom_op(forward, backward, q, k, v)[0]


@functools.lru_cache(maxsize=8)
def causal_mask(batch: int, heads: int, queries: int, keys: int, repeats: int = 1) -> Tensor:
    """0 where a query may look, a large negative number where it may not; the last query sees all keys.

    Returns:
        (batch, heads, repeats * queries, keys) on CPU, (1, 1, repeats * queries, keys) elsewhere; float32. Shared: do not write.
    """
    allowed = np.tril(np.ones((queries, keys), bool), keys - queries)
    mask = np.where(np.tile(allowed, (repeats, 1)), 0.0, -1e30).astype(np.float32)[None, None]
    if device_target() == "CPU":
        mask = np.ascontiguousarray(np.broadcast_to(mask, (batch, heads, *mask.shape[2:])))
    return from_host(mask) if device_target() == "CPU" else Tensor(mask)


# Row sums and scalings, see the module's docstring #


def _row_sum(x: Tensor) -> Tensor:
    """(rows, n) -> (rows, 1)."""
    if device_target() == "CPU":
        return _matmul(x, _ones(x.shape[1], 1))
    return x.sum(-1, keepdims=True)


def _column_sum(x: Tensor) -> Tensor:
    """(rows, n) -> (n,)."""
    if device_target() == "CPU":
        return _matmul(_ones(1, x.shape[0]), x).reshape(-1)
    return x.sum(0)


def _rows(x: Tensor, n: int) -> Tensor:
    """(rows, 1) -> (rows, n) on CPU, elsewhere left to broadcasting."""
    return _matmul(x, _ones(1, n)) if device_target() == "CPU" else x


def _columns(x: Tensor, rows: int) -> Tensor:
    """(n,) -> (rows, n) on CPU, elsewhere left to broadcasting."""
    return _matmul(_ones(rows, 1), x.reshape(1, -1)) if device_target() == "CPU" else x


@functools.lru_cache(maxsize=64)
def _ones(rows: int, columns: int) -> Tensor:
    return from_host(np.ones((rows, columns), np.float32))


@functools.lru_cache(maxsize=8)
def _quarter_turn(dim: int) -> Tensor:
    """The matrix R with x R = (-second half, first half); its products are exact."""
    half = dim // 2
    turn = np.zeros((dim, dim), np.float32)
    turn[half:, :half] = -np.eye(half)
    turn[:half, half:] = np.eye(half)
    return Tensor(turn)
