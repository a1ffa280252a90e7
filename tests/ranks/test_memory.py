"""No rank ever allocates anything of the model's size, and nothing grows."""

from __future__ import annotations

import gc
import resource
import weakref
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Engine, RecordingEngine, Work, World, use_world
from bmtrain_ms.compat.autograd import no_grad
from bmtrain_ms.compat.runtime import from_host
from tests.helpers.ranks import RankPool

pytestmark = pytest.mark.ranks

WIDTH, LAYERS, RANKS = 768, 170, 4
MODEL = 4 * WIDTH * WIDTH * LAYERS  # bytes of parameters: 382 MiB


class Layer(nn.Cell):
    """One weight."""

    def __init__(self, width: int):
        super().__init__()
        method = bms.ParameterInitializer(bms.init.normal_, std=0.01)
        self.weight = bms.DistributedParameter(bms.empty(width, width), init_method=method)

    def construct(self, x: Tensor) -> Tensor:
        return x + ops.MatMul(transpose_b=True)(x, self.weight)


def chain(width: int, layers: int, use_checkpoint: bool) -> bms.TransformerBlockList:
    return bms.TransformerBlockList(bms.Block(Layer(width), use_checkpoint) for _ in range(layers))


def data_bytes() -> int:
    """Private writable memory of this process: what RLIMIT_DATA limits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData")).split()[1]) << 10


def train(model: nn.Cell, steps: int, width: int) -> None:
    manager = bms.optim.OptimManager()
    optimizer = bms.optim.AdamOptimizer(model.trainable_params())
    manager.add_optimizer(optimizer)
    x = from_host(np.full((2, width), 0.1, np.float32))
    for _ in range(steps):
        manager.zero_grad()
        manager.backward(lambda: model(x).sum())
        manager.clip_grad_norm(optimizer.param_groups, 1.0)
        manager.step()


def whole_run(use_checkpoint: bool, path: str) -> None:
    """Construct, initialise, train, evaluate, save, load."""
    model = chain(WIDTH, LAYERS, use_checkpoint)
    bms.init_parameters(model)
    train(model, 2, WIDTH)
    with no_grad():
        model(from_host(np.ones((2, WIDTH), np.float32)))
    bms.save(model, path)
    del model
    gc.collect()
    bms.load(chain(WIDTH, LAYERS, use_checkpoint), path)


def under_a_limit(world: Any, path: str) -> None:
    """A tenth of the model is left beyond what the rank stores: parameters, two moments, gradients."""
    train(chain(8, 2, True), 2, 8)  # MindSpore and NumPy have made what they keep
    state = 4 * MODEL // RANKS
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + state + MODEL // 10, before[1]))
    try:
        with pytest.raises(MemoryError):
            np.empty(state + MODEL // 5, np.uint8)  # the limit limits
        whole_run(True, path)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def resident(what: str = "VmRSS") -> int:
    """Bytes; `VmHWM`: the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) << 10


def peak_beyond_state(world: Any, path: str) -> int:
    """Without checkpointing, where freed weights keep their addresses: the most resident memory beyond what is stored."""
    train(chain(8, 2, False), 2, 8)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident()
    whole_run(False, path)
    return resident("VmHWM") - before - 4 * MODEL // RANKS


@pytest.mark.timeout(400)
def test_nothing_of_the_model_s_size_is_ever_allocated(tmp_path: Path):
    pool = RankPool(RANKS)  # new processes: what others have left behind would count
    try:
        pool.run(under_a_limit, timeout=180, path=str(tmp_path / "model.safetensors"))
        for peak in pool.run(peak_beyond_state, timeout=180, path=str(tmp_path / "again.safetensors")):
            assert peak < MODEL // 10
    finally:
        pool.kill()


# Full gradients #


class Watching(RecordingEngine):
    """Counts the bytes of full gradients that are alive whenever a reduce is issued."""

    def __init__(self, inner: Engine):
        super().__init__(inner)
        self.alive: list[weakref.ref] = []
        self.most = 0

    def reduce_scatter(self, tensors: Any, op: str = "sum", label: str = "") -> Work:
        self.alive += [weakref.ref(x) for x in tensors]
        self.most = max(self.most, sum(x().nbytes for x in self.alive if x() is not None))
        return super().reduce_scatter(tensors, op, label)


def most_gradients(world: Any, use_checkpoint: bool, zero_level: int) -> int:
    engine = Watching(world.engine)
    with use_world(World(engine, world.mesh)):
        model = bms.TransformerBlockList(bms.Block(Layer(64), use_checkpoint, zero_level) for _ in range(8))
        train(model, 3, 64)
    return engine.most


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("zero_level", [2, 3])
def test_full_gradients_of_at_most_two_blocks_are_alive(run_ranks: Callable, use_checkpoint: bool, zero_level: int):
    for most in run_ranks(2, most_gradients, use_checkpoint=use_checkpoint, zero_level=zero_level):
        assert 0 < most <= 2 * 4 * 64 * 64


# Persistent memory #


def persistent(world: Any) -> tuple[int, int]:
    """Bytes that are stored, and the formula, for awkward sizes."""
    with use_world(World(world.engine, world.mesh)):
        model = nn.CellList([bms.Block(Layer(width)) for width in (129, 250, 333)])
        optimizer = bms.optim.AdamOptimizer(model.trainable_params())
        stored = sum(t.nbytes for p in optimizer.parameters for t in (p, *optimizer.state_of(p).values()))
        return stored, sum(12 * p.full_size for p in optimizer.parameters) // world.engine.size


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_persistent_bytes_follow_the_formula(run_ranks: Callable, ranks: int):
    for stored, formula in run_ranks(ranks, persistent):
        assert formula <= stored <= 1.02 * formula


# Leaks #


def grow(world: Any, use_checkpoint: bool) -> list[int]:
    """Resident bytes every 50 steps, after 150."""
    model = chain(256, 4, use_checkpoint)
    bms.init_parameters(model)
    sizes = []
    for _ in range(7):
        train(model, 50, 256)
        gc.collect()
        sizes.append(resident())
    return sizes[2:]


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_200_steps_do_not_grow(run_ranks: Callable, use_checkpoint: bool):
    block = 4 * 256 * 256
    for sizes in run_ranks(2, grow, use_checkpoint=use_checkpoint):
        assert max(sizes[1:]) - sizes[0] < 2 * block, "in 200 steps less than two of the four gathered blocks"


def test_the_weights_of_a_step_are_let_go_of(single_world: Any):
    """No graph, cache or traceback holds a full tensor after a step."""
    model = chain(64, 3, False)
    seen: list[weakref.ref] = []

    def noted(x: Tensor) -> Tensor:
        for block in model:
            original = block.inner.construct

            def construct(x: Tensor, original: Callable = original, inner: nn.Cell = block.inner) -> Tensor:
                seen.append(weakref.ref(inner.weight))
                return original(x)

            block.inner.construct = construct
        return model(x).sum()

    ms.value_and_grad(noted, None, model.trainable_params())(from_host(np.ones((2, 64), np.float32)))
    gc.collect()
    assert len(seen) == 3 and all(tensor() is None for tensor in seen)
