"""What a pipeline schedule does when it runs: messages between ranks, time, idle time, memory; worked out without ranks.

table = schedule("1f1b", p=4, m=8)
with_messages(table)[rank]           # what a rank has to do, in order
print(simulate(table).show())        # a picture, or an error that says who would wait for whom
simulate(table, forward=costs(divide(30, 4), head=6), backward=60.0, transfer=0.1).bubble
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple, Sequence, Union

from .checks import number
from .schedule import RECEIVE, SEND, Action, Kind, Row, Schedule

Times = Union[float, Sequence[float]]
COMPUTES = {kind: computes for kinds in (SEND, RECEIVE) for computes, kind in kinds.items()}
MESSAGES = ("rendezvous", "buffered", "none")


def with_messages(table: Schedule, forward: Times = 1.0, backward: Times = 2.0) -> tuple[Row, ...]:
    """For each rank its computations, sends and receives, in the order in which it has to do them.

    [Note: messages]
    All ranks' computations and messages are put into *one* order, in which what is needed comes before what needs it, and every
    rank does its own part of it in that order; a message has one place in it, for the sender and for the receiver. So there is no
    deadlock, even if a send ends only once its receive is reached (rendezvous): of all that is not done yet the first can be done,
    because those who take part in it have nothing else to do before. And messages need no tags: from one rank to another they
    arrive as they were sent, first in, first out for each ordered pair of ranks, even where the next and the previous rank are the
    same process (p = 2, v > 1). Where sends are buffered, both hold as well.

    The one order is how it would happen if messages took no time and were given over as soon as both ranks are between two
    computations. Of messages at one time those over even boundaries come first, so that pairs of ranks exchange side by side and do
    not wait in a chain. A rank sends itself nothing (p = 1): `Schedule.next` says where a result goes.

    `forward` and `backward` are times as `simulate` takes them, above zero. Any are right; with those of the run, roughly, ranks
    wait less for each other (recomputation makes a backward 3 forwards long). Every rank must give the same.

    Raises:
        ValueError: the computations wait for each other, or times are none.
    """
    times = _times(table, forward, backward)
    if not all(time > 0 for of_kind in times.values() for of_rank in of_kind for time in of_rank):
        raise ValueError("times by which messages are put in order must be above zero")
    ready = _at_the_ends(table)
    done: list[list[Action]] = [[] for _ in table.rows]
    rows = [deque(row) for row in table.rows]
    running: list[tuple[float, Action] | None] = [None] * table.p  # with its end
    held: list[tuple[int, int, Action]] = []  # boundary, sender, what it computed; in order of time
    now = 0.0
    while True:
        for rank, what in enumerate(running):
            if what is not None and what[0] <= now * (1 + 1e-9):  # times that differ by rounding are the same
                running[rank] = None
                held += _results(table, rank, what[1], ready)
        for message in sorted(held, key=lambda message: (message[0] % 2, *message[:2])):
            _, rank, action = message
            after = table.next(rank, action)
            if after is not None and running[rank] is None and running[after[0]] is None:
                held.remove(message)
                ready.add(after)
                done[rank].append(action._replace(kind=SEND[action.kind]))
                done[after[0]].append(after[1]._replace(kind=RECEIVE[action.kind]))
        for rank, row in enumerate(rows):
            if running[rank] is None and row and (rank, row[0]) in ready:
                action = row.popleft()
                done[rank].append(action)
                running[rank] = (now + times[action.kind][rank][action.chunk], action)
        ends = [what[0] for what in running if what is not None]
        if not ends:
            break
        now = min(ends)
    if any(rows):
        simulate(table, messages="none")  # says who waits for whom
    return tuple(map(tuple, done))


def _results(table: Schedule, rank: int, action: Action, ready: set[tuple[int, Action]]) -> list[tuple[int, int, Action]]:
    """What a computation gives others, as `with_messages` holds it; what it gives its own rank is ready."""
    after = table.next(rank, action)
    if after is None:
        return []
    if after[0] == rank:
        ready.add(after)
        return []
    return [((rank if action.kind is Kind.FORWARD else after[0]), rank, action)]


def _at_the_ends(table: Schedule) -> set[tuple[int, Action]]:
    """The computations that need nothing of others: forward in the first stage, and backward in the last."""
    first = {(0, Action(Kind.FORWARD, b, 0)) for b in range(table.m)}
    return first | {(table.p - 1, Action(Kind.BACKWARD, b, table.v - 1)) for b in range(table.m)}


class Simulation(NamedTuple):
    """What `simulate` found.

    Attributes:
        table, lines: what was run: the schedule, and for each rank what it did in order.
        spans: for each of them when it started and ended.
        makespan: when the last rank had finished.
        idle: for each rank how much of that it did not compute.
        bubble: the share of all ranks' time that is idle, 0 to 1.
        peaks: see `Schedule.peaks`.
    """

    table: Schedule
    lines: tuple[Row, ...]
    spans: tuple[tuple[tuple[float, float], ...], ...]
    makespan: float
    idle: tuple[float, ...]
    bubble: float
    peaks: tuple[int, ...]

    def show(self, width: int = 100) -> str:
        """A picture with time in columns and ranks in rows, and the sum of it below; what is too wide is left out in the middle."""
        table = self.table
        size = max(len(action.label(table.v)) for row in table.rows for action in row) + 1
        computed = [[(a, s, e) for a, (s, e) in zip(*both) if a.kind in SEND] for both in zip(self.lines, self.spans)]
        times = sorted(e - s for row in computed for _, s, e in row if e > s) or [1.0]
        least = max(times[0], times[len(times) // 2] / 4)  # the labels of tiny ones are cut
        scale = size / least  # columns for a unit of time
        rows = []
        for rank, row in enumerate(computed):
            text = ""
            for action, start, end in row:
                text = text.ljust(round(start * scale), ".")
                room = max(round(end * scale) - len(text), 0)
                text += (action.label(table.v).ljust(room - 1, "-") + " ")[:room]
            left = f"rank {rank:{len(str(table.p - 1))}} keeps {self.peaks[rank]:{len(str(max(self.peaks)))}} "
            rows.append(left + text.ljust(round(self.makespan * scale), "."))
        if max(map(len, rows)) > width:
            half = max(width - 3, 2) // 2
            rows = [f"{row[:half]} … {row[-half:]}" for row in rows]
        numbers = f"p={table.p} v={table.v} m={table.m}"
        return "\n".join([*rows, f"{table.name}, {numbers}: takes {self.makespan:g}, {self.bubble:.1%} of it idle"])


def simulate(
    table: Schedule,
    forward: Times = 1.0,
    backward: Times = 2.0,
    transfer: float = 0.0,
    messages: str = "rendezvous",
    lines: Sequence[Row] | None = None,
) -> Simulation:
    """Run a schedule without ranks.

    Args:
        table: the schedule.
        forward, backward: time of a micro-batch. A number: in all that a rank holds, so that a chunk takes a v-th; a list: in each
            of the p * v stages.
        transfer: time of a message.
        messages: "rendezvous": a send ends when it was received; "buffered": at once; "none": results are where they are needed
            without anybody's doing, which is how papers draw schedules.
        lines: what each rank does, if it is not what `with_messages` says.

    Raises:
        ValueError: ranks wait for each other, and which; a message is received as another one; times that are none.
    """
    if messages not in MESSAGES:
        raise ValueError(f"unknown kind of messages {messages!r}; choose one of {', '.join(MESSAGES)}")
    if lines is None:
        lines = table.rows if messages == "none" else with_messages(table)
    if tuple(tuple(action for action in line if action.kind in SEND) for line in lines) != table.rows:
        raise ValueError(f"the lines of ranks do not compute what {table.name} computes, or in another order")
    times = _times(table, forward, backward)
    spans = _Run(table, lines, messages, times, _of_no_sign("transfer", transfer)).to_end()
    makespan = max(end for row in spans for _, end in row)
    idle = tuple(makespan - table.m * sum(sum(times[kind][rank]) for kind in SEND) for rank in range(table.p))
    bubble = sum(idle) / (makespan * table.p) if makespan else 0.0
    return Simulation(table, tuple(map(tuple, lines)), spans, makespan, idle, bubble, table.peaks)


def _times(table: Schedule, forward: Times, backward: Times) -> dict[Kind, list[list[float]]]:
    """[kind][rank][chunk] from what `simulate` takes."""
    stages = table.p * table.v
    found = {}
    for kind, name, times in ((Kind.FORWARD, "forward", forward), (Kind.BACKWARD, "backward", backward)):
        if not isinstance(times, Sequence):
            times = [number(name, times) / table.v] * stages
        if len(times) != stages:
            raise ValueError(
                f"{name} has {len(times)} times, but p * v = {table.p} * {table.v} = {stages} stages need one each; "
                "or give the time of a rank's whole share, a number"
            )
        values = [_of_no_sign(name, time) for time in times]
        found[kind] = [values[rank :: table.p] for rank in range(table.p)]
    return found


def _of_no_sign(name: str, time: float) -> float:
    value = number(name, time)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a time, finite and not below zero, not {value}")
    return value


class _Run:
    """The ranks while their lines are run."""

    def __init__(
        self,
        table: Schedule,
        lines: Sequence[Row],
        messages: str,
        times: dict[Kind, list[list[float]]],
        transfer: float,
    ) -> None:
        self.table, self.lines, self.messages, self.times, self.transfer = table, lines, messages, times, transfer
        self.ready = dict.fromkeys(_at_the_ends(table), 0.0)  # (rank, computation): when what it needs was there
        self.sent: dict[tuple[int, int], deque[tuple[Action, float]]] = {}  # from, to: buffered (message, time), in order
        self.computed: set[tuple[int, Action]] = set()
        self.spans: list[list[tuple[float, float]]] = [[] for _ in lines]
        self.free = [0.0] * table.p

    def to_end(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Start and end of everything in the lines."""
        table, moved = self.table, True
        while moved:
            moved = False
            for rank in range(table.p):
                while self._head(rank) is not None and self._step(rank):
                    moved = True
        if any(self._head(rank) is not None for rank in range(table.p)):
            raise ValueError(self._stuck())
        lost = [f"{message} from rank {a} to {b}" for (a, b), queue in self.sent.items() for message, _ in queue]
        if lost:
            raise ValueError(f"nobody receives {', '.join(lost[:5])}")
        return tuple(map(tuple, self.spans))

    def _head(self, rank: int) -> Action | None:
        done = len(self.spans[rank])
        return self.lines[rank][done] if done < len(self.lines[rank]) else None

    def _do(self, rank: int, start: float, end: float) -> None:
        self.spans[rank].append((start, end))
        self.free[rank] = end

    def _step(self, rank: int) -> bool:
        """Do the next thing of a rank, if it can be done."""
        action = self._head(rank)
        assert action is not None
        if action.kind in SEND:
            return self._compute(rank, action)
        if action.kind in SEND.values():
            return self._send(rank, action)
        return self._receive(rank, action)  # where sends are not buffered, the sender does both

    def _compute(self, rank: int, action: Action) -> bool:
        if (rank, action) not in self.ready:
            return False
        start = max(self.free[rank], self.ready[rank, action])
        end = start + self.times[action.kind][rank][action.chunk]
        self._do(rank, start, end)
        self.computed.add((rank, action))
        after = self.table.next(rank, action)
        if after is not None and (self.messages == "none" or after[0] == rank):
            self.ready[after] = end + (self.transfer if after[0] != rank else 0.0)
        return True

    def _send(self, rank: int, action: Action) -> bool:
        result = action._replace(kind=COMPUTES[action.kind])
        after = self.table.next(rank, result)
        if after is None or (rank, result) not in self.computed:
            raise ValueError(f"rank {rank} is to send with {action} what nobody needs, or what it has not computed yet")
        peer, message = after[0], after[1]._replace(kind=RECEIVE[after[1].kind])
        if self.messages == "buffered":
            self.sent.setdefault((rank, peer), deque()).append((message, self.free[rank] + self.transfer))
            self._do(rank, self.free[rank], self.free[rank])
            return True
        waits = self._head(peer)
        if waits is None or waits.kind not in RECEIVE.values() or self.table.peer(peer, waits) != rank:
            return False
        start = max(self.free[rank], self.free[peer])
        self._do(rank, start, start + self.transfer)
        self._arrives(rank, peer, message, start + self.transfer)
        return True

    def _receive(self, rank: int, action: Action) -> bool:
        peer = self.table.peer(rank, action)
        queue = self.sent.get((peer, rank))
        if not queue:
            return False
        message, time = queue.popleft()
        self._arrives(peer, rank, message, max(time, self.free[rank]))
        return True

    def _arrives(self, sender: int, rank: int, message: Action, end: float) -> None:
        waits = self._head(rank)
        if message != waits:
            raise ValueError(f"rank {rank} receives {waits}, but what rank {sender} sends first is {message}")
        self._do(rank, self.free[rank], end)
        self.ready[rank, message._replace(kind=COMPUTES[message.kind])] = end

    def _stuck(self) -> str:
        """The ranks that wait for each other, from the first that waits."""
        rank = next(r for r in range(self.table.p) if self._head(r) is not None)
        trail: list[int] = []
        while rank not in trail and self._head(rank) is not None:
            trail.append(rank)
            rank = self._waits_for(rank)
        if rank in trail:
            trail = trail[trail.index(rank) :]
        waits = [f"rank {r} at {self._head(r)} waits for rank {self._waits_for(r)}" for r in trail]
        end = "" if rank in trail else ", which has done all that it has to"
        return f"deadlock in schedule {self.table.name}: {', '.join(waits)}{end}"

    def _waits_for(self, rank: int) -> int:
        action = self._head(rank)
        assert action is not None
        if action.kind not in SEND:
            return self.table.peer(rank, action)
        return (rank + (-1 if action.kind is Kind.FORWARD else 1)) % self.table.p
