"""What a loss is whose forward and backward passes alternate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Sequence

from mindspore import Parameter, Tensor


class Scheduled(ABC):
    """A loss that makes its own gradients, micro-batch by micro-batch, as a pipeline needs it: `OptimManager.backward` is given one
    where it is given a function otherwise, and calls `differentiated`."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss alone, without gradients."""

    @abstractmethod
    def differentiated(self, params: Sequence[Parameter], scale: float, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of scale * loss with respect to `params`: float32 shards, as `OptimManager.accumulate` takes
        them. All ranks of the pipeline call it together."""
