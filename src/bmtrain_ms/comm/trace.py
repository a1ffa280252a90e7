"""What each rank computed and moved, and when: a file for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Sequence

from mindspore import Tensor

from .agreement import all_gather_bytes
from .engine import Buffer, Engine, Work
from .wrappers import Around

TRACKS = ("compute", "gather", "reduce", "other")  # rows of the picture, one group of them for each rank
_TRACK_OF = {"all_gather": "gather", "reduce_scatter": "reduce", "all_reduce": "reduce"}


@dataclass(frozen=True)
class Span:
    """Something that took time: `start` and `end` in seconds of `time.monotonic`, `received` in bytes, `step` of training."""

    name: str
    track: str
    start: float
    end: float
    step: int = 0
    received: int = 0


class Trace:
    """Spans of one rank, in the order in which they ended."""

    def __init__(self, limit: int = 200_000):
        """`limit`: spans to keep; later ones are counted in `dropped`."""
        self.spans: list[Span] = []
        self.dropped = 0
        self._limit = limit

    def add(self, span: Span) -> None:
        """Keep a span."""
        if len(self.spans) < self._limit:
            self.spans.append(span)
        else:
            self.dropped += 1

    @contextlib.contextmanager
    def measure(self, name: str, step: int) -> Iterator[None]:
        """A span of computation around the body of a `with` statement."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(Span(name, "compute", start, time.monotonic(), step))


class TracingEngine(Around):
    """Adds every collective to a trace, from its turn to its end; on devices, which do not tell, from its call to its `wait`."""

    def __init__(self, inner: Engine, trace: Trace):
        super().__init__(inner)
        self.trace = trace

    def _around(self, op: str, label: str, tensors: Sequence[Buffer], received: int, work: Work) -> Work:
        name = f"{op} ({label})" if label else op
        return _Traced(work, self.trace, Span(name, _TRACK_OF.get(op, "other"), time.monotonic(), 0.0, self.clock.step, received))

    def _rewrap(self, inner: Engine) -> Engine:
        return TracingEngine(inner, self.trace)


class _Traced(Work):
    def __init__(self, inner: Work, trace: Trace, issued: Span):
        self._inner, self._trace, self._issued, self.outputs = inner, trace, issued, inner.outputs
        self._noted = False

    def done(self) -> bool:
        return self._inner.done()

    def span(self) -> tuple[float, float] | None:
        return self._inner.span()

    def wait(self) -> list[Tensor]:
        outputs = self._inner.wait()
        if not self._noted:
            self._noted = True
            start, end = self._inner.span() or (self._issued.start, time.monotonic())
            issued = self._issued
            self._trace.add(Span(issued.name, issued.track, start, end, issued.step, issued.received))
        return outputs


def write_trace(path: str | Path, trace: Trace, engine: Engine) -> None:
    """Write the spans of all ranks as one Chrome trace; rank 0 writes, all ranks call it.

    Times of ranks on different hosts are comparable as far as their clocks are.
    """
    offset = time.time() - time.monotonic()
    mine = json.dumps([_event(span, engine.rank, offset) for span in trace.spans]).encode()
    everybody = all_gather_bytes(engine, mine, "trace")
    if engine.rank == 0:
        events = [event for text in everybody for event in json.loads(text)]
        start = min((event["ts"] for event in events), default=0.0)
        for event in events:
            event["ts"] -= start
        document = {"traceEvents": _headings(engine.size) + events, "displayTimeUnit": "ms"}
        Path(path).expanduser().write_text(json.dumps(document), encoding="utf-8")


def _event(span: Span, rank: int, offset: float) -> dict[str, Any]:
    return {
        "name": span.name,
        "cat": span.track,
        "ph": "X",
        "ts": (span.start + offset) * 1e6,
        "dur": (span.end - span.start) * 1e6,
        "pid": rank,
        "tid": TRACKS.index(span.track),
        "args": {"step": span.step, "received": span.received},
    }


def _headings(size: int) -> list[dict[str, Any]]:
    named = [{"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}} for rank in range(size)]
    for rank in range(size):
        for i, track in enumerate(TRACKS):
            named.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": i, "args": {"name": track}})
    return named
