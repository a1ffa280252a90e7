"""Samples of indexed files in Megatron's order, and blends of them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from bmtrain_ms_base.checks import whole

from .extras import DataError, refuse_long
from .gpt_cache import cached
from .gpt_index import SplitError, blend_indices, build_indices, epochs_for, split_ranges
from .indexed import IndexedFile

_MANY = 10  # epochs, beyond which it is said


class GPTData:
    """The samples of one file, or of a range of its sequences.

    Args:
        path: name of a pair of `.bin` and `.idx`, or one that is open.
        samples: how many are needed.
        length: tokens of a sample; the last one's target is one more.
        seed: of the shuffling; Megatron's default is 1234.
        chosen: which sequences, see `split_ranges`; None: all.
        cache: folder for indices, see `gpt_cache.cached`.
        build: make indices that are missing; False: another rank has made them.

    Attributes:
        file: the indexed file.
        epochs: how often it is read.

    Raises:
        SplitError: there is nothing in the range.
        IndexedError: the file is damaged.
        DataError: memory has no room for a row, or for the index.

    Warns:
        UserWarning: samples repeat the documents more than ten times.
    """

    def __init__(
        self,
        path: str | Path | IndexedFile,
        samples: int,
        length: int,
        seed: int = 1234,
        chosen: range | None = None,
        cache: Path | None = None,
        build: bool = True,
    ):
        self.file = path if isinstance(path, IndexedFile) else IndexedFile(path)
        self.samples, self.length = whole("samples", samples, 1), whole("length", length, 1)
        refuse_long(self.length)
        self._seed = whole("seed", seed, 0)
        self._chosen = range(len(self.file)) if chosen is None else chosen
        if not 0 <= self._chosen.start <= self._chosen.stop <= len(self.file):
            raise SplitError(f"{self.file.name} has {len(self.file)} sequences, not {self._chosen}")
        tokens = int(self.file.lengths[self._chosen.start : self._chosen.stop].sum(dtype=np.int64))
        if not tokens:
            raise SplitError(f"{self.file.name} has no tokens in its sequences {self._chosen.start} to {self._chosen.stop}")
        self.epochs = epochs_for(tokens, self.samples, self.length)
        if self.epochs.count > _MANY:
            warnings.warn(
                f"{self.samples:,} samples of {self.length:,} tokens repeat the {len(self._chosen):,} sequence(s) of "
                f"{self.file.name}, {tokens:,} tokens, {self.epochs.count:,} times",
                stacklevel=2,
            )
        made = cached(cache, self.file.name, {"kind": "gpt", "version": 1, **self._order}, self._build if build else None)
        self._documents, self._begins, self._shuffle = (made[f"{kind}_index"] for kind in ("document", "sample", "shuffle"))

    @property
    def _order(self) -> dict[str, Any]:
        settings = {"file": self.file.digest, "sequences": [self._chosen.start, self._chosen.stop], "seed": self._seed}
        # not how many samples: as long as the epochs are the same they only are more of the same order
        return {**settings, "length": self.length, "epochs": self.epochs.count, "last_epoch_apart": self.epochs.separate}

    def _build(self) -> dict[str, np.ndarray]:
        return build_indices(self.file.lengths, self._chosen, self.epochs, self.length, self._seed)

    @property
    def described(self) -> dict[str, Any]:
        """What decides which row is where, and what is in it; JSON can hold it."""
        return self._order

    def __len__(self) -> int:
        """Samples that all epochs have: at least those that are needed."""
        return len(self._shuffle)

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, one more than `length`, and the number of tokens of each document among them.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= number < len(self._shuffle):
            raise IndexError(f"{self.file.name} has {len(self._shuffle):,} samples; there is no {number}")
        place = int(self._shuffle[number])
        (first, begin), (last, end) = self._begins[place].tolist(), self._begins[place + 1].tolist()
        parts = []
        for i in range(first, last + 1):
            sequence = int(self._documents[i])
            stop = end + 1 if i == last else None
            parts.append(self.file.read(sequence, begin if i == first else 0, stop))
        lengths = np.array([len(part) for part in parts if len(part)], np.int64)
        return np.concatenate(parts), lengths


class Blend:
    """Samples of several, mixed by weights as Megatron mixes them.

    Args:
        parts: what is mixed; each needs as many samples as its weight asks for, and half a percent more, see `blend_sizes`.
        weights: positive numbers of any sum.
        samples: how many are needed.
        cache: folder for indices, see `gpt_cache.cached`.
        build: make an index that is missing; False: another rank has made it.

    Raises:
        DataError: weights that do not fit, or a part that has too few samples.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], samples: int, cache: Path | None = None, build: bool = True):
        if len(parts) != len(weights) or len({part.length for part in parts}) != 1:
            raise DataError(f"a blend has a weight for each part, and parts of one length; not {len(parts)} and {len(weights)}")
        self._parts, self._weights = list(parts), [float(x) for x in weights]
        self.samples, self.length = whole("samples", samples, 1), parts[0].length
        known = {"kind": "blend", "version": 1, "weights": self._weights, "samples": self.samples}
        beside = next((part.file.name for part in parts if isinstance(part, GPTData)), "blend")
        made = cached(cache, beside, known, (lambda: blend_indices(self._weights, self.samples)) if build else None)
        self._which, self._numbers = made["dataset_index"], made["dataset_sample_index"]
        counts = np.bincount(self._which, minlength=len(parts))
        for place, (part, count) in enumerate(zip(parts, counts)):
            if count > len(part):
                raise DataError(f"part {place} of the blend needs {count:,} samples and has {len(part):,}: see blend_sizes")

    @property
    def described(self) -> dict[str, Any]:
        """What decides which row is where, and what is in it; JSON can hold it."""
        return {"weights": self._weights, "parts": [part.described for part in self._parts]}

    def __len__(self) -> int:
        """The number of samples."""
        return self.samples

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, one more than `length`, and the number of tokens of each document among them.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= number < self.samples:
            raise IndexError(f"the blend has {self.samples:,} samples; there is no {number}")
        return self._parts[int(self._which[number])].sample(int(self._numbers[number]))


