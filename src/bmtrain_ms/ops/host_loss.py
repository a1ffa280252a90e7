"""Cross entropy on the host: backward makes nothing of the logits' size but the gradient, forward nothing at all."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp
from ..compat.runtime import from_host, host_array, numpy_dtype, values
from . import kernels
from .rules import LossRule, over, parts

CHUNK = 1 << 16  # elements of logits that are float32 at a time


def cross_entropy(logits: Tensor, rule: LossRule) -> Tensor:
    """See `bmtrain_ms.ops.cross_entropy`; what it was given is checked, and in `rule`."""

    def forward(logits: Tensor) -> tuple[tuple[Tensor], tuple[Any, Any]]:
        loss, largest, sums = _forward(logits, rule)
        return (loss,), (largest, sums)

    def backward(inputs: tuple[Tensor, ...], residuals: tuple[Any, Any], grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (_backward(inputs[0], rule, *residuals, host_array(grads[0]).astype(np.float32) * rule.row_scale),)

    return custom_vjp(forward, backward, logits)[0]


def _forward(logits: Tensor, rule: LossRule) -> tuple[Tensor, np.ndarray, np.ndarray]:
    array, (rows, classes) = values(logits), logits.shape
    spread = rule.spread(classes)
    sums, at_label, smooth = (np.empty(rows, np.float64) for _ in range(3))
    largest = np.empty((rows, 1), np.float32)
    with np.errstate(all="ignore"):
        for part in parts((rows, classes), CHUNK):
            x = array[part].astype(np.float32, copy=False)
            kernels.log_sum_exp(x, largest[part], sums[part])
            at_label[part] = x[np.arange(len(x)), rule.labels[part]] - largest[part, 0]
            if spread is not None:
                smooth[part] = (x - largest[part]) @ spread
    return from_host(rule.reduced(rule.losses(sums, at_label, spread, smooth))), largest, sums


def _backward(logits: Tensor, rule: LossRule, largest: np.ndarray, sums: np.ndarray, scale: np.ndarray) -> Tensor:
    array, (rows, classes) = values(logits), logits.shape
    spread = rule.spread(classes)
    factor = over(scale * rule.of_softmax(spread), sums)
    at_label = scale * np.float32(1.0 - rule.smoothing) * rule.row_weight
    smooth = None if spread is None else np.broadcast_to(scale * rule.counts, (rows,))[:, None]
    out = np.empty((rows, classes), numpy_dtype(logits.dtype))
    with np.errstate(all="ignore"):
        for part in parts((rows, classes), CHUNK):
            x = out[part] if out.dtype == np.float32 else np.empty(out[part].shape, np.float32)
            kernels.scaled_softmax(array[part].astype(np.float32, copy=False), largest[part], factor[part], x)
            if smooth is not None:
                x -= smooth[part] * spread
            x[np.arange(len(x)), rule.labels[part]] -= at_label[part]
            if not rule.counts[part].all():
                x[rule.counts[part] == 0] = 0.0  # also where the softmax is not finite
            if out.dtype != np.float32:
                out[part] = x
    return from_host(out)
