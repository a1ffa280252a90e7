"""What is computed of a batch, and minimised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Protocol, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from bmtrain_ms_base.data import Batch
from bmtrain_ms_base.data.batch import IGNORED

from ..comm import World, reduce_numbers
from ..comm import world as current_world
from ..compat.runtime import from_host
from ..model_center.model import CausalLM
from ..nn.functional import cross_entropy, times
from ..parallel import Scheduled
from ..zero import context_of


class Task(Protocol):
    """A model, and what it is to learn of a batch."""

    @property
    def model(self) -> nn.Cell:
        """What is trained and saved."""
        ...

    @property
    def loss(self) -> Callable[[Batch], Tensor]:
        """A method, or another function, of a batch: its loss on this rank, a scalar, of which the mean over ranks is minimised,
        and the sum where a step has several batches; see `Batch.count`. All ranks call it together.

        A `Scheduled` where the model is in pipeline stages: it is given to the manager as it is.
        """
        ...


class Pretrain:
    """The next token of a causal language model, by cross entropy.

    The mean over ranks is that over all targets of the step that count, whatever rank and batch they are in, if batches know how
    many there are (`share_step`; a `Trainer` tells them). Without, it is the mean over this batch's. Targets of -100 do not count;
    where a batch has weights means are weighted. What routers add is a mean over tokens, as it is anywhere.

    Args:
        model: token ids (batch, length) -> logits (batch, length, vocab), or one in pipeline stages; takes `documents=` if batches
            have them, as `Llama` does.

    Attributes:
        loss: nats per target that counts, in float32, of a batch.
    """

    def __init__(self, model: nn.Cell):
        if not isinstance(model, nn.Cell):
            raise TypeError(f"Pretrain takes a model, a Cell of MindSpore's, not {type(model).__name__}")
        self.model = model
        staged = getattr(model, "loss", None)
        self.loss: Callable[[Batch], Tensor] = _StagedLoss(staged) if isinstance(staged, Scheduled) else self._loss

    def _loss(self, batch: Batch) -> Tensor:
        if batch.weights is None:
            return times(self._cross_entropy(batch, "mean", _weight(batch)), batch.part)
        counted = (batch.weights * (batch.targets != IGNORED)).reshape(-1)
        share = from_host((counted / max(batch.counted if batch.count is None else batch.count, 1e-30)).astype(np.float32))
        return (self._cross_entropy(batch, "none") * share).sum()

    def _cross_entropy(self, batch: Batch, reduction: str, weight: float = 1.0) -> Tensor:
        ids, targets, documents = _tensors(batch)
        if isinstance(self.model, CausalLM):  # without all logits at once, and with what routers add
            return self.model.loss(ids, targets, **documents, reduction=reduction, weight=weight)
        logits = self.model(ids, **documents)
        return times(cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction=reduction), weight)


class _StagedLoss(Scheduled):
    """The loss of a batch, by that of a model in pipeline stages, which the manager must see: it makes its gradients itself."""

    def __init__(self, staged: Scheduled):
        self._staged = staged

    def __call__(self, batch: Batch) -> Tensor:
        ids, targets, documents = self._arguments(batch)
        return times(self._staged(ids, targets, **documents), batch.part)

    def differentiated(self, params: Sequence[Parameter], scale: float, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients, see `Scheduled`.

        Raises:
            ValueError: the batch has weights.
        """
        ids, targets, documents = self._arguments(batch)
        loss, grads = self._staged.differentiated(params, scale * batch.part, ids, targets, **documents)
        return times(loss, batch.part), grads

    @staticmethod
    def _arguments(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        if batch.weights is not None:
            raise ValueError(
                "the loss of a model in pipeline stages takes no weights of targets: leave them out, or spread the model over one "
                "stage; targets that are not to count at all are -100"
            )
        ids, targets, options = _tensors(batch)
        return ids, targets, {**options, "weight": _weight(batch)}


def share_step(batches: Sequence[Batch], in_world: World | None = None) -> list[Batch]:
    """The batches of a step on this rank, told how many targets the step has: see `Batch.count`.

    Their gradients, added up by `OptimManager.backward(task.loss, batch)` and averaged over the ranks, are then those of the mean
    over all targets that count, of all ranks and batches. All ranks call it together, before the first of the step; ranks may have
    other numbers of rows, and none that count. It takes one all-reduce of one number, where ranks have different rows.

    Args:
        batches: of this step on this rank, one or several.
        in_world: the ranks; default: the current world.
    """
    world = in_world or current_world()
    count = sum(batch.counted for batch in batches)
    if context_of(world).data_ranks > 1:  # ranks that read the same rows count them equally often, so that the mean is over all
        count = reduce_numbers(world.everyone, [count], "targets that count", np.float64, "mean").item()
    rows = sum(len(batch.ids) for batch in batches)
    return [replace(batch, count=count, part=len(batch.ids) / rows) for batch in batches]


def _weight(batch: Batch) -> float:
    """What the mean over a batch's targets is multiplied with to have all targets of the step count alike; `part` comes on top."""
    if batch.count is None:
        return 1.0
    return batch.counted / (batch.count * batch.part) if batch.count else 0.0


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    documents = {} if batch.documents is None else {"documents": from_host(batch.documents)}
    return from_host(batch.ids), from_host(batch.targets.reshape(-1)), documents
