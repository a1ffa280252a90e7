"""Initial values of parameters, drawn slice by slice (BMTrain: `param_init`).

Result: bit-equal for every number of ranks, and never a full tensor in memory. A parameter's values depend on the run's seed and
on its name, so adding a layer leaves the others as they were.
"""

from __future__ import annotations

import math
from typing import Any, Callable

import numpy as np
from mindspore import nn

from bmtrain_ms_base.layout import Layout
from bmtrain_ms_base.random import chunks_of, key_of, normal, uniform

from ..comm import init_distributed as init_distributed  # BMTrain has these two here as well
from ..comm import is_initialized as is_initialized
from ..compat.runtime import from_host, numpy_dtype
from .param import DistributedParameter

# values of a chunk of elements: (words, shape of the full tensor, *args) -> float64, one per word
Fill = Callable[..., np.ndarray]


def _counter_based(fill: Fill) -> Fill:
    """Marks functions that `ParameterInitializer` may call on a slice."""
    fill.counter_based = True
    return fill


@_counter_based
def normal_(words: np.ndarray, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """Values of a normal distribution."""
    return mean + std * normal(words)


@_counter_based
def uniform_(words: np.ndarray, shape: tuple[int, ...], a: float = 0.0, b: float = 1.0) -> np.ndarray:
    """Values uniform in [a, b)."""
    return a + (b - a) * uniform(words)


@_counter_based
def constant_(words: np.ndarray, shape: tuple[int, ...], val: float = 0.0) -> np.ndarray:
    """The same value `val` everywhere."""
    return np.full(words.shape, float(val))


@_counter_based
def zeros_(words: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The value zero everywhere."""
    return np.zeros(words.shape)


@_counter_based
def ones_(words: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The value one everywhere."""
    return np.ones(words.shape)


@_counter_based
def xavier_normal_(words: np.ndarray, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """Normal with std = gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    fan_in, fan_out = _fans(shape)
    return gain * math.sqrt(2.0 / (fan_in + fan_out)) * normal(words)


@_counter_based
def xavier_uniform_(words: np.ndarray, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """Uniform in +-gain * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    fan_in, fan_out = _fans(shape)
    bound = gain * math.sqrt(6.0 / (fan_in + fan_out))
    return bound * (2.0 * uniform(words) - 1.0)


@_counter_based
def kaiming_normal_(words: np.ndarray, shape: tuple[int, ...], gain: float = math.sqrt(2.0)) -> np.ndarray:
    """Normal with std = gain / sqrt(fan_in) (He et al., 2015)."""
    return gain / math.sqrt(_fans(shape)[0]) * normal(words)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, *receptive field)."""
    if len(shape) < 2:
        raise ValueError(f"fan in and fan out need a weight of at least two dims, not shape {shape}; use normal_ or uniform_")
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


class ParameterInitializer:
    """How a parameter gets its first values (BMTrain: `ParameterInitializer`).

    Args:
        func: one of this module's functions, which are evaluated on the rank's slice only; or any function that fills a full
            float32 NumPy array in place. The latter is called on every rank, one parameter at a time, after NumPy's generator has
            been seeded from the run's seed and the parameter's name; it does allocate the full tensor.
        args, kwargs: passed on to `func`.
    """

    def __init__(self, func: Callable[..., Any], *args: Any, **kwargs: Any):
        if not callable(func):
            raise TypeError(f"func must be a function, as bmtrain_ms.init.normal_, not {func!r}")
        self.func, self.args, self.kwargs = func, args, kwargs

    def shard(self, key: np.ndarray, layout: Layout) -> np.ndarray:
        """What a rank stores, (layout.length,) float32, padded with zeros; the same whole tensor whatever the layout."""
        if not getattr(self.func, "counter_based", False):
            return layout.cut(self._whole(key, layout.whole))
        shard = np.zeros(layout.length, np.float32)
        for piece, words, inside in chunks_of(key, layout):
            shard[piece] = self.func(words, layout.whole, *self.args, **self.kwargs)[inside]
        return shard

    def _whole(self, key: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        whole = np.zeros(shape, np.float32)
        saved = np.random.get_state()
        np.random.seed(key.view(np.uint32))
        try:
            self.func(whole, *self.args, **self.kwargs)
        finally:
            np.random.set_state(saved)
        return whole


def init_parameters(model: nn.Cell) -> None:
    """Give every parameter that has an `init_method` its first values (BMTrain: `init_parameters`).

    Each rank draws its own slice; nothing is communicated. Parameters without `init_method` are left as they are.

    Raises:
        TypeError: an `init_method` is not a `ParameterInitializer`.
    """
    if not isinstance(model, nn.Cell):
        raise TypeError(f"init_parameters takes a model, not a {type(model).__name__}")
    model.check_names_and_refresh_name()
    for parameter in model.get_parameters():
        if isinstance(parameter, DistributedParameter) and parameter.init_method is not None:
            initialise(parameter)


def initialise(parameter: DistributedParameter) -> None:
    """Give one parameter its first values, by the name that it has now."""
    method = parameter.init_method
    if not isinstance(method, ParameterInitializer):
        raise TypeError(
            f"init_method of parameter {parameter.name} is a {type(method).__name__}; wrap it: ParameterInitializer(func, ...)"
        )
    shard = method.shard(key_of(parameter.world.seed, "init", parameter.name), parameter.layout)
    parameter.set_shard(from_host(shard.astype(numpy_dtype(parameter.dtype), copy=False)))
