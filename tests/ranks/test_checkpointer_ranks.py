"""Sharded checkpoints on real ranks: any layout reads what any other wrote, and training goes on as if it had not stopped."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, CheckpointError
from bmtrain_ms.checkpoint import checkpointer as checkpointer_module
from bmtrain_ms.checkpoint.index import HASHED, file_name
from bmtrain_ms.comm import World
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from bmtrain_ms_base.memory import reset_peak_memory, resident_memory
from tests.helpers.checkpoints import Layout, Run, counted_bytes, equal

pytestmark = pytest.mark.ranks

RANKS = (1, 2, 3, 4, 8)


def trained_and_saved(world: World, folder: str, layout: Layout | None = None, steps: int = 2) -> dict[str, np.ndarray]:
    """What was saved, in full."""
    run = Run(world, folder, layout)
    run.train(range(steps))
    run.save(steps, {"text": "é"})
    run.close()
    return run.everything()


def loaded(world: World, folders: list[str], layout: Layout | None = None) -> list[dict[str, np.ndarray]]:
    """What is there after loading each of the folders' latest checkpoints over other values."""
    found = []
    for folder in folders:
        run = Run(world, folder, layout)
        run.train(range(7, 8))
        resumed = run.load()
        assert (resumed.step, resumed.extra, resumed.result.missing) == (2, {"text": "é"}, [])
        assert world.engine.clock.step == 2
        found.append(run.everything())
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[int, Any]:
    """Ranks -> (folder, what was saved there); filled by the test of the first number of ranks."""
    return {n: [str(tmp_path_factory.mktemp(f"by-{n}")), None] for n in RANKS}


@pytest.mark.parametrize("n", RANKS)
def test_every_number_of_ranks_saves(run_ranks, saved, n):
    """The file names and sizes are those of the ranks; every rank knows the same full values."""
    folder = saved[n][0]
    results = run_ranks(n, trained_and_saved, folder=folder)
    assert all(equal(result, results[0]) for result in results[1:])
    saved[n][1] = results[0]
    assert sorted(os.listdir(folder)) == [".lock", "latest", "step-00000002"]
    written = sorted(os.listdir(f"{folder}/step-00000002"))
    assert written == ["index.json", *(file_name(r, n) for r in range(n))]


@pytest.mark.parametrize("m", RANKS)
def test_every_number_of_ranks_loads_what_any_number_saved(run_ranks, saved, m):
    there = {n: (folder, state) for n, (folder, state) in saved.items() if state is not None}
    if len(there) < len(RANKS):  # run alone
        for n in set(RANKS) - set(there):
            saved[n][1] = run_ranks(n, trained_and_saved, folder=saved[n][0])[0]
        there = dict(saved)
    found = run_ranks(m, loaded, folders=[folder for folder, _ in there.values()])
    for of_rank in found:
        for (n, (_, expected)), state in zip(there.items(), of_rank):
            assert equal(state, expected), f"saved by {n}, loaded by {m}"


