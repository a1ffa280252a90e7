"""The operations on the host: passes of NumPy over the tensors' own memory, and MindSpore's kernels where they are fast."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..compat.autograd import custom_vjp
from ..compat.runtime import addressed, from_host, numpy_dtype, values
from .host_attention import attention, causal_mask
from .host_loss import cross_entropy
from .rules import Angles

__all__ = [
    "attention",
    "causal_mask",
    "cross_entropy",
    "embedding",
    "layer_norm",
    "linear",
    "merge_heads",
    "rms_norm",
    "split_heads",
    "swiglu",
]

Tensors = tuple[Tensor, ...]
Arrays = tuple[np.ndarray, ...]

_quiet = np.errstate(all="ignore")  # inf and nan are answers

_matmul_t = ops.MatMul(transpose_b=True)
_gather = ops.Gather()
_segment_sum = ops.UnsortedSegmentSum()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `bmtrain_ms.ops.linear`."""
    flat = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    y = _matmul_t(flat, weight)
    if bias is not None:
        y = ops.bias_add(y, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0]) if x.ndim != 2 else y


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """See `bmtrain_ms.ops.embedding`."""
    (vocab, dim), dtype = table.shape, table.dtype

    def forward(table: Tensor) -> tuple[Tensors, None]:
        return (_gather(table, ids, 0),), None

    def backward(_: None, grads: Tensors) -> Tensors:
        rows = grads[0].reshape(-1, dim).astype(ms.float32)
        return (_segment_sum(rows, ids.reshape(-1), vocab).astype(dtype),)

    return custom_vjp(forward, backward, table)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `bmtrain_ms.ops.rms_norm`."""

    @_quiet
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, Arrays]:
        wide, gain = _wide(x), _wide(weight)[0]
        scale = 1.0 / np.sqrt(_row_mean(wide, wide) + np.float32(eps))
        normed = wide * scale
        return (_back(normed * gain, x),), (scale, normed, gain)

    @_quiet
    def backward(residuals: Arrays, grads: Tensors) -> Tensors:
        scale, normed, gain = residuals
        grad = _wide(grads[0])
        weight_grad = np.einsum("ij,ij->j", grad, normed)
        grad = grad * gain
        x_grad = normed * -_row_mean(grad, normed)
        x_grad += grad
        x_grad *= scale
        return _back(x_grad, x), addressed(_back(weight_grad, weight))

    return custom_vjp(forward, backward, x, weight)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `bmtrain_ms.ops.layer_norm`."""

    @_quiet
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensors, Arrays]:
        wide, gain = _wide(x), _wide(weight)[0]
        centred = wide - wide.mean(1, keepdims=True)
        scale = 1.0 / np.sqrt(_row_mean(centred, centred) + np.float32(eps))
        normed = centred * scale
        return (_back(normed * gain + _wide(bias)[0], x),), (scale, normed, gain)

    @_quiet
    def backward(residuals: Arrays, grads: Tensors) -> Tensors:
        scale, normed, gain = residuals
        grad = _wide(grads[0])
        weight_grad, bias_grad = np.einsum("ij,ij->j", grad, normed), grad.sum(0)
        grad = grad * gain
        x_grad = normed * -_row_mean(grad, normed)
        x_grad += grad
        x_grad -= grad.mean(1, keepdims=True)
        x_grad *= scale
        return _back(x_grad, x), addressed(_back(weight_grad, weight)), addressed(_back(bias_grad, bias))

    return custom_vjp(forward, backward, x, weight, bias)[0]


def _wide(x: Tensor) -> np.ndarray:
    """(rows, dim), float32."""
    return values(x).reshape(-1, x.shape[-1]).astype(np.float32, copy=False)


def _row_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the products, (rows, 1)."""
    return np.einsum("ij,ij->i", a, b)[:, None] * np.float32(1.0 / a.shape[1])


def _back(array: np.ndarray, like: Tensor) -> Tensor:
    """A tensor of the shape and type of `like`."""
    return from_host(array.reshape(like.shape).astype(numpy_dtype(like.dtype), copy=False))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `bmtrain_ms.ops.swiglu`; the sigmoid is MindSpore's, whose exponential is faster than NumPy's."""

    @_quiet
    def forward(gate: Tensor, up: Tensor) -> tuple[Tensors, Arrays]:
        sigmoid = values(ops.sigmoid(gate.astype(ms.float32)))
        silu = values(gate).reshape(sigmoid.shape) * sigmoid
        return (_back(silu * values(up), up),), (values(up), sigmoid, silu)

    @_quiet
    def backward(residuals: Arrays, grads: Tensors) -> Tensors:
        above, sigmoid, silu = residuals
        grad = values(grads[0]).astype(np.float32, copy=False)
        slope = 1.0 - silu  # silu' = s + silu (1 - s) = silu + s (1 - silu)
        slope *= sigmoid
        slope += silu
        slope *= grad
        slope *= above
        return _back(slope, gate), _back(silu * grad, up)

    return custom_vjp(forward, backward, gate, up)[0]


def split_heads(x: Tensor, batch: int, heads: int, angles: Angles | None = None) -> Tensor:
    """See `bmtrain_ms.ops.split_heads`."""
    length, dim, shape = x.shape[0] // batch, x.shape[1] // heads, x.shape

    @_quiet
    def forward(x: Tensor) -> tuple[Tensors, None]:
        apart = values(x).reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
        out = np.empty(apart.shape, apart.dtype)
        _turn(apart, angles, 1, out)
        return (from_host(out),), None

    @_quiet
    def backward(_: None, grads: Tensors) -> Tensors:
        grad = values(grads[0])
        out = np.empty((batch, length, heads, dim), grad.dtype)
        _turn(grad, angles, -1, out.transpose(0, 2, 1, 3))
        return (from_host(out.reshape(shape)),)

    return custom_vjp(forward, backward, x)[0]


def merge_heads(x: Tensor) -> Tensor:
    """See `bmtrain_ms.ops.merge_heads`."""
    batch, heads, length, dim = x.shape

    def forward(x: Tensor) -> tuple[Tensors, None]:
        return (from_host(values(x).transpose(0, 2, 1, 3).reshape(batch * length, heads * dim)),), None

    def backward(_: None, grads: Tensors) -> Tensors:
        apart = values(grads[0]).reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
        return (from_host(np.ascontiguousarray(apart)),)

    return custom_vjp(forward, backward, x)[0]


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
