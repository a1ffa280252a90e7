"""The batches of a run on samples: which rows a step has, for any number of ranks, and where the data ends."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bmtrain_ms_base.checks import whole

from .batch import Batch
from .extras import DataError, refuse_long

_SIZES = 100_000  # that a batch may have while it grows


class EndOfDataError(DataError):
    """A step for which there are not enough samples; every rank sees it alike, before the step begins."""


class Samples(Protocol):
    """Rows of tokens by number: `GPTData` and `Blend` are some.

    `length`: targets in each.  `samples`: how many there are.  `described`: all that decides which is where, and what is in it.
    """

    length: int
    samples: int

    @property
    def described(self) -> dict[str, Any]:
        """What decides which row is where, for JSON."""
        ...

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, one more than `length`, and the number of tokens of each document among them."""
        ...


@dataclass(frozen=True)
class RampUp:
    """A batch that grows with the samples consumed, as Megatron's `--rampup-batch-size start increment samples`."""

    start: int
    increment: int
    samples: int


@dataclass(frozen=True)
class _Phase:
    """Steps of one size, from the first one on."""

    step: int
    consumed: int
    size: int


class GPTBatches:
    """The batches of a run. What a step reads depends on how many samples were consumed before it, and on nothing else.

    Args:
        data: samples, a `GPTData` or a `Blend`.
        global_batch: rows of a step over all ranks.
        packed: documents of a row do not see each other, and the last token of each has no target; the boundaries are those of the
            index, whatever the tokens are. Otherwise a row is one text, as in Megatron.
        ramp_up: how the batch grows up to `global_batch`.

    Attributes:
        steps: for which there are samples.

    Raises:
        DataError: the ramp does not lead to the batch.
    """

    def __init__(self, data: Samples, global_batch: int, packed: bool = True, ramp_up: RampUp | None = None):
        self.data, self.global_batch = data, whole("global_batch", global_batch, 1)
        self._packed, self._ramp = packed, ramp_up
        self._phases = _phases(self.global_batch, ramp_up)
        last = next((phase for phase in reversed(self._phases) if phase.consumed <= data.samples), self._phases[0])
        self.steps = last.step + (data.samples - last.consumed) // last.size

    @property
    def described(self) -> dict[str, Any]:
        """What decides which row is at which step, and what is in it; JSON can hold it."""
        ramp = None if self._ramp is None else dataclasses.asdict(self._ramp)
        return {"samples": self.data.described, "global_batch": self.global_batch, "packed": self._packed, "ramp_up": ramp}

    def _phase(self, step: int) -> _Phase:
        return self._phases[bisect.bisect_right([phase.step for phase in self._phases], step) - 1]

    def size(self, step: int) -> int:
        """Rows of a step, over all ranks."""
        return self._phase(step).size

    def consumed(self, step: int) -> int:
        """Samples that were read before a step."""
        phase = self._phase(step)
        return phase.consumed + (step - phase.step) * phase.size

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The rows of one rank at one step, counted from 0.

        Raises:
            EndOfDataError: there are not enough samples for it, on any rank.
            DataError: memory has no room for them.
            ValueError: the rows of the step cannot be divided evenly over the ranks.
        """
        size, first = self.size(step), self.consumed(step)
        if size % ranks:
            raise ValueError(f"a global batch of {size}, at step {step}, cannot be split evenly over {ranks} ranks")
        if step >= self.steps:
            raise EndOfDataError(
                f"step {step} needs samples up to {first + size:,}, there are {self.data.samples:,}, for {self.steps:,} steps: "
                "make the data with more samples, which may repeat documents, or ask for fewer steps"
            )
        share = size // ranks
        refuse_long(self.data.length, share)
        rows = [self._row(first + rank * share + i) for i in range(share)]
        ids, targets, documents = (np.stack(arrays) for arrays in zip(*rows))
        return Batch(ids, targets, documents=documents if self._packed else None)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, lengths = self.data.sample(number)
        documents = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        targets = tokens[1:].astype(np.int32)
        if self._packed:
            targets[documents[1:] != documents[:-1]] = -100
        return tokens[:-1].astype(np.int32), targets, documents[:-1]


def samples_for(steps: int, global_batch: int, ramp_up: RampUp | None = None) -> int:
    """How many samples a number of steps consumes.

    Raises:
        DataError: the ramp does not lead to the batch.
    """
    phases = _phases(global_batch, ramp_up)
    last = next(phase for phase in reversed(phases) if phase.step <= steps)
    return last.consumed + (steps - last.step) * last.size


def _phases(target: int, ramp: RampUp | None) -> list[_Phase]:
    if ramp is None:
        return [_Phase(0, 0, target)]
    start, increment, samples = (whole(f"ramp_up.{f.name}", getattr(ramp, f.name)) for f in dataclasses.fields(ramp))
    if start < 1 or increment < 1 or samples < 0 or start > target or (target - start) % increment:
        raise DataError(f"from {start} rows, by {increment} more each time, a batch does not come to {target}: change these")
    count = (target - start) // increment
    if count > _SIZES:
        raise DataError(f"from {start} rows to {target:,} by {increment} are {count:,} sizes, more than {_SIZES:,}: grow by more")
    phases = [_Phase(0, 0, start if count and samples else target)]

    def size(consumed: int) -> int:
        return target if consumed >= samples else start + increment * int(consumed / (samples / count))

    while phases[-1].size < target:
        step, consumed, rows = phases[-1].step, phases[-1].consumed, phases[-1].size
        while size(consumed) == rows:
            # to the end of the phase at once, and then as far as rounding left it
            left = ((rows - start) // increment + 1) * (samples / count) - consumed
            steps = max(1, int(left // rows))
            step, consumed = step + steps, consumed + steps * rows
        phases.append(_Phase(step, consumed, size(consumed)))
    return phases
