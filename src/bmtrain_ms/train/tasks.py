"""What is computed of a batch, and minimised."""

from __future__ import annotations

from typing import Callable, Protocol, Sequence

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
        """Batch -> its mean loss on this rank, a scalar; all ranks call it together."""
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

    @property
    def loss(self) -> Callable[[Batch], Tensor]:
        """Batch -> nats per token that counts, in float32."""
        own = getattr(self.model, "loss", None)
        return _InStages(own) if isinstance(own, Scheduled) else self._of_batch

    def _of_batch(self, batch: Batch) -> Tensor:
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


class _InStages(Scheduled):
    """The loss of a model in pipeline stages, of a batch; such a model makes its own gradients."""

    def __init__(self, loss: Scheduled):
        self._of_tensors = loss

    def __call__(self, batch: Batch) -> Tensor:
        return self._of_tensors(*_tensors(batch))

    def differentiated(self, params: Sequence[Parameter], scale: float, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        return self._of_tensors.differentiated(params, scale, *_tensors(batch))


def _tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    if batch.weights is not None or batch.documents is not None:
        raise ValueError(
            "a model in pipeline stages takes ids and targets only: mask tokens by targets of -100, and leave weights "
            "and documents out"
        )
    return from_host(batch.ids), from_host(batch.targets)
