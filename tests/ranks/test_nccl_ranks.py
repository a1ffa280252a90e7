"""BMTrain's raw collectives between ranks, into tensors that exist."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms import nccl
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.compat.runtime import from_host

pytestmark = pytest.mark.ranks

Run = Callable[..., list[Any]]
NAMES = ("allReduce", "reduce", "broadcast", "allGather", "reduceScatter")


def given(ranks: int) -> np.ndarray:
    """(ranks, rows, 2): what each rank has."""
    return np.random.default_rng(ranks).integers(-8, 8, (ranks, 2 * ranks, 2)).astype(np.float32)


def out_shape(name: str, ranks: int) -> tuple[int, int]:
    rows = {"allGather": 2 * ranks * ranks, "reduceScatter": 2}.get(name, 2 * ranks)
    return rows, 2


def run(world: World, name: str, op: str, dtype: str, root: int) -> tuple[list, list]:
    """dst before which was -1, and src, afterwards."""
    engine, kind = world.engine, getattr(ms, dtype)
    src = Tensor(given(engine.size)[engine.rank]).astype(kind)
    dst = Tensor(np.full(out_shape(name, engine.size), -1, np.float32)).astype(kind)
    with use_world(world):
        comm = bms.config["comm"]
        options = {"allReduce": (op,), "reduce": (op, root), "broadcast": (root,), "reduceScatter": (op,)}.get(name, ())
        assert getattr(nccl, name)(src, dst, *options, comm) is None
    assert dst.dtype == kind
    return dst.astype(ms.float32).asnumpy().tolist(), src.astype(ms.float32).asnumpy().tolist()


def expected(name: str, op: str, ranks: int, root: int) -> list[np.ndarray]:
    x = given(ranks)
    reduced = {"sum": x.sum, "avg": x.mean, "max": x.max, "min": x.min, "prod": x.prod}[op](0)
    untouched = np.full(out_shape(name, ranks), -1, np.float32)
    return {
        "allReduce": [reduced] * ranks,
        "reduce": [reduced if rank == root else untouched for rank in range(ranks)],
        "broadcast": [x[root]] * ranks,
        "allGather": [x.reshape(-1, 2)] * ranks,
        "reduceScatter": np.split(reduced, ranks),
    }[name]


CASES = [
    *[(name, op) for name in ("allReduce", "reduce", "reduceScatter") for op in ("sum", "avg", "max", "min", "prod")],
    ("broadcast", "sum"),
    ("allGather", "sum"),
]


@pytest.mark.parametrize("name, op", CASES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_results(run_ranks: Run, ranks: int, name: str, op: str):
    dtypes = ("float32", "float16", "bfloat16") if op in ("avg", "prod") else ("float32", "float16", "bfloat16", "int32")
    for dtype in dtypes:
        answers = run_ranks(ranks, run, name=name, op=op, dtype=dtype, root=ranks - 1)
        for rank, ((dst, src), wanted) in enumerate(zip(answers, expected(name, op, ranks, ranks - 1))):
            np.testing.assert_allclose(dst, wanted, rtol=1e-2 if dtype == "bfloat16" else 1e-3, err_msg=dtype)
            assert np.array_equal(src, given(ranks)[rank])


def in_place(world: World) -> list[float]:
    x = Tensor(np.array([1.0, 2.0], np.float32)) * (world.engine.rank + 1.0)
    nccl.allReduce(x, x, "sum", world.engine)
    return x.asnumpy().tolist()


def test_into_itself(run_ranks: Run):
    assert run_ranks(2, in_place) == [[3.0, 6.0]] * 2


def host_memory(world: World) -> tuple[list, list]:
    """Into memory that NumPy sees, from a slice that is not contiguous."""
    buffer = np.zeros((2, 2), np.float32)
    x = Tensor(np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * world.engine.rank)
    nccl.allReduce(x[:, ::2], from_host(buffer), "sum", world.engine)
    return buffer.tolist(), x.asnumpy().tolist()


def test_into_host_memory_from_a_slice(run_ranks: Run):
    for rank, (buffer, x) in enumerate(run_ranks(2, host_memory)):
        assert buffer == [[10.0, 14.0], [16.0, 20.0]] and x == (np.arange(6).reshape(2, 3) + 10 * rank).tolist()


def messages(world: World) -> list[Any]:
    """Round the ring, of several types and shapes; a scalar too."""
    rank, size, received = world.engine.rank, world.engine.size, []
    for shape, dtype in (((2, 3), ms.float32), ((), ms.float32), ((4,), ms.bfloat16), ((1, 2), ms.int32)):
        src, dst = (Tensor(np.full(shape, value, np.float32)).astype(dtype) for value in (rank + 1, -1))
        steps = [lambda src=src: nccl.send(src, (rank + 1) % size, world.engine)]
        steps.append(lambda dst=dst: nccl.recv(dst, (rank - 1) % size, world.engine))
        for step in steps if rank % 2 == 0 else reversed(steps):
            step()
        assert dst.dtype == dtype and dst.shape == shape
        received.append(dst.astype(ms.float32).asnumpy().tolist())
    return received


def test_send_and_recv(run_ranks: Run):
    for rank, received in enumerate(run_ranks(2, messages)):
        v = float(2 - rank)
        assert received == [[[v] * 3] * 2, v, [v] * 4, [[v] * 2]]


def groups(world: World) -> tuple[int, int, list[float]]:
    """Ranks 2 and 0; rank 1 alone."""
    comm = world.engine.subgroup([1] if world.engine.rank == 1 else [2, 0])
    x = Tensor(np.array([float(world.engine.rank)], np.float32))
    out = Tensor(np.zeros(comm.size, np.float32))
    nccl.allGather(x, out, comm)
    return nccl.commCount(comm), nccl.commRank(comm), out.asnumpy().tolist()


def test_groups(run_ranks: Run):
    assert run_ranks(3, groups) == [(2, 1, [2.0, 0.0]), (1, 0, [1.0]), (2, 0, [2.0, 0.0])]


def does_not_fit(world: World) -> tuple[list[str], list[float]]:
    """The errors of each rank, and a collective afterwards: the ranks are still in step."""
    src, errors = Tensor(np.ones(4, np.float32)), []
    for call in (
        lambda: nccl.allGather(src, Tensor(np.zeros(4, np.float32)), world.engine),
        lambda: nccl.reduceScatter(src, Tensor(np.zeros(4, np.float32)), "sum", world.engine),
        lambda: nccl.allReduce(src, Tensor(np.zeros(4, np.int32)), "sum", world.engine),
        lambda: nccl.reduceScatter(src[:3], Tensor(np.zeros(4, np.float32)), "sum", world.engine),
        lambda: nccl.allReduce(src, src, "product", world.engine),
        lambda: nccl.send(src, 2, world.engine),
    ):
        with pytest.raises(ValueError) as info:
            call()
        errors.append(str(info.value))
    nccl.allReduce(src, src, "sum", world.engine)
    return errors, src.asnumpy().tolist()


def test_what_does_not_fit_is_an_error_on_every_rank(run_ranks: Run):
    """BMTrain writes past the end."""
    first, second = run_ranks(2, does_not_fit)
    assert first == second and first[1] == [2.0] * 4
    assert first[0][:3] == [
        "dst has 4 elements of Float32, the result 8 of Float32",
        "dst has 4 elements of Float32, the result 2 of Float32",
        "dst has 4 elements of Int32, the result 4 of Float32",
    ]
    assert first[0][3].startswith("reduce_scatter splits dim 0 over 2 ranks, which a tensor of shape (3,) does not allow")
    assert first[0][4].startswith("unknown reduction 'product'") and first[0][5].startswith(
        "dst=2 is not a rank of this group of 2"
    )


def inside_a_loss(world: World) -> tuple[list[float], list[float]]:
    """As upstream: without gradients. What goes in counts as a constant."""
    out = Tensor(np.zeros(2, np.float32))

    def loss(x: Tensor) -> Tensor:
        nccl.allReduce(x * 3.0, out, "sum", world.engine)
        return (x * 2.0).sum()

    return ms.grad(loss)(Tensor([1.0, 2.0])).asnumpy().tolist(), out.asnumpy().tolist()


def test_inside_a_loss(run_ranks: Run):
    assert run_ranks(2, inside_a_loss) == [([2.0, 2.0], [6.0, 12.0])] * 2
