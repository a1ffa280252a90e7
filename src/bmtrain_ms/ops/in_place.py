"""Arithmetic on tensors that belong to who calls: in their own memory where NumPy may write it, which is as fast as memory is."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ..compat.device import on_host
from ..compat.runtime import host_array, writable_array


def scale_(tensor: Tensor, factor: float) -> Tensor:
    """tensor * factor; on the host the tensor itself, changed. It must not be in use elsewhere."""
    array = writable_array(tensor)
    if array is None:
        return tensor * factor
    np.multiply(array, array.dtype.type(factor), out=array)
    return tensor


def add_(tensor: Tensor, other: Tensor) -> Tensor:
    """tensor + other, of equal shapes and types; on the host the first one itself, changed. It must not be in use elsewhere."""
    array, more = writable_array(tensor), writable_array(other)
    if array is None or more is None:
        return tensor + other
    np.add(array, more, out=array)
    return tensor


def square_sum(tensor: Tensor) -> float:
    """Sum of the squares of a float32 tensor; not finite if an element is not."""
    if not on_host():
        return host_array((tensor * tensor).sum()).item()
    array = writable_array(tensor)
    array = host_array(tensor).reshape(-1) if array is None else array
    with np.errstate(all="ignore"):
        return float(np.dot(array, array))
