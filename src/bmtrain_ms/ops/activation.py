"""Activations that are the same operations on the host and on devices."""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, ops

from ..compat.autograd import custom_vjp

_FACTOR, _CUBE = math.sqrt(2.0 / math.pi), 0.044715


def gelu(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in float32 (`gelu_new`, GPT-2)."""

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.astype(ms.float32)
        return x, ops.tanh(_FACTOR * (x + _CUBE * x * x * x))

    def forward(x: Tensor) -> tuple[tuple[Tensor], None]:
        wide, bent = halves(x)
        return ((0.5 * wide * (1.0 + bent)).astype(x.dtype),), None

    def backward(inputs: tuple[Tensor, ...], _: None, grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        wide, bent = halves(inputs[0])
        slope = 0.5 * (1.0 + bent) + 0.5 * wide * (1.0 - bent * bent) * _FACTOR * (1.0 + 3 * _CUBE * wide * wide)
        return ((grads[0].astype(ms.float32) * slope).astype(inputs[0].dtype),)

    return custom_vjp(forward, backward, x)[0]