LAYOUTS = {
    "plain": Layout(),
    "zero2": Layout(zero_level=2),
    "kept": Layout(use_checkpoint=False, prefetch=0),
    "prefetch": Layout(prefetch=3),
    "hierarchy": Layout(shard_size=2),
    "pairs": Layout(blocks="pairs"),
    "none": Layout(blocks="none"),
    "offload": Layout(offload=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_reads_any_other(run_ranks, tmp_path, name):
    """At 4 ranks; to the plain layout and from it."""
    layout, plain, others = LAYOUTS[name], str(tmp_path / "plain"), str(tmp_path / "other")
    first = run_ranks(4, trained_and_saved, folder=others, layout=layout)[0]
    assert len(list(Path(others).glob("step-*/rank-*"))) == (layout.shard_size or 4)
    second = run_ranks(4, trained_and_saved, folder=plain)[0]
    assert all(x.any() for x in first.values()) and first.keys() == second.keys()
    for into, source, expected in ((Layout(), others, first), (layout, plain, second)):
        for found in run_ranks(4, loaded, folders=[source], layout=into):
            same = {key: value for key, value in found[0].items() if key in expected}
            assert len(same) >= 3 * len([key for key in expected if " " not in key])  # parameters and both moments
            assert equal(same, {key: expected[key] for key in same})


@pytest.mark.parametrize("half", [False, True], ids=["to fp16", "to fp32"])
def test_another_dtype(run_ranks, tmp_path, half):
    """Masters and parameters stand for each other: float32 values survive a save in 16 bits, and are rounded on the way back."""
    folder = str(tmp_path)
    before = run_ranks(2, trained_and_saved, folder=folder, layout=Layout(half=half))[0]
    after = run_ranks(3, loaded, folders=[folder], layout=Layout(half=not half))[0][0]
    names = [name for name in before if " " not in name]
    for name in names:
        if half:
            assert after[name].tobytes() == before[f"master {name}"].tobytes()
        else:
            assert after[name].tobytes() == before[name].astype(np.float16).astype(np.float32).tobytes()
            assert after[f"master {name}"].tobytes() == before[name].tobytes()
    moments = [key for key in before if " " in key and not key.startswith("master")]
    assert len(moments) == 2 * len(names)
    assert all(after[key].tobytes() == before[key].tobytes() for key in moments)


# Bytes and memory #


class Large(nn.Cell):
    """One tensor."""

    def __init__(self, nbytes: int):
        super().__init__()
        self.large = bms.DistributedParameter(
            bms.empty(nbytes // 4), init_method=bms.ParameterInitializer(bms.init.normal_, std=0.5)
        )


def large(folder: str, nbytes: int) -> tuple[Large, Checkpointer]:
    """A model whose state is three times `nbytes`."""
    model = Large(nbytes)
    bms.init_parameters(model)
    manager = OptimManager()
    optimizer = AdamOptimizer(model.trainable_params())
    manager.add_optimizer(optimizer)
    manager.backward(lambda: (model.parameter("large") if hasattr(model, "parameter") else model.large).sum())
    manager.step()
    manager.zero_grad()
    return model, Checkpointer(folder, model, manager)


def save_large(world: World, folder: str, nbytes: int) -> int:
    """By how much resident memory grew at most."""
    _, checkpoints = large(folder, nbytes)
    world.engine.barrier("ready").wait()
    reset_peak_memory()
    before = resident_memory()[0]
    checkpoints.save(1)
    peak = resident_memory()[1]
    checkpoints.close()
    return peak - before


def load_large(world: World, folder: str, nbytes: int) -> tuple[dict[str, int], int]:
    """Bytes read of each file, and by how much resident memory grew at most."""
    _, checkpoints = large(folder, nbytes)
    world.engine.barrier("ready").wait()
    with counted_bytes() as counts:
        reset_peak_memory()
        before = resident_memory()[0]
        checkpoints.load()
        peak = resident_memory()[1]
    checkpoints.close()
    return counts, peak - before


def test_saving_200_mib_takes_little_memory_and_loading_reads_its_ranges(run_ranks, tmp_path):
    """Ranks read whole hashed blocks: at most two more than they need, of each tensor and file."""
    folder, nbytes = str(tmp_path), 67 << 20
    for grown in run_ranks(2, save_large, folder=folder, nbytes=nbytes):
        assert grown <= 64 << 20, f"{grown >> 20} MiB"
    sizes = sum(path.stat().st_size for path in Path(folder).glob("step-*/*"))
    assert sizes == pytest.approx(3 * nbytes, rel=0.01)
    for m in (2, 3, 4):
        results = run_ranks(m, load_large, folder=folder, nbytes=nbytes)
        for rank, (counts, grown) in enumerate(results):
            files = {name for name in counts if name.startswith("rank-")}
            start, stop = rank / m, (rank + 1) / m
            needed = {file_name(r, 2) for r in range(2) if start < (r + 1) / 2 and stop > r / 2}
            headers = {name: counts[name] for name in files - needed}
            assert all(count < 4096 for count in headers.values()), headers  # headers only
            allowed = 3 * (nbytes // m + 2 * HASHED * len(needed)) + 8192
            assert sum(counts[name] for name in files) <= allowed, f"{sum(counts.values()) / (3 * nbytes / m):.2f} of its share"
            assert grown <= 64 << 20, f"{grown >> 20} MiB"


# Resuming #


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (Layout(), {}),
        (Layout(half=True), {"overflow_at": 1}),
        (Layout(half=True), {"overflow_at": 3}),
        (Layout(offload=True), {}),
        (Layout(half=True, offload=True), {"overflow_at": 2}),
    ],
    ids=["fp32", "skipped before", "skipped after", "offload", "offload fp16"],
)
@pytest.mark.parametrize("ranks", [2])
def test_resumed_training_is_bit_equal(run_ranks, tmp_path, ranks, layout, options):
    """With dropout, in the same processes and in others."""
    arguments = {"folder": str(tmp_path), "layout": layout, "overflow_at": None, **options}
    whole = run_ranks(ranks, never_stopped, **arguments)
    again = run_ranks(ranks, gone_on, **arguments)
    for (losses, state, counters), (later, other, others) in zip(whole, again):
        assert later == losses and len(losses) == 4
        assert equal(state, other) and counters == others
    if "overflow_at" in options:
        assert whole[0][2]["skipped_steps"] == 1


def never_stopped(world: World, folder: str, layout: Layout, overflow_at: int | None) -> Any:
    run = Run(world, folder, layout, dropout=0.3)
    run.train(range(3), overflow_at)
    run.save(3)
    run.close()
    return run.train(range(3, 7), overflow_at), run.everything(), run.counters()


def gone_on(world: World, folder: str, layout: Layout, overflow_at: int | None) -> Any:
    run = Run(world, folder, layout, dropout=0.3)
    run.train(range(8, 10))
    assert run.load().step == 3
    return run.train(range(3, 7), overflow_at), run.everything(), run.counters()


def accumulated(world: World, folder: str, resume: bool, wait: bool) -> Any:
    """Two micro-steps a step; saved between the two of step 1."""
    run = Run(world, folder, dropout=0.3)
    losses = []
    for step in range(3):
        for micro in range(2):
            if not resume or (step, micro) > (1, 0):
                if micro == 0:
                    run.manager.zero_grad()
                losses.append(run.backward(2 * step + micro))
            if (step, micro) == (1, 0):
                if resume:
                    run.backward(9)
                    assert run.load().extra == {"micro": 1}
                else:
                    run.save(step, {"micro": 1}, wait)
        if not resume or step >= 1:
            assert run.update()
    run.close()
    return losses[-3:], run.everything(), run.counters()


@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "in the background"])
def test_saved_between_micro_steps(run_ranks, tmp_path, wait):
    """The gradients that wait are saved, as they were then."""
    first = run_ranks(2, accumulated, folder=str(tmp_path), resume=False, wait=wait)
    for (losses, state, counters), (later, other, others) in zip(
        first, run_ranks(2, accumulated, folder=str(tmp_path), resume=True, wait=wait)
    ):
        assert later == losses and equal(state, other) and counters == others


