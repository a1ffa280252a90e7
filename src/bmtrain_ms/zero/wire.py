"""What a shard looks like on its way: fewer bits than it is stored with, at a cost that is known.

Every rank, the owner included, computes with what arrived, so all ranks have the same full tensors; what is stored, updated and
saved keeps its precision, and gradients travel as they are. Cost of a gathered element x against the stored one:

* `bfloat16`: at most 2⁻⁸ abs(x).  `float16`: at most 2⁻¹¹ abs(x) above 6e-5, and 3e-8 below; beyond 65504 it is an error.  Both
  round to the nearest value and apply to float32 parameters; half the bytes.
* `int8`: at most 1/254 of the largest absolute value in its block of 256 elements ("ZeRO++", arXiv 2306.10209, qwZ); 1 byte an
  element and 4 for each block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..comm.world import GATHER_DTYPES
from ..compat.runtime import numpy_dtype

BLOCK = 256  # elements that share a scale

Arrays = Sequence[np.ndarray]


class Wire(ABC):
    """How a shard becomes the arrays that travel for it, and back, on the host (NumPy) and on devices (operations)."""

    @abstractmethod
    def sizes(self, n: int) -> list[tuple[int, np.dtype]]:
        """Elements and type of each array that travels for a shard of n elements."""

    @abstractmethod
    def encode(self, shard: np.ndarray, out: Arrays) -> None:
        """(n,) -> arrays of `sizes`.

        Raises:
            ValueError: a value cannot be represented.
        """

    @abstractmethod
    def decode(self, parts: Arrays, out: np.ndarray) -> None:
        """Each part (ranks, elements) -> (ranks, n)."""

    @abstractmethod
    def encode_on_device(self, shard: Tensor) -> list[Tensor]:
        """The arrays of `encode`, made on a device; values that are too large become infinite."""

    @abstractmethod
    def decode_on_device(self, parts: Sequence[Tensor], ranks: int, n: int, dtype: Any) -> Tensor:
        """The shards of `decode`, made on a device; parts and result are flat."""


class Rounded(Wire):
    """float32 as a 16-bit type."""

    def __init__(self, dtype: Any):
        self._dtype = dtype

    def sizes(self, n: int) -> list[tuple[int, np.dtype]]:
        return [(n, numpy_dtype(self._dtype))]

    def encode(self, shard: np.ndarray, out: Arrays) -> None:
        with np.errstate(over="ignore"):
            out[0][...] = shard.astype(out[0].dtype)
        if self._dtype == ms.float16 and (np.isinf(out[0]) & np.isfinite(shard)).any():
            raise ValueError(f"value {np.abs(shard).max():g} is beyond float16; use gather_dtype='bfloat16'")

    def decode(self, parts: Arrays, out: np.ndarray) -> None:
        out[...] = parts[0].astype(out.dtype)

    def encode_on_device(self, shard: Tensor) -> list[Tensor]:
        return [shard.astype(self._dtype)]

    def decode_on_device(self, parts: Sequence[Tensor], ranks: int, n: int, dtype: Any) -> Tensor:
        return parts[0].astype(dtype)


class BlockQuantised(Wire):
    """int8 in [-127, 127] and a float32 scale for each block; a block that is not finite arrives as NaN."""

    def sizes(self, n: int) -> list[tuple[int, np.dtype]]:
        blocks = -(-n // BLOCK)
        return [(blocks * BLOCK, np.dtype(np.int8)), (blocks, np.dtype(np.float32))]

    def encode(self, shard: np.ndarray, out: Arrays) -> None:
        values, scales = out
        padded = np.zeros((scales.size, BLOCK), np.float32)
        padded.reshape(-1)[: shard.size] = shard
        with np.errstate(invalid="ignore"):
            largest = np.abs(padded).max(1)
            scales[...] = np.where(np.isfinite(largest), largest / np.float32(127), np.float32(np.nan))
            padded /= np.where(scales > 0, scales, np.float32(np.inf))[:, None]  # a tiny block's scale may be 0
            padded[~np.isfinite(padded)] = 0
        values[...] = np.rint(padded, out=padded).reshape(-1)

    def decode(self, parts: Arrays, out: np.ndarray) -> None:
        values, scales = parts
        wide = values.astype(np.float32).reshape(*scales.shape, BLOCK) * scales[..., None]
        out[...] = wide.reshape(len(values), -1)[:, : out.shape[1]]

    def encode_on_device(self, shard: Tensor) -> list[Tensor]:
        wide, missing = shard.astype(ms.float32), -shard.shape[0] % BLOCK
        padded = (ops.cat((wide, ops.zeros((missing,), ms.float32))) if missing else wide).reshape(-1, BLOCK)
        largest = padded.abs().max(axis=1, keepdims=True)
        finite = ops.isfinite(padded.sum(axis=1, keepdims=True))
        scale = ops.select(finite, largest / 127.0, ops.full_like(largest, float("nan")))
        scaled = padded / ops.select(scale > 0, scale, ops.full_like(scale, float("inf")))
        values = ops.round(ops.select(ops.isfinite(scaled), scaled, ops.zeros_like(scaled)))
        return [values.astype(ms.int8).reshape(-1), scale.reshape(-1)]

    def decode_on_device(self, parts: Sequence[Tensor], ranks: int, n: int, dtype: Any) -> Tensor:
        values, scales = parts
        wide = values.astype(ms.float32).reshape(-1, BLOCK) * scales.reshape(-1, 1)
        return wide.reshape(ranks, -1)[:, :n].reshape(-1).astype(dtype)


def wire_for(gather_dtype: str | None, dtype: Any) -> Wire | None:
    """How a parameter of type `dtype` travels; None: as it is."""
    if gather_dtype is None:
        return None
    if gather_dtype == "int8":
        return BlockQuantised()
    return Rounded(GATHER_DTYPES[gather_dtype]) if dtype == ms.float32 else None
