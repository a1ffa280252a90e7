"""Adam in float64, and a small model whose gradients are known, for tests of optimizers and of the manager."""

from __future__ import annotations

import math
from typing import Any, Iterable

import mindspore as ms
import numpy as np
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.compat.runtime import overwrite
from bmtrain_ms.lr_scheduler import Linear
from bmtrain_ms.optim import AdamOptimizer, OptimManager

SHAPES = {"one": (1,), "prime": (7,), "matrix": (3, 5), "deep": (2, 3, 4)}
DTYPES = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parameters(dtype: Any = ms.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[bms.DistributedParameter]:
    return [
        bms.DistributedParameter(Tensor(numbers(*shape, seed=i)).astype(dtype), name=name)
        for i, (name, shape) in enumerate(shapes.items())
    ]


def gradients(step: int, dtype: Any = ms.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Of the shards: flat."""
    return [Tensor(numbers(math.prod(s), seed=100 * step + i)).astype(dtype) for i, s in enumerate(shapes.values())]


class AdamW:
    """Loshchilov and Hutter, 2019, algorithm 2, without a schedule multiplier; float64."""

    def __init__(
        self,
        value: np.ndarray,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hold_steps: int = 0,
        maximize: bool = False,
    ):
        self.p = value.astype(np.float64).reshape(-1)
        self.m, self.v, self.t = np.zeros_like(self.p), np.zeros_like(self.p), 0
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.hold_steps, self.sign = hold_steps, -1.0 if maximize else 1.0
        self.delta = np.zeros_like(self.p)

    def step(self, grad: np.ndarray) -> None:
        self.t += 1
        b1, b2 = self.betas
        g = self.sign * grad.astype(np.float64).reshape(-1)
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.delta = m_hat / (np.sqrt(v_hat) + self.eps) + self.weight_decay * self.p
        if self.t > self.hold_steps:
            self.p = self.p - self.lr * self.delta


def values(items: Iterable[Any]) -> list[np.ndarray]:
    return [x.asnumpy().copy() for x in items]


def floats(x: Any) -> np.ndarray:
    """A tensor's values in float32, whatever its type."""
    return x.asnumpy().astype(np.float32)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """The same bits."""
    return len(a) == len(b) and all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b))


def states(optimizer: Any) -> list[np.ndarray]:
    """Copies of every tensor of the optimizer."""
    return [x for p in optimizer.parameters for x in values(optimizer.state_of(p).values())]


def copy_tensors(source: AdamOptimizer, target: AdamOptimizer) -> None:
    for p, q in zip(source.parameters, target.parameters):
        for name, tensor in source.state_of(p).items():
            overwrite(target.state_of(q)[name], tensor)


class Setting:
    """A linear layer, its optimizer, schedule and manager, and a loss whose gradient is known: sum(y * c) of y = x Wᵀ + b."""

    def __init__(self, dtype: Any = ms.float32, schedule: bool = True, **manager: Any):
        self.layer = bms.nn.Linear(3, 2, dtype=dtype)
        bms.init_parameters(self.layer)
        self.weight, self.bias = self.layer.parameter("weight"), self.layer.parameter("bias")
        self.optimizer = AdamOptimizer(self.layer.trainable_params(), weight_decay=0.1)
        self.schedule = Linear(self.optimizer, 0.1, 1, 100, num_iter=1) if schedule else None
        self.manager = OptimManager(**manager)
        self.manager.add_optimizer(self.optimizer, self.schedule)
        self.dtype = ms.dtype_to_nptype(dtype)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Small integers: sums of products are exact."""
        random = np.random.default_rng(step)
        return random.integers(1, 5, (4, 3)).astype(self.dtype), random.integers(-4, 5, (4, 2)).astype(self.dtype)

    def backward(self, step: int, factor: float = 1.0) -> Any:
        x, c = map(Tensor, self.batch(step))
        return self.manager.backward(lambda x, c: (self.layer(x) * c).sum().astype(ms.float32) * factor, x, c)

    def gradients(self, step: int) -> list[np.ndarray]:
        x, c = self.batch(step)
        return [(c.T @ x).reshape(-1).astype(np.float32), c.sum(0).astype(np.float32)]

    def grads(self) -> list[np.ndarray]:
        return values(self.manager.grad(p) for p in self.optimizer.parameters)

    def run(self, steps: int) -> None:
        for step in range(steps):
            self.manager.zero_grad()
            self.backward(step)
            self.manager.step()

    def everything(self) -> list[np.ndarray]:
        return values(self.optimizer.parameters) + states(self.optimizer)
