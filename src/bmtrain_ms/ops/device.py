"""The operations on a device: few, large operations of MindSpore's, which broadcast and reduce as they look."""

from __future__ import annotations

import functools
import math
from typing import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..compat.autograd import custom_vjp
from . import fused
from .device_experts import choose_experts, dot_rows, grouped_linear, spread_rows, sum_rows, take_rows
from .device_loss import loss_gradient, loss_sums
from .rules import GELU, GELU_CUBE, Angles
from .seen import Seen

__all__ = [
    "add",
    "attention",
    "causal_mask",
    "choose_experts",
    "dot_rows",
    "embedding",
    "gelu",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linears",
    "loss_gradient",
    "loss_sums",
    "matmul",
    "merge_heads",
    "reshape",
    "rms_norm",
    "split_heads",
    "spread_rows",
    "sum_rows",
    "swiglu",
    "take_rows",
]

Tensors = tuple[Tensor, ...]

_matmul_t = ops.MatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()
_batch_matmul_t = ops.BatchMatMul(transpose_b=True)
_batch_t_matmul = ops.BatchMatMul(transpose_a=True)
_softmax = ops.Softmax(-1)
_gather = ops.Gather()
_segment_sum = ops.UnsortedSegmentSum()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`bmtrain_ms.ops.linear` on a device; the derivative is MindSpore's."""
    flat = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    y = _matmul_t(flat, weight)
    if bias is not None:
        y = ops.bias_add(y, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0]) if x.ndim != 2 else y


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`bmtrain_ms.ops.linears` on a device; one by one."""
    return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases))


def matmul(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """`bmtrain_ms.ops.matmul` on a device."""
    return ops.MatMul(transpose_a, transpose_b)(a, b)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """`bmtrain_ms.ops.embedding` on a device."""
    (vocab, dim), dtype = table.shape, table.dtype

    def forward(table: Tensor) -> tuple[Tensors, None]:
        return (_gather(table, ids, 0),), None

    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        rows = grads[0].reshape(-1, dim).astype(ms.float32)
        return (_segment_sum(rows, ids.reshape(-1), vocab).astype(dtype),)

    return custom_vjp(forward, backward, table)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`bmtrain_ms.ops.rms_norm` on a device."""
    dim, shape = x.shape[-1], x.shape

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, Tensors]:
        x32, gain = x.reshape(-1, dim).astype(ms.float32), weight.astype(ms.float32)
        scale = 1.0 / ops.sqrt(_row_mean(x32 * x32) + eps)
        normed = x32 * scale
        return ((normed * gain).astype(x.dtype).reshape(shape),), (scale, normed, gain)

    def backward(inputs: Tensors, residuals: Tensors, grads: Tensors) -> Tensors:
        (x, weight), (scale, normed, gain) = inputs, residuals
        grad = grads[0].reshape(-1, dim).astype(ms.float32)
        weight_grad = (grad * normed).sum(0)
        grad = grad * gain
        x_grad = scale * (grad - normed * _row_mean(grad * normed))
        return x_grad.astype(x.dtype).reshape(shape), weight_grad.astype(weight.dtype)

    return custom_vjp(forward, backward, x, weight)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`bmtrain_ms.ops.layer_norm` on a device."""
    dim, shape = x.shape[-1], x.shape

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensors, Tensors]:
        x32, gain = x.reshape(-1, dim).astype(ms.float32), weight.astype(ms.float32)
        centred = x32 - _row_mean(x32)
        scale = 1.0 / ops.sqrt(_row_mean(centred * centred) + eps)
        normed = centred * scale
        out = normed * gain + bias.astype(ms.float32)
        return (out.astype(x.dtype).reshape(shape),), (scale, normed, gain)

    def backward(inputs: Tensors, residuals: Tensors, grads: Tensors) -> Tensors:
        (x, weight, bias), (scale, normed, gain) = inputs, residuals
        grad = grads[0].reshape(-1, dim).astype(ms.float32)
        weight_grad, bias_grad = (grad * normed).sum(0), grad.sum(0)
        grad = grad * gain
        x_grad = scale * (grad - _row_mean(grad) - normed * _row_mean(grad * normed))
        return x_grad.astype(x.dtype).reshape(shape), weight_grad.astype(weight.dtype), bias_grad.astype(bias.dtype)

    return custom_vjp(forward, backward, x, weight, bias)[0]


def _row_mean(x: Tensor) -> Tensor:
    """(rows, n) -> (rows, 1)."""
    return x.sum(-1, keepdims=True) * (1.0 / x.shape[-1])


def add(x: Tensor, y: Tensor) -> Tensor:
    """`bmtrain_ms.ops.add` on a device, which is MindSpore's."""
    return x + y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`bmtrain_ms.ops.swiglu` on a device."""

    def forward(gate: Tensor, up: Tensor) -> tuple[Tensors, Tensors]:
        gate32 = gate.astype(ms.float32)
        sigmoid = ops.sigmoid(gate32)
        silu = gate32 * sigmoid
        return ((silu * up.astype(ms.float32)).astype(up.dtype),), (sigmoid, silu)

    def backward(inputs: Tensors, residuals: Tensors, grads: Tensors) -> Tensors:
        (gate, up), (sigmoid, silu) = inputs, residuals
        grad = grads[0].astype(ms.float32)
        slope = sigmoid + silu - silu * sigmoid  # silu' = s (1 + x (1 - s))
        return (grad * up.astype(ms.float32) * slope).astype(gate.dtype), (grad * silu).astype(up.dtype)

    return custom_vjp(forward, backward, gate, up)[0]


def gelu(x: Tensor) -> Tensor:
    """`bmtrain_ms.ops.gelu` on a device."""

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.astype(ms.float32)
        return wide, ops.tanh(GELU * (wide + GELU_CUBE * wide * wide * wide))

    def forward(x: Tensor) -> tuple[Tensors, None]:
        wide, bent = halves(x)
        return ((0.5 * wide * (1.0 + bent)).astype(x.dtype),), None

    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        wide, bent = halves(inputs[0])
        inner = GELU * (1.0 + 3 * GELU_CUBE * wide * wide)
        slope = 0.5 * (1.0 + bent + wide * (1.0 - bent * bent) * inner)
        return ((grads[0].astype(ms.float32) * slope).astype(inputs[0].dtype),)

    return custom_vjp(forward, backward, x)[0]


def split_heads(x: Tensor, batch: int, heads: int, angles: Angles | None = None) -> Tensor:
    """`bmtrain_ms.ops.split_heads` on a device; the derivative is MindSpore's."""
    length, dim = x.shape[0] // batch, x.shape[1] // heads
    apart = x.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
    if angles is None:
        return apart
    cos, sin = (Tensor(np.concatenate([a, a], axis=-1)) for a in angles)
    wide = apart.astype(ms.float32)
    return (wide * cos + ops.matmul(wide, _quarter_turn(dim)) * sin).astype(x.dtype)


