"""What both implementations of the operations are given."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..compat.runtime import host_array, is_float

Angles = tuple[np.ndarray, np.ndarray]
"""cos and sin of rotary position embedding, float32: each (length, dim / 2), or (batch, 1, length, dim / 2) where rows differ."""

GELU, GELU_CUBE = math.sqrt(2.0 / math.pi), 0.044715
REDUCTIONS = ("mean", "sum", "none")


def refuse_fractions(ids: Tensor) -> None:
    """Raise TypeError where ids are of a type that is none of whole numbers."""
    if is_float(ids) or ids.dtype == ms.bool_:
        raise TypeError(f"ids are whole numbers, of type int32 or int64, not {ids.dtype}: convert them with ids.astype(ms.int32)")


def check_cross_entropy_options(reduction: str, label_smoothing: float) -> None:
    """Raise ValueError if one is out of range."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")


class Sums(NamedTuple):
    """The sums of each row of logits, or of a part of their columns, (rows,) each; x is relative to the row's largest.

    `largest`: float32.  `sums`: of exp(x).  `at_label`: x[t], 0 where the label is in another part.  `smooth`: sum_c e/C w[c] x[c].
    """

    largest: np.ndarray
    sums: np.ndarray
    at_label: np.ndarray
    smooth: np.ndarray


@dataclass(frozen=True)
class LossRule:
    """What cross entropy is to compute; arrays on the host.

    With p = softmax(x), targets t, class weights w (ones), smoothing e over C classes, a row's loss is
    (1 - e) * w[t] * (lse - x[t]) + e/C * sum_c w[c] * (lse - x[c]), lse = log sum_c exp(x[c]), as in PyTorch. x is taken relative
    to its largest element throughout, so logits that are all large lose no digits.

    `classes`: C.  `labels`: (rows,), 0 where ignored.  `row_weight`: (rows,), w[t], 0 where ignored.  `counts`: (rows,), 1, 0 where
    ignored.  `weight`: (classes,) or None for ones.  `row_scale`: of each row's loss in the result: a scalar.
    """

    classes: int
    labels: np.ndarray
    row_weight: np.ndarray
    counts: np.ndarray
    weight: np.ndarray | None
    smoothing: float
    row_scale: np.float32
    reduction: str

    @classmethod
    def of(
        cls,
        rows: int,
        classes: int,
        targets: Tensor,
        ignore_index: int,
        weight: Tensor | None,
        reduction: str,
        smoothing: float,
    ) -> LossRule:
        """The rule that the arguments of `cross_entropy` say; they are checked here. `classes`: of all parts of the logits."""
        if tuple(targets.shape) != (rows,):
            raise ValueError(
                f"cross_entropy takes logits (rows, classes) and targets (rows,), not {(rows, classes)} and {tuple(targets.shape)}"
            )
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
        return cls(classes, labels, row_weight, counts.astype(np.float32), of_class, smoothing, scale, reduction)

    def of_rows(self, part: slice) -> LossRule:
        """The rule for some of the rows."""
        return replace(self, labels=self.labels[part], row_weight=self.row_weight[part], counts=self.counts[part])

    def spread(self, first: int, stop: int) -> np.ndarray | None:
        """(stop - first,): e/C * w[c] of these classes; None without smoothing."""
        if not self.smoothing:
            return None
        share = np.float32(self.smoothing / self.classes)
        return np.full(stop - first, share, np.float32) if self.weight is None else share * self.weight[first:stop]

    @property
    def spread_sum(self) -> float:
        """sum_c e/C * w[c]."""
        spread = self.spread(0, self.classes)
        return 0.0 if spread is None else float(spread.sum(dtype=np.float64))

    def of_softmax(self) -> np.ndarray:
        """(rows,): what the softmax is multiplied with in a row's gradient: (1 - e) w[t] + e/C sum w."""
        own = np.float32(1.0 - self.smoothing) * self.row_weight
        return own + np.float32(self.spread_sum) * self.counts if self.smoothing else own

    def places(self, part: slice, first: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, columns) of the labels of rows `part` that are in the classes [first, first + classes), counted from there."""
        columns = self.labels[part] - first
        rows = np.flatnonzero((columns >= 0) & (columns < classes))
        return rows, columns[rows]

    def reduced(self, found: Sums) -> np.ndarray:
        """Sums over all classes -> the loss, float32."""
        with np.errstate(all="ignore"):  # inf and nan are answers: a loss scaler looks for them
            log_sums = np.log(found.sums)
            losses = (1.0 - self.smoothing) * self.row_weight * (log_sums - found.at_label)
            if self.smoothing:
                losses = losses + self.spread_sum * log_sums - found.smooth
        losses = np.where(self.counts > 0, losses, 0.0)
        return np.asarray(losses if self.reduction == "none" else losses.sum() * self.row_scale, np.float32)


def parts(shape: tuple[int, ...], elements: int) -> list[slice]:
    """The rows of a matrix in pieces of about so many elements."""
    rows = max(1, elements // shape[1])
    return [slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)]


def over(numbers: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The quotients as a column, (rows, 1) float32."""
    with np.errstate(all="ignore"):
        return (numbers / sums).astype(np.float32)[:, None]
