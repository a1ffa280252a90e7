"""A model that records its tensors, built in several ways, and the same computation in float64 NumPy."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.inspect import InspectTensor, inspect_tensor, record_tensor

WIDTH, LAYERS, ROWS = 5, 3, 12  # 30 parameters a layer; ROWS divides by 1, 2 and 3 ranks
WAYS = ("plain", "checkpointed", "kept", "zero 2", "list")
NAMES = [(name, group) for _ in range(LAYERS) for name, group in (("x", "inputs"), ("y", None), ("z", None))]


class Layer(nn.Cell):
    """x + z with z = y² / 10, y = x Wᵀ + b, recorded at three places. (MindSpore's tanh on CPU is off by 1e-4.)"""

    def __init__(self) -> None:
        super().__init__()
        self.linear = bms.nn.Linear(WIDTH, WIDTH, init_std=0.3)

    def construct(self, x: Tensor) -> Tensor:
        record_tensor(x, "x", group="inputs")
        y = self.linear(x)
        record_tensor(y, "y")
        z = y * y * 0.1
        record_tensor(z, "z")
        return x + z


def build(way: str) -> nn.Cell:
    """With the same names and values each time."""
    layers = [Layer() for _ in range(LAYERS)]
    model = nn.Cell()
    if way == "plain":
        model.layers = nn.SequentialCell(layers)
    elif way == "list":
        model.layers = bms.TransformerBlockList(layers)
    else:
        level = 2 if way == "zero 2" else 3
        model.layers = nn.SequentialCell([bms.Block(layer, way == "checkpointed", level) for layer in layers])
    bms.init_parameters(model)
    return model


def batch() -> np.ndarray:
    """Of all ranks."""
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


def train(model: nn.Cell, x: Any) -> tuple[InspectTensor, np.ndarray, list[Tensor]]:
    """Loss sum(out²): what was recorded, and the gradients of x and of the parameters."""
    with inspect_tensor() as inspector:
        loss = ms.value_and_grad(lambda x: (model.layers(x) ** 2).sum(), 0, model.trainable_params())
        _, (by_x, by_weights) = loss(Tensor(x))
    return inspector, by_x.asnumpy(), list(by_weights)


def reference(state: dict[str, np.ndarray], x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Values and gradients of what is recorded, in order, in float64."""
    state = {name: value.astype(np.float64) for name, value in state.items()}
    weights = [state[f"layers.{i}.linear.weight"] for i in range(LAYERS)]
    values, x = [], x.astype(np.float64)
    for i, w in enumerate(weights):
        y = x @ w.T + state[f"layers.{i}.linear.bias"]
        values += [x, y, 0.1 * y**2]
        x = x + values[-1]
    grads: list[np.ndarray] = []
    by_out = 2.0 * x
    for i in reversed(range(LAYERS)):
        by_y = by_out * 0.2 * values[3 * i + 1]
        by_x = by_out + by_y @ weights[i]
        grads = [by_x, by_y, by_out, *grads]
        by_out = by_x
    return values, grads
