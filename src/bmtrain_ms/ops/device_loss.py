"""Cross entropy on a device: nothing of the logits' size is kept, or made but the gradient."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..compat.autograd import custom_vjp
from ..compat.runtime import host_array
from .rules import LossRule, over, parts

CHUNK = 1 << 24  # elements of logits that are float32 at a time


def cross_entropy(logits: Tensor, rule: LossRule) -> Tensor:
    """See `bmtrain_ms.ops.cross_entropy`; what it was given is checked, and in `rule`."""

    def forward(logits: Tensor) -> tuple[tuple[Tensor], tuple[Any, Any]]:
        loss, largest, sums = _forward(logits, rule)
        return (loss,), (largest, sums)

    def backward(inputs: tuple[Tensor, ...], residuals: tuple[Any, Any], grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (_backward(inputs[0], rule, *residuals, host_array(grads[0]).astype(np.float32) * rule.row_scale),)

    return custom_vjp(forward, backward, logits)[0]


def _forward(logits: Tensor, rule: LossRule) -> tuple[Tensor, Tensor, np.ndarray]:
    spread = rule.spread(logits.shape[1])
    if not logits.shape[0]:  # a reduction of nothing is an error
        return Tensor(rule.reduced(np.zeros(0))), logits, np.zeros(0)
    largest, sums, at_label, smooth = [], [], [], []
    for part in parts(logits.shape, CHUNK):
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


def _backward(logits: Tensor, rule: LossRule, largest: Tensor, sums: np.ndarray, scale: np.ndarray) -> Tensor:
    spread = rule.spread(logits.shape[1])
    factor = Tensor(over(scale * rule.of_softmax(spread), sums))
    at_label = Tensor((scale * np.float32(1.0 - rule.smoothing) * rule.row_weight)[:, None])
    counts = Tensor(rule.counts[:, None])
    smooth = (
        None if spread is None else Tensor(np.ascontiguousarray(np.broadcast_to(scale * rule.counts, rule.counts.shape))[:, None])
    )
    classes, pieces = Tensor(np.arange(logits.shape[1])[None]), []
    for part in parts(logits.shape, CHUNK):
        x = ops.exp(logits[part].astype(ms.float32) - largest[part]) * factor[part]
        if smooth is not None:
            x = x - smooth[part] * Tensor(spread)
        x = x - at_label[part] * (classes == Tensor(rule.labels[part][:, None])).astype(ms.float32)
        x = ops.select((counts[part] > 0).broadcast_to(x.shape), x, ops.zeros_like(x))
        pieces.append(x.astype(logits.dtype))
    return ops.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else logits * 0.0
