"""Checkpoints at several ranks: the file does not depend on their number, failures reach all of them, training goes on."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError, load_training
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.files import format as format_module
from bmtrain_ms.files import gathering
from bmtrain_ms.files.format import AtomicFile
from bmtrain_ms.lr_scheduler import Linear
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn.functional import cross_entropy
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from tests.helpers.models import full, share
from tests.helpers.training_v1 import save_training

pytestmark = pytest.mark.ranks

# The first is smaller than 2 ranks, "two" than 3; the last has padding that would run over the end of the file.
SHAPES = {"one": (1,), "two": (2,), "deep": (2, 3, 5), "prime": (7,)}
DTYPES = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}


class Odd(nn.Cell):
    """Sharded parameters of all types and a replicated one."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.count = Parameter(Tensor(np.array([seed, 5], np.int32)), name="count", requires_grad=False)
        for i, (kind, dtype) in enumerate(DTYPES.items()):
            for j, (name, shape) in enumerate(SHAPES.items()):
                p = bms.DistributedParameter(bms.empty(*shape, dtype=dtype))
                setattr(self, f"{name}_{kind}", p)
                values = np.random.default_rng([seed, i, j]).standard_normal(shape).astype(np.float32)
                p.copy_full(Tensor(values).astype(dtype))

    def raw(self, world: World) -> dict[str, bytes]:
        """The bits of the full tensors."""
        sharded = {p.name: p for p in self.get_parameters() if isinstance(p, bms.DistributedParameter)}
        gathered = {name: world.engine.all_gather([p]).wait()[0].asnumpy() for name, p in sharded.items()}
        assert not any(gathered[name][p.full_size :].any() for name, p in sharded.items()), "padding is not zero"
        bits = {name: gathered[name][: p.full_size].tobytes() for name, p in sharded.items()}
        return {**bits, "count": self.count.asnumpy().tobytes()}


def small_pieces(size: int = 8) -> pytest.MonkeyPatch:
    """So few bytes travel, or are read, at once: every tensor takes several rounds."""
    patch = pytest.MonkeyPatch()
    for module in (gathering, format_module):
        patch.setattr(module, "PIECE", size)
    return patch


def save_odd(world: World, path: str, seed: int, pieces: bool) -> dict[str, bytes]:
    patch = small_pieces() if pieces else pytest.MonkeyPatch()
    try:
        model = Odd(seed)
        bms.save(model, path)
        return model.raw(world)
    finally:
        patch.undo()


def load_odd(world: World, path: str, pieces: bool) -> dict[str, bytes]:
    patch = small_pieces() if pieces else pytest.MonkeyPatch()
    try:
        model = Odd(seed=9)
        bms.load(model, path)
        return model.raw(world)
    finally:
        patch.undo()


@pytest.mark.parametrize("most", [3])
@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
def test_the_file_does_not_depend_on_the_ranks(run_ranks, single_world, tmp_path, pieces, most):
    """Saved at N, loaded at M: the same bits in file and memory."""
    paths = {n: str(tmp_path / f"saved-by-{n}") for n in range(1, most + 1)}
    expected = save_odd(single_world, paths[1], 4, False)
    for n in range(2, most + 1):
        assert run_ranks(n, save_odd, path=paths[n], seed=4, pieces=pieces) == [expected] * n
    contents = {Path(path).read_bytes() for path in paths.values()}
    assert len(contents) == 1
    assert load_odd(single_world, paths[most], pieces) == expected
    for m in range(2, most + 1):
        for n in paths:
            assert run_ranks(m, load_odd, path=paths[n], pieces=pieces) == [expected] * m
    assert sorted(os.listdir(tmp_path)) == [f"saved-by-{n}" for n in paths]


def save_without_space(world: World, path: str, writes: int) -> str:
    """The disk is full after some writes, which rank 0 does alone; every rank returns its error."""
    patch = small_pieces()
    write, seen = AtomicFile.write, []

    def limited(self: AtomicFile, position: int, data: np.ndarray) -> None:
        assert world.engine.rank == 0
        seen.append(position)
        if len(seen) > writes:
            raise OSError(28, "No space left on device")
        write(self, position, data)

    patch.setattr(AtomicFile, "write", limited)
    try:
        bms.save(Odd(seed=1), path)
    except CheckpointError as error:
        assert len(seen) == (writes + 1 if world.engine.rank == 0 else 0)
        return str(error)
    finally:
        patch.undo()
    return "no error"


