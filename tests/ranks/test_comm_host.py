"""The engines over host memory, `node` and `mpi`, on real ranks: every collective against NumPy, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from bmtrain_ms.comm import Clock, CommError, CommTimeoutError, Engine, node
from bmtrain_ms.comm.mpi import MpiEngine
from bmtrain_ms.compat.runtime import from_host, host_array, numpy_dtype
from tests.helpers.ranks import RankPool

pytestmark = pytest.mark.ranks

FLOATS = (ms.float16, ms.bfloat16, ms.float32)
DTYPES = (*FLOATS, ms.int32, ms.int64, ms.uint8)
LARGE = 40_009  # a prime; more than 32 KiB even as uint8, so that all_reduce works by parts
SHAPES = [(0,), (1,), (7,), (1009,), (3, 5), (2, 1, 4), (LARGE,)]


def array(rank: int, shape: Sequence[int], dtype: Any, salt: int = 0) -> np.ndarray:
    """What `rank` passes to a collective: every rank can compute it."""
    values = np.random.default_rng([rank, salt, *shape]).standard_normal(tuple(shape)) * 3
    if dtype not in FLOATS:
        values = np.rint(np.abs(values) * 20)
    return np.asarray(values, np.float32).astype(numpy_dtype(dtype))


def tensor(rank: int, shape: Sequence[int], dtype: Any, salt: int = 0) -> Tensor:
    return from_host(array(rank, shape, dtype, salt))


def reduced(rows: Sequence[np.ndarray], op: str) -> np.ndarray:
    """In rank order, in float32 for floats, rounded once."""
    is_float = rows[0].dtype.kind not in "iu"
    wide = [row.astype(np.float32) if is_float else row for row in rows]
    total = wide[0]
    for row in wide[1:]:
        total = {"sum": np.add, "mean": np.add, "max": np.maximum, "min": np.minimum}[op](total, row)
    if op == "mean":
        total = total * np.float32(1 / len(rows))
    return total.astype(rows[0].dtype)


def check(found: Tensor, expected: np.ndarray, *what: Any) -> None:
    values = host_array(found)
    assert (tuple(found.shape), values.dtype) == (expected.shape, expected.dtype), what
    assert values.tobytes() == np.ascontiguousarray(expected).tobytes(), what


def digest(tensors: Sequence[Tensor]) -> str:
    return hashlib.sha256(b"".join(host_array(x).tobytes() for x in tensors)).hexdigest()


def cases(count: int = 1) -> list[tuple]:
    """(shape, dtype) of every kind; `count` copies of dim 0, for operations that split it."""
    return [((shape[0] * count, *shape[1:]), dtype) for dtype in DTYPES for shape in SHAPES]


def of_one(engine: Engine) -> Engine:
    """The same engine for a group of one rank."""
    from mpi4py import MPI

    if engine.name == "node":
        made = node.connect(MPI.COMM_SELF, engine.clock, 20)
        assert made is not None
        return made
    return MpiEngine(MPI.COMM_SELF.Dup(), engine.clock, 20)


@functools.cache
def over_mpi(size: int) -> MpiEngine:
    """The engine for several hosts, on the ranks of this one."""
    from mpi4py import MPI

    assert MPI.COMM_WORLD.Get_size() == size
    return MpiEngine(MPI.COMM_WORLD.Dup(), Clock(), 60)


def with_engine(world: Any, kind: str, body: str, **kwargs: Any) -> Any:
    """Run a function of this module in a world of that engine."""
    if kind == "mpi":
        world = dataclasses.replace(world, everyone=over_mpi(world.engine.size))
    assert world.engine.name == kind
    return globals()[body](world, **kwargs)


@pytest.fixture(params=["node", "mpi"])
def on_ranks(request: pytest.FixtureRequest, run_ranks: Callable) -> Callable:
    """`run_ranks` on each engine."""
    return lambda size, body, **kwargs: run_ranks(size, with_engine, kind=request.param, body=body.__name__, **kwargs)


def on(engine: Engine, body: Callable[[Engine], Any], alone: bool) -> Any:
    if not alone:
        return body(engine)
    single = of_one(engine)
    try:
        return body(single)
    finally:
        single.close()


# Each collective, for every type and size #


def gathers(engine: Engine) -> str:
    results = []
    for shape, dtype in cases():
        x = tensor(engine.rank, shape, dtype)
        (y,) = engine.all_gather([x]).wait()
        check(y, np.concatenate([array(rank, shape, dtype) for rank in range(engine.size)]), shape, dtype)
        check(x, array(engine.rank, shape, dtype), "input", shape, dtype)
        results.append(y)
    return digest(results)


def reduce_scatters(engine: Engine) -> None:
    for shape, dtype in cases(engine.size):
        rows = [array(rank, shape, dtype) for rank in range(engine.size)]
        x = tensor(engine.rank, shape, dtype)
        for op in ("sum", "mean", "max", "min") if dtype in FLOATS else ("sum", "max", "min"):
            (y,) = engine.reduce_scatter([x], op).wait()
            part = slice(engine.rank * shape[0] // engine.size, (engine.rank + 1) * shape[0] // engine.size)
            check(y, reduced([row[part] for row in rows], op), shape, dtype, op)
        check(x, rows[engine.rank], "input", shape, dtype)


def all_reduces(engine: Engine) -> str:
    results = []
    for shape, dtype in [*cases(), ((), ms.float32), ((), ms.int64)]:
        rows = [array(rank, shape, dtype) for rank in range(engine.size)]
        x = tensor(engine.rank, shape, dtype)
        for op in ("sum", "mean", "max", "min") if dtype in FLOATS else ("sum", "max", "min"):
            (y,) = engine.all_reduce([x], op).wait()
            check(y, reduced(rows, op), shape, dtype, op)
            results.append(y)
        check(x, rows[engine.rank], "input", shape, dtype)
    return digest(results)


def broadcasts(engine: Engine) -> None:
    for root in range(engine.size):
        for shape, dtype in [*cases(), ((), ms.float32)]:
            x = tensor(engine.rank, shape, dtype, salt=root)
            (y,) = engine.broadcast([x], root).wait()
            check(y, array(root, shape, dtype, salt=root), root, shape, dtype)
            check(x, array(engine.rank, shape, dtype, salt=root), "input", root, shape, dtype)


def all_to_alls(engine: Engine) -> None:
    for shape, dtype in cases(engine.size):
        (y,) = engine.all_to_all([tensor(engine.rank, shape, dtype)]).wait()
        n = shape[0] // engine.size
        parts = [array(sender, shape, dtype)[engine.rank * n : (engine.rank + 1) * n] for sender in range(engine.size)]
        check(y, np.concatenate(parts), shape, dtype)


def several_at_once(engine: Engine) -> None:
    """Tensors of different types and sizes travel in one call."""
    kinds = [((5,), ms.float32), ((1,), ms.float16), ((3, 7), ms.bfloat16), ((LARGE,), ms.float32), ((0,), ms.uint8)]
    small = [*kinds[:3], ((2,), ms.int64)]
    for group in (kinds, small):
        mine = [tensor(engine.rank, shape, dtype, i) for i, (shape, dtype) in enumerate(group)]
        rows = [[array(rank, shape, dtype, i) for rank in range(engine.size)] for i, (shape, dtype) in enumerate(group)]
        for y, row in zip(engine.all_gather(mine).wait(), rows):
            check(y, np.concatenate(row))
        for y, row in zip(engine.all_reduce(mine, "sum").wait(), rows):
            check(y, reduced(row, "sum"))
        for y, row in zip(engine.broadcast(mine, engine.size - 1).wait(), rows):
            check(y, row[-1])
    wide = [((shape[0] * engine.size, *shape[1:]), dtype) for shape, dtype in kinds]
    mine = [tensor(engine.rank, shape, dtype, i) for i, (shape, dtype) in enumerate(wide)]
    for i, (y, (shape, dtype)) in enumerate(zip(engine.reduce_scatter(mine, "sum").wait(), wide)):
        rows = [np.split(array(rank, shape, dtype, i), engine.size)[engine.rank] for rank in range(engine.size)]
        check(y, reduced(rows, "sum"))
    for i, (y, (shape, dtype)) in enumerate(zip(engine.all_to_all(mine).wait(), wide)):
        rows = [np.split(array(rank, shape, dtype, i), engine.size)[engine.rank] for rank in range(engine.size)]
        check(y, np.concatenate(rows))
    for work in (engine.all_gather([]), engine.all_reduce([]), engine.reduce_scatter([]), engine.broadcast([])):
        assert work.wait() == []


def in_small_batches(engine: Engine) -> None:
    """What is summed up is copied a few elements at a time, of one tensor or of several."""
    for nbytes in (1, 60, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node, "AT_ONCE", nbytes)
            for size, dtype in ((1009, ms.float32), (7, ms.float16), (0, ms.float32), (90, ms.uint8)):
                shape = (size * engine.size,)
                mine = [tensor(engine.rank, shape, dtype), tensor(engine.rank, shape, ms.bfloat16, 1)]
                for y, salt, kind in zip(engine.reduce_scatter(mine, "sum").wait(), (0, 1), (dtype, ms.bfloat16)):
                    rows = [np.split(array(rank, shape, kind, salt), engine.size)[engine.rank] for rank in range(engine.size)]
                    check(y, reduced(rows, "sum"))


BODIES = {
    f.__name__: f for f in (gathers, reduce_scatters, all_reduces, broadcasts, all_to_alls, several_at_once, in_small_batches)
}


def run_body(world: Any, name: str, alone: bool) -> Any:
    return on(world.engine, BODIES[name], alone)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", BODIES)
def test_against_numpy(on_ranks: Callable, name: str, size: int):
    results = on_ranks(max(size, 2), run_body, name=name, alone=size == 1)
    if size > 1:
        assert len(set(results)) == 1, "the ranks differ"


# Where results land #


def land_in_place(world: Any) -> None:
    engine = world.engine
    assert engine.lands_in_place
    for dtype in DTYPES:
        sizes = (3, 1, 1009)
        memory = np.zeros(sum(sizes) * engine.size + 2, numpy_dtype(dtype))
        out, views, start = [], [], 1
        for n in sizes:
            views.append(memory[start : start + n * engine.size])
            out.append(from_host(views[-1]))
            start += n * engine.size
        work = engine.all_gather([tensor(engine.rank, (n,), dtype, n) for n in sizes], out, "in place")
        assert [a is b for a, b in zip(work.outputs, out)] == [True] * 3
        returned = work.wait()
        assert [a is b for a, b in zip(returned, out)] == [True] * 3
        for n, view, y in zip(sizes, views, out):
            expected = np.concatenate([array(rank, (n,), dtype, n) for rank in range(engine.size)])
            assert view.tobytes() == expected.tobytes() == host_array(y).tobytes()
        edges = memory[[0, -1]]
        assert edges.tobytes() == np.zeros(2, memory.dtype).tobytes(), "wrote outside"


def reuse_buffer(world: Any) -> None:
    """The same memory takes one gather after the other, as ZeRO's buffers do."""
    engine = world.engine
    memory = np.zeros(7 * engine.size, np.float32)
    out = from_host(memory)
    for step in range(5):
        engine.all_gather([tensor(engine.rank, (7,), ms.float32, step)], [out]).wait()
        expected = np.concatenate([array(rank, (7,), ms.float32, step) for rank in range(engine.size)])
        assert memory.tobytes() == expected.tobytes()
        assert (out * 2).asnumpy().tobytes() == (expected * 2).tobytes()


