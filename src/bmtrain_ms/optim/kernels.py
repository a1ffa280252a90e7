"""Loops over elements that are compiled for this processor.

IEEE float32 in the order that is written, without fused multiply-add: the same bits on every processor, and as NumPy's. Arrays are
flat and equally long: the caller sees to it, these loops do not look. Import this where it is used: it imports numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bmtrain_ms_base.compiled import compiled

if TYPE_CHECKING:
    from .update import Coefficients


@compiled()
def _moments(m: Any, v: Any, grad: Any, c: Coefficients) -> tuple[Any, Any]:
    grad = grad * np.float32(c.factor)
    return (
        m * np.float32(c.beta1) + grad * np.float32(1.0 - c.beta1),
        grad * grad * np.float32(1.0 - c.beta2) + v * np.float32(c.beta2),
    )


@compiled()
def adam(p: np.ndarray, m: np.ndarray, v: np.ndarray, grad: np.ndarray, c: Coefficients) -> None:
    """Update m, v and, unless the rate is zero, p = keep * p - rate * m / (sqrt(v) + eps); all float32."""
    for i in range(p.size):
        m[i], v[i] = _moments(m[i], v[i], grad[i], c)
        if c.rate != 0.0:
            p[i] = p[i] * np.float32(c.keep) - m[i] / (np.sqrt(v[i]) + np.float32(c.eps)) * np.float32(c.rate)


@compiled()
def deltas(p: np.ndarray, m: np.ndarray, v: np.ndarray, grad: np.ndarray, c: Coefficients) -> tuple[float, float]:
    """Sum, and that of the squares, of what `adam` will subtract before the rate: correction * m / (sqrt(v) + eps) + decay * p."""
    total = squares = 0.0
    for i in range(p.size):
        mean, square = _moments(m[i], v[i], grad[i], c)
        delta = mean / (np.sqrt(square) + np.float32(c.eps)) * np.float32(c.correction) + np.float32(c.decay) * p[i]
        total += delta
        squares += np.float64(delta) * delta
    return total, squares


# Conversions, on bits: uint32 for float32, uint16 for 16 bits. NumPy's take four to ten times as long. #

_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)  # of every float16


@compiled()
def from_float16(low: np.ndarray, wide: np.ndarray) -> None:
    """Widen float16 to float32, which is exact."""
    for i in range(low.size):
        wide[i] = _VALUES[low[i]]


@compiled()
def from_bfloat16(low: np.ndarray, wide: np.ndarray) -> None:
    """Widen bfloat16 to float32, which is exact."""
    for i in range(low.size):
        wide[i] = low[i] << 16


@compiled()
def to_float16(wide: np.ndarray, low: np.ndarray) -> None:
    """Round float32 to the nearest float16, ties to even; NaN stays NaN."""
    for i in range(wide.size):
        x = wide[i] & 0x7FFFFFFF
        if x > 0x7F800000:
            rounded = 0x7E00 | x >> 13 & 0x1FF
        else:
            if x < 0x38800000:  # below 2**-14 float16 is subnormal: a multiple of 2**-24
                kept, drop = x & 0x7FFFFF | 0x800000, min(126 - (x >> 23), 31)
            else:
                kept, drop = x - (127 - 15 << 23), 13  # another bias of the exponent, ten bits of the mantissa
            rounded = min(kept + (1 << drop - 1) - 1 + (kept >> drop & 1) >> drop, 0x7C00)  # infinity at most
        low[i] = wide[i] >> 16 & 0x8000 | rounded


@compiled()
def to_bfloat16(wide: np.ndarray, low: np.ndarray) -> None:
    """Round float32 to the nearest bfloat16, ties to even; NaN stays NaN."""
    for i in range(wide.size):
        x = wide[i]
        if x & 0x7FFFFFFF > 0x7F800000:
            low[i] = x >> 16 | 0x40
        else:
            low[i] = x + 0x7FFF + (x >> 16 & 1) >> 16
