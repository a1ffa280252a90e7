"""The operations on the host: matrix products by NumPy's BLAS, and one compiled loop for the rest of each (`ops.kernels`).

They read tensors where they lie, compute in float32 (float64 stays), and keep tensors for backward, not copies of them.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp
from ..compat.runtime import from_host, values
from . import kernels
from .host_arrays import Arrays, Tensors, matrix, quiet, returned, wide
from .host_attention import attention, causal_mask
from .host_experts import choose_experts, dot_rows, grouped_linear, spread_rows, sum_rows, take_rows
from .host_loss import loss_gradient, loss_sums
from .rules import GELU, GELU_CUBE, Angles

__all__ = [
    "add",
    "attention",
    "causal_mask",
    "choose_experts",
    "dot_rows",
    "embedding",
    "gelu",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linears",
    "loss_gradient",
    "loss_sums",
    "matmul",
    "merge_heads",
    "reshape",
    "rms_norm",
    "split_heads",
    "spread_rows",
    "sum_rows",
    "swiglu",
    "take_rows",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`bmtrain_ms.ops.linear` on the host."""
    return linears(x, [weight], [bias])[0]


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`bmtrain_ms.ops.linears` on the host."""
    for weight in weights:
        if x.dtype != weight.dtype:
            raise TypeError(f"linear takes x and weight of one type, not {x.dtype} and {weight.dtype}")
    count, of_bias = len(weights), [i for i, b in enumerate(biases) if b is not None]

    @quiet
    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensors, None]:
        rows = matrix(x)
        outputs = [rows @ wide(weight).T for weight in parameters[:count]]
        for i, bias in zip(of_bias, parameters[count:]):
            outputs[i] += wide(bias)
        return tuple(returned(y, x, (*x.shape[:-1], y.shape[1])) for y in outputs), None

    @quiet
    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        x, *parameters = inputs
        rows, of_outputs = matrix(x), [matrix(grad) for grad in grads]
        x_grad = of_outputs[-1] @ wide(parameters[count - 1])
        for i in reversed(range(count - 1)):
            x_grad += of_outputs[i] @ wide(parameters[i])
        of_weights = [returned(grad.T @ rows, w) for grad, w in zip(of_outputs, parameters)]
        of_biases = [returned(of_outputs[i].sum(0), b) for i, b in zip(of_bias, parameters[count:])]
        return (returned(x_grad, x), *of_weights, *of_biases)

    return custom_vjp(forward, backward, x, *weights, *(b for b in biases if b is not None))


@quiet
def matmul(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """`bmtrain_ms.ops.matmul` on the host."""
    left, right = wide(a), wide(b)
    out = (left.T if transpose_a else left) @ (right.T if transpose_b else right)
    return returned(out, a, out.shape)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """`bmtrain_ms.ops.embedding` on the host.

    Raises:
        ValueError: an id is outside of the table.
    """
    (vocab, dim), places = table.shape, values(ids)
    if places.size and not 0 <= places.min() <= places.max() < vocab:
        raise ValueError(f"ids lie in [{places.min()}, {places.max()}], the table has {vocab} rows")

    def forward(table: Tensor) -> tuple[Tensors, None]:
        return (from_host(values(table)[places]),), None

    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        out = np.zeros((vocab, dim), np.float32)
        kernels.add_rows(places.reshape(-1).astype(np.int64, copy=False), matrix(grads[0], np.float32), out)
        return (returned(out, inputs[0]),)

    return custom_vjp(forward, backward, table)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`bmtrain_ms.ops.rms_norm` on the host."""

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, np.ndarray]:
        rows = matrix(x, np.float32)
        out, scale = np.empty_like(rows), np.empty(len(rows), np.float32)
        kernels.rms_norm(rows, wide(weight, np.float32), float(eps), out, scale)
        return (returned(out, x),), scale

    def backward(inputs: Tensors, scale: np.ndarray, grads: Tensors) -> Tensors:
        x, weight = inputs
        rows = matrix(x, np.float32)
        x_grad, weight_grad = np.empty_like(rows), np.zeros(rows.shape[1], np.float32)
        kernels.rms_norm_gradient(rows, wide(weight, np.float32), scale, matrix(grads[0], np.float32), x_grad, weight_grad)
        return returned(x_grad, x), returned(weight_grad, weight)

    return custom_vjp(forward, backward, x, weight)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`bmtrain_ms.ops.layer_norm` on the host."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensors, Arrays]:
        rows = matrix(x, np.float32)
        out, (mean, scale) = np.empty_like(rows), np.empty((2, len(rows)), np.float32)
        kernels.layer_norm(rows, wide(weight, np.float32), wide(bias, np.float32), float(eps), out, mean, scale)
        return (returned(out, x),), (mean, scale)

    def backward(inputs: Tensors, residuals: Arrays, grads: Tensors) -> Tensors:
        (x, weight, bias), (mean, scale) = inputs, residuals
        rows = matrix(x, np.float32)
        x_grad, (weight_grad, bias_grad) = np.empty_like(rows), np.zeros((2, rows.shape[1]), np.float32)
        grad = matrix(grads[0], np.float32)
        kernels.layer_norm_gradient(rows, wide(weight, np.float32), mean, scale, grad, x_grad, weight_grad, bias_grad)
        return returned(x_grad, x), returned(weight_grad, weight), returned(bias_grad, bias)

    return custom_vjp(forward, backward, x, weight, bias)[0]


