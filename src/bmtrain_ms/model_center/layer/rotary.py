"""Rotary position embedding."""

from __future__ import annotations

import functools

import numpy as np
from mindspore import Tensor

from ...nn import functional


class RotaryEmbedding:
    """Rotates queries and keys by angles that grow with the position (Su et al., 2021); halves paired as in HF Llama.

    Angles are made in float64 and used in float32 whatever the model's dtype: in bfloat16 positions above 256 are not exact.

    Args:
        dim_head: even.
        base: of the geometric series of frequencies.
    """

    def __init__(self, dim_head: int, base: float = 10000.0):
        if dim_head % 2:
            raise ValueError(f"rotary embedding needs an even dim_head, not {dim_head}")
        self.dim_head, self.base = dim_head, base

    def angles(self, offset: int, length: int) -> functional.Angles:
        """cos and sin at positions offset, offset + 1, ...: each (length, dim_head / 2), float32; shared: do not write."""
        return _consecutive(self.dim_head, self.base, offset, length)

    def angles_at(self, positions: np.ndarray) -> functional.Angles:
        """cos and sin at any positions (...) of int: each (..., dim_head / 2), float32."""
        return _angles(self.dim_head, self.base, positions)

    def __call__(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (batch, length, heads, dim_head), at positions offset, offset + 1, ... -> the same shape and dtype."""
        batch, length, heads, dim = x.shape
        flat = x.reshape(batch * length, heads * dim)
        return functional.split_heads(flat, batch, heads, self.angles(offset, length)).transpose(0, 2, 1, 3)


@functools.lru_cache(maxsize=8)
def _consecutive(dim: int, base: float, offset: int, length: int) -> functional.Angles:
    return _angles(dim, base, np.arange(offset, offset + length))


def _angles(dim: int, base: float, positions: np.ndarray) -> functional.Angles:
    frequency = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = positions.astype(np.float64)[..., None] * frequency
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
