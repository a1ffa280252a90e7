"""Pipeline schedules as tables: who computes what when, made and checked without ranks.

[Note: schedules]
p ranks form the pipeline; each holds v *chunks* of the model; a step has m micro-batches. *Stage* s = chunk * p + rank is the s-th
piece of the model, so that neighbours on the way through it are on neighbouring ranks, and after rank p - 1 comes rank 0. A
`Schedule` says in which order each rank computes; a function here makes each of the known ones. `simulation.py` works out in which
order ranks send and receive in between, and what all of it costs; `stages.py` which layers a stage holds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Callable, NamedTuple, Sequence

from .checks import whole


class Kind(Enum):
    """What a rank does: computes, or moves what was computed. *Backward* messages are gradients of forward ones."""

    FORWARD = "F"
    BACKWARD = "B"
    SEND_FORWARD = "SF"
    RECEIVE_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECEIVE_BACKWARD = "RB"


SEND = {Kind.FORWARD: Kind.SEND_FORWARD, Kind.BACKWARD: Kind.SEND_BACKWARD}
RECEIVE = {Kind.FORWARD: Kind.RECEIVE_FORWARD, Kind.BACKWARD: Kind.RECEIVE_BACKWARD}


class Action(NamedTuple):
    """One thing that a rank does, for one micro-batch and one of the rank's own chunks. It prints like `F3.0`.

    What is sent is the result of that chunk; what is received is its input, or the gradient of its result.
    """

    kind: Kind
    micro_batch: int
    chunk: int = 0

    def label(self, v: int) -> str:
        """How it is written where ranks have v chunks: `B3` if that is one, otherwise `B3.0`."""
        return f"{self.kind.value}{self.micro_batch}" if v == 1 else repr(self)

    def __repr__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}.{self.chunk}"


Row = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """The order in which each rank computes, see [Note: schedules].

    Attributes:
        name: what it is called.
        p, v, m: ranks, chunks of each, micro-batches.
        rows: for each rank the computations, in order.

    Raises:
        ValueError: a row does not have every micro-batch and chunk once forward and, later, once backward.
    """

    name: str
    p: int
    v: int
    m: int
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        _check(self.p, self.v, self.m)
        if len(self.rows) != self.p:
            raise ValueError(f"a schedule for p={self.p} ranks has a row for each, not {len(self.rows)} rows")
        whole_row = {Action(kind, b, c) for kind in SEND for b in range(self.m) for c in range(self.v)}
        for rank, row in enumerate(self.rows):
            place = {action: i for i, action in enumerate(row)}
            wrong = sorted(map(str, {*whole_row ^ set(row), *(a for a, n in Counter(row).items() if n > 1)}))
            if wrong:
                raise ValueError(f"rank {rank} must compute everything once; wrong are {', '.join(wrong[:5])}")
            for action in row:
                if action.kind is Kind.FORWARD and place[action] > place[action._replace(kind=Kind.BACKWARD)]:
                    raise ValueError(f"rank {rank} computes {action} after it went backward through it")

    def next(self, rank: int, action: Action) -> tuple[int, Action] | None:
        """(rank, computation) that needs the result of a rank's computation; none at the ends of the model."""
        stage = action.chunk * self.p + rank + (1 if action.kind is Kind.FORWARD else -1)
        return (stage % self.p, action._replace(chunk=stage // self.p)) if 0 <= stage < self.p * self.v else None

    def peer(self, rank: int, action: Action) -> int:
        """The rank with which a rank's send or receive exchanges."""
        onward = action.kind in (Kind.SEND_FORWARD, Kind.RECEIVE_BACKWARD)
        return (rank + (1 if onward else -1)) % self.p

    @property
    def peaks(self) -> tuple[int, ...]:
        """For each rank how many results of chunks are kept for the backward pass at once, at most; v of them are a whole share."""
        found = []
        for row in self.rows:
            kept = most = 0
            for action in row:
                kept += 1 if action.kind is Kind.FORWARD else -1
                most = max(most, kept)
            found.append(most)
        return tuple(found)

    def __str__(self) -> str:
        return "\n".join(f"rank {i}: " + " ".join(a.label(self.v) for a in row) for i, row in enumerate(self.rows))


def gpipe(p: int, m: int) -> Schedule:
    """All micro-batches forward, then all backward, the last one first (Huang et al. 2019; the order of BMTrain's pipelines).

    Idle are p - 1 forwards and backwards of each rank, and each keeps the results of all m micro-batches.

    Raises:
        ValueError: p or m is less than 1.
    """
    _check(p, 1, m)
    row = [Action(Kind.FORWARD, b) for b in range(m)] + [Action(Kind.BACKWARD, b) for b in reversed(range(m))]
    return Schedule("gpipe", p, 1, m, (tuple(row),) * p)


def one_f_one_b(p: int, m: int) -> Schedule:
    """1F1B: rank r goes forward min(m, p - 1 - r) times, then forward and backward in turns (Narayanan et al. 2021).

    It takes as long as GPipe, but rank r keeps the results of min(m, p - r) micro-batches only.

    Raises:
        ValueError: p or m is less than 1.
    """
    _check(p, 1, m)
    return Schedule("1f1b", p, 1, m, tuple(_in_turns(range(m), range(m), p - 1 - r, 1) for r in range(p)))


def interleaved(p: int, v: int, m: int, group: int | None = None) -> Schedule:
    """1F1B over v chunks of each rank, with a v-th of its idle time (Narayanan et al. 2021, section 2.2; Megatron-LM's order).

    `group` micro-batches (default p) pass a chunk before they all pass the next one. With v = 1 there is nothing to interleave: it
    is 1F1B. With p = 1 it is the same order on one rank, which passes results on to itself.

    Raises:
        ValueError: a number is less than 1, the group less than p, or the last group is neither full nor as large as p: then
            ranks would wait in the middle of the step for results that are not on their way yet.
    """
    _check(p, v, m)
    group = p if group is None else whole("group", group, 1)
    if v == 1:
        return Schedule("interleaved", p, v, m, one_f_one_b(p, m).rows)
    left = m % group
    if group < p or 0 < left < p:
        raise ValueError(_refusal(p, m, group))
    return Schedule("interleaved", p, v, m, interleaved_rows(p, v, m, group))


def interleaved_rows(p: int, v: int, m: int, group: int) -> tuple[Row, ...]:
    """The rows of `interleaved`, for any last group: with a short one ranks wait, or even for each other (p=4, v=3, m=5, group=4),
    which `simulate` says."""
    firsts = range(0, m, group)
    order = [b * v + c for first in firsts for c in range(v) for b in range(first, min(first + group, m))]
    back = [b * v + v - 1 - c for b, c in (divmod(i, v) for i in order)]
    return tuple(_in_turns(order, back, 2 * (p - 1 - r) + (v - 1) * group, v) for r in range(p))


NAMES: dict[str, Callable[..., Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved}


def schedule(name: str, p: int, m: int, v: int = 1, group: int | None = None) -> Schedule:
    """The schedule of a name: gpipe, 1f1b or interleaved, in upper or lower case.

    Raises:
        ValueError: an unknown name, chunks or a group for what has none, or what the schedule itself refuses.
    """
    known = str(name).lower()
    if known not in NAMES:
        raise ValueError(f"unknown pipeline schedule {name!r}; choose one of {', '.join(NAMES)}")
    if known == "interleaved":
        return interleaved(p, v, m, group)
    if v != 1 or group is not None:
        raise ValueError(f"{known} has one chunk on each rank and no groups: v={v}, group={group} need the schedule 'interleaved'")
    return NAMES[known](p, m)


def _check(p: int, v: int, m: int) -> None:
    whole("p, the number of pipeline ranks,", p, 1)
    whole("v, the number of chunks of a rank,", v, 1)
    whole("m, the number of micro-batches,", m, 1)


def _in_turns(forward: Sequence[int], backward: Sequence[int], ahead: int, v: int) -> Row:
    """So many forwards ahead, then forward and backward in turns, then the rest backward; numbers are micro-batch * v + chunk."""
    ahead = min(ahead, len(forward))
    fs, bs = ([Action(kind, *divmod(i, v)) for i in order] for kind, order in ((Kind.FORWARD, forward), (Kind.BACKWARD, backward)))
    turns = [action for pair in zip(fs[ahead:], bs) for action in pair]
    return (*fs[:ahead], *turns, *bs[len(fs) - ahead :])


def _refusal(p: int, m: int, group: int) -> str:
    """Why `interleaved` does not take this group of micro-batches, and the nearest numbers that it takes."""
    fits = [g for g in range(p, m + 1) if m % g == 0 or m % g >= p]
    remedy = [f"group={' or '.join(map(str, fits[:3]))}"] if fits else []
    if group < p:
        what = f"a group must have at least as many micro-batches as there are ranks, group >= p={p}, not {group}"
    else:
        what = f"m={m} micro-batches in groups of {group} leave a last group of {m % group}, fewer than the p={p} ranks"
        near = [n for n in (*range(m - 1, 0, -1), *range(m + 1, m + group + 1)) if n % group == 0 or n % group >= p]
        below, above = max((n for n in near if n < m), default=None), min(n for n in near if n > m)
        remedy.append(f"m={above}" if below is None else f"m={below} or m={above}")
    return f"interleaved: {what}; take {', or '.join([*remedy, 'the schedule 1f1b'])}"
