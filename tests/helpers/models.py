"""Small models of awkward sizes, sharded and unsharded, for parity tests."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, World, use_world
from bmtrain_ms.nn.functional import cross_entropy
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from bmtrain_ms.zero import context_of

WIDTH, INNER, CLASSES, ROWS = 7, 5, 11, 24  # odd on purpose; ROWS divides by 1, 2, 3 and 4 ranks


class Dense(bms.DistributedModule):
    """y = (x W + b) * g with parameters of numel 35, 5 or 7, and 1 (smaller than the world)."""

    def __init__(self, width: int, out: int, dtype: Any):
        super().__init__()

        def parameter(*shape: int, mean: float = 0.0) -> bms.DistributedParameter:
            method = bms.ParameterInitializer(bms.init.normal_, mean=mean, std=0.3)
            return bms.DistributedParameter(bms.empty(*shape, dtype=dtype), init_method=method)

        self.weight, self.bias, self.gain = parameter(out, width), parameter(out), parameter(1, mean=1.0)

    def construct(self, x: Tensor) -> Tensor:
        return (ops.MatMul(transpose_b=True)(x, self.weight) + self.bias) * self.gain


class Residual(nn.Cell):
    """x + b(tanh(a(x)))."""

    def __init__(self, dtype: Any = ms.float32, width: int = WIDTH, inner: int = INNER):
        super().__init__()
        self.a, self.b = Dense(width, inner, dtype), Dense(inner, width, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return x + self.b(ops.tanh(self.a(x)))


class Model(nn.Cell):
    """Blocks, and a head outside of them."""

    def __init__(self, layers: int, use_checkpoint: bool, zero_level: int, dtype: Any):
        super().__init__()
        self.layers = bms.TransformerBlockList(bms.Block(Residual(dtype), use_checkpoint, zero_level) for _ in range(layers))
        self.head = Dense(WIDTH, CLASSES, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class TwinDense(nn.Cell):
    """`Dense` of plain Parameters."""

    def __init__(self, width: int, out: int, dtype: Any):
        super().__init__()
        self.weight = Parameter(ops.zeros((out, width), dtype), name="weight")
        self.bias = Parameter(ops.zeros((out,), dtype), name="bias")
        self.gain = Parameter(ops.zeros((1,), dtype), name="gain")

    construct = Dense.construct


class TwinResidual(nn.Cell):
    """`Residual` of plain Parameters."""

    def __init__(self, dtype: Any):
        super().__init__()
        self.a, self.b = TwinDense(WIDTH, INNER, dtype), TwinDense(INNER, WIDTH, dtype)

    construct = Residual.construct


class Twin(nn.Cell):
    """`Model` without any of bmtrain_ms: the reference."""

    def __init__(self, layers: int, dtype: Any):
        super().__init__()
        self.layers = nn.SequentialCell([TwinResidual(dtype) for _ in range(layers)])
        self.head = TwinDense(WIDTH, CLASSES, dtype)

    construct = Model.construct


def data(step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of a step."""
    random = np.random.RandomState(100 + step)
    return random.randn(ROWS, WIDTH).astype(np.float32), random.randint(0, CLASSES, ROWS).astype(np.int32)


def share(world: World, x: np.ndarray) -> np.ndarray:
    """This rank's part of a global batch."""
    rows = len(x) // world.engine.size
    return np.ascontiguousarray(x[world.engine.rank * rows : (world.engine.rank + 1) * rows])


def recorded(world: World, prefetch: int = 1, gather_dtype: str | None = None, shard_size: int | None = None) -> World:
    """The same ranks, with a list of their collectives."""
    engine = RecordingEngine(world.engine)
    return World(engine, Mesh.data_parallel(engine.size, engine.rank, shard_size), world.seed, world.launch, prefetch, gather_dtype)


def full(world: World, p: bms.DistributedParameter, shard: Tensor | None = None) -> np.ndarray:
    """The full values of a parameter, or of a tensor sharded as it is."""
    engine = getattr(world.shards, "inner", world.shards)
    gathered = engine.all_gather([p if shard is None else shard]).wait()[0].asnumpy()
    assert not gathered[p.full_size :].any(), f"padding of {p.name} is not zero"
    return gathered[: p.full_size].reshape(p.full_shape).astype(np.float32)


def train_sharded(
    world: World, steps: int, zero_level: int, use_checkpoint: bool, half: bool, prefetch: int = 1, **options: Any
) -> dict:
    """Train `Model`; what happened, in full tensors. `options`: of `recorded`."""
    with use_world(recorded(world, prefetch, **options)) as here:
        model = Model(3, use_checkpoint, zero_level, ms.float16 if half else ms.float32)
        bms.init_parameters(model)
        initial = {p.name: full(here, p) for p in model.get_parameters()}
        optimizer = AdamOptimizer(model.trainable_params(), lr=1e-2, weight_decay=0.1)
        manager = OptimManager(loss_scale=1024.0 if half else None)
        manager.add_optimizer(optimizer)
        losses, grads = [], {}
        for step in range(steps):
            x, y = (share(here, a) for a in data(step))
            manager.zero_grad()
            loss = manager.backward(
                lambda x, y: cross_entropy(model(x), y), Tensor(x).astype(model.head.parameter("weight").dtype), Tensor(y)
            )
            losses.append(world.engine.all_reduce([loss.reshape(1)], "mean").wait()[0].asnumpy().item())
            if step == 0:
                grads = {p.name: full(here, p, manager.grad(p)) / manager.loss_scale for p in optimizer.parameters}
            manager.step()
        return {
            "initial": initial,
            "losses": losses,
            "grads": grads,
            "final": {p.name: full(here, p) for p in optimizer.parameters},
            "calls": here.engine.calls(),
            "peak": context_of(here).pipeline.meter.peak,
        }


def train_twin(initial: dict[str, np.ndarray], steps: int, half: bool) -> dict:
    """Train `Twin` on the whole batch, AdamW written out in float64 with masters, from the same values."""
    dtype = ms.float16 if half else ms.float32
    scale = 1024.0 if half else 1.0
    model = Twin(3, dtype)
    params = {p.name: p for p in model.trainable_params()}
    assert set(params) == set(initial)
    master = {name: value.astype(np.float64) for name, value in initial.items()}
    moments = {name: [np.zeros_like(v), np.zeros_like(v)] for name, v in master.items()}
    losses, first = [], {}
    for step in range(steps):
        for name, p in params.items():
            p.set_data(Tensor(master[name].astype(np.float32)).astype(dtype))
        x, y = data(step)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return ops.cross_entropy(model(x).astype(ms.float32), y) * scale

        value, grads = ms.value_and_grad(loss, None, list(params.values()))(Tensor(x).astype(dtype), Tensor(y))
        losses.append(value.asnumpy().item() / scale)
        grads = {name: g.asnumpy().astype(np.float64) / scale for name, g in zip(params, grads)}
        first = first or grads
        for name, g in grads.items():
            m, v = moments[name]
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            update = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
            master[name] -= 1e-2 * (update + 0.1 * master[name])
    return {"losses": losses, "grads": first, "final": master}