def do_not_share_memory(world: Any) -> None:
    """A result is nobody else's memory, and the scratch space of the next reduction does not reach it."""
    engine = world.engine
    x = tensor(engine.rank, (engine.size * 3,), ms.float32)
    works = [engine.all_gather([x]), engine.reduce_scatter([x]), engine.all_reduce([x]), engine.all_to_all([x])]
    results = [work.wait()[0] for work in works]
    before = [host_array(y).copy() for y in results]
    host_array(x)[...] = 99
    for op in ("max", "sum"):
        engine.all_reduce([x], op).wait(), engine.reduce_scatter([x], op).wait()
    for y, values in zip(results, before):
        check(y, values)


def take_views(world: Any) -> None:
    """Inputs that are not contiguous, and results of operations."""
    engine = world.engine
    whole = tensor(engine.rank, (4, 6), ms.float32)
    rows = [array(rank, (4, 6), ms.float32) for rank in range(engine.size)]
    (y,) = engine.all_reduce([whole.T]).wait()
    check(y, reduced([np.ascontiguousarray(row.T) for row in rows], "sum"))
    (y,) = engine.all_gather([whole[1:3] * 2]).wait()
    check(y, np.concatenate([row[1:3] * np.float32(2) for row in rows]))
    (y,) = engine.reduce_scatter([ops.transpose(tensor(engine.rank, (5, 4), ms.float32), (1, 0))[: engine.size]]).wait()
    parts = [array(rank, (5, 4), ms.float32).T[engine.rank : engine.rank + 1] for rank in range(engine.size)]
    check(y, reduced(parts, "sum"))


