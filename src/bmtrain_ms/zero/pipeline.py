"""When groups are gathered: on time at the latest, and those of one Block ahead where the order is known.

The order is learnt while it happens: after group A came group B last time, so while A computes, B is gathered. A wrong guess costs
a gather, never a result: what was gathered for nothing is dropped before anything else is gathered. The guesses depend only on
the order of calls, which is the same on every rank, so all ranks issue the same collectives.

[Note: sequences]
A sequence starts at the first call after a backward pass, whenever evaluation and training alternate, when an evaluation comes to a
group again or a model's evaluation is over, and after an optimizer of ours stepped. The first group of a sequence is never gathered
ahead: parameters often change between sequences, and the gather would be for nothing.

[Note: written in between]
Between two visits code of the user's may run, and write the parameters that were gathered ahead; nobody announces that. So before
a copy that was gathered ahead is used, each rank compares its piece of it with its shard, and all ranks agree whether to gather
again: what one rank finds written, another may not (equal values, empty shards). Nothing has to be agreed where no code of the
user's runs between the gather and the use, in a chain of Blocks (`undisturbed`) and in backward: whoever writes there is told when
the call ends (`Gathered.verify`). On a device nothing is gathered ahead but there: the program runs ahead of the device anyway.
"""

from __future__ import annotations

import contextlib
import weakref
from enum import Enum, auto
from typing import Iterable, Iterator

from ..comm import any_rank
from .buffers import BufferPool
from .group import Gathered, Meter, ParamGroup, ShardState
from .passes import Pass


class Phase(Enum):
    """What a visit is part of.

    FORWARD: recorded.  BACKWARD: recomputation and differentiation.  EVAL: a forward pass that is not recorded.
    """

    FORWARD = auto()
    BACKWARD = auto()
    EVAL = auto()


Visit = tuple[Phase, ParamGroup]

_SMALL = 1 / 8  # of the largest group: a smaller one does not count as gathered ahead, the one behind it is wanted as well
_MOST_AHEAD = 8  # small ones


class _Order:
    """What a group's visits were like.

    `followers`: phase -> the visit that came after.  `starts`: phases in which it has started a sequence.
    """

    def __init__(self) -> None:
        self.followers: dict[Phase, tuple[Phase, weakref.ref[ParamGroup]]] = {}
        self.starts: set[Phase] = set()


