"""Where the values of a tensor are: in an array of ours, in memory of an operation, or in both; asked of the memory itself."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from bmtrain_ms.compat.autograd import custom_op
from bmtrain_ms.compat.runtime import (
    FLOATS,
    Values,
    addressed,
    from_host,
    host_array,
    is_zero,
    numpy_dtype,
    overwrite,
    untouched_zeros,
    values,
    writable_array,
)
from bmtrain_ms.distributed import all_reduce
from tests.helpers.ranks import ROOT

pytestmark = pytest.mark.usefixtures("single_world")


def ours() -> Tensor:
    return from_host(np.arange(6, dtype=np.float32).reshape(2, 3))


def through_autograd(x: Tensor) -> Tensor:
    """The gradient that a derivative of ours returned, made of an array: MindSpore makes another Python object for it."""
    back = from_host(np.arange(6, dtype=np.float32).reshape(2, 3))
    return ms.grad(lambda x: custom_op(lambda x: (x * 2.0,), lambda grads: (back,), x)[0].sum())(x)


class Doubled(nn.Cell):
    """Its derivative, of a user's, makes its gradient of an array: what MindSpore makes of it looks like a result, without an
    address."""

    def construct(self, x: Tensor) -> Tensor:
        return x * 2.0

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> Tensor:
        return Tensor.from_numpy(np.full(x.shape, 2.0, np.float32))


def through_a_bprop() -> Tensor:
    """The gradient as a derivative before that one gets it."""
    taken = []

    def keep(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.extend(grads)
        return grads

    cell = Doubled()
    ms.grad(lambda x: cell(custom_op(lambda x: (x * 1.0,), keep, x)[0]).sum())(from_host(np.ones((2, 3), np.float32)))
    return taken[0]


def in_place(change: Callable[[Tensor], Any]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        x = ours()
        change(x)
        return x

    return make


def set_item(x: Tensor) -> None:
    x[0, 0] = 9.0


def assigned_value(x: Tensor) -> Tensor:
    x.assign_value(ops.ones((2, 3), ms.float32) * 4.0)
    return x


def set_data() -> Tensor:
    p = Parameter(ops.zeros((2, 3), ms.float32))
    p.set_data(ours())
    return p


MADE: dict[str, Callable[[], Tensor]] = {
    "of an array": ours,
    "by an operation": lambda: ours() * 2.0,
    "read by an operation": in_place(lambda x: x * 1.0),
    "looked at": in_place(lambda x: x.asnumpy()),
    "a view was taken": in_place(lambda x: x[1:] * 1.0),
    "transposed by others": in_place(lambda x: ops.matmul(x, x.T)),
    "an element was set": in_place(set_item),
    "assigned": in_place(lambda x: ops.assign(x, Tensor(np.full((2, 3), 4.0, np.float32)))),
    "a value was assigned": in_place(lambda x: x.assign_value(ops.ones((2, 3), ms.float32) * 4.0)),
    "viewed, then assigned": in_place(lambda x: (x[1:] * 1.0, ops.assign(x, Tensor(np.full((2, 3), 4.0, np.float32))))),
    "a gradient": lambda: through_autograd(ours()),
    "a gradient of a derivative of a user's": through_a_bprop,
    "a parameter": lambda: Parameter(ours()),
    "a parameter that was given an array": set_data,
    "a gradient that was assigned a value": lambda: assigned_value(through_autograd(ours())),
    "copied": lambda: copy.deepcopy(ours()),
    "a collective's": lambda: all_reduce(ours()),
}


@pytest.mark.parametrize("made", MADE)
def test_values_are_what_operations_read(made):
    x = MADE[made]()
    expected = (x * 1.0).asnumpy()
    assert np.array_equal(values(x), expected) and values(x).shape == expected.shape
    assert np.array_equal(host_array(x), expected)


@pytest.mark.parametrize("made", MADE)
def test_what_is_overwritten_is_what_operations_read(made):
    """On 2.5 a view gives the tensor memory of its own; writing into the array that it was made of would be lost."""
    x = MADE[made]()
    overwrite(x, Tensor(np.full((2, 3), 7.0, np.float32)))
    assert (x * 1.0).asnumpy().tolist() == [[7.0] * 3] * 2
    assert host_array(x).tolist() == values(x).tolist() == [[7.0] * 3] * 2


WRITES = {
    "in place": lambda x: overwrite(x, Tensor(np.full((2, 3), 7.0, np.float32))),
    "assigned": lambda x: ops.assign(x, Tensor(np.full((2, 3), 8.0, np.float32))),
    "an element was set": set_item,
    "a value was assigned": lambda x: x.assign_value(ops.ones((2, 3), ms.float32) * 9.0),
    "a view was taken": lambda x: x[1:] * 1.0,
}


@pytest.mark.parametrize("made", MADE)
def test_values_that_are_kept_follow_what_is_written(made):
    x = MADE[made]()
    kept = Values()
    assert np.array_equal(kept.of(x).array, (x * 1.0).asnumpy())
    for write in (*WRITES.values(), *WRITES.values()):
        write(x)
        expected = (x * 1.0).asnumpy()
        assert np.array_equal(kept.of(x).array, expected), write
        assert kept.bytes.tobytes() == expected.tobytes()


def test_values_that_are_kept_are_an_array_of_the_memory():
    x = ours()
    kept = Values()
    array = kept.of(x).array
    overwrite(x, Tensor(np.full((2, 3), 7.0, np.float32)))
    assert kept.of(x).array is array and array.tolist() == [[7.0] * 3] * 2
    assert kept.of(ours()).array.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]  # of another tensor


@pytest.mark.parametrize("size", [3, 1 << 14], ids=["small", "large"])
def test_zeros_are_told_from_what_is_not(size):
    array = np.zeros(size, np.float32)
    x = from_host(array)
    assert is_zero(x) and is_zero(x * 1.0)
    array[-1] = -0.0
    assert is_zero(x)
    for value in (1e-30, np.nan):
        array[-1] = value
        assert not is_zero(x) and not is_zero(x + 0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_of_every_type_are_not_copied(dtype):
    array = np.ones(1 << 15, numpy_dtype(dtype))  # on 2.5 less than 32 KiB of an operation's is copied, which is faster
    x = from_host(array)
    array[2] = 3
    assert values(x).dtype == array.dtype and float(values(x)[2]) == 3.0 and np.shares_memory(values(x), array)
    made = x + x
    assert values(made).__array_interface__["data"][0] == addressed(made)._data_ptr()


@pytest.mark.parametrize("shape", [(), (1,), (3, 0, 2)])
def test_values_of_odd_shapes(shape):
    assert values(from_host(np.ones(shape, np.float32))).shape == shape


def test_values_of_views_are_right():
    x = ours() * 1.0
    for view in (x.T, x[1:], x[:, 1]):
        assert np.array_equal(values(view), (view * 1.0).asnumpy())
        with pytest.raises(ValueError, match="is a view"):
            overwrite(view, view)


def test_arrays_that_are_written_into_are_those_of_the_tensor():
    x = ours()
    array = writable_array(x)
    assert array is not None
    array[...] = 2.0
    assert (x + 0.0).asnumpy().tolist() == [[2.0] * 3] * 2


LOOP = """
import numpy as np
from mindspore import Tensor, ops
import bmtrain_ms as bms
from bmtrain_ms.nn.functional import rms_norm

