"""Losses."""

from __future__ import annotations

from mindspore import Tensor, nn

from .nn import functional


class FusedCrossEntropy(nn.Cell):
    """Cross entropy with a float32 loss for logits of any float dtype (BMTrain: `loss.FusedCrossEntropy`).

    Args:
        ignore_index: rows with this target count neither in the mean nor in the gradient.
    """

    def __init__(self, ignore_index: int = -100):
        super().__init__()
        self.ignore_index = ignore_index

    def construct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (rows, classes), targets (rows,) -> the mean over the rows that count, a float32 scalar."""
        return functional.cross_entropy(logits, targets, self.ignore_index)
