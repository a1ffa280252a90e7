"""What is computed of a batch, and minimised."""

from __future__ import annotations

from typing import Any, Callable, Protocol, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from bmtrain_ms_base.data import Batch

from ..compat.runtime import from_host
from ..model_center.model import Llama
from ..nn.functional import cross_entropy
from ..parallel import Scheduled


class Task(Protocol):
    """A model, and what it is to learn of a batch."""

    @property
    def model(self) -> nn.Cell:
        """What is trained and saved."""
        ...

    @property
    def loss(self) -> Callable[[Batch], Tensor]:
        """A method, or another function, of a batch: its mean loss on this rank, a scalar. All ranks call it together.

        A `Scheduled` where the model is in pipeline stages: it is given to the manager as it is.
        """
        ...


class Pretrain:
    """The next token of a causal language model, by cross entropy.

    Targets of -100 do not count. Where a batch has weights the loss is the weighted mean over this rank's targets.

    Args:
        model: token ids (batch, length) -> logits (batch, length, vocab), or one in pipeline stages; takes `documents=` if batches
            have them, as `Llama` does.

    Attributes:
        loss: nats per token that counts, in float32, of a batch.
    """

    def __init__(self, model: nn.Cell):
        if not isinstance(model, nn.Cell):
            raise TypeError(f"Pretrain takes a model, a Cell of MindSpore's, not {type(model).__name__}")
        self.model = model
        staged = getattr(model, "loss", None)
        self.loss: Callable[[Batch], Tensor] = _StagedLoss(staged) if isinstance(staged, Scheduled) else self._loss

    def _loss(self, batch: Batch) -> Tensor:
        if batch.weights is None:
            return self._cross_entropy(batch, "mean")
        counted = (batch.weights * (batch.targets != -100)).reshape(-1)
        share = from_host((counted / max(float(counted.sum()), 1e-30)).astype(np.float32))
        return (self._cross_entropy(batch, "none") * share).sum()

    def _cross_entropy(self, batch: Batch, reduction: str) -> Tensor:
        ids, targets, documents = _tensors(batch)
        if isinstance(self.model, Llama):  # the same bits, without all logits at once
            return self.model.loss(ids, targets, **documents, reduction=reduction)
        logits = self.model(ids, **documents)
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction=reduction)


class _StagedLoss(Scheduled):
    """The loss of a batch, by that of a model in pipeline stages, which the manager must see: it makes its gradients itself."""

    def __init__(self, staged: Scheduled):
        self._staged = staged

    def __call__(self, batch: Batch) -> Tensor:
        ids, targets, documents = self._arguments(batch)
        return self._staged(ids, targets, **documents)

    def differentiated(self, params: Sequence[Parameter], scale: float, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """See `Scheduled`.

        Raises:
            ValueError: the batch has weights.
        """
        ids, targets, documents = self._arguments(batch)
        return self._staged.differentiated(params, scale, ids, targets, **documents)

    @staticmethod
    def _arguments(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        if batch.weights is not None:
            raise ValueError(
                "the loss of a model in pipeline stages takes no weights of targets: leave them out, or spread the model over one "
                "stage; targets that are not to count at all are -100"
            )
        return _tensors(batch)


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    documents = {} if batch.documents is None else {"documents": from_host(batch.documents)}
    return from_host(batch.ids), from_host(batch.targets.reshape(-1)), documents
