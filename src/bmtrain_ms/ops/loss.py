"""Cross entropy of logits, of a part of their columns, and of hidden states whose logits are never all there.

The host's and the device's forms give two functions. `loss_sums(logits, rule, first)`: the `Sums` of logits (rows, columns), which
are those of the classes from `first` on. `loss_gradient(logits, rule, first, found, scale)`: the gradient of the logits, where
`found` are the sums over all classes, and `scale`, a number or (rows,), is what the rows' losses are multiplied with.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Callable, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp
from ..compat.runtime import from_host, host_array
from .rules import LossRule, Sums

Tensors = tuple[Tensor, ...]
LOGITS = 1 << 26  # that are there at a time where nobody says how many


class Part(NamedTuple):
    """Which classes the columns are, where they are not all of them.

    `first`: the first one.  `joined`: sums over these classes -> over those of all parts.  `pulled`: gradients of the loss, which
    all parts have made -> their sum.
    """

    first: int
    joined: Callable[[Sums], Sums]
    pulled: Callable[[np.ndarray], np.ndarray]


WHOLE = Part(0, lambda found: found, lambda grad: grad)


def cross_entropy(logits: Tensor, rule: LossRule, implementation: ModuleType, part: Part = WHOLE) -> Tensor:
    """The loss of logits (rows, classes), or of the columns that `part` says."""

    def forward(logits: Tensor) -> tuple[Tensors, Sums]:
        found = part.joined(implementation.loss_sums(logits, rule, part.first))
        return (from_host(rule.reduced(found)),), found

    def backward(inputs: Tensors, found: Sums, grads: Tensors) -> Tensors:
        return (implementation.loss_gradient(inputs[0], rule, part.first, found, _scale(rule, part, grads)),)

    return custom_vjp(forward, backward, logits)[0]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, rule: LossRule, implementation: ModuleType, rows: int | None = None, part: Part = WHOLE
) -> Tensor:
    """The loss of the logits hidden Wᵀ, of which there never are more than those of `rows` tokens; backward makes them again.

    Args:
        hidden: (tokens, dim).
        weight: (classes, dim), or the rows that `part` says.

    Raises:
        ValueError: `rows` is below 1.
    """
    rows = max(1, LOGITS // weight.shape[0]) if rows is None else rows
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    if hidden.shape[0] <= rows:
        return cross_entropy(implementation.linear(hidden, weight), rule, implementation, part)
    pieces = [slice(i, i + rows) for i in range(0, hidden.shape[0], rows)]

    def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensors, Sums]:
        found = []
        for piece in pieces:
            logits = implementation.matmul(hidden[piece], weight, transpose_b=True)
            found.append(implementation.loss_sums(logits, rule.of_rows(piece), part.first))
        joined = part.joined(Sums(*map(np.concatenate, zip(*found))))
        return (from_host(rule.reduced(joined)),), joined

    def backward(inputs: Tensors, found: Sums, grads: Tensors) -> Tensors:
        hidden, weight = inputs
        scale = np.broadcast_to(_scale(rule, part, grads), rule.labels.shape)
        hidden_grads, weight_grad = [], None
        for piece in pieces:
            x = hidden[piece]
            logits = implementation.matmul(x, weight, transpose_b=True)
            of_piece = Sums(*(column[piece] for column in found))
            grad = implementation.loss_gradient(logits, rule.of_rows(piece), part.first, of_piece, scale[piece])
            hidden_grads.append(implementation.matmul(grad, weight))
            more = implementation.matmul(grad, x, transpose_a=True).astype(ms.float32)
            weight_grad = more if weight_grad is None else weight_grad + more
        return ms.ops.cat(hidden_grads, 0), weight_grad.astype(weight.dtype)

    return custom_vjp(forward, backward, hidden, weight)[0]


def _scale(rule: LossRule, part: Part, grads: Any) -> np.ndarray:
    return part.pulled(host_array(grads[0]).astype(np.float32)) * rule.row_scale
