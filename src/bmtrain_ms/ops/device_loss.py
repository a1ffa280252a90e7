"""What cross entropy is made of, on a device: nothing of the logits' size is kept, or made but their gradient."""

from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..compat.runtime import host_array
from .rules import LossRule, Sums, over, parts

CHUNK = 1 << 24  # elements of logits that are float32 at a time


def loss_sums(logits: Tensor, rule: LossRule, first: int) -> Sums:
    """The sums of each row of logits, on a device; see `bmtrain_ms.ops.loss`."""
    rows, classes = logits.shape
    spread = rule.spread(first, first + classes)
    if not rows:  # a reduction of nothing is an error
        return Sums(np.zeros(0, np.float32), *(np.zeros(0) for _ in range(3)))
    largest, sums, at_label, smooth = [], [], [], []
    for part in parts(logits.shape, CHUNK):
        x = logits[part].astype(ms.float32)
        largest.append(x.max(axis=1, keepdims=True))
        x = x - largest[-1]
        at_label.append(ops.gather_elements(x, 1, _columns(rule, part, first, classes)).reshape(-1))
        if spread is not None:
            smooth.append((x * Tensor(spread)).sum(1))
        sums.append(ops.exp(x).sum(1))
    join: Callable[[list[Tensor]], np.ndarray] = lambda pieces: host_array(ops.cat(pieces)).reshape(-1)  # noqa: E731
    labels = np.where(_owned(rule, first, classes), join(at_label).astype(np.float64), 0.0)
    smoothed = join(smooth).astype(np.float64) if smooth else np.zeros(rows)
    return Sums(join(largest), join(sums).astype(np.float64), labels, smoothed)


def loss_gradient(logits: Tensor, rule: LossRule, first: int, found: Sums, scale: np.ndarray) -> Tensor:
    """The gradient of the logits, on a device; see `bmtrain_ms.ops.loss`."""
    classes = logits.shape[1]
    spread = rule.spread(first, first + classes)
    column: Callable[[np.ndarray], Tensor] = lambda x: Tensor(np.ascontiguousarray(x, np.float32)[:, None])  # noqa: E731
    largest, counts, factor = column(found.largest), column(rule.counts), Tensor(over(scale * rule.of_softmax(), found.sums))
    at_label = column(scale * np.float32(1.0 - rule.smoothing) * rule.row_weight * _owned(rule, first, classes))
    smooth = None if spread is None else column(np.broadcast_to(scale * rule.counts, rule.counts.shape))
    numbers, pieces = Tensor(np.arange(classes)[None]), []
    for part in parts(logits.shape, CHUNK):
        x = ops.exp(logits[part].astype(ms.float32) - largest[part]) * factor[part]
        if smooth is not None:
            x = x - smooth[part] * Tensor(spread)
        x = x - at_label[part] * (numbers == _columns(rule, part, first, classes)).astype(ms.float32)
        x = ops.select((counts[part] > 0).broadcast_to(x.shape), x, ops.zeros_like(x))
        pieces.append(x.astype(logits.dtype))
    return ops.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else logits * 0.0


def _owned(rule: LossRule, first: int, classes: int) -> np.ndarray:
    """(rows,): whether the label is among these classes."""
    return (rule.labels >= first) & (rule.labels < first + classes)


def _columns(rule: LossRule, part: slice, first: int, classes: int) -> Tensor:
    """(rows, 1): the label counted from `first`; some column where it is in none."""
    return Tensor(np.clip(rule.labels[part] - first, 0, classes - 1)[:, None])
