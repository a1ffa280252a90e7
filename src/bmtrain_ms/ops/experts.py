"""Rows that go to experts and come back, with their derivatives; where they lie: [Note: experts] in `bmtrain_ms_base.routing`.

The host's and the device's forms give four functions without derivatives, of rows (n, dim) and of indices on the host, in which
-1 stands for a row of zeros. `take_rows(x, index)`: x[index].  `sum_rows(x, places, weights)`: for each row of `places` (m, k) the
sum of k rows, each times its weight (m, k) if there are weights, in float32.  `spread_rows(x, weights, slots)`: x[slot // k] times
the weight of the slot.  `dot_rows(x, y, places)`: (m, k) float32, products of x[i] and y[places[i, j]].
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp

Tensors = tuple[Tensor, ...]


def pick_rows(x: Tensor, index: np.ndarray, places: np.ndarray, implementation: ModuleType) -> Tensor:
    """x[index], rows of zeros for -1.

    Args:
        x: (n, dim).
        index: (m,) of int.
        places: (n, k) of int: where in the result each row of x lies.
    """
    return custom_vjp(
        lambda x: ((implementation.take_rows(x, index),), None),
        lambda _, __, grads: (implementation.sum_rows(grads[0], places, None),),
        x,
    )[0]


def combine_rows(y: Tensor, weights: Tensor, places: np.ndarray, slots: np.ndarray, implementation: ModuleType) -> Tensor:
    """For each token the sum of k rows of y, each times its weight; in float32, in the type of y.

    Args:
        y: (n, dim).
        weights: (tokens, k), float32.
        places: (tokens, k) of int, where in y the rows lie; -1: nothing is added, and the weight has no gradient.
        slots: (n,) of int, t * k + j of each row of y; -1: of none.
    """

    def forward(y: Tensor, weights: Tensor) -> tuple[Tensors, None]:
        return (implementation.sum_rows(y, places, weights),), None

    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        y, weights = inputs
        return implementation.spread_rows(grads[0], weights, slots), implementation.dot_rows(grads[0], y, places)

    return custom_vjp(forward, backward, y, weights)[0]