@pytest.mark.parametrize("body", [land_in_place, reuse_buffer, do_not_share_memory, take_views])
@pytest.mark.parametrize("size", [2, 3])
def test_memory(on_ranks: Callable, body: Callable, size: int):
    on_ranks(size, body)


def overflow(world: Any) -> list:
    x = from_host(np.array([60000, -60000, np.inf, 1, np.nan, 5], np.float16))
    work = [world.engine.all_reduce([x]), world.engine.reduce_scatter([x]), world.engine.all_reduce([x], "mean")]
    return [host_array(w.wait()[0]).astype(np.float64).tolist() for w in work]


def test_overflow_is_inf(on_ranks: Callable):
    """Warnings are errors in the ranks too."""
    results = on_ranks(2, overflow)
    inf, nan = np.inf, np.nan
    for rank, (total, part, mean) in enumerate(results):
        np.testing.assert_array_equal(total, [inf, -inf, inf, 2, nan, 10])
        np.testing.assert_array_equal(part, total[3 * rank : 3 * rank + 3])
        np.testing.assert_array_equal(mean, [60000, -60000, inf, 1, nan, 5])


# In flight #


def compute_meanwhile(world: Any) -> None:
    """Rank 1 comes when rank 0 has computed, which sees the result only after `wait`."""
    engine = world.engine
    x = tensor(engine.rank, (LARGE,), ms.float32)
    engine.barrier().wait()
    if engine.rank == 1:
        engine.recv([x], src=0).wait()
    work = engine.all_reduce([x], label="late")
    (y,) = work.outputs
    if engine.rank == 0:
        assert not work.done()
        a = ops.ones((64, 64))
        total = sum(float((a @ a).sum()) for _ in range(10))
        assert total == 10 * 64**3
        assert not work.done()
        engine.send([x], dst=1).wait()
    assert work.wait()[0] is y
    assert work.done()
    assert work.wait()[0] is y
    check(y, reduced([array(rank, (LARGE,), ms.float32) for rank in range(engine.size)], "sum"))


