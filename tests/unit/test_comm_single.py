"""The group of one rank: every collective is the identity, with the errors of the larger groups."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from bmtrain_ms.comm import Clock, SingleEngine
from bmtrain_ms.compat.runtime import from_host, host_array, numpy_dtype

pytestmark = pytest.mark.usefixtures("single_world")
DTYPES = [ms.float16, ms.bfloat16, ms.float32, ms.int32, ms.int64, ms.uint8]
SHAPES = [(1,), (7,), (0,), (3, 2), (2, 1, 5)]


def tensor(shape: tuple, dtype: Any = ms.float32) -> Tensor:
    return from_host(np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(numpy_dtype(dtype)))


def bits(x: Tensor) -> tuple:
    return x.dtype, tuple(x.shape), host_array(x).tobytes()


IDENTITIES = {
    "all_gather": lambda engine, xs: engine.all_gather(xs),
    "reduce_scatter sum": lambda engine, xs: engine.reduce_scatter(xs),
    "reduce_scatter max": lambda engine, xs: engine.reduce_scatter(xs, "max"),
    "all_reduce sum": lambda engine, xs: engine.all_reduce(xs),
    "all_reduce min": lambda engine, xs: engine.all_reduce(xs, op="min"),
    "broadcast": lambda engine, xs: engine.broadcast(xs),
    "all_to_all": lambda engine, xs: engine.all_to_all(xs),
}


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("operation", IDENTITIES)
def test_identity(operation: str, host: bool):
    inputs = [tensor(shape, dtype) for shape in SHAPES for dtype in DTYPES if host or shape != (0,)]
    before = [bits(x) for x in inputs]
    work = IDENTITIES[operation](SingleEngine(host=host), inputs)
    assert work.done()
    assert [bits(x) for x in work.outputs] == before == [bits(x) for x in inputs]
    assert work.wait() is work.outputs
    assert work.wait() is work.outputs, "waiting twice is allowed"


@pytest.mark.parametrize("operation", [name for name in IDENTITIES if name != "broadcast"])
def test_results_do_not_share_memory_with_the_inputs(operation: str):
    x = tensor((4,))
    (y,) = IDENTITIES[operation](SingleEngine(), [x]).wait()
    host_array(x)[0] = 99
    assert host_array(y).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16, ms.float32])
def test_mean_of_one_rank(dtype: Any):
    x = tensor((5,), dtype)
    for work in (SingleEngine().all_reduce([x], "mean"), SingleEngine().reduce_scatter([x], "mean")):
        assert [bits(y) for y in work.wait()] == [bits(x)]


def test_all_gather_lands_in_place():
    engine = SingleEngine()
    assert engine.lands_in_place
    memory = np.zeros(6, np.float32)
    out = [from_host(memory[:2]), from_host(memory[2:])]
    returned = engine.all_gather([tensor((2,)), tensor((4,))], out).wait()
    assert [a is b for a, b in zip(returned, out)] == [True, True]
    assert memory.tolist() == [1, 2, 1, 2, 3, 4]


def test_a_device_does_not_land_in_place():
    engine = SingleEngine(host=False)
    assert not engine.lands_in_place
    out = tensor((2,))
    (returned,) = engine.all_gather([tensor((2,)) * 3], [out]).wait()
    assert returned is not out
    assert (host_array(returned).tolist(), host_array(out).tolist()) == ([3, 6], [1, 2])


def test_nothing_to_do():
    engine = SingleEngine()
    for work in (engine.all_gather([]), engine.all_reduce([]), engine.broadcast([]), engine.barrier("end")):
        assert work.done() and work.wait() == []


def test_attributes():
    clock = Clock(step=7)
    engine = SingleEngine(clock)
    assert (engine.name, engine.rank, engine.size) == ("single", 0, 1)
    assert engine.clock is clock
    assert SingleEngine().clock == Clock(step=0)
    assert engine.close() is None and engine.close() is None


def test_subgroup_of_one():
    engine = SingleEngine()
    assert engine.subgroup([0]).size == 1
    with pytest.raises(ValueError, match=r"^rank=1 is not a rank of this group of 1 \(0\.\.0\)$"):
        engine.subgroup([0, 1])
    with pytest.raises(ValueError, match=r"^a rank appears twice in the sub-group \[0, 0\]$"):
        engine.subgroup([0, 0])
    with pytest.raises(ValueError, match=r"^rank 0 is not in the sub-group \[\]: only its members create it$"):
        engine.subgroup([])


UNKNOWN = r"^unknown reduction 'product'; choose one of sum, mean, max, min$"
INTEGERS = r"^the mean of integer tensors is not an integer; use sum, or convert to a float type$"
SCALAR = r"^{} splits dim 0 over 1 ranks, which a tensor of shape \(\) does not allow; pad dim 0 to a multiple of 1$"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda e: e.all_reduce([tensor((1,))], "product"), UNKNOWN),
        (lambda e: e.reduce_scatter([tensor((1,))], "product"), UNKNOWN),
        (lambda e: e.all_reduce([tensor((1,)), tensor((1,), ms.int32)], "mean"), INTEGERS),
        (lambda e: e.reduce_scatter([tensor((1,), ms.uint8)], "mean"), INTEGERS),
        (lambda e: e.reduce_scatter([tensor(())]), SCALAR.format("reduce_scatter")),
        (lambda e: e.all_to_all([tensor(())]), SCALAR.format("all_to_all")),
        (lambda e: e.broadcast([tensor((1,))], root=1), r"^root=1 is not a rank of this group of 1 \(0\.\.0\)$"),
        (lambda e: e.broadcast([tensor((1,))], root=-1), r"^root=-1 is not a rank of this group of 1 \(0\.\.0\)$"),
        (lambda e: e.send([tensor((1,))], 0), "^a group of one rank has nobody to send to$"),
        (lambda e: e.recv([tensor((1,))], 0), "^a group of one rank has nobody to receive from$"),
    ],
)
def test_errors(call: Any, text: str):
    with pytest.raises(ValueError, match=text):
        call(SingleEngine())
