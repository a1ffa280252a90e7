"""Which tokens a rank reads at which step."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import xxhash

from bmtrain_ms_base.checks import whole

from .batch import Batch

_HASHED = 1 << 20  # tokens at a time


class TokenSampler:
    """Windows of a token array, shuffled anew in each epoch. A batch is a pure function of the step, so there is no state to save.

    The global batch does not depend on the number of ranks: rank r of n reads the r-th n-th of it.

    Args:
        tokens: one long array of token ids.
        length: tokens per window; targets are the inputs shifted by one.
        global_batch: windows per step over all ranks.
        seed: of the shuffling.
        tokenizer: that made the tokens, if it is known: its text, or a `tokenizers.Tokenizer`.

    Raises:
        ValueError: a size below 1, or fewer tokens than one global batch needs.
    """

    def __init__(self, tokens: np.ndarray, length: int, global_batch: int, seed: int = 0, tokenizer: Any = None):
        length, global_batch, seed = whole("length", length), whole("global_batch", global_batch), whole("seed", seed)
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise TypeError(f"tokens must be one long array of whole numbers, not of shape {tokens.shape} and type {tokens.dtype}")
        if length < 1 or global_batch < 1:
            raise ValueError(f"need length >= 1 and global_batch >= 1, not {length} and {global_batch}")
        self._tokens, self._length, self.global_batch, self._seed = tokens, length, global_batch, seed
        self._tokenizer = tokenizer if tokenizer is None or isinstance(tokenizer, str) else tokenizer.to_str()
        self.windows = max(0, len(tokens) - 1) // length
        if self.windows < global_batch:
            raise ValueError(
                f"{len(tokens)} tokens make {self.windows} windows of {length}, a step needs {global_batch}; "
                "use more text, a shorter length or a smaller batch"
            )

    @property
    def described(self) -> dict[str, Any]:
        """What decides which window is in which place, and what is in it; JSON can hold it."""
        sizes = {"tokens": len(self._tokens), "length": self._length, "global_batch": self.global_batch, "seed": self._seed}
        return {**sizes, **self._digests}

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        """Digests of the contents; about a second for each GB of tokens, once."""
        found = xxhash.xxh3_64()
        for start in range(0, len(self._tokens), _HASHED):
            piece = np.ascontiguousarray(
                self._tokens[start : start + _HASHED], np.int32
            )  # as batches are, whatever they are kept in
            found.update(piece.view(np.uint8).data)
        text = {} if self._tokenizer is None else {"tokenizer": xxhash.xxh3_64_hexdigest(self._tokenizer.encode())}
        return {"digest": found.hexdigest(), **text}

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The rows of one rank at one step, counted from 0: (global_batch / ranks, length).

        Raises:
            ValueError: the global batch is not a multiple of the number of ranks.
        """
        if self.global_batch % ranks:
            raise ValueError(f"a global batch of {self.global_batch} cannot be split evenly over {ranks} ranks")
        share = self.global_batch // ranks
        first = step * self.global_batch + rank * share
        chosen = [self._window(i) for i in range(first, first + share)]
        rows = np.stack([self._tokens[w * self._length : (w + 1) * self._length + 1] for w in chosen])
        return Batch(np.ascontiguousarray(rows[:, :-1], np.int32), np.ascontiguousarray(rows[:, 1:], np.int32))

    def _window(self, sample: int) -> int:
        epoch, place = divmod(sample, self.windows)
        return int(epoch_order(self._seed, epoch, self.windows)[place])


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """The order of an epoch's windows, by its number."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(windows)


def unigram_entropy(tokens: np.ndarray) -> float:
    """Nats per token that the best model without context would lose on these tokens."""
    counts = np.bincount(tokens)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())