bms.init_distributed(seed=0)


class Layer(bms.DistributedModule):
    def __init__(self):
        super().__init__()
        self.weight = bms.DistributedParameter(np.eye(6, dtype=np.float32))
        self.bias = bms.DistributedParameter(np.ones(6, np.float32))
        self.gain = bms.DistributedParameter(np.ones(6, np.float32))

    def construct(self, x):
        return ops.matmul(rms_norm(x, self.gain, 1e-6), self.weight) + self.bias


x = Tensor(np.ones((2, 6), np.float32))
for make in (bms.optim.AdamOptimizer, bms.optim.AdamOffloadOptimizer):
    for clip in (False, True):
        for checkpoint in (False, True):
            model = bms.TransformerBlockList([bms.Block(Layer(), use_checkpoint=checkpoint) for _ in range(2)])
            optimizer = make(model.trainable_params())
            manager = bms.optim.OptimManager()
            manager.add_optimizer(optimizer)
            for _ in range(2):
                manager.zero_grad()
                manager.backward(lambda x: (model(x) ** 2).mean(), x)
                if clip:
                    manager.clip_grad_norm(optimizer.param_groups, 1.0)
                manager.step()
            optimizer.load_state_dict(optimizer.state_dict())
print("done")
"""


def test_no_step_makes_mindspore_log_an_error(tmp_path):
    """Neither clipped nor scaled: then nothing but the optimizer reads the gradients."""
    (tmp_path / "loop.py").write_text(LOOP)
    environment = {**os.environ, "GLOG_v": "3", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("done\n"), done.stderr
    assert "[ERROR]" not in done.stdout + done.stderr and "is null" not in done.stderr


@pytest.mark.parametrize("length", [1 << 50, 1 << 70])
def test_zeros_that_there_is_no_room_for(length: int):
    with pytest.raises(MemoryError, match=r"^unable to allocate [0-9,]+ GiB$"):
        untouched_zeros(length, ms.float32)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16, np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("length", [0, 1, 1 << 15, 1 << 16])
def test_zeros_of_a_shard(dtype: Any, length: int):
    made = untouched_zeros(length, dtype)
    assert made.shape == (length,) and made.dtype == numpy_dtype(dtype) and not made.view(np.uint8).any()
    made.view(np.uint8)[:] = 1
