"""The recording engine's events and the simulated fabric's time."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from bmtrain_ms.comm import Clock, Engine, Event, FabricEngine, RecordingEngine, SingleEngine, Work, wrappers
from bmtrain_ms.comm.engine import Done
from bmtrain_ms.compat.runtime import from_host

pytestmark = pytest.mark.usefixtures("single_world")


class Four(SingleEngine):
    """Says that it is rank 1 of 4; moves nothing."""

    size, rank = 4, 1

    def send(self, tensors: Sequence[Tensor], dst: int, label: str = "") -> Work:
        return Done([])

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        return Done(list(like))

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        return Two(self.clock)


class Two(Four):
    size, rank = 2, 0


def zeros(*shape: int, dtype: Any = np.float32) -> Tensor:
    return from_host(np.zeros(shape, dtype))


CALLS: dict[str, Callable[[Engine, Sequence[Tensor], str], Work]] = {
    "all_gather": lambda e, xs, label: e.all_gather(xs, label=label),
    "reduce_scatter": lambda e, xs, label: e.reduce_scatter(xs, "max", label),
    "all_reduce": lambda e, xs, label: e.all_reduce(xs, "sum", label),
    "broadcast": lambda e, xs, label: e.broadcast(xs, 3, label),
    "all_to_all": lambda e, xs, label: e.all_to_all(xs, label),
    "send": lambda e, xs, label: e.send(xs, 2, label),
    "recv": lambda e, xs, label: e.recv(xs, 2, label),
    "barrier": lambda e, xs, label: e.barrier(label),
}
# bytes received, with 4 ranks, for tensors of 12 * 4 + 8 * 2 = 64 bytes
RECEIVED = {
    "all_gather": 192,
    "reduce_scatter": 48,
    "all_reduce": 96,
    "broadcast": 64,
    "all_to_all": 48,
    "send": 0,
    "recv": 64,
    "barrier": 0,
}


@pytest.mark.parametrize("op", CALLS)
def test_event(op: str):
    engine = RecordingEngine(Four())
    tensors = [zeros(12), zeros(8, dtype=np.float16)]
    CALLS[op](engine, tensors, "layer 3").wait()
    assert engine.events == [Event(op, "layer 3", 0 if op == "barrier" else 2, RECEIVED[op])]


def test_broadcast_root_receives_nothing():
    engine = RecordingEngine(Four())
    engine.broadcast([zeros(12)], root=1)
    assert engine.events == [Event("broadcast", "", 1, 0)]


def test_events_keep_the_order_and_results_pass_through():
    engine = RecordingEngine(SingleEngine())
    x = from_host(np.array([1.0, 2.0], np.float32))
    out = zeros(2)
    assert engine.all_gather([x], [out], "a").wait()[0] is out
    assert out.asnumpy().tolist() == [1.0, 2.0]
    assert engine.all_reduce([x], label="b").wait()[0].asnumpy().tolist() == [1.0, 2.0]
    engine.barrier()
    assert engine.calls() == [("all_gather", "a"), ("all_reduce", "b"), ("barrier", "")]
    assert [event.received for event in engine.events] == [0, 0, 0]


def test_a_refused_operation_is_no_event():
    engine = RecordingEngine(SingleEngine())
    with pytest.raises(ValueError, match="unknown reduction 'product'"):
        engine.all_reduce([zeros(1)], "product")
    assert engine.events == []


@pytest.mark.parametrize("wrap", [RecordingEngine, lambda inner: FabricEngine(inner, 0, 1e9)])
def test_a_wrapper_looks_like_its_engine(wrap: Callable[[Engine], Engine]):
    clock = Clock(step=5)
    engine = wrap(Four(clock))
    assert (engine.name, engine.rank, engine.size, engine.lands_in_place) == ("single", 1, 4, True)
    assert engine.clock is clock
    assert not wrap(SingleEngine(host=False)).lands_in_place


def test_subgroups_record_into_one_list():
    engine = RecordingEngine(Four())
    sub = engine.subgroup([1, 3])
    assert isinstance(sub, RecordingEngine) and (sub.size, sub.rank) == (2, 0)
    engine.barrier("world")
    sub.all_gather([zeros(2)], label="sub")
    assert engine.events == [Event("barrier", "world", 0, 0), Event("all_gather", "sub", 1, 8)]


def test_close_reaches_the_inner_engine():
    closed = []
    inner = SingleEngine()
    inner.close = lambda: closed.append(1)  # type: ignore[method-assign]
    FabricEngine(RecordingEngine(inner), 0, 1).close()
    assert closed == [1]


# The fabric, by a clock that moves only while somebody sleeps #


class Seconds:
    """Takes the place of the `time` module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def since(self, action: Callable[[], Any]) -> float:
        start = self.now
        action()
        return self.now - start


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    made = Seconds()
    monkeypatch.setattr(wrappers, "time", made)
    return made


