"""Rows that go to experts and come back, on the host."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp
from ..compat.runtime import from_host, values
from .host_arrays import Tensors, matrix, quiet, returned, wide


def choose_experts(scores: Tensor, top_k: int, groups: int, keep: int, best: int) -> Tensor:
    """`bmtrain_ms.ops.choose_experts` on the host."""
    left = matrix(scores, np.float32).copy()
    rows, experts = left.shape
    if keep < groups:
        by_group = left.reshape(rows, groups, experts // groups)
        of_group = np.sort(by_group, -1)[..., -best:].sum(-1, dtype=np.float32)
        out = np.ones((rows, groups), bool)
        np.put_along_axis(out, _best(of_group, keep), False, 1)
        by_group[out] = -np.inf
    return from_host(_best(left, top_k))


def _best(left: np.ndarray, count: int) -> np.ndarray:
    """(rows, count) int32, best first, the lowest index of equal ones. `left` is spoilt."""
    found = np.empty((left.shape[0], count), np.int32)
    for j in range(count):
        found[:, j] = left.argmax(1)
        np.put_along_axis(left, found[:, j : j + 1].astype(np.int64), -np.inf, 1)
    return found


@quiet
def take_rows(x: Tensor, index: np.ndarray) -> Tensor:
    """x[index], rows of zeros for -1, on the host; see `bmtrain_ms.ops.experts`."""
    rows = values(x)[index]
    if (index < 0).any():
        rows[index < 0] = 0
    return from_host(rows)


@quiet
def sum_rows(x: Tensor, places: np.ndarray, weights: Tensor | None) -> Tensor:
    """The sum of k rows for each row of `places`, weighted if there are weights, on the host; see `bmtrain_ms.ops.experts`."""
    rows, w = wide(x), None if weights is None else values(weights)
    out = np.zeros((len(places), rows.shape[1]), rows.dtype)
    for j in range(places.shape[1]):
        there = np.flatnonzero(places[:, j] >= 0)
        found = rows[places[there, j]]
        out[there] += found if w is None else found * w[there, j, None]
    return returned(out, x, out.shape)


@quiet
def spread_rows(x: Tensor, weights: Tensor, slots: np.ndarray) -> Tensor:
    """x[slot // k] times the weight of each slot, on the host; see `bmtrain_ms.ops.experts`."""
    w, there = values(weights), np.flatnonzero(slots >= 0)
    rows = wide(x)
    out = np.zeros((len(slots), rows.shape[1]), rows.dtype)
    out[there] = rows[slots[there] // w.shape[1]] * w.reshape(-1)[slots[there], None]
    return returned(out, x, out.shape)


@quiet
def dot_rows(x: Tensor, y: Tensor, places: np.ndarray) -> Tensor:
    """The products of x[i] and y[places[i, j]], on the host; see `bmtrain_ms.ops.experts`."""
    a, b = matrix(x, np.float32), matrix(y, np.float32)
    out = np.zeros(places.shape, np.float32)
    for j in range(places.shape[1]):
        there = np.flatnonzero(places[:, j] >= 0)
        out[there, j] = np.einsum("td,td->t", a[there], b[places[there, j]])
    return from_host(out)


def grouped_linear(x: Tensor, weight: Tensor, counts: np.ndarray) -> Tensor:
    """`bmtrain_ms.ops.grouped_linear` on the host."""
    ends = np.cumsum(counts)
    groups = [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(counts.tolist(), ends.tolist())) if n]

    @quiet
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, None]:
        rows, matrices = wide(x), wide(weight)
        out = np.zeros((len(rows), matrices.shape[1]), rows.dtype)
        for e, part in groups:
            np.matmul(rows[part], matrices[e].T, out=out[part])
        return (returned(out, x, out.shape),), None

    @quiet
    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        rows, matrices, grad = wide(inputs[0]), wide(inputs[1]), wide(grads[0])
        x_grad, weight_grad = np.zeros(rows.shape, rows.dtype), np.zeros(matrices.shape, matrices.dtype)
        for e, part in groups:
            np.matmul(grad[part], matrices[e], out=x_grad[part])
            np.matmul(grad[part].T, rows[part], out=weight_grad[e])
        return returned(x_grad, inputs[0]), returned(weight_grad, inputs[1])

    return custom_vjp(forward, backward, x, weight)[0]
