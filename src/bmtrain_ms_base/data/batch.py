"""What a step is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

IGNORED = -100  # a target that is not to be learnt


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's rows of a step, as NumPy arrays of one shape, (rows, length).

    `ids`: int32, the tokens.  `targets`: int32, for each of them the one to come; -100 where none is to be learnt.
    `weights`: float32, what each target counts, or None: all the same.
    `documents`: int32, which document of its row a token belongs to, where rows hold several that do not see each other, or None.
    `count`: what all targets of the step count, on average of the ranks: what the sum of the losses is divided by, so that the mean
    over ranks is that over all targets. None: what those here count. `train.share_step` says it.
    `part`: of this rank's rows of the step, where they come in several batches whose gradients are added; 1: this is all of them.

    Raises:
        ValueError: two of them have different shapes.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None
    documents: np.ndarray | None = None
    count: float | None = None
    part: float = 1.0

    def __post_init__(self) -> None:
        for name in ("targets", "weights", "documents"):
            array = getattr(self, name)
            if array is not None and array.shape != self.ids.shape:
                raise ValueError(f"{name} of a batch have the shape {array.shape}, its ids {self.ids.shape}: make them alike")

    @property
    def counted(self) -> float:
        """What the targets count, together: their number, without those of -100, or the sum of their weights."""
        counts = self.targets != IGNORED
        return float(counts.sum() if self.weights is None else (self.weights * counts).sum(dtype=np.float64))

    def pieces(self, rows: int) -> list[Batch]:
        """The batch in parts of so many rows.

        Raises:
            ValueError: they are not a whole number, or the batch has been told already how many targets its step has.
        """
        if self.count is not None:
            raise ValueError("divide a batch before it is told what its step has: share_step(batch.pieces(rows))")
        if rows < 1 or len(self.ids) % rows:
            raise ValueError(f"a batch of {len(self.ids)} rows cannot be divided into parts of {rows}")
        if rows == len(self.ids):
            return [self]
        parts = [slice(start, start + rows) for start in range(0, len(self.ids), rows)]
        weights, documents = self.weights, self.documents
        return [
            Batch(
                self.ids[part],
                self.targets[part],
                None if weights is None else weights[part],
                None if documents is None else documents[part],
            )
            for part in parts
        ]


class Batches(Protocol):
    """Where batches come from: `TokenSampler` is one. A step is a pure function of its number, so there is no state to save."""

    @property
    def described(self) -> dict[str, Any]:
        """What decides which row is at which step, and what is in it, for JSON: a run that goes on compares it."""
        ...

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The `rank`-th of `ranks` equal parts of a step, counted from 0; the step itself does not depend on their number."""
        ...


def changes(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two descriptions of data, each with both values: what would change which sample comes when."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text for key in {**before, **now} for text in changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [text for i, (x, y) in enumerate(zip(before, now)) for text in changes(x, y, f"{name}[{i}]")]
    return [] if before == now else [f"{name}: {before} then, {now} now"]
