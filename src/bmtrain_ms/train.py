"""The training loop of a language model: steps, log, evaluation, checkpoints, and ending in good order."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from .checkpoint import Checkpointer
from .checkpoint.folder import replace_text
from .checks import number, whole
from .comm import world
from .compat.autograd import no_grad
from .compat.memory import resident_memory
from .compat.runtime import from_host, host_array
from .data import TokenSampler
from .lr_scheduler import Cosine
from .nn.functional import cross_entropy
from .optim import AdamOptimizer, GradientOverflowError, OptimManager

EXIT_STOPPED = 75  # what a process ends with that was told to stop, and saved (EX_TEMPFAIL: try again)
_SAME_REQUEST = 1.0  # seconds


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Stopped(Exception):
    """A signal came; the step was finished and a checkpoint saved. End the process with `EXIT_STOPPED`."""


_KINDS = {
    **dict.fromkeys(("steps", "warmup", "bad_steps", "save_every", "keep_last", "keep_every"), whole),
    **dict.fromkeys(("lr", "weight_decay", "clip", "loss_scale", "save_minutes"), number),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    `steps`: in all, resumed ones included.  `lr`, `warmup`: peak rate and its warm-up steps; cosine to zero at `steps`.
    `clip`: largest gradient norm.  `loss_scale`: initial one, None for off.  `log`: JSONL file, one line per step, or None.
    `bad_steps`: without loss scaling, a step whose loss or gradient is not finite is skipped; after so many in a row training ends.
    `save_every` steps, `save_minutes`: how often to save, in the background; None: only when asked.  `keep_last`, `keep_every`,
    `shared_storage`: see `checkpoint.Checkpointer`.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    loss_scale: float | None = None
    log: Path | None = None
    bad_steps: int = 3
    save_every: int | None = None
    save_minutes: float | None = None
    keep_last: int | None = 3
    keep_every: int | None = None
    shared_storage: bool = True

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            optional = self.__dataclass_fields__[name].default is None or name == "keep_last"
            value = value if value is None and optional else kind(name, value)
            if value is not None and not value > 0 and name not in ("lr", "warmup", "weight_decay"):
                raise ValueError(f"{name} must be positive, not {value}")
        object.__setattr__(self, "log", None if self.log is None else Path(self.log).expanduser())


class StopSignals:
    """Inside the `with` statement SIGTERM, SIGINT and SIGUSR1 ask to stop; a second one, a second later or more, ends the process.

    One that comes sooner says the same again: a scheduler tells the launcher and the ranks, and the launcher tells the ranks too.
    One that comes too late for anybody to look at `asked` has its usual effect when the `with` statement ends.
    """

    def __init__(self) -> None:
        self.asked = False
        self._signum = 0
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def _ask(self, signum: int, frame: Any) -> None:
        if not self.asked:
            self.asked, self._asked_at, self._signum = True, time.monotonic(), signum
        elif time.monotonic() - self._asked_at >= _SAME_REQUEST:
            os._exit(128 + signum)  # the last checkpoint is complete, and stays

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self._before and self.asked and kind is None:
            signal.raise_signal(self._signum)
        self._before = {}


class Trainer:
    """Trains `model` on batches of `sampler`. All ranks make one and call its methods together.

    Args:
        model: token ids (batch, length) -> logits (batch, length, vocab); initialised or to be loaded.
        sampler: the training text.
        settings: how to train.
        folder: of its checkpoints, or None.
    """

    def __init__(self, model: nn.Cell, sampler: TokenSampler, settings: TrainSettings, folder: str | Path | None = None):
        if not (isinstance(model, nn.Cell) and isinstance(settings, TrainSettings)):
            kinds = f"{type(model).__name__} and {type(settings).__name__}"
            raise TypeError(f"Trainer takes a model, a sampler, TrainSettings and a folder; model and settings are {kinds}")
        self.model, self.sampler, self.settings = model, sampler, settings
        self.done = 0  # steps
        optimizer = AdamOptimizer(model.trainable_params(), settings.lr, settings.betas, weight_decay=settings.weight_decay)
        self.manager = OptimManager(loss_scale=settings.loss_scale)
        self._schedule = Cosine(optimizer, settings.lr, min(settings.warmup, settings.steps), settings.steps)
        self.manager.add_optimizer(optimizer, self._schedule)
        self._optimizer = optimizer
        self._engine = world().engine
        self.checkpoints: Checkpointer | None = None
        if folder is not None:
            self.checkpoints = Checkpointer(
                folder,
                model,
                self.manager,
                keep_last=settings.keep_last,
                keep_every=settings.keep_every,
                shared_storage=settings.shared_storage,
            )
        elif settings.save_every or settings.save_minutes:
            raise ValueError("save_every and save_minutes need a folder for the checkpoints")
        self._bad, self._saved_at = 0, time.monotonic()
        self._stop = StopSignals()
        self._told = (False, False)  # by any rank: to stop, to save

    def fit(self, until: int | None = None) -> None:
        """Train up to step `until` (default: all), with a progress bar and a log line per step on rank 0.

        What is saved in the background is complete when it returns, or raises one of these:

        Raises:
            TrainingError: `bad_steps` in a row had a loss or a gradient that is not finite, and there is no loss scaling.
            GradientOverflowError: see `OptimManager.step`.
            Stopped: a signal came.
            CheckpointError: a checkpoint cannot be written, or another job saves to the folder.
        """
        until = self.settings.steps if until is None else min(until, self.settings.steps)
        self.model.set_train(True)
        chief = self._engine.rank == 0
        bar = tqdm(total=self.settings.steps, initial=self.done, disable=not chief, desc="train", mininterval=1.0)
        if self.checkpoints is not None:
            self.checkpoints.lock()
        with bar, StopSignals() as self._stop:
            try:
                while self.done < until:
                    record = self.train_step()
                    if chief:
                        self._log(record)
                        bar.update()
                        bar.set_postfix_str(
                            f"loss {record['loss']:.3f} lr {record['lr']:.1e} |g| {record['grad_norm']:.2f} "
                            f"{record['tokens_per_second']:.0f} tok/s {record['memory_mib']} MiB"
                        )
                    self._save_if_due()
                told = self._engine.all_reduce([from_host(np.array([self._stop.asked], np.float32))], "max", "told to stop")
                if host_array(told.wait()[0])[0]:  # in the last step, after its loss was known
                    self._told = True, False
                    self._save_if_due()
            except (TrainingError, GradientOverflowError):  # on every rank alike
                self._finish_saving()
                raise
            self._finish_saving()

    def _finish_saving(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.finish()

    def _save_if_due(self) -> None:
        stop, due = self._told
        if self.checkpoints is None:
            if stop:
                raise Stopped(f"stopped after step {self.done}, as a signal asked; there is no folder for a checkpoint")
            return
        if stop:
            self.save()
            raise Stopped(f"stopped after step {self.done}, as a signal asked; saved in {self.checkpoints.folder}")
        every = self.settings.save_every
        if due or (every and self.done % every == 0):
            self._saved_at = time.monotonic()
            self.checkpoints.save(self.done, self._extra(), wait=False)
        else:
            self.checkpoints.poll()

    def train_step(self) -> dict[str, Any]:
        """One step; returns what the log line holds (the loss is the mean over the ranks)."""
        start = time.perf_counter()
        inputs, targets = self.sampler.batch(self.done, self._engine.rank, self._engine.size)
        rate = self._optimizer.param_groups[0]["lr"]
        self.manager.zero_grad()
        loss = self._mean(self.manager.backward(self._loss, from_host(inputs), from_host(targets.reshape(-1))))
        grad_norm = self.manager.clip_grad_norm(self._optimizer.param_groups, self.settings.clip)
        updated = self._update(loss, grad_norm)
        self.done += 1
        seconds = time.perf_counter() - start
        return {
            "step": self.done,
            "loss": loss,
            "lr": rate,
            "grad_norm": grad_norm,
            "loss_scale": self.manager.loss_scale,
            "skipped": not updated,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.sampler.global_batch * inputs.shape[1] / seconds, 1),
            "memory_mib": memory_mib(),
        }

    def evaluate(self, tokens: np.ndarray, length: int, rows: int = 8) -> float:
        """Mean loss per token, in nats, over all whole windows of `tokens`; the same on every rank, for any number of ranks.

        `rows`: windows per call of the model.
        """
        windows = (len(tokens) - 1) // length
        if windows < 1:
            raise ValueError(f"{len(tokens)} held-out tokens do not fill one window of {length}")
        inputs = tokens[: windows * length].reshape(windows, length).astype(np.int32)
        targets = tokens[1 : windows * length + 1].reshape(windows, length).astype(np.int32)
        starts = range(0, windows, rows)
        total = 0.0
        self.model.set_train(False)
        with no_grad():
            for i in range(0, len(starts), self._engine.size):  # every rank runs every round: the gathers are collective
                mine = i + self._engine.rank
                part = slice(starts[min(mine, len(starts) - 1)], starts[min(mine, len(starts) - 1)] + rows)
                loss = self._loss(from_host(inputs[part]), from_host(targets[part].reshape(-1)))
                if mine < len(starts):
                    total += host_array(loss).item() * len(inputs[part])
        self.model.set_train(True)
        sums = self._engine.all_reduce([from_host(np.array([total], np.float32))], label="evaluate").wait()
        return host_array(sums[0]).item() / windows

    def save(self) -> None:
        """Write a checkpoint to go on from, and wait for it.

        Raises:
            ValueError: the trainer has no folder.
            CheckpointError: it cannot be written.
        """
        self._folder().save(self.done, self._extra())

    def close(self) -> None:
        """Finish what is being saved, and let another job save to the folder."""
        if self.checkpoints is not None:
            self.checkpoints.close()

    def resume(self, path: str | Path | None = None, other_data: bool = False) -> bool:
        """Go on from a checkpoint (default: the latest of the folder), at any number of ranks; the log loses the lines behind it.

        The schedule is that of this run's settings: with more `steps` than before it is stretched.

        Args:
            other_data: whether the sampler may be another one than that of the run that saved, of which step `done` is next.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: see `Checkpointer.load`.
            ValueError: the sampler is another one: it would repeat or leave out data.
        """
        planned = self._schedule.state_dict()
        resumed = self._folder().load(path)
        if resumed is None:
            return False
        before, now = resumed.extra.get("data"), self.sampler.described
        if not other_data and before not in (None, now):
            raise ValueError(
                f"{resumed.path} was saved by a run on the data {before}, this one has {now}: step {resumed.step} would be at "
                "another place in them. Use the same, or resume(other_data=True)"
            )
        self.done = resumed.step
        self._schedule.load_state_dict({**planned, "num_iter": self._schedule.num_iter})
        log = self.settings.log
        if self._engine.rank == 0 and log is not None and log.exists():
            replace_text(log, "".join(json.dumps(line) + "\n" for line in _readable(log) if line["step"] <= self.done))
        return True

    def _extra(self) -> dict[str, Any]:
        return {"step": self.done, "data": self.sampler.described}

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs)
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)

    def _update(self, loss: float, grad_norm: float) -> bool:
        """Whether the parameters were updated."""
        if self.settings.loss_scale is not None or (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._bad = 0
            return self.manager.step().updated
        self._bad += 1
        if self._bad >= self.settings.bad_steps:
            where = "" if self.checkpoints is None else f" The last good checkpoint is in {self.checkpoints.folder}."
            raise TrainingError(
                f"loss {loss}, gradient norm {grad_norm} at step {self.done + 1}, and not finite for {self._bad} step(s) in a row, "
                f"which were skipped.{where} Lower the learning rate, look at the data, or set a loss scale if the model is in "
                "float16"
            )
        self.manager.discard_step()
        return False

    def _folder(self) -> Checkpointer:
        if self.checkpoints is None:
            raise ValueError("this Trainer has no folder for checkpoints: Trainer(model, sampler, settings, folder)")
        return self.checkpoints

    def _mean(self, loss: Tensor) -> float:
        """Over the ranks; what any of them was told travels with it."""
        minutes = self.settings.save_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        told = from_host(np.array([self._stop.asked, due], np.float32))
        mean, told = self._engine.all_reduce([loss.reshape(1), told], "mean", "loss").wait()
        stop, due = host_array(told) > 0
        self._told = bool(stop), bool(due)
        return host_array(mean).item()

    def _log(self, record: dict[str, Any]) -> None:
        if self.settings.log is not None:
            with open(self.settings.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL log, without a last line that was cut when the run was killed.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = []
    for place, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {place} is not JSON: {error}") from error
    return records


def _readable(log: Path) -> list[dict[str, Any]]:
    """The records that are there. A power loss leaves zeros for what was not written; that must not keep a run from going on."""
    records, damaged = [], 0
    for line in log.read_bytes().split(b"\n"):
        try:
            record = json.loads(line) if line else None
        except ValueError:  # of UnicodeDecodeError and JSONDecodeError too
            record = line
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif record is not None:
            damaged += 1
    if damaged:
        sys.stderr.write(f"WARNING: {log} has {damaged} damaged line(s), which are left out\n")
    return records


def plot_log(log: str | Path, picture: str | Path, held_out: dict[int, float], unigram: float) -> bool:
    """Draw the loss curve as PNG; False, with a note on stderr, where matplotlib is not installed.

    Args:
        log: JSONL log.
        picture: PNG to write.
        held_out: step -> loss on held-out text.
        unigram: entropy to compare with.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        sys.stderr.write("no loss curve: matplotlib is not installed (pip install matplotlib)\n")
        return False
    records = read_log(log)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1, label="training")
    axes.plot(list(held_out), list(held_out.values()), "o-", label="held out")
    axes.axhline(unigram, color="grey", linestyle=":", label="unigram entropy of the held-out text")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return True


def memory_mib() -> int:
    """Resident memory of this process, in MiB."""
    return resident_memory()[0] >> 20
