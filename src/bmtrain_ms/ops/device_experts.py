"""Rows that go to experts and come back, on a device: where they lie is known on the host, so nothing here waits."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..compat.autograd import custom_vjp, no_grad
from ..compat.runtime import from_host

Tensors = tuple[Tensor, ...]

_gather = ops.Gather()
_batch_matmul = ops.BatchMatMul()
_batch_matmul_t = ops.BatchMatMul(transpose_b=True)
_batch_t_matmul = ops.BatchMatMul(transpose_a=True)


def choose_experts(scores: Tensor, top_k: int, groups: int, keep: int, best: int) -> Tensor:
    """`bmtrain_ms.ops.choose_experts` on a device."""
    with no_grad():
        left = scores.astype(ms.float32)
        if keep < groups:
            rows, experts = left.shape
            by_group = left.reshape(rows, groups, experts // groups)
            chosen = _best(ops.topk(by_group, best)[0].sum(-1), keep)
            kept = _one_hot(chosen, groups).any(1).reshape(rows, groups, 1)
            left = by_group.masked_fill(ops.logical_not(kept), float("-inf")).reshape(rows, experts)
        return _best(left, top_k)


def _best(left: Tensor, count: int) -> Tensor:
    """(rows, count) int32, best first: a device's own top-k does not say which of equal ones it takes."""
    found = []
    for _ in range(count):
        found.append(ops.argmax(left, -1, True).astype(ms.int32))
        left = left.masked_fill(_one_hot(found[-1], left.shape[1]).any(1), float("-inf"))
    return found[0] if count == 1 else ops.cat(found, 1)


def _one_hot(index: Tensor, size: int) -> Tensor:
    """(rows, n) -> (rows, n, size) of truth values."""
    return ops.equal(index.expand_dims(-1), from_host(np.arange(size, dtype=np.int32)))


def take_rows(x: Tensor, index: np.ndarray) -> Tensor:
    """x[index], rows of zeros for -1, on a device; see `bmtrain_ms.ops.experts`."""
    if (index < 0).any():  # a row of zeros behind the others: zero times what is not finite would be no zero
        x, index = ops.cat((x, ops.zeros((1, *x.shape[1:]), x.dtype)), 0), np.where(index < 0, x.shape[0], index)
    return _gather(x, from_host(index.astype(np.int32)), 0)


def sum_rows(x: Tensor, places: np.ndarray, weights: Tensor | None) -> Tensor:
    """The sum of k rows for each row of `places`, weighted if there are weights, on a device; see `bmtrain_ms.ops.experts`."""
    total = None
    for j in range(places.shape[1]):
        rows = take_rows(x, places[:, j]).astype(ms.float32)
        rows = rows if weights is None else rows * weights[:, j : j + 1]
        total = rows if total is None else total + rows
    return total.astype(x.dtype)


def spread_rows(x: Tensor, weights: Tensor, slots: np.ndarray) -> Tensor:
    """x[slot // k] times the weight of each slot, on a device; see `bmtrain_ms.ops.experts`."""
    top_k = weights.shape[1]
    rows = take_rows(x, np.where(slots < 0, -1, slots // top_k)).astype(ms.float32)
    return (rows * take_rows(weights.reshape(-1, 1), slots)).astype(x.dtype)


def dot_rows(x: Tensor, y: Tensor, places: np.ndarray) -> Tensor:
    """The products of x[i] and y[places[i, j]], on a device; see `bmtrain_ms.ops.experts`."""
    wide = x.astype(ms.float32)
    found = [(wide * take_rows(y, places[:, j]).astype(ms.float32)).sum(-1, keepdims=True) for j in range(places.shape[1])]
    return found[0] if len(found) == 1 else ops.cat(found, 1)


def grouped_linear(x: Tensor, weight: Tensor, counts: np.ndarray) -> Tensor:
    """`bmtrain_ms.ops.grouped_linear` on a device: one product of all matrices, of as many rows each as the largest group has."""
    groups, width, ends = len(counts), max(1, int(counts.max())), np.cumsum(counts)
    column = np.arange(width)
    padded = np.where(column < counts[:, None], (ends - counts)[:, None] + column, -1).reshape(-1)
    back = np.full(x.shape[0], -1)
    back[padded[padded >= 0]] = np.flatnonzero(padded >= 0)

    def apart(rows: Tensor) -> Tensor:
        return take_rows(rows, padded).reshape(groups, width, -1)

    def together(rows: Tensor) -> Tensor:
        return take_rows(rows.reshape(groups * width, -1), back)

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, None]:
        return (together(_batch_matmul_t(apart(x), weight)),), None

    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        rows, grad = apart(inputs[0]), apart(grads[0])
        return together(_batch_matmul(grad, inputs[1])), _batch_t_matmul(grad, rows)

    return custom_vjp(forward, backward, x, weight)[0]