def add(x: Tensor, y: Tensor) -> Tensor:
    """`bmtrain_ms.ops.add` on the host. MindSpore's own takes three times as long on CPU (2.5), and what it returns is not known
    to lie in memory of ours, which whoever reads it has to find out."""
    return custom_vjp(_add, lambda _, __, grads: (grads[0], grads[0]), x, y)[0]


@quiet
def _add(x: Tensor, y: Tensor) -> tuple[Tensors, None]:
    return (returned(wide(x) + wide(y), x),), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`bmtrain_ms.ops.swiglu` on the host."""
    return custom_vjp(_swiglu, _swiglu_gradient, gate, up)[0]


def _swiglu(gate: Tensor, up: Tensor) -> tuple[Tensors, None]:
    g = wide(gate, np.float32).reshape(-1)
    out = np.empty_like(g)
    kernels.swiglu(g, wide(up, np.float32).reshape(-1), out)
    return (returned(out, up),), None


def _swiglu_gradient(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
    g, u, grad = (wide(x, np.float32).reshape(-1) for x in (*inputs, grads[0]))
    gate_grad, up_grad = np.empty_like(g), np.empty_like(g)
    kernels.swiglu_gradient(g, u, grad, gate_grad, up_grad)
    return returned(gate_grad, inputs[0]), returned(up_grad, inputs[1])


def gelu(x: Tensor) -> Tensor:
    """`bmtrain_ms.ops.gelu` on the host. NumPy's tanh: MindSpore's own is wrong by 1e-4 on CPU (2.5 and 2.10)."""

    def halves(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        wide = matrix(x, np.float32)
        return wide, np.tanh(np.float32(GELU) * (wide + np.float32(GELU_CUBE) * wide**3))

    @quiet
    def forward(x: Tensor) -> tuple[Tensors, None]:
        wide, bent = halves(x)
        return (returned(np.float32(0.5) * wide * (1 + bent), x),), None

    @quiet
    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        wide, bent = halves(inputs[0])
        inner = np.float32(GELU) * (1 + np.float32(3 * GELU_CUBE) * wide * wide)
        slope = np.float32(0.5) * (1 + bent + wide * (1 - bent * bent) * inner)
        return (returned(matrix(grads[0], np.float32) * slope, inputs[0]),)

    return custom_vjp(forward, backward, x)[0]


def split_heads(x: Tensor, batch: int, heads: int, angles: Angles | None = None) -> Tensor:
    """`bmtrain_ms.ops.split_heads` on the host."""
    length, dim = x.shape[0] // batch, x.shape[1] // heads
    apart, together = (batch, heads, length, dim), (batch, length, heads, dim)
    if angles is None:
        return custom_vjp(
            lambda x: ((_swapped(x, together),), None), lambda xs, _, grads: (_swapped(grads[0], apart, xs[0].shape),), x
        )[0]
    cos, sin = (np.ascontiguousarray(a, np.float32).reshape(-1, length, dim // 2) for a in angles)

    def forward(x: Tensor) -> tuple[Tensors, None]:
        out = np.empty(apart, np.float32)
        kernels.split_heads(wide(x, np.float32).reshape(together), cos, sin, out)
        return (returned(out, x, apart),), None

    def backward(inputs: Tensors, _: None, grads: Tensors) -> Tensors:
        out = np.empty(together, np.float32)
        kernels.split_heads_gradient(wide(grads[0], np.float32), cos, sin, out)
        return (returned(out, inputs[0]),)

    return custom_vjp(forward, backward, x)[0]


def merge_heads(x: Tensor) -> Tensor:
    """`bmtrain_ms.ops.merge_heads` on the host."""
    batch, heads, length, dim = x.shape
    together = (batch, length, heads, dim)
    return custom_vjp(
        lambda x: ((_swapped(x, x.shape, (batch * length, heads * dim)),), None),
        lambda xs, _, grads: (_swapped(grads[0], together),),
        x,
    )[0]


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`bmtrain_ms.ops.reshape` on the host."""
    if x.shape == shape:
        return x
    return custom_vjp(
        lambda x: ((from_host(values(x).reshape(shape)),), None),
        lambda xs, _, grads: (from_host(values(grads[0]).reshape(xs[0].shape)),),
        x,
    )[0]


def _swapped(x: Tensor, shape: tuple[int, ...], back: tuple[int, ...] | None = None) -> Tensor:
    """x in a shape of four dims, the two in the middle exchanged; then in the shape `back`."""
    out = np.ascontiguousarray(values(x).reshape(shape).swapaxes(1, 2))
    return from_host(out if back is None else out.reshape(back))