def test_issuing_does_not_wait_for_the_others(on_ranks: Callable):
    on_ranks(2, compute_meanwhile)


def turns_while_waiting(world: Any) -> int:
    """How often the transport of rank 0 looks whether rank 1 has come, in half a second."""
    engine = world.engine
    x = tensor(0, (1,), ms.float32)
    engine.barrier().wait()
    if engine.rank == 1:
        engine.recv([x], src=0).wait()
        engine.barrier().wait()
        return 0
    thread, turns = engine._thread, []
    name = "_turn" if engine.name == "node" else "_poll"
    original = getattr(thread, name)

    def counted(*args: Any) -> Any:
        turns.append(1)
        return original(*args)

    setattr(thread, name, counted)
    try:
        work = engine.barrier()
        time.sleep(0.5)
        count = len(turns)
        engine.send([x], dst=1).wait()
        work.wait()
    finally:
        delattr(thread, name)
    return count


def test_waiting_leaves_the_core_to_the_rank_that_computes(on_ranks: Callable):
    """The node engine sleeps until a message comes; MPI must be asked, every half a millisecond. Spinning would be 10,000s."""
    assert on_ranks(2, turns_while_waiting)[0] < 1200


def many_in_flight(world: Any) -> str:
    engine, works = world.engine, []
    for i in range(60):
        shape = ((1, 1009, LARGE // 4)[i % 3] * engine.size,)
        x = tensor(engine.rank, shape, ms.float32, i)
        rows = [array(rank, shape, ms.float32, i) for rank in range(engine.size)]
        part = slice(engine.rank * shape[0] // engine.size, (engine.rank + 1) * shape[0] // engine.size)
        kind = i % 5
        if kind == 0:
            works.append((engine.all_gather([x]), np.concatenate(rows)))
        elif kind == 1:
            works.append((engine.reduce_scatter([x], "mean"), reduced([row[part] for row in rows], "mean")))
        elif kind == 2:
            works.append((engine.all_reduce([x], "sum"), reduced(rows, "sum")))
        elif kind == 3:
            works.append((engine.broadcast([x], i % engine.size), rows[i % engine.size]))
        else:
            works.append((engine.all_to_all([x]), np.concatenate([row[part] for row in rows])))
    last = engine.barrier("all")
    last.wait()
    assert all(work.done() for work, _ in works), "operations finish in the order in which they were issued"
    for work, expected in reversed(works):
        check(work.wait()[0], expected)
    return "ok"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_many_in_flight(on_ranks: Callable, size: int):
    assert on_ranks(size, many_in_flight) == ["ok"] * size


# Point to point #


def ring(world: Any) -> None:
    """Everybody sends and receives at once, small and large (beyond MPI's eager limit), in either order of issue and waiting."""
    engine = world.engine
    right, left = (engine.rank + 1) % engine.size, (engine.rank - 1) % engine.size
    for n in (0, 1, 1009, 1 << 19):
        for send_first in (True, False):
            for dtype in (ms.float32, ms.bfloat16, ms.uint8):
                shapes = [(n,), (3, 2)]
                mine = [tensor(engine.rank, shape, dtype, 1) for shape in shapes]
                like = [tensor(0, shape, dtype) for shape in shapes]
                if send_first:
                    sent = engine.send(mine, right, "ring")
                    got = engine.recv(like, left, "ring")
                else:
                    got = engine.recv(like, left, "ring")
                    sent = engine.send(mine, right, "ring")
                assert (sent if send_first else got).wait() is not None
                assert sent.wait() == []
                for y, shape in zip(got.wait(), shapes):
                    check(y, array(left, shape, dtype, 1), n, dtype)
                for x, shape in zip(like, shapes):
                    check(x, array(0, shape, dtype), "like is only a model")


def messages_keep_their_order(world: Any) -> None:
    engine = world.engine
    if engine.rank == 0:
        works = [engine.send([tensor(0, (i + 1,), ms.float32, i)], 1) for i in range(20)]
    else:
        works = [engine.recv([tensor(0, (i + 1,), ms.float32)], 0) for i in range(20)]
        for i, work in enumerate(works):
            check(work.wait()[0], array(0, (i + 1,), ms.float32, i))
    for work in works:
        work.wait()


def messages_beside_collectives(world: Any) -> None:
    """A message that is not there yet does not hold up collectives."""
    engine = world.engine
    got = engine.recv([tensor(0, (5,), ms.float32)], 1) if engine.rank == 0 else None
    for i in range(3):
        (total,) = engine.all_reduce([tensor(engine.rank, (5,), ms.float32, i)]).wait()
        check(total, reduced([array(rank, (5,), ms.float32, i) for rank in range(engine.size)], "sum"))
    if engine.rank == 1:
        engine.send([tensor(1, (5,), ms.float32)], 0).wait()
    if got is not None:
        check(got.wait()[0], array(1, (5,), ms.float32))


def to_oneself(world: Any) -> None:
    engine = world.engine
    got = engine.recv([tensor(0, (5,), ms.float32)], engine.rank)
    engine.send([tensor(engine.rank, (5,), ms.float32)], engine.rank).wait()
    check(got.wait()[0], array(engine.rank, (5,), ms.float32))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_does_not_deadlock(on_ranks: Callable, size: int):
    on_ranks(size, ring, timeout=60)


@pytest.mark.parametrize("body", [messages_keep_their_order, messages_beside_collectives, to_oneself])
def test_messages(on_ranks: Callable, body: Callable):
    on_ranks(2, body, timeout=60)


# Sub-groups #


def pairs(world: Any) -> None:
    """Two groups of two at once, next to the world's own collectives; then groups of another order."""
    engine = world.engine
    mine = [0, 2] if engine.rank % 2 == 0 else [1, 3]
    group = engine.subgroup(mine)
    assert (group.size, group.rank, group.name) == (2, mine.index(engine.rank), engine.name)
    assert group.clock is engine.clock
    works = []
    for i in range(10):
        x = tensor(engine.rank, (1009,), ms.float32, i)
        rows = {rank: array(rank, (1009,), ms.float32, i) for rank in range(4)}
        works.append((group.all_reduce([x]), reduced([rows[rank] for rank in mine], "sum")))
        works.append((engine.all_reduce([x]), reduced([rows[rank] for rank in range(4)], "sum")))
        works.append((group.all_gather([x]), np.concatenate([rows[rank] for rank in mine])))
    for work, expected in works:
        check(work.wait()[0], expected)
    peer = 1 - group.rank
    sent = group.send([tensor(engine.rank, (3,), ms.float32)], peer)
    (y,) = group.recv([tensor(0, (3,), ms.float32)], peer).wait()
    sent.wait()
    check(y, array(mine[peer], (3,), ms.float32))

    backwards = engine.subgroup(mine[::-1])
    assert backwards.rank == 1 - group.rank
    (y,) = backwards.all_gather([tensor(engine.rank, (3,), ms.int32)]).wait()
    check(y, np.concatenate([array(rank, (3,), ms.int32) for rank in mine[::-1]]))
    (y,) = backwards.broadcast([tensor(engine.rank, (3,), ms.int32)], root=0).wait()
    check(y, array(mine[1], (3,), ms.int32))


def nested(world: Any) -> None:
    """Ranks are numbered in the group that is asked, not in the world."""
    engine = world.engine
    if engine.rank == 0:
        return
    last = engine.subgroup([1, 2, 3])
    assert (last.rank, last.size) == (engine.rank - 1, 3)
    if last.rank == 0:
        return
    inner = last.subgroup([2, 1])
    (y,) = inner.all_gather([tensor(engine.rank, (2,), ms.float32)]).wait()
    check(y, np.concatenate([array(rank, (2,), ms.float32) for rank in (3, 2)]))


def closing_a_subgroup(world: Any) -> None:
    """The parent goes on; so do other groups."""
    engine = world.engine
    one, two = engine.subgroup(range(engine.size)), engine.subgroup([engine.rank])
    assert (two.size, two.rank) == (1, 0)
    one.barrier().wait()
    one.close()
    one.close()
    for group in (engine, two):
        (y,) = group.all_reduce([tensor(engine.rank, (3,), ms.float32)]).wait()
        members = [engine.rank] if group is two else range(engine.size)
        check(y, reduced([array(rank, (3,), ms.float32) for rank in members], "sum"))


@pytest.mark.parametrize("body", [pairs, nested, closing_a_subgroup])
def test_subgroups(on_ranks: Callable, body: Callable):
    on_ranks(4, body, timeout=60)


# Errors #


def errors(world: Any) -> dict[str, str]:
    engine = world.engine
    x = tensor(engine.rank, (4,), ms.float32)
    whole = tensor(engine.rank, (4,), ms.int32)
    calls: dict[str, Callable] = {
        "op": lambda: engine.all_reduce([x], "product"),
        "op of reduce_scatter": lambda: engine.reduce_scatter([x], "avg"),
        "mean": lambda: engine.all_reduce([x, whole], "mean"),
        "split": lambda: engine.reduce_scatter([x, tensor(0, (5, 3), ms.float32)]),
        "split of all_to_all": lambda: engine.all_to_all([tensor(0, (1,), ms.float32)]),
        "scalar": lambda: engine.reduce_scatter([tensor(0, (), ms.float32)]),
        "root": lambda: engine.broadcast([x], 2),
        "dst": lambda: engine.send([x], -1),
        "src": lambda: engine.recv([x], 7),
        "group": lambda: engine.subgroup([1 - engine.rank]),
        "group rank": lambda: engine.subgroup([0, 1, 2]),
        "group twice": lambda: engine.subgroup([0, 1, 1]),
    }
    texts = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        texts[name] = str(caught.value)
    (y,) = engine.all_reduce([x]).wait()  # nothing was issued, nothing is broken
    check(y, reduced([array(rank, (4,), ms.float32) for rank in range(2)], "sum"))
    return texts


def test_errors(on_ranks: Callable):
    per_rank = on_ranks(2, errors)
    for rank, texts in enumerate(per_rank):
        assert texts == {
            "op": "unknown reduction 'product'; choose one of sum, mean, max, min",
            "op of reduce_scatter": "unknown reduction 'avg'; choose one of sum, mean, max, min",
            "mean": "the mean of integer tensors is not an integer; use sum, or convert to a float type",
            "split": "reduce_scatter splits dim 0 over 2 ranks, which a tensor of shape (5, 3) does not allow; "
            "pad dim 0 to a multiple of 2",
            "split of all_to_all": "all_to_all splits dim 0 over 2 ranks, which a tensor of shape (1,) does not allow; "
            "pad dim 0 to a multiple of 2",
            "scalar": "reduce_scatter splits dim 0 over 2 ranks, which a tensor of shape () does not allow; "
            "pad dim 0 to a multiple of 2",
            "root": "root=2 is not a rank of this group of 2 (0..1)",
            "dst": "dst=-1 is not a rank of this group of 2 (0..1)",
            "src": "src=7 is not a rank of this group of 2 (0..1)",
            "group": f"rank {rank} is not in the sub-group [{1 - rank}]: only its members create it",
            "group rank": "rank=2 is not a rank of this group of 2 (0..1)",
            "group twice": "a rank appears twice in the sub-group [0, 1, 1]",
        }


def closed(world: Any) -> list[str]:
    engine = of_one(world.engine)
    work = engine.all_reduce([tensor(0, (3,), ms.float32)])
    engine.close()
    assert work.done(), "close finishes what is in flight"
    check(work.wait()[0], array(0, (3,), ms.float32))
    engine.close()
    texts = []
    for call in (lambda: engine.barrier("too late"), lambda: engine.recv([tensor(0, (1,), ms.float32)], 0)):
        with pytest.raises(CommError) as caught:
            call()
        texts.append(str(caught.value))
    return texts


def test_closed_engine(on_ranks: Callable):
    texts = ["barrier (too late) at step 0 on rank 0 of 1: the engine is closed"]
    texts.append("recv from rank 0 at step 0 on rank 0 of 1: the engine is closed")
    assert on_ranks(2, closed) == [texts, texts]


def late(world: Any, kind: str) -> list:
    """Rank 0 issues what rank 1 does not."""
    from mpi4py import MPI

    comm, clock = MPI.COMM_WORLD.Dup(), Clock(step=41)
    doomed = MpiEngine(comm, clock, 1) if kind == "mpi" else node.connect(comm, clock, 1)
    x = tensor(0, (5,), ms.float32)
    doomed.barrier().wait()
    if world.engine.rank == 1:
        world.engine.barrier("meet again").wait()
        return []
    doomed.clock.step = 42
    texts, kinds = [], []
    works = [doomed.all_gather([x], label="block 3"), doomed.all_reduce([x], label="behind it")]
    for work in works:
        with pytest.raises(CommError) as caught:
            work.wait()
        assert work.done()
        texts.append(str(caught.value))
        kinds.append(type(caught.value) is CommTimeoutError)
    for call in (lambda: doomed.barrier("after").wait(), lambda: works[0].wait()):
        with pytest.raises(CommTimeoutError) as caught:
            call()  # a group that has lost an operation cannot be used again
        texts.append(str(caught.value))
    doomed.close()
    world.engine.barrier("meet again").wait()  # other engines are healthy
    return [texts, kinds]


@pytest.mark.parametrize(
    "kind, who",
    [
        ("mpi", ". Another rank is dead, stuck, or did not issue this operation; look for the first error among the other ranks"),
        ("node", ": rank 1 is dead, stuck, or did not issue this operation; look for the first error among the ranks"),
    ],
)
def test_time_out_names_operation_label_step_and_rank(kind: str, who: str):
    pool = RankPool(2)
    try:
        (texts, kinds), _ = pool.run(late, timeout=60, kind=kind)
    finally:
        pool.kill()
    text = f"all_gather (block 3) at step 42 on rank 0 of 2 did not finish within 1 s{who}, or raise init_distributed(timeout=...)"
    assert texts == [text] * 4
    assert kinds == [True, True]


# Where memory cannot be read #


def not_readable(world: Any) -> bool:
    """One rank cannot read another's memory: no rank gets the node engine, and nobody waits."""
    from mpi4py import MPI

    original = node._can_read
    node._can_read = lambda pid, there, bits: world.engine.rank == 0 and original(pid, there, bits)
    try:
        return node.connect(MPI.COMM_WORLD.Dup(), Clock(), 20) is None
    finally:
        node._can_read = original


def test_all_ranks_agree_not_to_use_it(run_ranks: Callable):
    assert run_ranks(3, not_readable) == [True] * 3


def allocations(world: Any) -> tuple[int, int, int]:
    """Bytes that NumPy allocates, at most, for an all-gather in place and for a reduce-scatter of 16 MiB shards; and a shard's."""
    import tracemalloc

    n = 1 << 22
    shard, full = np.ones(n, np.float32), np.ones(n * world.engine.size, np.float32)
    given, whole, out = from_host(shard), from_host(full), from_host(np.empty_like(full))
    found = []
    for call in (lambda: world.engine.all_gather([given], [out]), lambda: world.engine.reduce_scatter([whole])):
        if world.engine.name == "mpi":
            call().wait()  # its scratch memory is kept
        world.engine.barrier().wait()
        tracemalloc.start()
        tracemalloc.reset_peak()
        results = call().wait()
        found.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del results
    return found[0], found[1], shard.nbytes


@pytest.mark.parametrize("size", [2, 3])
def test_no_extra_copy(on_ranks: Callable, size: int):
    for gather, reduce, shard in on_ranks(size, allocations):
        assert gather < 100_000
        assert reduce < shard + size * node.AT_ONCE + 100_000  # others' parts are copied bit by bit