def test_latency_and_bandwidth(clock: Seconds):
    engine = FabricEngine(Four(), latency=0.05, bandwidth=1e4)
    threads = set(threading.enumerate())
    work = engine.all_gather([zeros(250)])  # 3 * 1000 bytes: 0.05 + 0.3 s
    assert not work.done()
    clock.sleep(0.34)
    assert not work.done()
    assert clock.since(work.wait) == pytest.approx(0.01)
    assert work.done() and set(threading.enumerate()) <= threads  # earlier tests' may end
    assert clock.since(work.wait) == 0.0, "waiting again costs nothing"


def test_twice_the_bytes_take_twice_as_long(clock: Seconds):
    engine = FabricEngine(Four(), latency=0, bandwidth=3e4)
    assert clock.since(lambda: engine.all_gather([zeros(250)]).wait()) == pytest.approx(0.1)
    assert clock.since(lambda: engine.all_gather([zeros(250), zeros(250)]).wait()) == pytest.approx(0.2)


def test_transfers_of_a_rank_share_its_link(clock: Seconds):
    engine = FabricEngine(Four(), latency=0.05, bandwidth=3e4)
    works = [engine.all_gather([zeros(250)]) for _ in range(3)]
    assert [work.done() for work in works] == [False] * 3
    assert [clock.since(work.wait) for work in works] == pytest.approx([0.15] * 3)


def test_subgroups_share_the_link(clock: Seconds):
    engine = FabricEngine(Four(), latency=0.1, bandwidth=1e9)
    sub = engine.subgroup([1, 3])
    assert isinstance(sub, FabricEngine)
    first, second = engine.barrier(), sub.barrier()
    assert clock.since(lambda: [first.wait(), second.wait()]) == pytest.approx(0.2)


def test_two_ranks_have_two_links(clock: Seconds):
    works = [FabricEngine(Four(), 0.15, 1e9).barrier() for _ in range(2)]
    assert clock.since(lambda: [work.wait() for work in works]) == pytest.approx(0.15)


def test_an_idle_link_does_not_save_up(clock: Seconds):
    engine = FabricEngine(Four(), latency=0.1, bandwidth=1e9)
    engine.barrier().wait()
    clock.sleep(5.0)
    assert clock.since(lambda: engine.barrier().wait()) == pytest.approx(0.1)


def test_computation_hides_a_transfer(clock: Seconds):
    engine = FabricEngine(Four(), latency=0.2, bandwidth=1e9)
    work = engine.barrier()
    clock.sleep(0.15)
    assert clock.since(work.wait) == pytest.approx(0.05)


def test_results_pass_through_the_fabric():
    engine = FabricEngine(SingleEngine(), latency=0, bandwidth=1e9)
    out = zeros(2)
    work = engine.all_gather([from_host(np.array([3.0, 4.0], np.float32))], [out])
    assert work.wait()[0] is out is work.outputs[0]
    assert out.asnumpy().tolist() == [3.0, 4.0]


def test_done_asks_the_inner_work_too():
    class Never(Done):
        def done(self) -> bool:
            return False

    inner = SingleEngine()
    inner.barrier = lambda label="": Never([])  # type: ignore[method-assign]
    work = FabricEngine(inner, latency=0, bandwidth=1e9).barrier()
    time.sleep(0.01)
    assert not work.done()


@pytest.mark.parametrize(("latency", "bandwidth"), [(-1, 1), (0, 0), (0, -5)])
def test_impossible_fabrics(latency: float, bandwidth: float):
    text = f"^latency must be >= 0 and bandwidth > 0, not {latency} and {bandwidth}$"
    with pytest.raises(ValueError, match=text):
        FabricEngine(SingleEngine(), latency, bandwidth)


def test_bytes_of_sixteen_bit_tensors():
    engine = RecordingEngine(Four())
    engine.recv([Tensor(np.zeros((3, 5), np.float32)).astype(ms.bfloat16), zeros(), zeros(0)], 0)
    assert engine.events == [Event("recv", "", 3, 34)]