@pytest.mark.parametrize("ranks, writes", [(2, 0), (3, 11)])
def test_the_old_file_stays_when_the_disk_is_full(run_ranks, tmp_path, ranks, writes):
    path = str(tmp_path / "file")
    run_ranks(ranks, save_odd, path=path, seed=0, pieces=False)
    before = Path(path).read_bytes()
    errors = run_ranks(ranks, save_without_space, path=path, writes=writes, timeout=30)
    assert errors[0] == f"{path} cannot be written: [Errno 28] No space left on device"
    assert errors[1:] == [f"{path} cannot be written: rank(s) [0] failed; see their messages"] * (ranks - 1)
    assert os.listdir(tmp_path) == ["file"] and Path(path).read_bytes() == before
    after = run_ranks(ranks, save_odd, path=path, seed=1, pieces=False)  # the ranks are still in step
    assert run_ranks(ranks, load_odd, path=path, pieces=False) == after


def save_error(world: World, path: str) -> str:
    with pytest.raises(CheckpointError) as info:
        bms.save(Odd(), path)
    return str(info.value)


def test_nowhere_to_write(run_ranks, tmp_path):
    path = str(tmp_path / "missing" / "file")
    errors = run_ranks(2, save_error, path=path)
    assert errors[0].startswith(f"{path} cannot be written: [Errno 2] No such file or directory")
    assert errors[1] == f"{path} cannot be written: rank(s) [0] failed; see their messages"


def load_errors(world: World, paths: list[str]) -> tuple[str, bool]:
    """The error, and whether nothing has changed."""
    model = Odd(seed=9)
    before = model.raw(world)
    with pytest.raises(CheckpointError) as info:
        bms.load(model, paths[world.engine.rank])
    return str(info.value), model.raw(world) == before


def test_loading_fails_on_all_ranks(run_ranks, tmp_path):
    """One host does not see the file."""
    good, missing = str(tmp_path / "file"), str(tmp_path / "missing")
    run_ranks(2, save_odd, path=good, seed=0, pieces=False)
    errors = run_ranks(2, load_errors, paths=[good, missing])
    assert errors[0][0] == f"{good} cannot be loaded: rank(s) [1] failed; see their messages"
    assert errors[1] == (f"{missing} does not exist (or is not visible from this host)", True)
    Path(good).write_bytes(Path(good).read_bytes()[:-3])
    for text, unchanged in run_ranks(2, load_errors, paths=[good, good]):
        assert text.startswith(f"{good} is damaged: the file has ") and unchanged


