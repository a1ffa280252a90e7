"""Cross entropy as a Cell."""

from __future__ import annotations

from mindspore import Tensor, nn

from bmtrain_ms_base.absent import absent

from .comm import world as current_world
from .distributed import parallel_cross_entropy
from .nn import functional

__getattr__ = absent(
    __name__,
    {"_function": "OptimManager looks for overflows by itself: manager.step().updated; the loss is nn.functional.cross_entropy"},
)


class FusedCrossEntropy(nn.Cell):
    """Cross entropy with a float32 loss for logits of any float dtype (BMTrain: `loss.FusedCrossEntropy`).

    Beside the logits its backward makes their gradient and nothing else of that size. Options as those of
    `nn.functional.cross_entropy`, and, unlike BMTrain's, for every dtype alike.

    Args:
        weight: (classes,), of each class; default: ones.
        ignore_index: rows with this target count neither in the loss nor in the gradient.
        reduction: `mean`, `sum` or `none`.
        label_smoothing: in [0, 1).
        parallel: logits are this rank's part of the classes, as `VPProjection` and `VPEmbedding` give them.
        classes: with `parallel`: of all ranks; default: equal parts.

    Raises:
        ValueError: an option is out of range; when called, shapes or targets do not fit.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        parallel: bool = False,
        classes: int | None = None,
    ):
        super().__init__()
        functional.check_cross_entropy_options(reduction, label_smoothing)
        self.weight, self.ignore_index = weight, ignore_index
        self.reduction, self.label_smoothing = reduction, label_smoothing
        self.parallel, self.classes = parallel, classes

    def construct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (rows, classes), targets (rows,) -> float32, a scalar, or (rows,) for `reduction="none"`."""
        if self.parallel:
            options = self.ignore_index, self.weight, self.reduction, self.label_smoothing
            return parallel_cross_entropy(logits, targets, current_world().along("tp"), self.classes, *options)
        return functional.cross_entropy(logits, targets, self.ignore_index, self.weight, self.reduction, self.label_smoothing)