class GatherPipeline:
    """Decides which groups are FULL; those of at most `1 + prefetch` Blocks, besides small ones and those that ZeRO-2 keeps."""

    def __init__(self, pool: BufferPool, prefetch: int):
        if prefetch < 0:
            raise ValueError(f"prefetch must be 0 (off) or more, not {prefetch}")
        self.pool, self.prefetch, self.meter = pool, prefetch, Meter()
        self._largest = 0  # bytes of a group
        self._seen: weakref.WeakSet[ParamGroup] = weakref.WeakSet()  # what an evaluation has visited
        self._last: Visit | None = None
        self._pass = Pass()  # of the last visit
        self._ahead: list[tuple[Visit, Gathered, object]] = []  # with the undisturbed stretch in which it was issued
        self._stretch: object = None  # where no code of the user's runs between visits; None: it may
        self._orders: weakref.WeakKeyDictionary[ParamGroup, _Order] = weakref.WeakKeyDictionary()
        self._held: dict[ParamGroup, Gathered | None] = {}  # those whose copy stays, once it is there

    def enter(self, group: ParamGroup, phase: Phase, of: Pass, parked: Gathered | None = None) -> Gathered:
        """Have the group FULL and start on what comes next.

        Args:
            of: the pass that the visit belongs to.
            parked: gather into this copy, whose memory a graph refers to.
        """
        held = self._held.get(group)
        if held is not None:
            held.tensors()
            return held
        visit = (phase, group)
        self._pass = of
        self._largest = max(self._largest, group.full_nbytes)
        self._learn(visit)
        gathered = self._take_ahead(visit, parked)
        gathered.tensors()
        if group in self._held:
            self._held[group] = gathered
        self._gather_ahead(visit, running=group)
        return gathered

    @contextlib.contextmanager
    def hold(self, groups: Iterable[ParamGroup], share: bool = False) -> Iterator[None]:
        """Inside the `with` statement a copy of these groups stays, once it is gathered, for all passes: what ZeRO-2 is where
        several micro-batches are under way. Nobody may write the parameters.

        `share`: nobody would notice either: of groups that are whole no copy is made.
        """
        added = self._hold(groups)
        for group in added if share else ():
            if group.is_whole:
                shared = self._held[group] = Gathered(group, self.pool, self.meter)
                shared.share()
        try:
            yield
        finally:
            self._let_go(added)

    def hold_until_end(self, groups: Iterable[ParamGroup], of: Pass) -> None:
        """Hold copies of the groups, as `hold` does, until a pass has ended."""
        added = self._hold(groups)
        if added:
            of.at_end(lambda: self._let_go(added))

    def _hold(self, groups: Iterable[ParamGroup]) -> list[ParamGroup]:
        """Hold the groups; returns those of them that were not held before. Copies that are there already are used again, unless
        the parameters were written: a pass that an error ended, or that nobody differentiates, may have left them."""
        added = []
        for group in dict.fromkeys(groups):
            gathered = self._held.get(group)
            if gathered is not None and self._written_anywhere(gathered):
                gathered.release()
                self._held[group] = None
            elif group not in self._held:
                self._held[group] = None
                added.append(group)
        return added

    def _let_go(self, groups: Iterable[ParamGroup]) -> None:
        for group in groups:
            gathered = self._held.pop(group)
            if gathered is not None:
                gathered.release()

    def holds(self, gathered: Gathered) -> bool:
        """Whether the copy stays whatever those do who used it."""
        return self._held.get(gathered.group) is gathered

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside the `with` statement no code of the user's runs between visits, see [Note: written in between]."""
        before = self._stretch
        self._stretch = before or object()
        try:
            yield
        finally:
            self._stretch = before
            # What comes next may be another model, and gone by the next time: when it is, each rank's garbage collector decides,
            # and ranks would not gather the same ahead.
            if before is None and self._last is not None and self._last[0] is Phase.EVAL:
                self.parameters_changed()

    def leave(self, copies: Iterable[Gathered]) -> None:
        """The call is over, and nobody needs the copies."""
        released = [gathered for gathered in copies if not self.holds(gathered)]
        for gathered in released:
            gathered.release()
        if released:
            self._after_release()

    def park(self, copies: Iterable[Gathered]) -> None:
        """The call is over, but the graph refers to the copies' memory, which is filled again before backward."""
        parked = [gathered.park() for gathered in copies]
        if any(parked):
            self._after_release()

    def end_sequence(self) -> None:
        """End the sequence, see [Note: sequences], and let go of what was gathered ahead."""
        self._drop_ahead()
        self._last = None
        self.pool.trim()

    def parameters_changed(self) -> None:
        """What was gathered ahead is old, and the next visit starts a sequence."""
        self._drop_ahead()
        self._last = None

    def _learn(self, visit: Visit) -> None:
        phase, group = visit
        again = phase is Phase.EVAL and group in self._seen
        if again or (self._last is not None and (self._last[0] is Phase.EVAL) != (phase is Phase.EVAL)):
            self.parameters_changed()
        if self._last is None:
            self._order(group).starts.add(phase)
            self._seen.clear()
        else:
            before, last = self._last
            self._order(last).followers[before] = (phase, weakref.ref(group))
        if phase is Phase.EVAL:
            self._seen.add(group)
        self._last = visit

    def _take_ahead(self, visit: Visit, parked: Gathered | None) -> Gathered:
        if self._ahead:
            expected, gathered, stretch = self._ahead[0]
            if expected == visit and parked in (None, gathered):
                self._ahead.pop(0)
                trusted = visit[0] is Phase.BACKWARD or (stretch is not None and stretch is self._stretch)
                if trusted or not self._written_anywhere(gathered):
                    gathered.trusted = trusted
                    return gathered
                gathered.release()
            self._drop_ahead()  # another order than last time, or old values
        return parked or Gathered(visit[1], self.pool, self.meter)

    @staticmethod
    def _written_anywhere(gathered: Gathered) -> bool:
        """Whether any rank has written a parameter since it was gathered; the same answer on all."""
        label = f"{gathered.group.label} written since it was gathered"
        return any_rank(gathered.group.engine, bool(gathered.written()), label)

    def _drop_ahead(self) -> None:
        for _, gathered, _ in self._ahead:
            if gathered.parked:
                gathered.park()
            else:
                gathered.release()
        self._ahead = []

    def before_reduce(self) -> None:
        """Gradients are about to be reduced, of a call whose copies are released: see [Note: gathers before reduces]."""
        if self._last is not None:
            self._gather_ahead(self._last, running=None, more=1)

    def _after_release(self) -> None:
        if self._last is not None:
            self._gather_ahead(self._last, running=None)

    def _order(self, group: ParamGroup) -> _Order:
        found = self._orders.get(group)
        if found is None:
            found = self._orders[group] = _Order()
        return found

    def _following(self, visit: Visit) -> Visit | None:
        """What came after it last time, unless that starts a sequence."""
        followers = self._order(visit[1]).followers
        if visit[0] not in followers:
            return None
        phase, reference = followers[visit[0]]
        group = reference()  # None: the model is gone
        return None if group is None or phase in self._order(group).starts else (phase, group)

    def _gather_ahead(self, visit: Visit, running: ParamGroup | None, more: int = 0) -> None:
        first = visit[0]
        counted = [(first, visit[1].block)]  # of which groups are gathered ahead, behind the one that is visited
        walked = 0  # of those that are gathered ahead, which held ones are not among
        for depth in range(self.prefetch * _MOST_AHEAD):
            previous, following = visit, self._following(visit)
            if following is None:
                return
            visit = following
            phase, group = visit
            # The limit comes first: it counts the Blocks that earlier calls have issued, too, which are passed over further down.
            # What forbids to issue one ends the walk: copies are taken in the order in which they were issued, and a visit that
            # is not the next one drops them all.
            another = (phase, group.block) != counted[-1]
            if another and len(counted) > self.prefetch + more:
                return
            if self._held.get(group) is not None:
                continue
            if another and group.full_nbytes >= _SMALL * self._largest:
                counted.append((phase, group.block))
            walked += 1
            if walked <= len(self._ahead):
                continue
            if phase is not previous[0] and depth > 0:
                return  # the forward pass that leads to this backward visit is still ahead
            if not group.engine.lands_in_place and self._stretch is None and phase is not Phase.BACKWARD:
                return
            if running is not None and (group is running or (group.block is running.block and phase is not first)):
                return  # its own copy is still FULL: gathered ahead when that is released
            # of the pass that is under way: a guess, where it is another one whose backward pass comes next
            parked = self._pass.parked(group) if phase is Phase.BACKWARD else None
            gathered = parked or Gathered(group, self.pool, self.meter)
            if gathered.state is ShardState.FULL:
                return
            gathered.issue()
            self._ahead.append((visit, gathered, self._stretch))