def memory(world: World, path: str, nbytes: int) -> tuple[int, int]:
    """The most that NumPy allocated in saving and in loading; pieces are 64 KiB."""
    patch = small_pieces(1 << 16)

    class Large(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.large = bms.DistributedParameter(bms.empty(nbytes // 4), init_method=bms.ParameterInitializer(bms.init.normal_))

    def peak(function: Any, *args: Any) -> int:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        function(*args)
        return tracemalloc.get_traced_memory()[1] - before

    model, other = Large(), Large()
    bms.init_parameters(model)
    tracemalloc.start()
    try:
        peaks = peak(bms.save, model, path), peak(bms.load, other, path)
    finally:
        tracemalloc.stop()
        patch.undo()
    assert np.array_equal(model.large.asnumpy(), other.large.asnumpy()) and model.large.asnumpy().any()
    return peaks


def test_no_rank_holds_the_parameter(run_ranks, tmp_path):
    """128 pieces: saving holds a few, loading this rank's half and a few."""
    nbytes, few = 8 << 20, 8 << 16
    for saving, loading in run_ranks(2, memory, path=str(tmp_path / "file"), nbytes=nbytes):
        assert saving < few
        assert nbytes // 2 < loading < nbytes // 2 + few


# Training #


class Run:
    """A Llama in training on its share of a global batch of 6, in a world of its own over the same ranks."""

    def __init__(self, world: World, half: bool, dropout: float = 0.0):
        self.world = World(world.engine, world.mesh, seed=5, launch=world.launch)
        world.engine.clock.step = 0
        with use_world(self.world):
            config = LlamaConfig(17, 12, 2, num_heads_kv=1, dim_ff=7, num_layers=2, dtype="float16" if half else "float32")
            self.model = spread(Llama(config)).set_train(True)
            self.dropout = bms.nn.Dropout(dropout).set_train(True)
            bms.init_parameters(self.model)
            self.optimizer = AdamOptimizer(self.model.trainable_params(), weight_decay=0.1, eps=1e-4)
            self.manager = OptimManager(loss_scale=2.0**12 if half else None, loss_scale_steps=4)
            self.manager.add_optimizer(self.optimizer, Linear(self.optimizer, 0.02, 2, 10))

    def train(self, steps: range) -> list[float]:
        with use_world(self.world):
            return [self.step(step) for step in steps]

    def step(self, step: int) -> float:
        random = np.random.default_rng(step)
        ids, targets = (Tensor(share(self.world, random.integers(0, 17, (6, 5)).astype(np.int32))) for _ in range(2))
        self.manager.zero_grad()
        loss = self.manager.backward(lambda: cross_entropy(self.dropout(self.model(ids)).reshape(-1, 17), targets.reshape(-1)))
        self.manager.clip_grad_norm(self.optimizer.param_groups, 1.0)
        self.manager.step()
        return float(self.world.engine.all_reduce([loss.reshape(1)], "mean").wait()[0].asnumpy()[0])

    def save(self, path: str) -> None:
        with use_world(self.world):
            save_training(path, self.model, self.manager, {"step": 3})

    def load(self, path: str) -> None:
        with use_world(self.world):
            assert load_training(path, self.model, self.manager) == {"step": 3}

    def everything(self) -> dict[str, Any]:
        tensors = {(name, p.name): t for p in self.optimizer.parameters for name, t in self.optimizer.state_of(p).items()}
        by_name = {p.name: p for p in self.optimizer.parameters}
        state = {f"{kind} {name}": full(self.world, by_name[name], t) for (kind, name), t in tensors.items()}
        return {**{name: full(self.world, p) for name, p in by_name.items()}, **state}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(x, b[name]) for name, x in a.items())


def resume(world: World, path: str, half: bool, dropout: float) -> tuple[list[float], dict[str, np.ndarray]]:
    """3 steps, save, 3 more; and the last 3 again in new objects. Returns their losses and what is there in the end."""
    run = Run(world, half, dropout)
    run.train(range(3))
    run.save(path)
    losses, state = run.train(range(3, 6)), run.manager.state_dict(tensors=False)
    final = run.everything()
    again = Run(world, half, dropout)
    again.train(range(8, 9))
    again.load(path)
    assert again.train(range(3, 6)) == losses
    assert equal(again.everything(), final) and again.manager.state_dict(tensors=False) == state
    return losses, final


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_resumed_training_is_bit_equal(run_ranks, tmp_path, half):
    """Dropout included."""
    results = run_ranks(2, resume, path=str(tmp_path / "file"), half=half, dropout=0.2)
    assert results[0][0] == results[1][0] and equal(results[0][1], results[1][1])


def go_on(world: World, path: str) -> tuple[list[float], dict[str, np.ndarray]]:
    run = Run(world, half=False)
    run.load(path)
    return run.train(range(3, 6)), run.everything()


def test_training_goes_on_at_another_number_of_ranks(run_ranks, single_world, tmp_path):
    """From 2 ranks to 1 and to 3; only the order of sums differs."""
    path = str(tmp_path / "file")
    losses, final = run_ranks(2, resume, path=path, half=False, dropout=0.0)[0]
    for other_losses, other in (go_on(single_world, path), run_ranks(3, go_on, path=path)[0]):
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert other.keys() == final.keys()
        for name, value in final.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(value).max()), err_msg=name)
