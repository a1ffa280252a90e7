"""Attention on the host."""

from __future__ import annotations

import functools
import math

import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp
from ..compat.runtime import from_host, values
from . import kernels
from .host_arrays import Tensors, quiet, returned, wide


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """See `bmtrain_ms.ops.attention`. A causal mask is not added: the loop ends where it begins."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    queries = getattr(mask, "causal_queries", 0)

    @quiet
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensors, np.ndarray]:
        weights = wide(q, np.float32) @ wide(k, np.float32).swapaxes(-1, -2)
        if mask is None or queries:
            kernels.softmax(_matrices(weights), scale, queries)
        else:
            weights *= np.float32(scale)
            weights += values(mask)
            kernels.softmax(_matrices(weights), 1.0, 0)
        return (returned(weights @ wide(v, np.float32), q),), weights

    @quiet
    def backward(inputs: Tensors, weights: np.ndarray, grads: Tensors) -> Tensors:
        q, k, v = inputs
        grad = wide(grads[0], np.float32)
        v_grad = weights.swapaxes(-1, -2) @ grad
        slope = grad @ wide(v, np.float32).swapaxes(-1, -2)
        kernels.softmax_gradient(_matrices(weights), _matrices(slope), scale, queries)
        q_grad = slope @ wide(k, np.float32)
        return returned(q_grad, q), returned(slope.swapaxes(-1, -2) @ wide(q, np.float32), k), returned(v_grad, v)

    return custom_vjp(forward, backward, q, k, v)[0]


def _matrices(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, *x.shape[-2:])


@functools.lru_cache(maxsize=8)
def causal_mask(batch: int, heads: int, queries: int, keys: int, repeats: int = 1) -> Tensor:
    """See `bmtrain_ms.ops.causal_mask`; (1, 1, repeats * queries, keys)."""
    allowed = np.tril(np.ones((queries, keys), bool), keys - queries)
    mask = from_host(np.where(np.tile(allowed, (repeats, 1)), 0.0, -1e30).astype(np.float32)[None, None])
    mask.causal_queries = queries  # what `attention` knows it by
    return mask
