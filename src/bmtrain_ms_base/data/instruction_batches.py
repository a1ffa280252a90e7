"""Batches of conversations, as `prepare` or ModelLink has written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bmtrain_ms_base.checks import whole

from .batch import IGNORED, Batch
from .extras import refuse_long
from .indexed import IndexedError, IndexedFile
from .instructions import OUTPUTS
from .sampling import epoch_order


class InstructionBatches:
    """Rows of conversations, shuffled anew in each epoch. A batch is a pure function of the step, so there is no state to save.

    Args:
        prefix: of the three pairs `PREFIX_packed_input_ids_document`, `PREFIX_packed_attention_mask_document` and
            `PREFIX_packed_labels_document`.
        length: tokens of a row; shorter ones are padded.
        global_batch: rows of a step over all ranks.
        seed: of the shuffling.

    Attributes:
        rows: how many there are.
        files: the three, open.

    Raises:
        IndexedError: a file is damaged, the three do not fit together, or a row is longer.
        DataError: memory has no room for a row.
        ValueError: there are fewer rows than a step needs.
    """

    def __init__(self, prefix: str | Path, length: int, global_batch: int, seed: int = 0):
        self._length, self.global_batch = whole("length", length, 1), whole("global_batch", global_batch, 1)
        refuse_long(self._length)
        self._seed = whole("seed", seed, 0)
        self.files = [IndexedFile(f"{prefix}_{output}_document") for output in OUTPUTS]
        self.rows = len(self.files[0])
        for file in self.files[1:]:
            if not np.array_equal(file.lengths, self.files[0].lengths):
                raise IndexedError(f"{file.name} has other rows than {self.files[0].name}: prepare them together")
        longest = int(self.files[0].lengths.max(initial=0))
        if longest > self._length:
            raise IndexedError(
                f"{self.files[0].name} has a row of {longest} tokens, longer than {self._length}: give a larger length"
            )
        if self.rows < self.global_batch:
            raise ValueError(f"{self.files[0].name} has {self.rows} rows, a step needs {self.global_batch}: use a smaller batch")

    @property
    def described(self) -> dict[str, Any]:
        """What decides which row is at which step, and what is in it; JSON can hold it."""
        files = [file.digest for file in self.files]
        return {"conversations": files, "length": self._length, "global_batch": self.global_batch, "seed": self._seed}

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The rows of one rank at one step, counted from 0.

        Raises:
            DataError: memory has no room for them.
            ValueError: the global batch is not a multiple of the number of ranks.
        """
        if self.global_batch % ranks:
            raise ValueError(f"a global batch of {self.global_batch} cannot be split evenly over {ranks} ranks")
        share = self.global_batch // ranks
        refuse_long(self._length, share)
        first = step * self.global_batch + rank * share
        ids, targets, documents = (np.stack(arrays) for arrays in zip(*(self._row(i) for i in range(first, first + share))))
        return Batch(ids, targets, documents=documents)

    def _row(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        epoch, place = divmod(sample, self.rows)
        row = int(epoch_order(self._seed, epoch, self.rows)[place])
        ids, documents, labels = (file.read(row).astype(np.int32) for file in self.files)
        rest = self._length - len(ids)
        ids, documents = np.pad(ids, (0, rest)), np.pad(documents, (0, rest))
        targets = np.full(self._length, IGNORED, np.int32)
        targets[: len(labels) - 1] = labels[1:]
        targets[:-1][documents[1:] != documents[:-1]] = IGNORED
        # padding is a document of its own, behind the others
        return ids, targets, np.where(documents == 0, documents.max() + 1, documents) - 1
