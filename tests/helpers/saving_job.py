"""A job that saves, for tests that kill it: `python saving_job.py MODE '{"folder": ..., "notes": ...}'` on each rank.

Ranks write what they know to files in `notes`, by single system calls, so that nothing is lost when they are killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, CheckpointError, tools
from bmtrain_ms.checkpoint import checkpointer as checkpointer_module
from bmtrain_ms.checkpoint import folder as folder_module
from bmtrain_ms.checkpoint.training import entries_to_save
from bmtrain_ms.comm.engine import CommTimeoutError
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from bmtrain_ms.train import EXIT_STOPPED, Pretrain, Stopped, Trainer, TrainSettings

ELEMENTS = 700_001  # of three tensors each: 8 MiB


def digest(pieces: dict[str, np.ndarray]) -> str:
    """Of a rank's pieces, by name."""
    found = hashlib.sha256()
    for name in sorted(pieces):
        found.update(name.encode())
        found.update(pieces[name].tobytes())
    return found.hexdigest()


def owned(checkpoints: Checkpointer, model: nn.Cell, manager: OptimManager) -> dict[str, np.ndarray]:
    """What this rank would save."""
    pieces = checkpoints._owned(entries_to_save(model, manager))
    return {name: array for name, (_, array) in pieces.items()}


class Job:
    """`parameters` change in every step as the steps before say."""

    def __init__(self, folder: str, notes: str, timeout: float = 60.0):
        self.world = bms.init_distributed(seed=3, timeout=timeout)
        self.rank, self.notes = self.world.engine.rank, Path(notes)

        class Model(bms.DistributedModule):
            def __init__(self) -> None:
                super().__init__()
                method = bms.ParameterInitializer(bms.init.normal_, std=0.5)
                self.large = bms.DistributedParameter(bms.empty(ELEMENTS), init_method=method)

            def construct(self) -> Any:
                return (self.large * self.large).sum()

        self.model = Model()
        bms.init_parameters(self.model)
        self.manager = OptimManager()
        self.manager.add_optimizer(AdamOptimizer(self.model.trainable_params(), lr=0.01))
        self.checkpoints = Checkpointer(folder, self.model, self.manager, keep_last=2)
        self.note("pid", str(os.getpid()))

    def note(self, kind: str, text: str) -> None:
        with open(self.notes / f"{kind}-{self.rank}", "ab", buffering=0) as file:
            file.write(f"{text}\n".encode())

    def step(self) -> None:
        self.manager.zero_grad()
        self.manager.backward(self.model)
        self.manager.step()

    def digest(self) -> str:
        return digest(owned(self.checkpoints, self.model, self.manager))

    def save(self, step: int, wait: bool = True) -> None:
        self.note("state", f"{step} {self.digest()}")
        self.checkpoints.save(step, wait=wait)
        if wait:
            self.note("saved", str(step))


def forever(folder: str, notes: str) -> None:
    """Save after every step; every third step twice, every second in the background."""
    job = Job(folder, notes)
    resumed = job.checkpoints.load()
    step = 0 if resumed is None else resumed.step
    if resumed is not None:
        job.note("state", f"{step} {job.digest()}")
    while True:
        step += 1
        job.step()
        background = step % 2 == 0
        job.save(step, wait=not background)
        if background:
            job.checkpoints.finish()
            job.note("saved", str(step))
        if step % 3 == 0:
            job.save(step)


def crash(folder: str, notes: str) -> None:
    """Children save and are killed before their n-th change of the disk, for every n: of a new step, and of one that is there."""
    job = Job(folder, notes)
    job.step()
    job.save(1)
    job.step()
    job.save(2)
    for again in (False, True):
        job.step()  # other values than what is there
        n, code = 0, signal.SIGKILL.value
        while code == signal.SIGKILL:
            child = os.fork()
            if child == 0:
                kill_before(n)
                job.checkpoints.save(3)
                os._exit(0)
            code = os.waitpid(child, 0)[1]
            names = sorted(name for name in os.listdir(folder) if name.startswith("step-"))
            for name in names:
                tools.verify(Path(folder, name))
            job.note("crash", json.dumps([again, n, code, str(folder_module.latest_in(Path(folder))), names]))
            n += 1
            folder_module.sweep(Path(folder))
            if code and not again:
                shutil.rmtree(Path(folder, "step-00000003"), ignore_errors=True)
                folder_module.point_to(Path(folder), "step-00000002")


