"""Passes: what is kept from a forward pass for the backward pass that belongs to it.

[Note: passes]
Usually one is open at a time: a function is differentiated, and its backward pass follows at once. A pipeline stage has several
micro-batches under way, forward passes of the younger ones between a forward pass and its backward pass. What a backward pass has
ended with is let go of; what belongs to others must stay, as their recorded graphs read it.
"""

from __future__ import annotations

from typing import Callable

from .group import Gathered, ParamGroup


class Pass:
    """The gathered copies that one forward pass keeps."""

    def __init__(self) -> None:
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

    def end(self) -> None:
        """Let go of everything: the backward pass has ended, or there will be none."""
        for gathered in self._kept:
            gathered.release()
        ends, self._kept, self._ends = self._ends, [], []
        for end in ends:
            end()

    def at_end(self, end: Callable[[], None]) -> None:
        """Call `end` when the pass has ended."""
        self._ends.append(end)
