"""Saving and loading a training state: `python -m tests.benchmarks.checkpoints --torch PYTHON [--gigabytes 2]`"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

from bmtrain_ms_cli.launch import COPIES_PAST_THE_CACHE
from tests.benchmarks.harness import environment, launch, report, table, write_page
from tests.helpers.ranks import ROOT

WARM, ROUNDS, TENSORS = 2, 5, 32  # a virtual machine gives memory for files only when it is asked for the first time

CAUSE = (
    "Files are written in pieces of 128 KiB: larger ones take larger pages, which this virtual machine has to ask its host for "
    "(2 GB: 0.5 s in pieces of 64 or 128 KiB, 0.5 to 5.5 s in pieces of 256 KiB to 4 MiB). Every 64 MiB the disk is asked to "
    "begin: 1.05 s in all instead of 1.7 s. `cp` is measured on its own and keeps its last copy: in turn with saving it got the "
    "memory that saving had just given back. The stall is the copy of the state, and what `poll` does when all is written: the "
    "index and the names. The files of the checkpoint before are deleted by a thread. `bmtrain-ms launch` has glibc copy past the "
    "cache from 4 MiB on (`GLIBC_TUNABLES`), and so has this page: without, the stall is half as long again."
)


def rank(gigabytes: float, folder: str) -> None:
    """Save, save in the background, load."""
    import bmtrain_ms as bms
    from bmtrain_ms.checkpoint import Checkpointer
    from bmtrain_ms.compat.runtime import overwrite

    world = bms.init_distributed()
    count = int(gigabytes * 1e9 / 12 / TENSORS)  # a float32 element and its two moments

    class Weights(bms.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            for i in range(TENSORS):
                method = bms.ParameterInitializer(bms.init.normal_)
                setattr(self, f"p{i}", bms.DistributedParameter(bms.empty(count), init_method=method))

    model = Weights()
    bms.init_parameters(model)
    optimizer = bms.optim.AdamOptimizer(model.trainable_params())
    manager = bms.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for p in optimizer.parameters:
        for moment in optimizer.state_of(p).values():
            overwrite(moment, p)  # memory that nobody has written to is read for nothing
    checkpoints = Checkpointer(folder, model, manager, keep_last=1)

    def timed(function: Callable[[], Any]) -> float:
        bms.synchronize()
        start = time.perf_counter()
        function()
        bms.synchronize()
        return time.perf_counter() - start

    steps = iter(range(1, 100))
    save = [timed(lambda: checkpoints.save(next(steps))) for _ in range(WARM + ROUNDS)]
    copies = []
    if world.engine.rank == 0:
        copies = [copied(next(Path(folder).glob("step-*"))) for _ in range(WARM + ROUNDS)]
        shutil.rmtree(Path(folder, "copy-before"))
    bms.synchronize()
    stall = []
    for _ in range(WARM + ROUNDS):
        seconds, polled = timed(lambda: checkpoints.save(next(steps), wait=False)), 0.0
        while checkpoints._running is not None:
            time.sleep(0.1)  # what a training step would take
            bms.synchronize()
            start = time.perf_counter()
            checkpoints.poll()
            polled = time.perf_counter() - start
        stall.append(seconds + polled)  # of the last, which gives the checkpoint its name
        checkpoints._join_deletion()  # training has gone on for long until the next
    load = [timed(lambda: checkpoints.load()) for _ in range(WARM + ROUNDS)]
    checkpoints.close()
    report({"save": save, "copy": copies, "stall": stall, "load": load, "rank": [world.engine.rank]})


def resumed(folder: str) -> None:
    """Resume and make one step of the demo's model."""
    import bmtrain_ms as bms
    from tests.benchmarks.harness import SIZES, Training

    bms.init_distributed()
    training = Training(SIZES["S"], True)
    checkpoints = bms.checkpoint.Checkpointer(folder, training.model, training.manager)
    if checkpoints.load() is None:
        checkpoints.save(0)
    training.step()
    checkpoints.close()
    report(time.time())


def copied(folder: Path) -> float:
    """Seconds of a `cp` of a checkpoint that is brought to the disk as ours is, with the copy before it there until it is done."""
    target, before = folder.with_name("copy"), folder.with_name("copy-before")
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder), str(target)], check=True)
    for path in target.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(before, ignore_errors=True)
    target.rename(before)
    return seconds


def middle(seconds: list[float]) -> float:
    """Of those after the warm-up."""
    return statistics.median(seconds[WARM:])


