"""What both implementations of the operations are given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from ..compat.runtime import host_array

Angles = tuple[np.ndarray, np.ndarray]
"""cos and sin of rotary position embedding, float32: each (length, dim / 2), or (batch, 1, length, dim / 2) where rows differ."""

REDUCTIONS = ("mean", "sum", "none")


def check_cross_entropy_options(reduction: str, label_smoothing: float) -> None:
    """Raise ValueError if one is out of range."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")


@dataclass(frozen=True)
class LossRule:
    """What cross entropy is to compute; arrays on the host.

    With p = softmax(x), targets t, class weights w (ones), smoothing e over C classes, a row's loss is
    (1 - e) * w[t] * (lse - x[t]) + e/C * sum_c w[c] * (lse - x[c]), lse = log sum_c exp(x[c]), as in PyTorch. x is taken relative
    to its largest element throughout, so logits that are all large lose no digits.

    `labels`: (rows,), 0 where ignored.  `row_weight`: (rows,), w[t], 0 where ignored.  `counts`: (rows,), 1, 0 where ignored.
    `weight`: (classes,) or None for ones.  `row_scale`: of each row's loss in the result: a scalar.
    """

    labels: np.ndarray
    row_weight: np.ndarray
    counts: np.ndarray
    weight: np.ndarray | None
    smoothing: float
    row_scale: np.float32
    reduction: str

    @classmethod
    def of(
        cls, logits: Tensor, targets: Tensor, ignore_index: int, weight: Tensor | None, reduction: str, smoothing: float
    ) -> LossRule:
        """From the arguments of `cross_entropy`, which are checked here."""
        if logits.ndim != 2 or tuple(targets.shape) != (logits.shape[0],):
            raise ValueError(
                f"cross_entropy takes logits (rows, classes) and targets (rows,), not {tuple(logits.shape)} and "
                f"{tuple(targets.shape)}"
            )
        classes = logits.shape[1]
        check_cross_entropy_options(reduction, smoothing)
        if weight is not None and tuple(weight.shape) != (classes,):
            raise ValueError(f"weight must have shape ({classes},), one for each class, not {tuple(weight.shape)}")
        chosen = host_array(targets)
        if chosen.dtype.kind not in "iu":
            raise TypeError(f"targets are class indices, int32 or int64, not {chosen.dtype}")
        counts = chosen != ignore_index
        valid = chosen[counts]
        if valid.size and not 0 <= valid.min() <= valid.max() < classes:
            raise ValueError(f"targets lie in [{valid.min()}, {valid.max()}], the logits have {classes} classes")
        labels = np.where(counts, chosen, 0).astype(np.int64)
        of_class = None if weight is None else host_array(weight).astype(np.float32)
        row_weight = counts.astype(np.float32) if of_class is None else counts * of_class[labels]
        total = float(row_weight.sum(dtype=np.float64)) if reduction == "mean" else 1.0
        scale = np.float32(1.0 / total) if total else np.float32(0.0)
        return cls(labels, row_weight, counts.astype(np.float32), of_class, smoothing, scale, reduction)

    def spread(self, classes: int) -> np.ndarray | None:
        """(classes,): e/C * w[c]; None without smoothing."""
        if not self.smoothing:
            return None
        share = np.float32(self.smoothing / classes)
        return np.full(classes, share, np.float32) if self.weight is None else share * self.weight

    def of_softmax(self, spread: np.ndarray | None) -> np.ndarray:
        """(rows,): what the softmax is multiplied with in a row's gradient: (1 - e) w[t] + e/C sum w."""
        own = np.float32(1.0 - self.smoothing) * self.row_weight
        return own if spread is None else own + np.float32(spread.sum(dtype=np.float64)) * self.counts

    def reduced(self, losses: np.ndarray) -> np.ndarray:
        """float64 losses of the rows -> the result."""
        losses = np.where(self.counts > 0, losses, 0.0)
        return np.asarray(losses if self.reduction == "none" else losses.sum() * self.row_scale, np.float32)

    def losses(self, sums: np.ndarray, at_label: np.ndarray, spread: np.ndarray | None, smooth: np.ndarray) -> np.ndarray:
        """All (rows,), float64; x relative to its largest: `sums`: of exp(x), `at_label`: x[t], `smooth`: sum_c e/C w[c] x[c]."""
        with np.errstate(all="ignore"):  # inf and nan are answers: a loss scaler looks for them
            log_sums = np.log(sums)
            losses = (1.0 - self.smoothing) * self.row_weight * (log_sums - at_label)
            return losses if spread is None else losses + float(spread.sum(dtype=np.float64)) * log_sums - smooth


def parts(shape: tuple[int, ...], elements: int) -> list[slice]:
    """The rows of a matrix in pieces of about so many elements."""
    rows = max(1, elements // shape[1])
    return [slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)]


def over(numbers: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The quotients as a column, (rows, 1) float32."""
    with np.errstate(all="ignore"):
        return (numbers / sums).astype(np.float32)[:, None]
