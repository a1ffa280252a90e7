"""Attention on the host. Behind a causal mask it goes through the queries in blocks: what none of a block sees is not computed."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp
from ..compat.runtime import values
from . import kernels
from .host_arrays import Tensors, quiet, returned, wide
from .seen import NOT_SEEN, Seen

BLOCK = 64  # queries: measured from 32 to all of them, at lengths of 128 to 1024
WORKING = 32 << 20  # bytes of the scores of a block, where fewer queries make them fewer
KEPT = 32 << 20  # bytes of weights that are kept for the backward pass; more are computed again, a block at a time


class _Scores:
    """A call: how its queries are divided, and the weights of a block."""

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | Seen | None, scale: float, softcap: float | None):
        self.mask, self.scale, self.softcap = mask, scale, softcap
        seen = mask if isinstance(mask, Seen) else getattr(mask, "seen", None)
        self.seen: Seen | None = seen
        self.length, self.keys = (seen.queries if seen else q.shape[2]), k.shape[2]
        self.shape = q.shape[:3]
        width = self.keys if seen is None or seen.window is None else min(self.keys, seen.window + BLOCK)
        row = 4 * width * q.shape[0] * q.shape[1] * (q.shape[2] // self.length)  # bytes of a query's scores
        rows = min(BLOCK, max(8, WORKING // max(1, row))) if seen else self.length
        self.blocks = [slice(start, min(start + rows, self.length)) for start in range(0, self.length, rows)]
        self.keeps = row * self.length <= KEPT

    def range(self, rows: slice) -> slice:
        """The keys that a block's queries see."""
        if self.seen is None:
            return slice(0, self.keys)
        first, last, _ = self.seen.block(rows)
        return slice(first, last)

    def weights(self, queries: np.ndarray, known: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray | None, int]:
        """(batch * kv heads, queries of the group, rows, keys of `range`), the slope of the cap, and how the kernels are told of a
        causal block."""
        first, last, allowed = (0, self.keys, None) if self.seen is None else self.seen.block(rows)
        scores, bend, factor = queries[:, :, rows] @ known[:, :, first:last].swapaxes(-1, -2), None, self.scale
        if self.softcap is not None:
            scores *= np.float32(self.scale / self.softcap)
            np.tanh(scores, out=scores)
            bend, factor = 1.0 - scores * scores, self.softcap
        causal = rows.stop - rows.start if self.seen is not None and allowed is None else 0
        if allowed is not None:
            scores *= np.float32(factor)
            batch, heads, _ = self.shape
            apart = scores.reshape(batch, heads, *scores.shape[1:])
            np.copyto(apart, NOT_SEEN, where=~allowed[:, None, None])
            factor = 1.0
        elif self.seen is None and self.mask is not None:
            scores *= np.float32(factor)
            scores.reshape(*self.shape, self.keys)[...] += values(self.mask)
            factor = 1.0
        kernels.softmax(_matrices(scores), factor, causal)
        return scores, bend, causal


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Seen | None, scale: float | None, softcap: float | None) -> Tensor:
    """`bmtrain_ms.ops.attention` on the host. What is not seen is not computed, but for the corners of blocks."""
    scores = _Scores(q, k, mask, 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale, softcap)

    @quiet
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensors, list[Any]]:
        queries, known, shown = _queries(q, scores.length), _keys(k), _keys(v)
        out, kept = np.empty((*queries.shape[:3], v.shape[-1]), np.float32), []
        for rows in scores.blocks:
            found = scores.weights(queries, known, rows)
            out[:, :, rows] = found[0] @ shown[:, :, scores.range(rows)]
            kept.append(found if scores.keeps else None)
        return (returned(out, q, (*q.shape[:3], v.shape[-1])),), kept

    @quiet
    def backward(inputs: Tensors, kept: list[Any], grads: Tensors) -> Tensors:
        q, k, v = inputs
        queries, known, shown = _queries(q, scores.length), _keys(k), _keys(v)
        grad = _queries(grads[0], scores.length)
        q_grad, k_grad, v_grad = np.empty_like(queries), np.zeros_like(known), np.zeros_like(shown)
        for rows, found in zip(scores.blocks, kept):
            weights, bend, causal = found or scores.weights(queries, known, rows)
            seen = scores.range(rows)
            v_grad[:, :, seen] += (weights.swapaxes(-1, -2) @ grad[:, :, rows]).sum(1, keepdims=True)
            slope = grad[:, :, rows] @ shown[:, :, seen].swapaxes(-1, -2)
            kernels.softmax_gradient(_matrices(weights), _matrices(slope), scores.scale, causal)
            if bend is not None:
                slope *= bend
            q_grad[:, :, rows] = slope @ known[:, :, seen]
            k_grad[:, :, seen] += (slope.swapaxes(-1, -2) @ queries[:, :, rows]).sum(1, keepdims=True)
        return returned(q_grad, q), returned(k_grad, k), returned(v_grad, v)

    return custom_vjp(forward, backward, q, k, v)[0]


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
    """`bmtrain_ms.ops.causal_mask` on the host, (1, 1, repeats * queries, keys)."""
    seen = Seen(queries, keys)
    mask = seen.tensor(repeats)
    mask.seen = seen  # what `attention` knows it by
    return mask
