"""Cross entropy whose backward needs the logits and two numbers per row: nothing of their size is kept, or made but the gradient.

With p = softmax(x), targets t, class weights w (ones), smoothing e over C classes, a row's loss is
(1 - e) * w[t] * (lse - x[t]) + e/C * sum_c w[c] * (lse - x[c]), lse = log sum_c exp(x[c]), as in PyTorch. x is taken relative to
its largest element throughout, so logits that are all large lose no digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..compat.autograd import custom_op
from ..compat.runtime import device_target, from_host, host_array, numpy_dtype, values

_HOST_CHUNK, _DEVICE_CHUNK = 1 << 16, 1 << 24  # elements of logits that are float32 at a time
REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(logits)[target], in float32.

    Args:
        logits: (rows, classes), any float dtype; the loss is computed in float32.
        targets: (rows,) of int32 or int64.
        ignore_index: rows with this target have no loss and no gradient.
        weight: (classes,), of each class; default: ones.
        reduction: `mean` over the rows that count (with `weight`: divided by the sum of their targets' weights), 0 when there is
            none; `sum`; or `none`.
        label_smoothing: e in [0, 1): that share of the target is spread over all classes.

    Returns:
        float32, a scalar; (rows,) for `none`.

    Raises:
        TypeError: targets are not integers.
        ValueError: shapes do not fit, a target is outside [0, classes), or an option is out of range.
    """
    rule = _Rule.of(logits, targets, ignore_index, weight, reduction, label_smoothing)
    kept: list[Any] = []

    def forward(logits: Tensor) -> tuple[Tensor]:
        loss, largest, sums = (_host_forward if device_target() == "CPU" else _device_forward)(logits, rule)
        kept.extend((largest, sums))
        return (loss,)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        scale = host_array(grads[0]).astype(np.float32) * rule.row_scale
        return ((_host_backward if device_target() == "CPU" else _device_backward)(logits, rule, kept[0], kept[1], scale),)

    return custom_op(forward, backward, logits)[0]


def check_cross_entropy_options(reduction: str, label_smoothing: float) -> None:
    """Raise ValueError if one is out of range."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")


@dataclass(frozen=True)
class _Rule:
    """What is to be computed; arrays on the host.

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
    ) -> _Rule:
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


def _parts(shape: tuple[int, ...], elements: int) -> list[slice]:
    rows = max(1, elements // shape[1])
    return [slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)]


def _over(numbers: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """(rows, 1)."""
    with np.errstate(all="ignore"):
        return (numbers / sums).astype(np.float32)[:, None]


def _host_forward(logits: Tensor, rule: _Rule) -> tuple[Tensor, np.ndarray, np.ndarray]:
    array, (rows, classes) = values(logits), logits.shape
    spread = rule.spread(classes)
    sums, at_label, smooth = (np.empty(rows, np.float64) for _ in range(3))
    largest = np.empty((rows, 1), np.float32)
    with np.errstate(all="ignore"):
        for part in _parts((rows, classes), _HOST_CHUNK):
            x = array[part].astype(np.float32)
            x.max(1, keepdims=True, out=largest[part])
            np.subtract(x, largest[part], x)
            at_label[part] = x[np.arange(len(x)), rule.labels[part]]
            if spread is not None:
                smooth[part] = x @ spread
            np.exp(x, x)
            sums[part] = x.sum(1)
    return from_host(rule.reduced(rule.losses(sums, at_label, spread, smooth))), largest, sums


def _host_backward(logits: Tensor, rule: _Rule, largest: np.ndarray, sums: np.ndarray, scale: np.ndarray) -> Tensor:
    array, (rows, classes) = values(logits), logits.shape
    spread = rule.spread(classes)
    factor = _over(scale * rule.of_softmax(spread), sums)
    at_label = scale * np.float32(1.0 - rule.smoothing) * rule.row_weight
    smooth = None if spread is None else np.broadcast_to(scale * rule.counts, (rows,))[:, None]
    out = np.empty((rows, classes), numpy_dtype(logits.dtype))
    with np.errstate(all="ignore"):
        for part in _parts((rows, classes), _HOST_CHUNK):
            x = array[part].astype(np.float32)
            np.subtract(x, largest[part], x)
            np.exp(x, x)
            np.multiply(x, factor[part], x)
            if smooth is not None:
                x -= smooth[part] * spread
            x[np.arange(len(x)), rule.labels[part]] -= at_label[part]
            if not rule.counts[part].all():
                x[rule.counts[part] == 0] = 0.0  # also where the softmax is not finite
            out[part] = x
    return from_host(out)


def _device_forward(logits: Tensor, rule: _Rule) -> tuple[Tensor, Tensor, np.ndarray]:
    spread = rule.spread(logits.shape[1])
    largest, sums, at_label, smooth = [], [], [], []
    for part in _parts(logits.shape, _DEVICE_CHUNK):
        x = logits[part].astype(ms.float32)
        largest.append(x.max(axis=1, keepdims=True))
        x = x - largest[-1]
        at_label.append(ops.gather_elements(x, 1, Tensor(rule.labels[part][:, None])).reshape(-1))
        if spread is not None:
            smooth.append((x * Tensor(spread)).sum(1))
        sums.append(ops.exp(x).sum(1))
    join: Callable[[list[Tensor]], np.ndarray] = lambda pieces: host_array(ops.cat(pieces)).astype(np.float64)  # noqa: E731
    of_rows = join(sums)
    losses = rule.losses(of_rows, join(at_label), spread, join(smooth) if smooth else np.zeros(1))
    return Tensor(rule.reduced(losses)), ops.cat(largest), of_rows


def _device_backward(logits: Tensor, rule: _Rule, largest: Tensor, sums: np.ndarray, scale: np.ndarray) -> Tensor:
    spread = rule.spread(logits.shape[1])
    factor = Tensor(_over(scale * rule.of_softmax(spread), sums))
    at_label = Tensor((scale * np.float32(1.0 - rule.smoothing) * rule.row_weight)[:, None])
    counts = Tensor(rule.counts[:, None])
    smooth = (
        None if spread is None else Tensor(np.ascontiguousarray(np.broadcast_to(scale * rule.counts, rule.counts.shape))[:, None])
    )
    classes, pieces = Tensor(np.arange(logits.shape[1])[None]), []
    for part in _parts(logits.shape, _DEVICE_CHUNK):
        x = ops.exp(logits[part].astype(ms.float32) - largest[part]) * factor[part]
        if smooth is not None:
            x = x - smooth[part] * Tensor(spread)
        x = x - at_label[part] * (classes == Tensor(rule.labels[part][:, None])).astype(ms.float32)
        x = ops.select((counts[part] > 0).broadcast_to(x.shape), x, ops.zeros_like(x))
        pieces.append(x.astype(logits.dtype))
    return pieces[0] if len(pieces) == 1 else ops.cat(pieces)