def without_dropout(world: World, folder: str, layout: Layout, resume: bool) -> Any:
    run = Run(world, folder, layout)
    if resume:
        run.load()
    else:
        run.train(range(3))
        run.save(3)
        run.close()
    return run.train(range(3, 6)), run.everything()


def test_training_goes_on_at_another_number_of_ranks(run_ranks, tmp_path):
    """Only the order of sums differs."""
    folder = str(tmp_path)
    losses, state = run_ranks(2, without_dropout, folder=folder, layout=Layout(), resume=False)[0]
    for m, layout in ((1, Layout()), (3, Layout(zero_level=2)), (4, Layout(shard_size=2))):
        later, other = run_ranks(m, without_dropout, folder=folder, layout=layout, resume=True)[0]
        assert later == pytest.approx(losses, rel=1e-5)
        assert other.keys() == state.keys()
        for name, value in state.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(value).max()), err_msg=name)


# In the background #


def held_up(world: World, folder: str, slow: int) -> tuple[list[bool], list[str], bool]:
    """One rank's file is written only when it may."""
    may, write, run = threading.Event(), checkpointer_module.write_rank_file, Run(world, folder)

    def waiting(*args: Any) -> Any:
        if world.engine.rank == slow:
            assert may.wait(60)
        return write(*args)

    checkpointer_module.write_rank_file = waiting
    try:
        run.train(range(1))
        expected = run.everything()
        run.save(1, wait=False)
        polls = [run.checkpoints.poll()]
        run.train(range(1, 3))
        polls.append(run.checkpoints.poll())
        there = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        may.set()
        run.checkpoints.finish()
        polls.append(run.checkpoints.poll())
    finally:
        checkpointer_module.write_rank_file = write
        may.set()
        run.close()
    other = Run(world, folder)
    other.load()
    return polls, there, equal(other.everything(), expected)