def blend_sizes(weights: Sequence[float], samples: int) -> list[int]:
    """How many samples each part of a blend is made with, as Megatron does: its share, and half a percent."""
    shares = np.array(weights, np.float64) / np.sum(weights, dtype=np.float64)
    return [math.ceil(samples * share * 1.005) for share in shares.tolist()]


def gpt_data(
    paths: Sequence[str | IndexedFile],
    samples: Sequence[int],
    length: int,
    split: str = "969,30,1",
    seed: int = 1234,
    cache: Path | None = None,
    build: bool = True,
) -> list[Any]:
    """Training, validation and test samples of a `--data-path`: a `GPTData` or a `Blend` each, None where there are none.

    Args:
        paths: names of pairs, or such that are open; or weights and names in turn.
        samples: how many are needed of training, validation and test; 0: none.
        length: tokens of a sample.
        split: how sequences are divided among the three.
        seed: of the shuffling.
        cache: folder for indices, see `gpt_cache.cached`.
        build: make indices that are missing; False: another rank has made them.

    Raises:
        DataError: paths that are none, files that are damaged, or a split that leaves nothing where samples are needed.
    """
    weights, files = open_files(paths)
    ranges = [split_ranges(split, len(file)) for file in files]
    made: list[Any] = []
    for place, (kind, count) in enumerate(zip(("training", "validation", "test"), samples)):
        if not count:
            made.append(None)
            continue
        if any(chosen[place] is None for chosen in ranges):
            raise SplitError(f"the split {split} has nothing for {kind}, of which {count:,} samples are needed")
        sizes = blend_sizes(weights, count) if len(files) > 1 else [count]
        parts = [GPTData(file, size, length, seed, chosen[place], cache, build) for file, size, chosen in zip(files, sizes, ranges)]
        made.append(parts[0] if len(parts) == 1 else Blend(parts, weights, count, cache, build))
    return made


def open_files(paths: Sequence[str | IndexedFile]) -> tuple[list[float], list[IndexedFile]]:
    """The weights and the files of a data path as `gpt_data` takes it, all of them opened and checked.

    Raises:
        DataError: paths that are none, or files that are missing or damaged.
    """
    weights, files = _weighted(paths)
    return weights, [file if isinstance(file, IndexedFile) else IndexedFile(file) for file in files]


def _weighted(paths: Sequence[str | IndexedFile]) -> tuple[list[float], list[str | IndexedFile]]:
    words = " ".join(path.name if isinstance(path, IndexedFile) else path for path in paths)
    try:
        float(paths[0])  # type: ignore[arg-type]
    except (ValueError, TypeError, IndexError):
        if len(paths) == 1:
            return [1.0], list(paths)
        raise DataError(f"a data path is one name, or weights and names in turn; not {words or 'nothing'}") from None
    try:
        weights = [float(x) for x in paths[::2]]  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise DataError(f"weights and names have to take turns: {words} ({error})") from error
    if len(paths) % 2:
        raise DataError(f"the weight {paths[-1]} has no name behind it")
    return weights, list(paths[1::2])
