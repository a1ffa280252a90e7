"""Rotary position embedding."""

from __future__ import annotations

import functools

import numpy as np
from mindspore import Tensor

from ...compat.runtime import device_target, from_host
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
        return _angles(self.dim_head, self.base, offset, length)

    def __call__(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (batch, length, heads, dim_head), at positions offset, offset + 1, ... -> the same shape and dtype."""
        batch, length, heads, dim = x.shape
        cos, sin = _tables(self.dim_head, self.base, offset, batch, length, heads)
        return functional.rotate(x.reshape(-1, dim), cos, sin).reshape(x.shape)


@functools.lru_cache(maxsize=8)
def _angles(dim: int, base: float, offset: int, length: int) -> functional.Angles:
    frequency = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = np.outer(np.arange(offset, offset + length, dtype=np.float64), frequency)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _tables(dim: int, base: float, offset: int, batch: int, length: int, heads: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (batch * length * heads, dim): spelled out, because broadcasting is slow on CPU."""
    shape = (batch, length, heads, dim)
    make = from_host if device_target() == "CPU" else Tensor
    both = (np.concatenate([half, half], axis=1)[None, :, None, :] for half in _angles(dim, base, offset, length))
    cos, sin = (make(np.ascontiguousarray(np.broadcast_to(x, shape)).reshape(-1, dim)) for x in both)
    return cos, sin
