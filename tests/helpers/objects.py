"""Objects that ranks send each other, from hypothesis, and what it means for two to be the same."""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
import numpy as np
from hypothesis import strategies as st
from mindspore import Tensor

from bmtrain_ms.compat.runtime import numpy_dtype

MARK = "__bmtrain_ms__"
DTYPES = ["?", "i1", "u1", "<i2", ">i2", "u4", "i8", "u8", "f2", "<f4", ">f4", "f8", "c8", "c16"]


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types at every depth; NaN is NaN. Arrays may differ in byte order."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):  # results of operations are of a subclass on 2.5
        return a.dtype == b.dtype and a.shape == b.shape and same(a.asnumpy(), b.asnumpy())
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for pair, other in zip(a.items(), b.items()) for x, y in zip(pair, other))
    if isinstance(a, (np.ndarray, np.generic)):
        a, b = (np.asarray(x).astype(x.dtype.newbyteorder("=")) for x in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b


@st.composite
def arrays(draw: Any) -> np.ndarray:
    """Bits of any dtype, bfloat16 and other byte orders included; of 0 to 3 dims, empty ones too."""
    name = draw(st.sampled_from([*DTYPES, "bfloat16"]))
    dtype = numpy_dtype(ms.bfloat16) if name == "bfloat16" else np.dtype(name)
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    bits = np.frombuffer(draw(st.binary(min_size=count, max_size=count)) or b"", np.uint8).copy()
    return (bits & 1 if name == "?" else bits).view(dtype).reshape(shape)


def scalars(array: np.ndarray) -> Any:
    """The array, or its first element as a NumPy scalar."""
    return array.reshape(-1)[0] if array.size and array.shape[:1] == (1,) else array


keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1 << 64, 1 << 200)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.binary(max_size=20)
    | arrays().map(scalars)
)
objects = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.just(MARK), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)
