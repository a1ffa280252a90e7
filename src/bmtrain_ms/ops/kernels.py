"""Compiled loops of the operations on the host: each reads and writes memory once, where NumPy goes over it for every sign.

Arrays are contiguous and float32 and fit together: the caller sees to it, these loops do not look. inf and nan are answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bmtrain_ms_base.compiled import bits_of, compiled, float_of

_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2 in two parts: n * the first is exact
_SHIFT = np.float32(12582912.0)  # 1.5 * 2**23: what is added to it is rounded to an integer, in the lowest bits
_SMALLEST = np.float32(-87.336)  # below, exp is less than the smallest normal number
_C = tuple(np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5))
_ONE, _ZERO = np.float32(1.0), np.float32(0.0)
_LEAST = np.int32(-(1 << 31))


@compiled()
def _ordered(x: Any) -> Any:
    """An int32 for a float32, in the same order, NaN above infinity: the largest is found in vector registers."""
    bits = bits_of(x)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled()
def _in_order(key: Any) -> Any:
    """The float32 of which `key` is `_ordered`."""
    return float_of(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled()
def _exp(x: Any) -> Any:
    """exp(x) of a float32 x <= 0, to 2 units in the last place, 0 below -87.3; without a call, so that loops fill vector registers.

    Moshier's (Cephes, expf): exp(x) = 2**n exp(r), |r| <= ln(2) / 2.
    """
    shifted = x * _LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_C[0] * r + _C[1]) * r + _C[2]) * r + _C[3]) * r + _C[4]) * r + _C[5]
    y = (p * (r * r) + r + _ONE) * float_of((bits_of(shifted) << np.int32(23)) + np.int32(0x3F800000))
    return _ZERO if x < _SMALLEST else y


@compiled(reassociate=True)
def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
    """x, out (rows, dim), weight (dim,), scale (rows,), the factor of each row."""
    rows, dim = x.shape
    for i in range(rows):
        total = _ZERO
        for j in range(dim):
            total += x[i, j] * x[i, j]
        s = _ONE / np.sqrt(total / np.float32(dim) + np.float32(eps))
        scale[i] = s
        for j in range(dim):
            out[i, j] = x[i, j] * s * weight[j]


@compiled(reassociate=True)
def rms_norm_gradient(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, grad: np.ndarray, x_grad: np.ndarray, weight_grad: np.ndarray
) -> None:
    """Write the gradient of x of `rms_norm` and add up that of the weight; `weight_grad` (dim,) is zero before."""
    rows, dim = x.shape
    for i in range(rows):
        s, along = scale[i], _ZERO
        for j in range(dim):
            along += grad[i, j] * weight[j] * x[i, j]
        along *= s * s / np.float32(dim)
        for j in range(dim):
            weight_grad[j] += grad[i, j] * x[i, j] * s
            x_grad[i, j] = s * (grad[i, j] * weight[j] - x[i, j] * along)


@compiled(reassociate=True)
def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> None:
    """x, out (rows, dim), weight, bias (dim,), mean and scale (rows,) of each row."""
    rows, dim = x.shape
    for i in range(rows):
        total = _ZERO
        for j in range(dim):
            total += x[i, j]
        m, total = total / np.float32(dim), _ZERO
        for j in range(dim):
            total += (x[i, j] - m) * (x[i, j] - m)
        s = _ONE / np.sqrt(total / np.float32(dim) + np.float32(eps))
        mean[i], scale[i] = m, s
        for j in range(dim):
            out[i, j] = (x[i, j] - m) * s * weight[j] + bias[j]


@compiled(reassociate=True)
def layer_norm_gradient(
    x: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    grad: np.ndarray,
    x_grad: np.ndarray,
    weight_grad: np.ndarray,
    bias_grad: np.ndarray,
) -> None:
    """Write the gradient of x of `layer_norm` and add up the others; `weight_grad`, `bias_grad` (dim,) are zero before."""
    rows, dim = x.shape
    for i in range(rows):
        m, s, along, level = mean[i], scale[i], _ZERO, _ZERO
        for j in range(dim):
            along += grad[i, j] * weight[j] * ((x[i, j] - m) * s)
            level += grad[i, j] * weight[j]
        along, level = along / np.float32(dim), level / np.float32(dim)
        for j in range(dim):
            normed = (x[i, j] - m) * s
            weight_grad[j] += grad[i, j] * normed
            bias_grad[j] += grad[i, j]
            x_grad[i, j] = s * (grad[i, j] * weight[j] - level - normed * along)


@compiled()
def _sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    e = _exp(-abs(x))
    return (e if x < _ZERO else _ONE) / (_ONE + e)


@compiled(reassociate=True)
def swiglu(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """out = silu(gate) * up, of flat arrays of equal length."""
    for i in range(gate.size):
        out[i] = gate[i] * _sigmoid(gate[i]) * up[i]


@compiled(reassociate=True)
def swiglu_gradient(gate: np.ndarray, up: np.ndarray, grad: np.ndarray, gate_grad: np.ndarray, up_grad: np.ndarray) -> None:
    """Write the gradients of gate and up of `swiglu`, from flat arrays of equal length."""
    for i in range(gate.size):
        s = _sigmoid(gate[i])
        silu = gate[i] * s
        up_grad[i] = grad[i] * silu
        gate_grad[i] = grad[i] * up[i] * (s + silu * (_ONE - s))


@compiled(reassociate=True)
def split_heads(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """x (batch, length, heads, dim) -> out (batch, heads, length, dim), turned by angles (1 or batch, length, dim / 2)."""
    batch, length, heads, dim = x.shape
    half = dim // 2
    for b in range(batch):
        a = b if cos.shape[0] > 1 else 0
        for h in range(heads):
            for t in range(length):
                for i in range(half):
                    first, second = x[b, t, h, i], x[b, t, h, half + i]
                    out[b, h, t, i] = first * cos[a, t, i] - second * sin[a, t, i]
                    out[b, h, t, half + i] = second * cos[a, t, i] + first * sin[a, t, i]


@compiled(reassociate=True)
def split_heads_gradient(grad: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """grad (batch, heads, length, dim) -> out (batch, length, heads, dim), turned back."""
    batch, heads, length, dim = grad.shape
    half = dim // 2
    for b in range(batch):
        a = b if cos.shape[0] > 1 else 0
        for t in range(length):
            for h in range(heads):
                for i in range(half):
                    first, second = grad[b, h, t, i], grad[b, h, t, half + i]
                    out[b, t, h, i] = first * cos[a, t, i] + second * sin[a, t, i]
                    out[b, t, h, half + i] = second * cos[a, t, i] - first * sin[a, t, i]


@compiled()
def _seen(row: int, queries: int, keys: int) -> int:
    """How many keys a row of grouped queries may look at; all where `queries` is 0."""
    return keys - queries + row % queries + 1 if queries > 0 else keys


@compiled(reassociate=True)
def softmax(scores: np.ndarray, scale: float, queries: int) -> None:
    """Replace scores (matrices, rows, keys) by softmax(scale * scores) over the last dim.

    queries: 0, or their number, and row r is query r % queries, which sees no later key; the last one sees all.
    """
    matrices, rows, keys = scores.shape
    factor = np.float32(scale)
    for m in range(matrices):
        for r in range(rows):
            seen = max(0, _seen(r, queries, keys))
            top = _LEAST
            for j in range(seen):
                top = max(top, _ordered(scores[m, r, j]))
            largest, total = _in_order(top) * factor, _ZERO
            for j in range(seen):
                e = _exp(scores[m, r, j] * factor - largest)
                scores[m, r, j] = e
                total += e
            part = _ONE / total
            for j in range(seen):
                scores[m, r, j] *= part
            for j in range(seen, keys):
                scores[m, r, j] = _ZERO


@compiled(reassociate=True)
def softmax_gradient(weights: np.ndarray, grad: np.ndarray, scale: float, queries: int) -> None:
    """Replace `grad`, the gradient of the `weights` that `softmax` made, by the gradient of the scores."""
    matrices, rows, keys = weights.shape
    factor = np.float32(scale)
    for m in range(matrices):
        for r in range(rows):
            seen = max(0, _seen(r, queries, keys))
            total = _ZERO
            for j in range(seen):
                total += weights[m, r, j] * grad[m, r, j]
            for j in range(seen):
                grad[m, r, j] = weights[m, r, j] * (grad[m, r, j] - total) * factor
            for j in range(seen, keys):
                grad[m, r, j] = _ZERO


@compiled(reassociate=True)
def log_sum_exp(x: np.ndarray, largest: np.ndarray, sums: np.ndarray) -> None:
    """x (rows, classes) -> the largest of each row (rows, 1), and the sum of exp(x - largest), (rows,) float64."""
    rows, classes = x.shape
    for i in range(rows):
        key = _LEAST
        for j in range(classes):
            key = max(key, _ordered(x[i, j]))
        top, total = _in_order(key), _ZERO
        for j in range(classes):
            total += _exp(x[i, j] - top)
        largest[i, 0], sums[i] = top, total


@compiled(reassociate=True)
def scaled_softmax(x: np.ndarray, largest: np.ndarray, factor: np.ndarray, out: np.ndarray) -> None:
    """out = exp(x - largest) * factor; x, out (rows, classes), largest, factor (rows, 1); exactly 0 where the factor is."""
    rows, classes = x.shape
    for i in range(rows):
        top, f = largest[i, 0], factor[i, 0]
        for j in range(classes):
            out[i, j] = _exp(x[i, j] - top) * f


@compiled()
def add_rows(ids: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """out[ids[i]] += rows[i], one behind the other; ids (n,) int64, rows (n, dim)."""
    for i in range(ids.size):
        place = ids[i]
        for j in range(rows.shape[1]):
            out[place, j] += rows[i, j]
