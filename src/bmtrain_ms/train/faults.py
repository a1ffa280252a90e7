"""Steps that go wrong."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import numpy as np

from bmtrain_ms_base.data import Batch

_LOOKED_AT, _ENOUGH = 64, 16  # losses


class Faults:
    """Which steps are bad. Losses are means over all ranks, so all of them decide alike.

    Args:
        most: bad steps in a row that are tolerated; who asks counts.
        spike: a loss so many times the median of the last 64 is bad; None: only what is not finite is.

    Attributes:
        in_a_row: bad steps until now.
        recent: the last losses that were good, for `spike`.
    """

    def __init__(self, most: int, spike: float | None):
        self._most, self._spike = most, spike
        self.in_a_row = 0
        self.recent: list[float] = []

    def wrong(self, loss: float, grad_norm: float, finite: bool) -> str | None:
        """What is wrong with a step, in words; None if nothing is."""
        usual = statistics.median(self.recent) if self._spike and len(self.recent) >= _ENOUGH else math.inf
        if not finite:
            self.in_a_row += 1
            return f"loss {loss}, gradient norm {grad_norm}, not finite,"
        if self._spike and usual * self._spike < loss < math.inf:  # an overflow is for the loss scale to see
            self.in_a_row += 1
            return f"loss {loss:.4g}, more than {self._spike:g} times the usual {usual:.4g},"
        self.in_a_row = 0
        if self._spike and math.isfinite(loss):
            self.recent = [*self.recent, loss][-_LOOKED_AT:]
        return None


def keep_batch(path: Path, batch: Batch, step: int) -> None:
    """Write a batch as a file of NumPy's: `ids`, `targets`, `documents`, `step`. Where that fails it is said, and no more."""
    arrays = {name: getattr(batch, name) for name in ("ids", "targets", "documents") if getattr(batch, name) is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, step=step, **arrays)
    except OSError as error:
        sys.stderr.write(f"WARNING: the batch of a bad step cannot be kept in {path}: {error.strerror}\n")
