"""MindSpore's own optimizers over a model whose gradients are exact, with and without bmtrain_ms."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.experimental import optim as experimental

import bmtrain_ms as bms
from bmtrain_ms.comm import World
from bmtrain_ms.optim import OptimManager
from tests.helpers.models import full

SHAPES = {"one": (1,), "prime": (7,), "matrix": (3, 4)}  # at 3 ranks two own nothing of "one"

MAKERS: dict[str, Callable[[list[Parameter]], Any]] = {
    "AdamWeightDecay": lambda params: nn.AdamWeightDecay(params, 0.1, weight_decay=0.1),
    "Adam": lambda params: nn.Adam(params, 0.1, weight_decay=0.1),
    "SGD": lambda params: nn.SGD(params, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Momentum": lambda params: nn.Momentum(params, 0.1, 0.9),
    "experimental.AdamW": lambda params: experimental.AdamW(params, lr=0.1, weight_decay=0.1),
    "experimental.SGD": lambda params: experimental.SGD(params, lr=0.1, momentum=0.9),
    "groups": lambda params: nn.Adam([{"params": params[:1], "lr": 0.5}, {"params": params[1:], "weight_decay": 0.2}], 0.1),
    "experimental groups": lambda params: experimental.Adam([{"params": params[1:], "lr": 0.5}, {"params": params[:1]}], lr=0.1),
}


def initial(name: str) -> np.ndarray:
    return np.random.default_rng(list(SHAPES).index(name)).integers(-8, 9, SHAPES[name]).astype(np.float32) / 8


def gradient(name: str, step: int) -> np.ndarray:
    """Small integers: scaling, and the mean over ranks that all have it, are exact."""
    return np.random.default_rng([list(SHAPES).index(name), step]).integers(-5, 6, SHAPES[name]).astype(np.float32)


class Sum(bms.DistributedModule):
    """sum(p * c) over its parameters: its gradient is c."""

    def __init__(self, dtype: Any = ms.float32):
        super().__init__()
        for name in SHAPES:
            setattr(self, name, bms.DistributedParameter(initial(name).astype(ms.dtype_to_nptype(dtype))))

    def construct(self, *factors: Tensor) -> Tensor:
        terms = [(getattr(self, name) * c).sum().astype(ms.float32) for name, c in zip(SHAPES, factors)]
        return terms[0] + terms[1] + terms[2]


class Managed:
    """`Sum` with an optimizer under the manager."""

    def __init__(
        self,
        make: Callable[[list[Parameter]], Any],
        schedule: Callable[[Any], Any] | None = None,
        dtype: Any = ms.float32,
        **manager: Any,
    ):
        self.model, self.dtype = Sum(dtype), ms.dtype_to_nptype(dtype)
        self.model.check_names_and_refresh_name()
        self.params = self.model.trainable_params()
        self.optimizer = make(self.params)
        self.manager = OptimManager(**manager)
        self.manager.add_optimizer(self.optimizer, schedule(self.optimizer) if schedule else None)
        self.driver = self.manager.drivers[0]

    def run(self, steps: range) -> None:
        for step in steps:
            self.manager.zero_grad()
            self.manager.backward(self.model, *(Tensor(gradient(name, step).astype(self.dtype)) for name in SHAPES))
            assert self.manager.step().updated

    def values(self, world: World) -> dict[str, np.ndarray]:
        return {p.name: full(world, p) for p in self.params}


def alone(
    make: Callable[[list[Parameter]], Any], steps: int, rate: Callable[[Any, int], None] | None = None
) -> dict[str, np.ndarray]:
    """The same without us: plain parameters, whole gradients, the optimizer called. `rate` sets the rate before a step."""
    params = [Parameter(Tensor(initial(name)), name=name) for name in SHAPES]
    optimizer = make(params)
    by_name = {p.name: p for p in params}
    for step in range(steps):
        if rate is not None:
            rate(optimizer, step)
        optimizer(tuple(Tensor(gradient(p.name, step)) for p in optimizer.parameters))
    return {name: by_name[name].asnumpy() for name in SHAPES}