def merge_heads(x: Tensor) -> Tensor:
    """`bmtrain_ms.ops.merge_heads` on a device; the derivative is MindSpore's."""
    batch, heads, length, dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch * length, heads * dim)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`bmtrain_ms.ops.reshape` on a device, which is MindSpore's."""
    return x.reshape(shape)


@functools.lru_cache(maxsize=8)
def _quarter_turn(dim: int) -> Tensor:
    """The matrix R with x R = (-second half, first half); its products are exact."""
    half = dim // 2
    turn = np.zeros((dim, dim), np.float32)
    turn[half:, :half] = -np.eye(half)
    turn[:half, half:] = np.eye(half)
    return Tensor(turn)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Seen | None, scale: float | None, softcap: float | None) -> Tensor:
    """`bmtrain_ms.ops.attention` on a device."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = fused.attention(q, k, v, mask, scale, softcap)
    if out is not None:
        return out
    mask = mask.tensor(q.shape[2] // mask.queries) if isinstance(mask, Seen) else mask

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensors, tuple[Tensor, Tensor | None]]:
        scores, bent = _batch_matmul_t(q * scale, k).astype(ms.float32), None
        if softcap is not None:
            bent = ops.tanh(scores * (1.0 / softcap))
            scores = bent * softcap
        weights = _softmax(scores if mask is None else scores + mask).astype(q.dtype)
        return (_batch_matmul(weights, v),), (weights, bent)

    def backward(inputs: Tensors, kept: tuple[Tensor, Tensor | None], grads: Tensors) -> Tensors:
        (q, k, v), (grad,), (weights, bent) = inputs, grads, kept
        v_grad = _batch_t_matmul(weights, grad)
        weights32 = weights.astype(ms.float32)
        slope = weights32 * _batch_matmul_t(grad, v).astype(ms.float32)
        scores_grad = (slope - weights32 * slope.sum(-1, keepdims=True)) * scale
        scores_grad = (scores_grad if bent is None else scores_grad * (1.0 - bent * bent)).astype(q.dtype)
        return _batch_matmul(scores_grad, k), _batch_t_matmul(scores_grad, q), v_grad

    return custom_vjp(forward, backward, q, k, v)[0]


@functools.lru_cache(maxsize=8)
def causal_mask(batch: int, heads: int, queries: int, keys: int, repeats: int = 1) -> Tensor:
    """`bmtrain_ms.ops.causal_mask` on a device, (1, 1, repeats * queries, keys)."""
    return Seen(queries, keys).tensor(repeats)
