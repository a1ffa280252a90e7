"""The HCCL engine's calls, held to the signatures of the installed MindSpore.

No Ascend device runs these tests: they show that the calls bind, carry the right arguments and read results of the documented
structure. They do not show that HCCL does what its documentation says.
"""

from __future__ import annotations

import inspect
from typing import Any

import mindspore as ms
import mindspore.communication
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.communication import comm_func

from bmtrain_ms.comm import Clock
from bmtrain_ms.comm.hccl import HcclEngine
from bmtrain_ms.comm.rehearsed import Signed

pytestmark = pytest.mark.usefixtures("single_world")
WORLD = "hccl_world_group"


class Handle:
    def __init__(self, log: list):
        self._log = log

    def wait(self) -> None:
        self._log.append("wait")


class StandIn(Signed):
    """`comm_func` for a group of `size` ranks that all hold the same values; every call must bind to the real signature."""

    def __init__(self, size: int, stacks: bool = True):
        self.size, self.stacks = size, stacks
        self.log: list = []

    def _call(self, name: str, bound: inspect.BoundArguments) -> Any:
        given = bound.arguments
        self.log.append((name, {key: tuple(value.shape) if key == "tensor" else value for key, value in given.items()}))
        return getattr(self, f"_{name}")(given.get("tensor"), given)

    def _handle(self, bound: dict) -> Handle | None:
        return Handle(self.log) if bound.get("async_op", False) else None

    def _all_gather_into_tensor(self, x: Tensor, bound: dict) -> tuple:
        shape = (self.size, *x.shape) if self.stacks else (self.size * x.shape[0], *x.shape[1:])
        return Tensor(np.concatenate([x.asnumpy()] * self.size).reshape(shape)), self._handle(bound)

    def _reduce_scatter_tensor(self, x: Tensor, bound: dict) -> tuple:
        total = x.asnumpy() * (self.size if bound["op"] == "sum" else 1)
        return Tensor(total[: x.shape[0] // self.size]), self._handle(bound)

    def _all_reduce(self, x: Tensor, bound: dict) -> tuple:
        return Tensor(x.asnumpy() * (self.size if bound["op"] == "sum" else 1)), self._handle(bound)

    def _broadcast(self, x: Tensor, bound: dict) -> Tensor:
        return Tensor(x.asnumpy())

    def _all_to_all_single_with_output_shape(self, x: Tensor, bound: dict) -> tuple:
        return Tensor(np.zeros(bound["output_shape"], np.float32)), self._handle(bound)

    def _isend(self, x: Tensor, bound: dict) -> Handle:
        return Handle(self.log)

    def _irecv(self, x: Tensor, bound: dict) -> tuple:
        return Tensor(np.zeros(x.shape, np.float32)), Handle(self.log)

    def _barrier(self, x: None, bound: dict) -> None:
        return None


def tensor(*shape: int, value: float = 1.0, dtype: Any = ms.float32) -> Tensor:
    return Tensor(np.full(shape, value), dtype)


@pytest.fixture
def fake() -> StandIn:
    return StandIn(4)


@pytest.fixture
def engine(fake: StandIn) -> HcclEngine:
    return HcclEngine(WORLD, rank=2, size=4, clock=Clock(9), comm_func=fake)


def finish(work: Any, fake: StandIn) -> list[tuple]:
    """Shapes of the outputs; checks that nothing was waited for before, and each handle once."""
    assert "wait" not in fake.log
    calls = len(fake.log)
    outputs = work.wait()
    assert outputs is work.outputs
    assert work.done()
    waits = fake.log[calls:]
    work.wait()
    assert fake.log[calls:] == waits, "a second wait does nothing"
    assert set(waits) <= {"wait"}
    return [tuple(y.shape) for y in outputs]


def test_the_stand_in_checks_keywords(fake: StandIn):
    with pytest.raises(TypeError, match="unexpected keyword argument 'grp'"):
        fake.all_reduce(tensor(1), grp=WORLD)
    with pytest.raises(AttributeError, match="no_such_function"):
        fake.no_such_function(tensor(1))


def test_attributes(engine: HcclEngine):
    assert (engine.name, engine.rank, engine.size, engine.clock) == ("hccl", 2, 4, Clock(9))
    assert not engine.lands_in_place
    assert HcclEngine(WORLD, 0, 1, comm_func=object()).clock == Clock(0)
    assert engine.close() is None


def test_comm_func_is_mindspores_by_default():
    assert HcclEngine(WORLD, 0, 4)._comm is comm_func


@pytest.mark.parametrize("stacks", [True, False])
def test_all_gather(stacks: bool):
    """The text of MindSpore's documentation says (N, n, ...), its example shows (N*n, ...): both are understood."""
    fake = StandIn(4, stacks)
    work = HcclEngine(WORLD, 2, 4, comm_func=fake).all_gather([tensor(3), tensor(2, 5)], label="x")
    assert not work.done()
    assert finish(work, fake) == [(12,), (8, 5)]
    assert fake.log == [
        ("all_gather_into_tensor", {"tensor": (3,), "group": WORLD, "async_op": True}),
        ("all_gather_into_tensor", {"tensor": (2, 5), "group": WORLD, "async_op": True}),
        "wait",
        "wait",
    ]


def test_all_gather_keeps_the_order(engine: HcclEngine):
    (joined,) = engine.all_gather([Tensor([1.0, 2.0])]).wait()
    assert joined.asnumpy().tolist() == [1.0, 2.0] * 4


def test_all_gather_ignores_out(engine: HcclEngine):
    out = tensor(4)
    assert engine.all_gather([tensor(1)], [out]).wait()[0] is not out


@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_reduce_scatter(op: str, engine: HcclEngine, fake: StandIn):
    assert finish(engine.reduce_scatter([tensor(8), tensor(4, 3)], op), fake) == [(2,), (1, 3)]
    assert fake.log == [
        ("reduce_scatter_tensor", {"tensor": (8,), "op": op, "group": WORLD, "async_op": True}),
        ("reduce_scatter_tensor", {"tensor": (4, 3), "op": op, "group": WORLD, "async_op": True}),
        "wait",
        "wait",
    ]


@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_all_reduce(op: str, engine: HcclEngine, fake: StandIn):
    assert finish(engine.all_reduce([tensor(3)], op), fake) == [(3,)]
    assert fake.log == [("all_reduce", {"tensor": (3,), "op": op, "group": WORLD, "async_op": True}), "wait"]


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_mean_divides_before_the_sum(dtype: Any, engine: HcclEngine, fake: StandIn):
    """60000 * 4 is not a float16; 60000 / 4 * 4 is."""
    x = tensor(4, value=60000.0, dtype=dtype)
    for work in (engine.all_reduce([x], "mean"), engine.reduce_scatter([x], "mean")):
        (y,) = work.wait()
        assert y.dtype == dtype
        assert set(y.asnumpy().tolist()) == {60000.0}
    assert [call[1]["op"] for call in fake.log if call != "wait"] == ["sum", "sum"]
    assert x.asnumpy().tolist() == [60000.0] * 4


def test_op_names_are_mindspores():
    from mindspore.ops import ReduceOp

    assert (ReduceOp.SUM, ReduceOp.MAX, ReduceOp.MIN) == ("sum", "max", "min")


def test_broadcast(engine: HcclEngine, fake: StandIn):
    assert finish(engine.broadcast([tensor(3), tensor(1)], root=3), fake) == [(3,), (1,)]
    assert fake.log == [
        ("broadcast", {"tensor": (3,), "src": 3, "group": WORLD}),
        ("broadcast", {"tensor": (1,), "src": 3, "group": WORLD}),
    ]


def test_all_to_all(engine: HcclEngine, fake: StandIn):
    assert finish(engine.all_to_all([tensor(4, 2)]), fake) == [(4, 2)]
    arguments = {"output_shape": (4, 2), "tensor": (4, 2), "group": WORLD, "async_op": True}
    assert fake.log == [("all_to_all_single_with_output_shape", arguments), "wait"]


def test_send(engine: HcclEngine, fake: StandIn):
    assert finish(engine.send([tensor(3), tensor(2)], dst=1), fake) == []
    assert fake.log == [
        ("isend", {"tensor": (3,), "dst": 1, "group": WORLD}),
        ("isend", {"tensor": (2,), "dst": 1, "group": WORLD}),
        "wait",
        "wait",
    ]


def test_recv(engine: HcclEngine, fake: StandIn):
    assert finish(engine.recv([tensor(3), tensor(2)], src=0), fake) == [(3,), (2,)]
    assert fake.log == [
        ("irecv", {"tensor": (3,), "src": 0, "group": WORLD}),
        ("irecv", {"tensor": (2,), "src": 0, "group": WORLD}),
        "wait",
        "wait",
    ]


def test_barrier(engine: HcclEngine, fake: StandIn):
    work = engine.barrier("here")
    assert work.done() and work.wait() == []
    assert fake.log == [("barrier", {"group": WORLD})]


def test_real_results_without_a_handle_are_understood(engine: HcclEngine, fake: StandIn):
    """`None` in place of a handle is what comm_func returns for finished operations."""
    fake._handle = lambda bound: None  # type: ignore[method-assign]
    work = engine.all_reduce([tensor(3)])
    assert work.done()
    assert [tuple(y.shape) for y in work.wait()] == [(3,)]


# Sub-groups: comm_func's src and dst are global ranks, and MindSpore numbers a group's ranks in ascending order #


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list:
    groups: list = []
    signature = inspect.signature(mindspore.communication.create_group)

    def create_group(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        assert isinstance(bound["rank_ids"], list)  # a tuple is a TypeError in MindSpore
        groups.append((bound["group"], bound["rank_ids"]))

    monkeypatch.setattr(mindspore.communication, "create_group", create_group)
    return groups


def test_subgroup(engine: HcclEngine, fake: StandIn, created: list):
    sub = engine.subgroup((0, 2))
    ((name, ranks),) = created
    assert ranks == [0, 2]
    assert isinstance(sub, HcclEngine)
    assert (sub.rank, sub.size, sub.clock) == (1, 2, engine.clock)
    assert sub.clock is engine.clock
    fake.size = 2
    sub.all_gather([tensor(1)])
    sub.broadcast([tensor(1)], root=1)
    sub.send([tensor(1)], dst=0)
    sub.recv([tensor(1)], src=0)
    sub.broadcast([tensor(1)], root=0)
    assert [(call, arguments["group"]) for call, arguments in fake.log] == [
        ("all_gather_into_tensor", name),
        ("broadcast", name),
        ("isend", name),
        ("irecv", name),
        ("broadcast", name),
    ]
    assert [a.get("src", a.get("dst")) for _, a in fake.log] == [None, 2, 0, 0, 0]


def test_subgroup_of_a_subgroup_has_global_ranks(created: list):
    engine = HcclEngine(WORLD, rank=6, size=8, comm_func=StandIn(8))
    even = engine.subgroup([0, 2, 4, 6])
    last = even.subgroup([2, 3])
    assert [ranks for _, ranks in created] == [[0, 2, 4, 6], [4, 6]]
    assert (even.rank, last.rank, last.size) == (3, 1, 2)
    fake = last._comm
    last.send([tensor(1)], dst=0)
    assert fake.log == [("isend", {"tensor": (1,), "dst": 4, "group": created[1][0]})]


def test_group_names(created: list):
    """The same members always get the same name, other members another one, and long lists a short one."""
    engine = HcclEngine(WORLD, rank=0, size=512, comm_func=StandIn(512))
    for ranks in ([0, 1], [0, 1], [0, 2], range(512)):
        engine.subgroup(list(ranks))
    names = [name for name, _ in created]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert all(len(name) < 128 for name in names)


def test_subgroup_in_another_order(engine: HcclEngine, created: list):
    with pytest.raises(ValueError, match=r"^HCCL numbers the ranks of a group in ascending order; sort the sub-group \[2, 0\]"):
        engine.subgroup([2, 0])
    assert created == []


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda e: e.all_reduce([tensor(1)], "product"), r"^unknown reduction 'product'; choose one of sum, mean, max, min$"),
        (lambda e: e.reduce_scatter([tensor(4)], "avg"), r"^unknown reduction 'avg'"),
        (lambda e: e.all_reduce([tensor(1, dtype=ms.int32)], "mean"), r"^the mean of integer tensors is not an integer"),
        (lambda e: e.reduce_scatter([tensor(5)]), r"^reduce_scatter splits dim 0 over 4 ranks, .* shape \(5,\) .* of 4$"),
        (lambda e: e.all_to_all([tensor(6, 4)]), r"^all_to_all splits dim 0 over 4 ranks, .* shape \(6, 4\) does not allow"),
        (lambda e: e.broadcast([tensor(1)], root=4), r"^root=4 is not a rank of this group of 4 \(0\.\.3\)$"),
        (lambda e: e.send([tensor(1)], dst=-1), r"^dst=-1 is not a rank of this group of 4 \(0\.\.3\)$"),
        (lambda e: e.recv([tensor(1)], src=9), r"^src=9 is not a rank of this group of 4 \(0\.\.3\)$"),
        (lambda e: e.subgroup([0, 1]), r"^rank 2 is not in the sub-group \[0, 1\]: only its members create it$"),
        (lambda e: e.subgroup([2, 2]), r"^a rank appears twice in the sub-group \[2, 2\]$"),
        (lambda e: e.subgroup([2, 4]), r"^rank=4 is not a rank of this group of 4"),
    ],
)
def test_errors_before_any_call(call: Any, text: str, engine: HcclEngine, fake: StandIn, created: list):
    with pytest.raises(ValueError, match=text):
        call(engine)
    assert fake.log == created == []