def mindspore_alone(gigabytes: float, folder: str) -> None:
    """`mindspore.save_checkpoint` and `load_checkpoint` of as many bytes, one process."""
    import mindspore as ms
    import numpy as np

    count = int(gigabytes * 1e9 / 12 / TENSORS)
    random = np.random.default_rng(0)
    state = [{"name": f"p{i}", "data": ms.Tensor(random.standard_normal(count, np.float32))} for i in range(3 * TENSORS)]
    path = str(Path(folder) / "state.ckpt")
    save, load = [], []
    for _ in range(WARM + ROUNDS):
        start = time.perf_counter()
        ms.save_checkpoint(state, path)
        save.append(time.perf_counter() - start)
        start = time.perf_counter()
        ms.load_checkpoint(path)
        load.append(time.perf_counter() - start)
    report({"save": save, "load": load})


def torch_alone(gigabytes: float, folder: str) -> None:
    """torch.distributed.checkpoint of as many bytes, one process."""
    import torch
    import torch.distributed.checkpoint as dcp

    count = int(gigabytes * 1e9 / 12 / TENSORS)
    state = {f"p{i}": torch.randn(count) for i in range(3 * TENSORS)}
    save, load = [], []
    for i in range(WARM + ROUNDS):
        path = str(Path(folder) / f"torch-{i}")
        start = time.perf_counter()
        dcp.save(state, checkpoint_id=path, no_dist=True)
        save.append(time.perf_counter() - start)
        start = time.perf_counter()
        dcp.load(state, checkpoint_id=path, no_dist=True)
        load.append(time.perf_counter() - start)
        shutil.rmtree(path)
    report({"save": save, "load": load})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", help="a Python that has PyTorch")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    size, module = options.gigabytes, "tests.benchmarks.checkpoints"
    rows, best = [], {}
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            results = launch(module, ranks, str(size), folder, GLIBC_TUNABLES=COPIES_PAST_THE_CACHE)  # as `bmtrain-ms launch` does
        first = next(r for r in results if r["rank"] == [0])
        save, copy, load, stall = (middle(first[name]) for name in ("save", "copy", "load", "stall"))
        best[ranks] = (copy / save, copy / load, stall / save)
        shown = [f"{size / save:.2f}", f"**{copy / save:.2f}**", f"{size / load:.2f}", f"**{copy / load:.2f}**"]
        rows.append([f"bmtrain_ms, {ranks} rank(s)", *shown, f"**{100 * stall / save:.1f} %**", f"{size / copy:.2f}"])
    others = [("mindspore.save_checkpoint, load_checkpoint", "mindspore", sys.executable)]
    if options.torch:
        others.append(("torch.distributed.checkpoint", "torch", options.torch))
    for name, word, python in others:
        with tempfile.TemporaryDirectory() as folder:
            result = launch(module, 1, word, str(size), folder, python=python)[0]
        rows.append([name, f"{size / middle(result['save']):.2f}", "–", f"{size / middle(result['load']):.2f}"])
        rows[-1] += ["–", "–", "–"]
    write_page(
        "checkpoints",
        "Saving and loading",
        "Target: a state of 2 GB is saved and loaded at 0.70 of the speed of `cp` or more; saving in the background stops "
        "training for at most 10 % of the time that saving takes.",
        "**Result**: "
        + "; ".join(f"{n} rank(s): save {s:.2f}, load {x:.2f}, stall {100 * t:.1f} %" for n, (s, x, t) in best.items())
        + ".",
        f"{environment()} `python -m {module} --torch PYTHON`",
        f"Medians of {ROUNDS} after {WARM} for warming up; saving first, then `cp`. A state of {size:g} GB (float32 parameters "
        "and Adam's moments). `cp -r` copies the finished checkpoint and brings it to the disk, and the copy before is deleted "
        "after that, as saving does; its source is in the page cache. Saving also checks what it wrote, and hashes it; loading "
        "checks the hashes.",
        table(["", "save, GB/s", "/ cp", "load, GB/s", "/ cp", "stall", "cp, GB/s"], rows),
        CAUSE,
        resume_times(),
    )


def resume_times() -> str:
    """From launch to the end of the first step, fresh and resumed, 2 ranks."""
    times: dict[str, list[float]] = {"fresh": [], "resumed": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            for name in times:
                start = time.time()
                times[name].append(max(launch("tests.benchmarks.checkpoints", 2, "resume", folder)) - start)
    fresh, resumed_ = statistics.median(times["fresh"]), statistics.median(times["resumed"])
    return (
        f"From launch to the end of the first step of model S on 2 ranks: {fresh:.2f} s when it starts anew (and saves once), "
        f"{resumed_:.2f} s when it resumes: {resumed_ / fresh:.2f} times."
    )


if __name__ == "__main__":
    words = sys.argv[1:]
    assert ROOT.is_dir()
    if words[:1] != ["rank"]:
        main()
    elif words[1] == "resume":
        resumed(words[2])
    elif words[1] in ("mindspore", "torch"):
        (mindspore_alone if words[1] == "mindspore" else torch_alone)(float(words[2]), words[3])
    else:
        rank(float(words[1]), words[2])
