"""The stand-in for HCCL that rehearsals run over: what it keeps of HCCL, in one process (others: test_rehearsed_ranks)."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, communication, ops
from mindspore.communication import comm_func

from bmtrain_ms.comm import SimulatedEngine, SingleEngine
from bmtrain_ms.comm.rehearsed import RehearsedComm, RehearsedEngine, _reduced

pytestmark = pytest.mark.usefixtures("rehearsed_world")

BEGUN = {  # operation -> what is given besides a tensor of 6 elements, by the second of three ranks that give the same
    "all_gather_into_tensor": ((), [0, 1, 2, 3, 4, 5] * 3),
    "all_reduce": ((), [0, 3, 6, 9, 12, 15]),
    "reduce_scatter_tensor": ((), [6, 9]),
    "irecv": ((0,), [0, 1, 2, 3, 4, 5]),
}


@pytest.fixture
def comm() -> RehearsedComm:
    return RehearsedComm(SimulatedEngine(1, 3))


def numbers(dtype: Any = ms.float32) -> Tensor:
    return Tensor(np.arange(6), dtype)


def begun(comm: RehearsedComm, name: str, x: Tensor) -> tuple[Tensor, Any]:
    more, _ = BEGUN[name]
    return getattr(comm, name)(x, *more, **({} if name == "irecv" else {"async_op": True}))


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16, ms.int32, ms.int8])
@pytest.mark.parametrize("name", BEGUN)
def test_nothing_is_there_before_the_wait(comm, name, dtype):
    out, handle = begun(comm, name, numbers(dtype))
    assert out.dtype == dtype
    before = out.astype(ms.float32).asnumpy()
    assert np.isnan(before).all() or (before >= 127).all()
    assert comm.unwaited() == [f"{name} in hccl_world_group"]
    handle.wait()
    assert comm.unwaited() == comm.lost() == []
    assert out.astype(ms.float32).asnumpy().tolist() == BEGUN[name][1]
    handle.wait()  # again


def test_what_is_computed_too_early_is_wrong(comm):
    out, handle = comm.all_reduce(numbers(), async_op=True)
    early = out * 2.0
    handle.wait()
    assert np.isnan(early.asnumpy()).all() and (out * 2.0).asnumpy().tolist() == [0, 6, 12, 18, 24, 30]


@pytest.mark.parametrize("name", sorted(set(BEGUN) - {"irecv"}))
def test_without_async_op_it_is_there(comm, name):
    out, handle = getattr(comm, name)(numbers())
    assert handle is None and out.asnumpy().tolist() == BEGUN[name][1] and comm.unwaited() == []


def test_broadcast_and_barrier_have_no_handle(comm):
    assert comm.broadcast(numbers(), src=2).asnumpy().tolist() == [0, 1, 2, 3, 4, 5]
    assert comm.barrier() is None


def test_all_to_all(comm):
    out, handle = comm.all_to_all_single_with_output_shape((3, 2), numbers().reshape(3, 2), async_op=True)
    handle.wait()
    assert out.asnumpy().tolist() == [[2, 3]] * 3
    with pytest.raises(NotImplementedError, match=r"^a rehearsal exchanges equal parts only$"):
        comm.all_to_all_single_with_output_shape((3, 2), numbers(), [1, 1, 1], [1, 1, 1])


@pytest.mark.parametrize("name", sorted(set(BEGUN) - {"irecv"}))
def test_an_input_that_is_written_too_early_is_told(comm, name):
    x = ops.ones(6, ms.float32)
    _, handle = begun(comm, name, x)
    ops.assign(x, ops.zeros(6, ms.float32))
    with pytest.raises(RuntimeError, match=rf"^the input of {name} was written before its handle was waited for"):
        handle.wait()


def test_what_nobody_waits_for_is_noticed(comm):
    engine = RehearsedEngine(SimulatedEngine(1, 3))
    engine.all_gather([numbers()])
    assert engine.comm.unwaited() == ["all_gather_into_tensor in hccl_world_group"] and engine.comm.lost() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.close()
    engine.all_reduce([numbers()])
    engine.send([numbers()], dst=0)
    assert engine.comm.lost() == ["all_reduce in hccl_world_group", "isend in hccl_world_group"]
    with pytest.warns(UserWarning, match=r"^2 operations were never waited for: all_reduce in hccl_world_group, isend in hccl"):
        engine.close()


def test_closing_ends_the_ranks_engine(monkeypatch):
    inner, closed = SimulatedEngine(0, 2), []
    monkeypatch.setattr(inner, "close", lambda: closed.append(True), raising=False)
    RehearsedEngine(inner).close()
    assert closed == [True]


# As MindSpore and HCCL take it #


@pytest.mark.parametrize("name", [*BEGUN, "broadcast", "isend", "barrier", "all_to_all_single_with_output_shape"])
def test_arguments_are_those_of_the_installed_function(comm, name, monkeypatch):
    signature = inspect.signature(getattr(comm_func, name))
    seen: list[dict] = []
    monkeypatch.setattr(comm, f"_{name}", seen.append, raising=False)
    given = {key: object() for key, p in signature.parameters.items() if p.default is inspect.Parameter.empty}
    getattr(comm, name)(**given)
    assert list(seen[0]) == list(signature.parameters)
    with pytest.raises(TypeError, match="unexpected keyword argument 'grp'"):
        getattr(comm, name)(**given, grp="hccl_world_group")


def test_functions_that_mindspore_does_not_have(comm, monkeypatch):
    with pytest.raises(AttributeError, match="all_shuffle"):
        comm.all_shuffle(numbers())
    monkeypatch.delattr(comm_func, "all_reduce")
    with pytest.raises(AttributeError, match="all_reduce"):
        comm.all_reduce(numbers())


def test_create_group_takes_what_mindspore_s_takes(comm):
    with pytest.raises(TypeError, match="unexpected keyword argument 'members'"):
        comm.create_group("pair", [0, 1], members=[0, 1])
    with pytest.raises(TypeError, match=r"^the ranks of a group are a list, not a tuple$"):
        comm.create_group("pair", (0, 1))
    assert list(inspect.signature(communication.create_group).parameters)[:2] == ["group", "rank_ids"]


def test_groups_have_to_be_made(comm):
    with pytest.raises(RuntimeError, match=r"^there is no group 'pair': create_group makes it$"):
        comm.all_reduce(numbers(), group="pair")
    comm.create_group("pair", [1, 2])
    assert comm.all_reduce(numbers(), group="pair")[0].asnumpy().tolist() == [0, 2, 4, 6, 8, 10]


def test_what_is_no_tensor(comm):
    with pytest.raises(TypeError, match=r"^For all_reduce, the input tensor must be tensor$"):
        comm.all_reduce(np.ones(3))
    with pytest.raises(ValueError, match=r"^For all_gather_into_tensor, a scalar has no first dimension$"):
        comm.all_gather_into_tensor(Tensor(1.0))


@pytest.mark.parametrize("dtype", [ms.float64, ms.int64, ms.uint8, ms.bool_])
def test_types_that_hccl_does_not_sum(comm, dtype):
    with pytest.raises(TypeError, match=r"^For all_reduce, a tensor of "):
        comm.all_reduce(numbers(dtype))
    with pytest.raises(TypeError, match=r"^For reduce_scatter_tensor, a tensor of "):
        comm.reduce_scatter_tensor(numbers(dtype))
    if dtype == ms.bool_:
        with pytest.raises(TypeError, match=r"^For broadcast, a tensor of Bool is not among Int8, "):
            comm.broadcast(numbers(dtype))


def test_sums_are_made_in_their_own_type_and_in_no_promised_order():
    assert np.isinf(_reduced(np.array([[-60000.0], [60000.0], [60000.0]], np.float16), "sum")).all()
    assert _reduced(np.array([[60000.0], [-60000.0], [60000.0]], np.float16), "sum").tolist() == [60000.0]
    rows = np.array([[1e8], [1.0], [-1e8]], np.float32)
    assert _reduced(rows, "sum").tolist() == [0.0] and _reduced(rows[[1, 2, 0]], "sum").tolist() == [1.0]
    assert [_reduced(rows, op).item() for op in ("max", "min")] == [1e8, -1e8]
    assert _reduced(np.array([[2], [3], [4]], np.int32), "prod").tolist() == [24]


# The engine over it #


@pytest.mark.parametrize("dtype", [ms.float64, ms.int64, ms.float32])
def test_the_engine_sums_them_all_the_same(dtype):
    engine = RehearsedEngine(SimulatedEngine(1, 3))
    x = numbers(dtype)
    (total,), (mine,) = engine.all_reduce([x]).wait(), engine.reduce_scatter([x]).wait()
    assert total.dtype == mine.dtype == dtype
    assert total.asnumpy().tolist() == [0, 3, 6, 9, 12, 15] and mine.asnumpy().tolist() == [6, 9]
    assert engine.all_reduce([x.reshape(2, 3)], "max").wait()[0].asnumpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    if dtype == ms.float64:
        assert engine.all_reduce([x], "mean").wait()[0].asnumpy().tolist() == [0, 1, 2, 3, 4, 5]


def test_the_engine_moves_truth_values():
    engine = RehearsedEngine(SimulatedEngine(1, 3))
    x = Tensor([True, False, True])
    for work in (engine.all_gather([x]), engine.broadcast([x]), engine.all_to_all([x]), engine.recv([x], src=0)):
        (out,) = work.wait()
        assert out.dtype == ms.bool_
    assert engine.all_gather([x]).wait()[0].asnumpy().tolist() == [True, False, True] * 3
    engine.send([x], dst=0).wait()


@pytest.mark.parametrize("stacks", [False, True])
def test_results_are_shaped_when_they_have_arrived(stacks):
    """Even a view may copy (2.5), and would copy nothing yet."""
    engine = RehearsedEngine(SimulatedEngine(0, 2))
    engine.comm.stacks = stacks
    work = engine.all_gather([numbers()])
    outputs = work.outputs
    assert np.isnan(outputs[0].asnumpy()).all()
    assert work.wait() is outputs and outputs[0].asnumpy().tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert engine.all_gather([Tensor(4.0)]).wait()[0].asnumpy().tolist() == [4.0, 4.0]


def test_one_rank():
    engine = RehearsedEngine(SingleEngine())
    assert (engine.name, engine.rank, engine.size, engine.lands_in_place) == ("rehearsed", 0, 1, False)
    assert engine.all_reduce([numbers()], "mean").wait()[0].asnumpy().tolist() == [0, 1, 2, 3, 4, 5]
