"""Passes: what is kept from a forward pass for the backward pass that belongs to it.

[Note: passes]
Usually one is open at a time: a function is differentiated, and its backward pass follows at once. A pipeline stage has several
micro-batches under way, forward passes of the younger ones between a forward pass and its backward pass. What a backward pass has
ended with is let go of; what belongs to others must stay, as their recorded graphs read it.
"""

from __future__ import annotations

from typing import Callable, Protocol

from .group import Gathered, ParamGroup


class Expectant(Protocol):
    """A call that leaves it to its backward pass to look whether parameters were written, see `Call`."""

    def verify(self) -> None:
        """Raise RuntimeError where one was."""
        ...

    def abandon(self) -> None:
        """No backward pass came."""
        ...


class Pass:
    """The gathered copies that one forward pass keeps, and the calls whose backward passes are to come."""

    def __init__(self) -> None:
        self._expected: dict[int, Expectant] = {}
        self._kept: list[Gathered] = []
        self._ends: list[Callable[[], None]] = []

    def keep(self, gathered: Gathered) -> None:
        """Let go of this copy when the pass has ended, if nobody does so before."""
        self._kept.append(gathered)

    def forget(self, gathered: Gathered) -> None:
        """Somebody has let go of the copy, or will; it need not be among those that are kept."""
        if gathered in self._kept:
            self._kept.remove(gathered)

    def parked(self, group: ParamGroup) -> Gathered | None:
        """The youngest copy of a group whose memory a recorded graph of this pass refers to."""
        return next((gathered for gathered in reversed(self._kept) if gathered.group is group and gathered.parked), None)

    def expect(self, call: Expectant) -> None:
        """The call counts on its backward pass."""
        self._expected[id(call)] = call

    def expect_no_more(self, call: Expectant) -> None:
        """The call's backward pass came; it need not have been expected."""
        self._expected.pop(id(call), None)

    def verify(self) -> None:
        """The backward pass has ended: look at what it has not come to, results that nothing was differentiated through.

        Raises:
            RuntimeError: parameters were written while a call computed with them.
        """
        expected, self._expected = self._expected, {}
        for call in expected.values():
            call.abandon()
        for call in expected.values():
            call.verify()

    def end(self) -> None:
        """Let go of everything: the backward pass has ended, or there will be none."""
        self._expected = {}
        for gathered in self._kept:
            gathered.release()
        ends, self._kept, self._ends = self._ends, [], []
        for end in ends:
            end()

    def at_end(self, end: Callable[[], None]) -> None:
        """Call `end` when the pass has ended."""
        self._ends.append(end)
