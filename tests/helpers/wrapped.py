"""Ordinary models, and the comparison of a wrapped one with an unwrapped twin."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import World
from bmtrain_ms.compat.cells import parameter_table
from tests.helpers.models import full

WIDTH, CLASSES = 4, 3


class Layer(nn.Cell):
    """x + b(tanh(a(x)))."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.a, self.b = nn.Dense(width, width), nn.Dense(width, width)

    def construct(self, x: Tensor) -> Tensor:
        return x + self.b(ops.tanh(self.a(x)))


class Stack(nn.Cell):
    """Repeated layers and a head."""

    def __init__(self, layer: Callable[[], nn.Cell] = Layer, layers: int = 2):
        super().__init__()
        self.layers = nn.CellList([layer() for _ in range(layers)])
        self.head = nn.Dense(WIDTH, CLASSES)

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def x_of(*shape: int, seed: int = 0) -> Tensor:
    """A batch; (5, WIDTH) by default."""
    return Tensor(np.random.RandomState(seed).randn(*(shape or (5, WIDTH))).astype(np.float32))


def built(build: Callable[[], nn.Cell], training: bool = True) -> nn.Cell:
    """The model with the values that this seed gives; the same each time. (`copy.deepcopy` of a plain model forgets flags.)"""
    ms.set_seed(1)
    np.random.seed(1)
    return build().set_train(training)


def twins(build: Callable[[], nn.Cell], **options: Any) -> tuple[nn.Cell, nn.Cell]:
    """The unwrapped model, and another object, wrapped."""
    return built(build), bms.BMTrainModelWrapper(built(build), verbose=False, **options)


def gradients(model: nn.Cell, forward: Callable[..., Tensor], *inputs: Any) -> tuple[float, dict[str, np.ndarray], list[Any]]:
    """Loss, gradients as they come (shards, if sharded) by name, and the parameters in the same order."""
    params = model.trainable_params()
    loss, grads = ms.value_and_grad(lambda: forward(model, *inputs), None, params)()
    return loss.asnumpy().item(), {p.name: g for p, g in zip(params, grads)}, list(params)


def assert_equal_training(plain: nn.Cell, wrapped: nn.Cell, forward: Callable[..., Tensor], *inputs: Any, tolerance: float = 1e-6):
    """Loss and every gradient of `forward(model, *inputs)`, in one process. None of them is zero everywhere."""
    assert plain is not wrapped
    loss, expected, _ = gradients(plain, forward, *inputs)
    got_loss, got, params = gradients(wrapped, forward, *inputs)
    np.testing.assert_allclose(got_loss, loss, rtol=tolerance)
    assert sorted(got) == sorted(expected)
    for p in params:
        assert np.abs(expected[p.name].asnumpy()).max() > 0, p.name
        value = got[p.name].asnumpy().reshape(expected[p.name].shape)
        np.testing.assert_allclose(value, expected[p.name].asnumpy(), rtol=1e-5, atol=tolerance, err_msg=p.name)


def square(model: nn.Cell, *args: Any, **kwargs: Any) -> Tensor:
    """A loss for a model that returns one tensor."""
    return (model(*args, **kwargs) ** 2).mean()


def whole(world: World, p: Any, tensor: Tensor | None = None) -> np.ndarray:
    """The full values of a parameter, sharded or not, or of what has its form."""
    if isinstance(p, bms.DistributedParameter):
        return full(world, p, tensor)
    return (p if tensor is None else tensor).asnumpy()


def raw(model: nn.Cell, path: str) -> Any:
    """The Parameter at `path`, ungathered."""
    *cells, name = path.split(".")
    for step in cells:
        model = model[int(step)] if isinstance(model, (nn.CellList, nn.SequentialCell)) else getattr(model, step)
    return parameter_table(model)[name]
