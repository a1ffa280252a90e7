"""Attention on the host. Behind a causal mask it goes through the queries in blocks: what none of a block sees is not computed."""

from __future__ import annotations

import functools
import math
from typing import Iterator

import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp
from ..compat.runtime import from_host, values
from . import kernels
from .host_arrays import Arrays, Tensors, quiet, returned, wide

BLOCK = 64  # queries: measured from 32 to all of them, at lengths of 128 to 1024


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None) -> Tensor:
    """See `bmtrain_ms.ops.attention`. A causal mask is not added: the loops end where it begins."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    causal = getattr(mask, "causal_queries", 0)
    length, keys = causal or q.shape[2], k.shape[2]
    blocks = [(rows, keys - length + rows.stop) for rows in _blocks(length)] if causal else [(slice(0, length), keys)]

    @quiet
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensors, Arrays]:
        queries, known, shown = _queries(q, length), _keys(k), _keys(v)
        out, kept, bends = np.empty((*queries.shape[:3], v.shape[-1]), np.float32), [], []
        for rows, seen in blocks:
            weights = queries[:, :, rows] @ known[:, :, :seen].swapaxes(-1, -2)
            factor = scale
            if softcap is not None:
                weights *= np.float32(scale / softcap)
                np.tanh(weights, out=weights)
                bends.append(1.0 - weights * weights)
                factor = softcap
            if mask is None or causal:
                kernels.softmax(_matrices(weights), factor, rows.stop - rows.start if causal else 0)
            else:
                weights *= np.float32(factor)
                weights.reshape(*q.shape[:3], keys)[...] += values(mask)
                kernels.softmax(_matrices(weights), 1.0, 0)
            out[:, :, rows] = weights @ shown[:, :, :seen]
            kept.append(weights)
        return (returned(out, q, (*q.shape[:3], v.shape[-1])),), (*kept, *bends)

    @quiet
    def backward(inputs: Tensors, kept: Arrays, grads: Tensors) -> Tensors:
        q, k, v = inputs
        queries, known, shown, grad = _queries(q, length), _keys(k), _keys(v), _queries(grads[0], length)
        q_grad, k_grad, v_grad = np.empty_like(queries), np.zeros_like(known), np.zeros_like(shown)
        for i, ((rows, seen), weights) in enumerate(zip(blocks, kept)):
            v_grad[:, :, :seen] += (weights.swapaxes(-1, -2) @ grad[:, :, rows]).sum(1, keepdims=True)
            slope = grad[:, :, rows] @ shown[:, :, :seen].swapaxes(-1, -2)
            kernels.softmax_gradient(_matrices(weights), _matrices(slope), scale, rows.stop - rows.start if causal else 0)
            if softcap is not None:
                slope *= kept[len(blocks) + i]
            q_grad[:, :, rows] = slope @ known[:, :, :seen]
            k_grad[:, :, :seen] += (slope.swapaxes(-1, -2) @ queries[:, :, rows]).sum(1, keepdims=True)
        return returned(q_grad, q), returned(k_grad, k), returned(v_grad, v)

    return custom_vjp(forward, backward, q, k, v)[0]


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, BLOCK):
        yield slice(start, min(start + BLOCK, length))


def _queries(x: Tensor, length: int) -> np.ndarray:
    """(batch * kv heads, queries of the group, length, dim)."""
    return wide(x, np.float32).reshape(x.shape[0] * x.shape[1], -1, length, x.shape[3])


def _keys(x: Tensor) -> np.ndarray:
    """(batch * kv heads, 1, keys, dim)."""
    return wide(x, np.float32).reshape(x.shape[0] * x.shape[1], 1, *x.shape[2:])


def _matrices(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, *x.shape[-2:])


@functools.lru_cache(maxsize=8)
def causal_mask(batch: int, heads: int, queries: int, keys: int, repeats: int = 1) -> Tensor:
    """See `bmtrain_ms.ops.causal_mask`; (1, 1, repeats * queries, keys)."""
    allowed = np.tril(np.ones((queries, keys), bool), keys - queries)
    mask = from_host(np.where(np.tile(allowed, (repeats, 1)), 0.0, -1e30).astype(np.float32)[None, None])
    mask.causal_queries = queries  # what `attention` knows it by
    return mask
