"""What cross entropy is made of, on the host: nothing of the logits' size is made but their gradient."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ..compat.runtime import from_host, numpy_dtype, values
from . import kernels
from .rules import LossRule, Sums, over, parts

CHUNK = 1 << 16  # elements of logits that are float32 at a time


def loss_sums(logits: Tensor, rule: LossRule, first: int) -> Sums:
    """The sums of each row of logits, on the host; see `bmtrain_ms.ops.loss`."""
    array, (rows, classes) = values(logits), logits.shape
    spread = rule.spread(first, first + classes)
    sums, at_label, smooth = (np.zeros(rows, np.float64) for _ in range(3))
    largest = np.empty((rows, 1), np.float32)
    with np.errstate(all="ignore"):
        for part in parts((rows, classes), CHUNK):
            x = array[part].astype(np.float32, copy=False)
            kernels.log_sum_exp(x, largest[part], sums[part])
            of_part, columns = rule.places(part, first, classes)
            at_label[part][of_part] = x[of_part, columns] - largest[part, 0][of_part]
            if spread is not None:
                smooth[part] = (x - largest[part]) @ spread
    return Sums(largest[:, 0], sums, at_label, smooth)


def loss_gradient(logits: Tensor, rule: LossRule, first: int, found: Sums, scale: np.ndarray) -> Tensor:
    """The gradient of the logits, on the host; see `bmtrain_ms.ops.loss`."""
    array, (rows, classes) = values(logits), logits.shape
    spread, largest = rule.spread(first, first + classes), found.largest[:, None]
    factor = over(scale * rule.of_softmax(), found.sums)
    at_label = np.broadcast_to(scale * np.float32(1.0 - rule.smoothing) * rule.row_weight, (rows,))
    smooth = None if spread is None else np.broadcast_to(scale * rule.counts, (rows,))[:, None]
    out = np.empty((rows, classes), numpy_dtype(logits.dtype))
    with np.errstate(all="ignore"):
        for part in parts((rows, classes), CHUNK):
            x = out[part] if out.dtype == np.float32 else np.empty(out[part].shape, np.float32)
            kernels.scaled_softmax(array[part].astype(np.float32, copy=False), largest[part], factor[part], x)
            if smooth is not None:
                x -= smooth[part] * spread
            of_part, columns = rule.places(part, first, classes)
            x[of_part, columns] -= at_label[part][of_part]
            if not rule.counts[part].all():
                x[rule.counts[part] == 0] = 0.0  # also where the softmax is not finite
            if out.dtype != np.float32:
                out[part] = x
    return from_host(out)
