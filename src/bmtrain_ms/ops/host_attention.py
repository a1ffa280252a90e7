"""Attention on the host. MindSpore's reductions and broadcasts are slow there: a mask has the shape of the scores."""

from __future__ import annotations

import functools
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..compat.autograd import custom_vjp
from ..compat.runtime import from_host, values

Tensors = tuple[Tensor, ...]

_batch_matmul = ops.BatchMatMul()
_batch_matmul_t = ops.BatchMatMul(transpose_b=True)
_batch_t_matmul = ops.BatchMatMul(transpose_a=True)
_softmax = ops.Softmax(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """See `bmtrain_ms.ops.attention`."""
    scale = 1.0 / math.sqrt(q.shape[-1])

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensors, Tensors]:
        scores = _batch_matmul_t(q * scale, k).astype(ms.float32)
        weights = _softmax(scores if mask is None else scores + mask).astype(q.dtype)
        return (_batch_matmul(weights, v),), (q, k, v, weights)

    def backward(residuals: Tensors, grads: Tensors) -> Tensors:
        (q, k, v, weights), (grad,) = residuals, grads
        v_grad = _batch_t_matmul(weights, grad)
        with np.errstate(all="ignore"):  # inf and nan are answers
            weights32 = values(weights).astype(np.float32, copy=False)
            slope = weights32 * values(_batch_matmul_t(grad, v)).astype(np.float32, copy=False)
            slope -= weights32 * slope.sum(-1, keepdims=True)
            slope *= np.float32(scale)
        scores_grad = from_host(slope).astype(q.dtype)
        return _batch_matmul(scores_grad, k), _batch_t_matmul(scores_grad, q), v_grad

    return custom_vjp(forward, backward, q, k, v)[0]


@functools.lru_cache(maxsize=8)
def causal_mask(batch: int, heads: int, queries: int, keys: int, repeats: int = 1) -> Tensor:
    """See `bmtrain_ms.ops.causal_mask`; (batch, heads, repeats * queries, keys)."""
    allowed = np.tril(np.ones((queries, keys), bool), keys - queries)
    mask = np.where(np.tile(allowed, (repeats, 1)), 0.0, -1e30).astype(np.float32)[None, None]
    return from_host(np.ascontiguousarray(np.broadcast_to(mask, (batch, heads, *mask.shape[2:]))))
