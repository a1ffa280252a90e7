"""A place for values while debugging."""

from __future__ import annotations

from typing import Iterator

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from bmtrain_ms import debug
from bmtrain_ms.compat.runtime import overwrite

pytestmark = pytest.mark.usefixtures("single_world")


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    debug.clear()
    yield
    debug.clear()


def test_set_and_get():
    assert debug.get("x") is None and debug.get("x", 5) == 5
    debug.set("x", None)
    assert debug.get("x", 5) is None
    value = object()
    debug.set("x", value)
    debug.set("y", 1)
    assert debug.get("x") is value and debug.get("y") == 1


def test_lists():
    debug.append("x", 1)
    debug.append("x", 2)
    debug.extend("x", (i * i for i in (3, 4)))
    debug.extend("y", [])
    assert debug.get("x") == [1, 2, 9, 16] and debug.get("y") == []
    debug.set("z", [1])
    debug.append("z", 2)
    assert debug.get("z") == [1, 2]


@pytest.mark.parametrize("add", [lambda: debug.append("x", 1), lambda: debug.extend("x", [1])], ids=["append", "extend"])
def test_what_is_no_list(add):
    debug.set("x", 3)
    with pytest.raises(TypeError, match="debug value 'x' is a int, not a list; clear it first"):
        add()
    assert debug.get("x") == 3
    debug.clear("x")
    add()
    assert debug.get("x") == [1]


def test_clear():
    debug.set("x", 1)
    debug.set("y", 2)
    debug.clear("x")
    debug.clear("nothing")
    assert debug.get("x") is None and debug.get("y") == 2
    debug.clear()
    assert debug.get("y") is None


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16, ms.int32], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_tensors_are_copies_in_host_memory(shape, dtype):
    x = Tensor(np.ones(shape, np.float32)).astype(dtype)
    parameter = Parameter(x.copy(), name="p")
    debug.set("set", x)
    debug.append("list", x)
    debug.extend("list", [x, parameter])
    if x.size:
        for changed in (x, parameter):
            overwrite(changed, Tensor(np.zeros(shape, np.float32)).astype(dtype))
        assert not x.astype(ms.float32).asnumpy().any()
    for kept in (debug.get("set"), *debug.get("list")):
        assert type(kept) is Tensor and kept.dtype == dtype and kept.shape == shape
        assert (kept.astype(ms.float32).asnumpy() == 1).all()


def test_what_is_kept_has_no_history():
    def loss(x: Tensor) -> Tensor:
        y = x * x
        debug.set("y", y)
        return y.sum() + (debug.get("y") * 100.0).sum()

    assert ms.grad(loss)(Tensor([1.0, 2.0])).asnumpy().tolist() == [2.0, 4.0]
    assert debug.get("y").asnumpy().tolist() == [1.0, 4.0]