@pytest.mark.parametrize("slow", [0, 1])
def test_poll_is_collective(run_ranks, tmp_path, slow):
    """The slower rank decides; what is saved is what was there when `save` was called."""
    assert run_ranks(2, held_up, folder=str(tmp_path), slow=slow) == [([False, False, True], [], True)] * 2


def failing(world: World, folder: str, broken: int, error: BaseException) -> tuple[str, list[str], list[str], bool]:
    """One rank cannot write its second checkpoint; then it can again."""
    write, run = checkpointer_module.write_rank_file, Run(world, folder)

    def refusing(*args: Any) -> Any:
        if world.engine.rank == broken:
            raise error
        return write(*args)

    run.train(range(1))
    run.save(1, wait=False)
    run.train(range(1, 2))
    run.checkpoints.finish()
    checkpointer_module.write_rank_file = refusing
    try:
        run.save(2, wait=False)
        with pytest.raises(CheckpointError) as info:
            while not run.checkpoints.poll():
                pass
    finally:
        checkpointer_module.write_rank_file = write
    after_error = sorted(os.listdir(folder))
    assert run.checkpoints.poll()
    run.train(range(2, 3))
    expected = run.everything()
    run.save(3, wait=False)
    run.close()
    names = sorted(os.listdir(folder))
    other = Run(world, folder)
    other.load()
    return str(info.value), after_error, names, equal(other.everything(), expected)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MemoryError("no memory")], ids=["OSError", "MemoryError"]
)
@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_on_one_rank_is_raised_on_all_and_they_go_on(run_ranks, tmp_path, broken, error):
    results = run_ranks(2, failing, folder=str(tmp_path), broken=broken, error=error, timeout=60)
    for rank, (text, after_error, names, same) in enumerate(results):
        assert text.startswith(f"{tmp_path}/step-00000002 cannot be written: ")
        assert (str(error) if rank == broken else f"rank(s) [{broken}] failed; see their messages") in text
        assert after_error == [".lock", "latest", "step-00000001"]
        assert names == [".lock", "latest", "step-00000001", "step-00000003"] and same


def failing_at_the_end(world: World, folder: str) -> tuple[str, list[str]]:
    """Rank 0 meets a defect when all have written; each rank's error, and what it sees then."""
    sync_folder, run = checkpointer_module.sync_folder, Run(world, folder)
    run.save(1)

    def refusing(*args: Any) -> Any:
        raise RuntimeError("a defect")

    checkpointer_module.sync_folder = refusing
    try:
        with pytest.raises(CheckpointError) as info:
            run.save(2)
    finally:
        checkpointer_module.sync_folder = sync_folder
    there = [name for name in os.listdir(folder) if name.startswith(".step")]
    run.save(3)
    run.close()
    return str(info.value), there


def test_an_error_of_any_kind_does_not_leave_others_waiting(run_ranks, tmp_path):
    (first, there), (second, other) = run_ranks(2, failing_at_the_end, folder=str(tmp_path), timeout=60)
    assert first == f"{tmp_path}/step-00000002 cannot be written: a defect" and there == other == []
    assert second == f"{tmp_path}/step-00000002 cannot be written: rank(s) [0] failed; see their messages"
    assert Path(tmp_path, "latest").read_text() == "step-00000003\n"
