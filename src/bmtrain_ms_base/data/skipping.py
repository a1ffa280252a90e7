"""Batches that are left out."""

from __future__ import annotations

from typing import Any, Sequence

from .batch import Batch, Batches


class Skipping:
    """Batches without some of them: those that made a run diverge, say. Which batch a step has is a function of its number.

    Args:
        batches: all of them.
        left_out: numbers of those that no step has, from 0 on.
    """

    def __init__(self, batches: Batches, left_out: Sequence[int] = ()):
        self.batches, self._left_out = batches, sorted(set(left_out))

    @property
    def described(self) -> dict[str, Any]:
        """The description of all batches: which ones are left out may change in what is still to come."""
        return self.batches.described

    def number(self, step: int) -> int:
        """Which batch a step has."""
        found = step
        for skipped in self._left_out:
            if skipped > found:
                break
            found += 1
        return found

    def position(self, step: int) -> dict[str, Any]:
        """Where a run is that has done so many steps, and what it has left out until then; a run that goes on compares it."""
        last = self.number(step - 1) if step else -1
        return {"last_batch": last, "left_out": [skipped for skipped in self._left_out if skipped < last]}

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The rows of one rank at one step, counted from 0."""
        return self.batches.batch(self.number(step), rank, ranks)
