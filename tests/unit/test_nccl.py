"""BMTrain's raw collectives on one rank: names, arguments and errors; tests/ranks/test_nccl_ranks.py has results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor

import bmtrain_ms as bms
from bmtrain_ms import nccl

pytestmark = pytest.mark.usefixtures("single_world")


def tensor(*values: float, dtype: Any = np.float32) -> Tensor:
    return Tensor(np.array(values, dtype))


def test_who_is_there():
    comm = bms.config["comm"]
    assert (nccl.commCount(comm), nccl.commRank(comm)) == (1, 0)


@pytest.mark.parametrize("op", ["sum", "avg", "max", "min"])
def test_one_rank_copies(op: str):
    comm, x = bms.config["comm"], tensor(1.0, -2.0)
    for call in (
        lambda out: nccl.allReduce(x, out, op, comm),
        lambda out: nccl.reduce(x, out, op, 0, comm),
        lambda out: nccl.reduceScatter(x, out, op, comm),
        lambda out: nccl.allGather(x, out, comm),
        lambda out: nccl.broadcast(x, out, 0, comm),
    ):
        out = tensor(7.0, 7.0)
        assert call(out) is None
        assert out.asnumpy().tolist() == [1.0, -2.0] and x.asnumpy().tolist() == [1.0, -2.0]


def test_into_itself_and_into_a_parameter():
    comm, x = bms.config["comm"], tensor(1.0, 2.0)
    nccl.allReduce(x, x, "sum", comm)
    assert x.asnumpy().tolist() == [1.0, 2.0]
    parameter = Parameter(tensor(0.0, 0.0), name="p")
    nccl.allReduce(x, parameter, "sum", comm)
    assert parameter.asnumpy().tolist() == [1.0, 2.0]
    shard = bms.DistributedParameter(np.zeros((1, 2), np.float32))
    nccl.broadcast(x, shard, 0, comm)
    assert shard.gather().asnumpy().tolist() == [[1.0, 2.0]]


def test_shapes_may_differ_where_sizes_do_not():
    out = Tensor(np.zeros((2, 2), np.float32))
    nccl.allReduce(tensor(1, 2, 3, 4), out, "sum", bms.config["comm"])
    assert out.asnumpy().tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("call", [nccl.allReduce, nccl.reduceScatter], ids=lambda f: f.__name__)
def test_unknown_reductions(call: Any):
    for op in ("product", "mean"):
        with pytest.raises(ValueError) as info:
            call(tensor(1), tensor(1), op, bms.config["comm"])
        expected = f"unknown reduction '{op}'; choose one of sum, avg, max, min, prod"
        assert str(info.value) == expected
    with pytest.raises(ValueError, match="unknown reduction 'product'"):
        nccl.reduce(tensor(1), tensor(1), "product", 0, bms.config["comm"])


@pytest.mark.parametrize(
    "out, text",
    [
        (tensor(0, 0, 0), "dst has 3 elements of Float32, the result 2 of Float32"),
        (tensor(0, 0, dtype=np.float16), "dst has 2 elements of Float16, the result 2 of Float32"),
    ],
    ids=["size", "type"],
)
def test_a_result_that_does_not_fit(out: Tensor, text: str):
    comm = bms.config["comm"]
    before = out.asnumpy().tolist()
    for call in (
        lambda: nccl.allReduce(tensor(1, 2), out, "sum", comm),
        lambda: nccl.allGather(tensor(1, 2), out, comm),
        lambda: nccl.broadcast(tensor(1, 2), out, 0, comm),
    ):
        with pytest.raises(ValueError) as info:
            call()
        assert str(info.value) == text and out.asnumpy().tolist() == before


def test_integers_have_no_mean_and_nobody_is_alone_to_talk_to():
    comm, x = bms.config["comm"], tensor(1, dtype=np.int32)
    with pytest.raises(ValueError, match="the mean of integer tensors is not an integer"):
        nccl.allReduce(x, x, "avg", comm)
    with pytest.raises(ValueError, match="root=1 is not a rank of this group of 1"):
        nccl.broadcast(x, x, 1, comm)
    with pytest.raises(ValueError, match="a group of one rank has nobody to send to"):
        nccl.send(x, 0, comm)
    with pytest.raises(ValueError, match="a group of one rank has nobody to receive from"):
        nccl.recv(x, 0, comm)
    with pytest.raises(ValueError, match="root=1 is not a rank"):
        nccl.reduce(x, x, "sum", 1, comm)


def test_a_view_is_refused_instead_of_being_left_alone():
    """MindSpore assigns nothing to it, and says nothing on 2.5."""
    comm, whole = bms.config["comm"], tensor(1, 2, 3, 4, 5, 6)
    for view in (whole[2:4], whole.reshape(2, 3).T):
        with pytest.raises(ValueError, match=r"a tensor of shape \(.*\) is a view \(a slice, or transposed\), which cannot"):
            nccl.allReduce(view + 1.0, view, "sum", comm)
    assert whole.asnumpy().tolist() == [1, 2, 3, 4, 5, 6]
