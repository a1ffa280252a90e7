"""Tensors as arrays to compute with, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor

from ..compat.runtime import from_host, numpy_dtype, values

Tensors = tuple[Tensor, ...]
Arrays = tuple[np.ndarray, ...]

quiet = np.errstate(all="ignore")  # inf and nan are answers


def wide(x: Tensor, dtype: Any = None) -> np.ndarray:
    """The values of `x`: in its own memory if they are of the type to compute in, `dtype`, or else float32 for 16 bits."""
    array = values(x)
    if dtype is None:
        dtype = np.float32 if array.itemsize == 2 else array.dtype
    return array.astype(dtype, copy=False)


def matrix(x: Tensor, dtype: Any = None) -> np.ndarray:
    """`wide(x, dtype)` as (rows, last dim)."""
    return wide(x, dtype).reshape(-1, x.shape[-1])


def returned(array: np.ndarray, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor of the type, and of the shape, of `like`, or of another shape."""
    dtype = numpy_dtype(like.dtype)
    if array.dtype != dtype:
        with np.errstate(all="ignore"):  # not `quiet`, which its caller may be in: one such object is not entered twice
            array = array.astype(dtype)
    return from_host(array.reshape(like.shape if shape is None else shape))