def kill_before(n: int) -> None:
    """This process ends before its n-th change of the disk."""
    seen = []

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(seen) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(function)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    folder_module.exchange = counted(folder_module.exchange)


def full(folder: str, notes: str, broken: int) -> None:
    """One rank cannot write more than a MiB; then it can again."""
    job = Job(folder, notes)
    job.step()
    job.save(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, wait in ((2, True), (3, False)):
        job.step()
        if job.rank == broken:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            job.checkpoints.save(step, wait=wait)
            job.checkpoints.finish()
            job.note("error", "none")
        except CheckpointError as error:
            job.note("error", str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        bms.synchronize()  # rank 0 tidies up
        job.note("there", " ".join(sorted(os.listdir(folder))))
        bms.synchronize()
    job.save(4)


def once(folder: str, notes: str) -> None:
    """Save, or say why not."""
    job = Job(folder, notes)
    try:
        job.save(1)
        job.note("error", "none")
    except CheckpointError as error:
        job.note("error", str(error))


def stuck(folder: str, notes: str, broken: int, timeout: float) -> None:
    """One rank stops while it writes its second checkpoint."""
    job = Job(folder, notes, timeout)
    job.save(1)
    write = checkpointer_module.write_rank_file

    def stopping(*args: Any) -> Any:
        if job.rank == broken:
            os.kill(os.getpid(), signal.SIGSTOP)
        return write(*args)

    checkpointer_module.write_rank_file = stopping
    try:
        job.step()
        job.checkpoints.save(2)
    except CommTimeoutError as error:
        job.note("error", str(error))
        os._exit(3)


def train(
    folder: str,
    notes: str,
    steps: int,
    resume: bool = False,
    pause: list[int] | None = None,
    signals: int = 1,
    bad_from: int | None = None,
    save_every: int | None = None,
) -> None:
    """Train a tiny Llama. The ranks in `pause` wait in the seventh step until a signal has come, or two."""
    world = bms.init_distributed(seed=1)
    rank = world.engine.rank
    model = spread(Llama(LlamaConfig(13, 16, 2, dim_ff=12, num_layers=1)))
    bms.init_parameters(model)
    log = Path(notes, "log.jsonl")
    sampler = bms.data.TokenSampler(np.tile(np.arange(13), 40).astype(np.int32), length=6, global_batch=4)
    optimizer, manager = AdamOptimizer(model.trainable_params(), 0.03, (0.9, 0.95), weight_decay=0.1), OptimManager()
    manager.add_optimizer(optimizer, bms.lr_scheduler.Cosine(optimizer, 0.03, 2, steps))
    settings = TrainSettings(steps, log=log, save_every=save_every)
    trainer = Trainer(Pretrain(model), sampler, manager, settings, folder)
    batch, loss = sampler.batch, trainer.task.loss

    def waiting(step: int, *args: Any) -> Any:
        if step == 6 and rank in (pause or []):
            Path(notes, f"pid-{rank}").write_text(f"{os.getpid()}\n")
            deadline = time.monotonic() + 60
            while (not trainer._stop.asked or signals > 1) and time.monotonic() < deadline:
                time.sleep(0.005)
                if trainer._stop.asked:
                    Path(notes, f"asked-{rank}").touch()
        return batch(step, *args)

    def spoiled(*args: Any) -> Any:
        return loss(*args) * (float("nan") if bad_from is not None and trainer.done >= bad_from else 1.0)

    sampler.batch, trainer.task.loss = waiting, spoiled
    if resume:
        assert trainer.resume()
    try:
        trainer.fit()
    except Stopped:
        sys.exit(EXIT_STOPPED)
    trainer.close()
    pieces = owned(trainer.checkpoints, model, trainer.manager) if trainer.checkpoints else {}
    Path(notes, f"final-{rank}").write_text(digest(pieces))


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
