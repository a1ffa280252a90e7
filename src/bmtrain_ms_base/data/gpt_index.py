"""Which tokens are in which sample: Megatron's indices, number for number.

The sequences of a split are repeated for as many epochs as are needed, shuffled, and lie one behind the other; samples are windows
of that, each one token longer than its length, and are shuffled too. Both shuffles are those of one `numpy.random.RandomState`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np

from .extras import DataError, refuse_large

_INT32 = np.iinfo(np.int32).max
_ADVICE = "ask for fewer steps"


class SplitError(DataError):
    """A split that leaves nothing, where something is asked of it."""


def shares_of(split: str) -> list[float]:
    """The shares of training, validation and test that a split as `969,30,1` names.

    Raises:
        SplitError: it is no split.
    """
    parts = [float(x) for x in re.findall(r"[.0-9]*[0-9][.0-9]*", split)] if re.fullmatch(r"[.0-9,/ ]+", split) else []
    parts += [0.0] * (3 - len(parts))
    if len(parts) != 3 or not 0 < sum(parts) < math.inf:
        raise SplitError(f"a split is up to three numbers that are not all zero, e.g. 969,30,1; not {split!r}")
    return parts


def split_ranges(split: str, sequences: int) -> list[range | None]:
    """The sequences of training, validation and test, as Megatron divides them by e.g. `969,30,1`; None for a part of zero.

    Raises:
        SplitError: it is no split, or a part that is not zero would get no sequence.
    """
    parts = shares_of(split)
    ends = [0.0]
    for part in (np.array(parts) / np.sum(parts)).tolist():
        ends.append(ends[-1] + part)
    found: list[range | None] = []
    for name, part, begin, end in zip(("training", "validation", "test"), parts, ends, ends[1:]):
        chosen = range(round(begin * float(sequences)), round(end * float(sequences)))
        if part and not chosen:
            raise SplitError(
                f"the split {split} of {sequences:,} sequences leaves none for {name}: give it a larger part, or 0 to do without it"
            )
        found.append(chosen if part else None)
    return found


@dataclass(frozen=True)
class Epochs:
    """How often a split is read for a number of samples.

    Attributes:
        count: epochs.
        per_epoch: tokens in one.
        separate: the last one, of which little is needed, is shuffled by itself.
        before_last: samples in all epochs but the last; for one epoch: none.
        samples: in all epochs, of which the last ones may not be needed.
    """

    count: int
    per_epoch: int
    separate: bool
    before_last: int
    samples: int


def epochs_for(tokens: int, samples: int, length: int) -> Epochs:
    """How often so many tokens are to be read for so many samples of a length.

    Raises:
        SplitError: there are no tokens.
    """
    if tokens < 1:
        raise SplitError("there are no tokens, so that no number of epochs has a sample")
    count = max(1, -(-(samples * length + 1) // tokens))
    before_last, separate = 0, False
    if count > 1:
        before_last = ((count - 1) * tokens - 1) // length
        separate = samples - before_last < int(0.80 * ((tokens - 1) // length))
    return Epochs(count, tokens, separate, before_last, (count * tokens - 1) // length)


def build_indices(sizes: np.ndarray, chosen: range, epochs: Epochs, length: int, seed: int) -> dict[str, np.ndarray]:
    """The document, sample and shuffle index.

    Args:
        sizes: tokens of every sequence of the file.
        chosen: those of the split.
        epochs: see `epochs_for`.
        length: tokens of a sample, without the one that is its last target.
        seed: of both shuffles.

    Raises:
        DataError: memory has no room for them.
    """
    what = f"an index of {epochs.samples:,} samples, {epochs.count:,} epochs,"
    refuse_large(12 * epochs.count * len(chosen) + 40 * epochs.samples, what, _ADVICE)
    random = np.random.RandomState(seed)
    documents = _documents(chosen, epochs, random)
    samples = _samples(sizes, documents, epochs, length)
    return {"document_index": documents, "sample_index": samples, "shuffle_index": _shuffle(epochs, random)}


def _documents(chosen: range, epochs: Epochs, random: Any) -> np.ndarray:
    def shuffled(count: int) -> np.ndarray:
        made = np.tile(np.arange(chosen.start, chosen.stop, dtype=np.int32), count)
        random.shuffle(made)
        return made

    if epochs.separate:
        return np.concatenate([shuffled(epochs.count - 1), shuffled(1)])
    return shuffled(epochs.count)


def _samples(sizes: np.ndarray, documents: np.ndarray, epochs: Epochs, length: int) -> np.ndarray:
    """(place in the document index, token in that document) of the begin of each sample, and of the end of the last."""
    places = np.concatenate([[0], np.cumsum(sizes[documents], dtype=np.int64)])
    begins = np.arange(epochs.samples + 1, dtype=np.int64) * length
    found = np.searchsorted(places, begins, side="right") - 1
    samples = np.stack([found, begins - places[found]], 1)
    samples[0] = 0  # also where the first documents are empty
    large = max(len(documents), int(sizes.max(initial=0))) > _INT32
    return samples if large else samples.astype(np.int32)


def _shuffle(epochs: Epochs, random: Any) -> np.ndarray:
    kind = np.uint32 if epochs.samples < np.iinfo(np.uint32).max - 1 else np.int64
    cuts = [0, epochs.before_last, epochs.samples] if epochs.separate else [0, epochs.samples]
    parts = [np.arange(begin, end, dtype=kind) for begin, end in zip(cuts, cuts[1:])]
    for part in parts:
        random.shuffle(part)
    return np.concatenate(parts)


def blend_indices(weights: Sequence[float], samples: int) -> dict[str, np.ndarray]:
    """Which dataset each sample of a blend is from, and its number there: whoever is furthest behind its weight is next.

    Raises:
        DataError: a weight that is not positive, or too many of them.
    """
    shares = np.array(weights, np.float64)
    if not 1 <= len(shares) < 32767:
        raise DataError(f"a blend is of 1 to 32,766 datasets, not {len(shares):,}")
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise DataError(f"weights of a blend are positive numbers, not {', '.join(f'{x:g}' for x in weights)}")
    refuse_large(10 * samples, f"an index of a blend of {samples:,} samples", _ADVICE)
    from . import gpt_loops  # numba, which takes a second

    which, numbers = np.empty(samples, np.int16), np.empty(samples, np.int64)
    gpt_loops.blend(shares / shares.sum(), which, numbers)
    return {"dataset_index": which, "dataset_sample_index": numbers}
