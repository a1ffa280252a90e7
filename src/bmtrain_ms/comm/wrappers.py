"""Engines around another engine: one records what is issued, one delays it as a slower network would."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Sequence

from mindspore import Tensor

from .engine import Buffer, Engine, Work


class Around(Engine):
    """Passes everything on to `inner`; subclasses see each operation in `_around`."""

    def __init__(self, inner: Engine):
        self.inner = inner
        self.name, self.rank, self.size, self.clock = inner.name, inner.rank, inner.size, inner.clock
        self.lands_in_place = inner.lands_in_place

    @property
    def lost(self) -> BaseException | None:
        return self.inner.lost

    def all_gather(self, tensors: Sequence[Buffer], out: Sequence[Buffer] | None = None, label: str = "") -> Work:
        received = (self.size - 1) * _nbytes(tensors)
        return self._around("all_gather", label, tensors, received, self.inner.all_gather(tensors, out, label))

    def reduce_scatter(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        received = (self.size - 1) * _nbytes(tensors) // self.size
        return self._around("reduce_scatter", label, tensors, received, self.inner.reduce_scatter(tensors, op, label))

    def all_reduce(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        received = 2 * (self.size - 1) * _nbytes(tensors) // self.size
        return self._around("all_reduce", label, tensors, received, self.inner.all_reduce(tensors, op, label))

    def broadcast(self, tensors: Sequence[Buffer], root: int = 0, label: str = "") -> Work:
        received = 0 if self.rank == root else _nbytes(tensors)
        return self._around("broadcast", label, tensors, received, self.inner.broadcast(tensors, root, label))

    def all_to_all(self, tensors: Sequence[Buffer], label: str = "") -> Work:
        received = (self.size - 1) * _nbytes(tensors) // self.size
        return self._around("all_to_all", label, tensors, received, self.inner.all_to_all(tensors, label))

    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        return self._around("send", label, tensors, 0, self.inner.send(tensors, dst, label))

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        return self._around("recv", label, like, _nbytes(like), self.inner.recv(like, src, label))

    def barrier(self, label: str = "") -> Work:
        return self._around("barrier", label, (), 0, self.inner.barrier(label))

    def compare(self, what: str, value: Any) -> None:
        self.inner.compare(what, value)

    def follow(self, rule: str) -> None:
        self.inner.follow(rule)

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        return self._rewrap(self.inner.subgroup(ranks))

    def close(self) -> None:
        self.inner.close()

    @abstractmethod
    def _around(self, op: str, label: str, tensors: Sequence[Buffer], received: int, work: Work) -> Work:
        """What a wrapper adds to an operation that `inner` has just issued."""

    @abstractmethod
    def _rewrap(self, inner: Engine) -> Engine:
        """This wrapper around another engine, that of a sub-group."""


@dataclass(frozen=True)
class Event:
    """One collective as it was issued.

    `tensors`: how many it carried.  `received`: bytes that this rank had to receive from others, by the least-volume algorithm.
    """

    op: str
    label: str
    tensors: int
    received: int


class RecordingEngine(Around):
    """Keeps a list of every operation, in `events`; sub-groups add to the same list."""

    def __init__(self, inner: Engine, events: list[Event] | None = None):
        super().__init__(inner)
        self.events: list[Event] = [] if events is None else events

    def _around(self, op: str, label: str, tensors: Sequence[Buffer], received: int, work: Work) -> Work:
        self.events.append(Event(op, label, len(tensors), received))
        return work

    def _rewrap(self, inner: Engine) -> Engine:
        return RecordingEngine(inner, self.events)

    def calls(self) -> list[tuple[str, str]]:
        """(operation, label) of every event."""
        return [(event.op, event.label) for event in self.events]


class FabricEngine(Around):
    """Delays completion as a link with a latency and a bandwidth would, without using the CPU.

    Transfers of one rank share its link: each starts when the one before has ended. Used to measure overlap: what a step costs
    beyond max(computation, communication) is not hidden.
    """

    def __init__(self, inner: Engine, latency: float, bandwidth: float, link: list[float] | None = None):
        """
        Args:
            inner: does the work.
            latency: seconds per operation.
            bandwidth: bytes received per second.
        """
        super().__init__(inner)
        if latency < 0 or bandwidth <= 0:
            raise ValueError(f"latency must be >= 0 and bandwidth > 0, not {latency} and {bandwidth}")
        self.latency, self.bandwidth = latency, bandwidth
        self._link_free = [0.0] if link is None else link

    def _around(self, op: str, label: str, tensors: Sequence[Buffer], received: int, work: Work) -> Work:
        start = max(time.monotonic(), self._link_free[0])
        self._link_free[0] = start + self.latency + received / self.bandwidth
        return _Delayed(work, start, self._link_free[0])

    def _rewrap(self, inner: Engine) -> Engine:
        return FabricEngine(inner, self.latency, self.bandwidth, self._link_free)


class _Delayed(Work):
    def __init__(self, inner: Work, start: float, ready: float):
        self._inner, self._start, self._ready, self.outputs = inner, start, ready, inner.outputs

    def done(self) -> bool:
        return time.monotonic() >= self._ready and self._inner.done()

    def wait(self) -> list[Tensor]:
        outputs = self._inner.wait()
        time.sleep(max(0.0, self._ready - time.monotonic()))
        return outputs

    def span(self) -> tuple[float, float] | None:
        return self._start, self._ready


def _nbytes(tensors: Sequence[Any]) -> int:
    return sum(x.nbytes for x in tensors)
