"""What is computed of a batch, and minimised."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from mindspore import Tensor, nn

from bmtrain_ms_base.data import Batch

from ..compat.runtime import from_host
from ..model_center.model import Llama
from ..nn.functional import cross_entropy


class Task(Protocol):
    """A model, and what it is to learn of a batch."""

    @property
    def model(self) -> nn.Cell:
        """What is trained and saved."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of the batch on this rank, a scalar; all ranks call it together."""
        ...


class Pretrain:
    """The next token of a causal language model, by cross entropy.

    Targets of -100 do not count. Where a batch has weights the loss is the weighted mean over this rank's targets.

    Args:
        model: token ids (batch, length) -> logits (batch, length, vocab); takes `documents=` if batches have them, as `Llama` does.
    """

    def __init__(self, model: nn.Cell):
        if not isinstance(model, nn.Cell):
            raise TypeError(f"Pretrain takes a model, a Cell of MindSpore's, not {type(model).__name__}")
        self.model = model

    def loss(self, batch: Batch) -> Tensor:
        """Nats per token that counts, in float32."""
        if batch.weights is None:
            return self._cross_entropy(batch, "mean")
        counted = (batch.weights * (batch.targets != -100)).reshape(-1)
        share = from_host((counted / max(float(counted.sum()), 1e-30)).astype(np.float32))
        return (self._cross_entropy(batch, "none") * share).sum()

    def _cross_entropy(self, batch: Batch, reduction: str) -> Tensor:
        ids, targets = from_host(batch.ids), from_host(batch.targets.reshape(-1))
        documents = {} if batch.documents is None else {"documents": from_host(batch.documents)}
        if isinstance(self.model, Llama):  # the same bits, without all logits at once
            return self.model.loss(ids, targets, **documents, reduction=reduction)
        logits = self.model(ids, **documents)
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction=reduction)
