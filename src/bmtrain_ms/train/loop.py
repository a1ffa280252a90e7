"""The loop: one batch after the other through a task and a manager, with its log, its checkpoints and its end."""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
from mindspore import Tensor, nn

from bmtrain_ms_base.checks import number, whole
from bmtrain_ms_base.data import Batch, Batches, changes
from bmtrain_ms_base.data.skipping import Skipping
from bmtrain_ms_base.memory import resident_memory

from ..checkpoint import Checkpointer, CheckpointError
from ..comm import any_rank, gather_json
from ..comm import world as current_world
from ..compat.cells import evaluating
from ..compat.runtime import from_host, host_array
from ..optim import GradientOverflowError, OptimManager
from ..zero import context_of
from .errors import Stopped, TrainingError
from .evaluate import mean_loss
from .faults import Faults, keep_batch
from .log import LogFile
from .signals import StopSignals
from .status import Status
from .tasks import Task, share_step

_KINDS = {
    **dict.fromkeys(("steps", "rows", "bad_steps", "save_every", "keep_last", "keep_every"), whole),
    **dict.fromkeys(("clip", "save_minutes", "spike"), number),
}


@dataclass(frozen=True)
class TrainSettings:
    """How long a run is, when it ends, and what it leaves behind; how it learns is the manager's.

    `steps`: in all, resumed ones included.  `clip`: largest gradient norm.  `rows`: of a rank's batch that go through the model at
    a time, whose gradients are added up; None: all.  `log`: JSONL file, one line per step, or None.
    `bad_steps`: without loss scaling, a step whose loss or gradient is not finite is skipped; after so many in a row training ends.
    `spike`: a step whose loss is more than so many times the median of the last 64 is a bad one too; None: none is.
    `save_every` steps, `save_minutes`: how often to save, in the background; None: only when asked.  `keep_last`, `keep_every`,
    `shared_storage`: see `checkpoint.Checkpointer`.
    """

    steps: int
    clip: float = 1.0
    log: Path | None = None
    rows: int | None = None
    bad_steps: int = 3
    spike: float | None = None
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
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        object.__setattr__(self, "log", None if self.log is None else Path(self.log).expanduser())


class Trainer:
    """Has a manager minimise a task's loss on one batch after the other. All ranks make one and call its methods together.

    From the first step on, or from `resume`, until `close`, a signal to end (SIGTERM, SIGINT, SIGHUP, SIGUSR1) lets the step or the
    round of `evaluate` finish; then `fit`, `evaluate` or `save` saves and raises `Stopped` on every rank. One that comes before has
    its usual effect; one that comes after the last of these calls has it when the trainer is closed. As a context manager a trainer
    is closed at the end of the `with` statement.

    Args:
        task: the loss of a batch, and the model that is trained, initialised or to be loaded; e.g. `Pretrain(model)`.
        batches: what is trained on, e.g. a `data.TokenSampler`: a step is a pure function of its number.
        manager: with the optimizers of the model's parameters, their schedules, and the loss scale.
        settings: how long, and what is left behind.
        folder: of its checkpoints, or None.
        signals: what watches for signals, if it is to go on when the trainer is closed, as for the next trainer.
        watchers: called on every rank after each step with what its log line will hold, to which they may add.
        kept: JSON-serialisable; is in each checkpoint, as the settings of the run.
    """

    def __init__(
        self,
        task: Task,
        batches: Batches,
        manager: OptimManager,
        settings: TrainSettings,
        folder: str | Path | None = None,
        *,
        signals: StopSignals | None = None,
        watchers: Sequence[Callable[[dict[str, Any]], None]] = (),
        kept: dict[str, Any] | None = None,
    ):
        _check_parts(task, batches, manager, settings)
        self.task, self.batches, self.manager, self.settings = task, batches, manager, settings
        self.model = task.model
        self.done = 0  # steps
        self._world = current_world()
        self.checkpoints: Checkpointer | None = None
        if folder is not None:
            self.checkpoints = Checkpointer(
                folder,
                self.model,
                manager,
                keep_last=settings.keep_last,
                keep_every=settings.keep_every,
                shared_storage=settings.shared_storage,
            )
        elif settings.save_every or settings.save_minutes:
            raise ValueError("save_every and save_minutes need a folder for the checkpoints")
        self.watchers, self._kept = list(watchers), kept
        self._faults, self._saved_at = Faults(settings.bad_steps, settings.spike), time.monotonic()
        self._log_file: LogFile | None = None  # rank 0's
        self._stop, self._owns_stop = signals or StopSignals(), signals is None
        if self._owns_stop:
            weakref.finalize(self, self._stop.release).atexit = False
        self._told = (False, False)  # by any rank: to stop, to save

    def fit(self, until: int | None = None) -> None:
        """Train up to step `until` (default: all), with a status line (see `Status`) and a log line per step on rank 0.

        What is saved in the background is complete when it returns, or raises one of these:

        Raises:
            TrainingError: `bad_steps` in a row had a loss or a gradient that is not finite, and there is no loss scaling; or the
                log cannot be written, or another job writes it.
            ValueError: more steps are done than the settings ask for.
            GradientOverflowError: see `OptimManager.step`.
            Stopped: a signal came.
            CheckpointError: a checkpoint cannot be written, or another job saves to the folder.
        """
        if self.done > self.settings.steps:
            raise ValueError(f"{self.done} steps are done already, the settings ask for {self.settings.steps} in all: ask for more")
        until = self.settings.steps if until is None else min(until, self.settings.steps)
        self.model.set_train(True)
        chief = self._world.everyone.rank == 0
        if self.checkpoints is not None:
            self.checkpoints.lock()
        self._as_chief(self._open_log)
        self._stop.watch()
        with Status(self.done, self.settings.steps, shown=chief) as status:
            try:
                self._end_if_told()  # since the last call
                while self.done < until:
                    record = self.train_step()
                    for watcher in self.watchers:
                        watcher(record)
                    if chief:
                        self._log(record)
                        status.show(record)
                    self._save_if_due()
                self._end_if_told()  # in the last step, after its loss was known
            except (TrainingError, GradientOverflowError):  # on every rank alike
                self._finish_saving()
                raise
            self._finish_saving()

    def _finish_saving(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.finish()

    def _save_if_due(self) -> None:
        stop, due = self._told
        if stop:
            self._end()
        if self.checkpoints is None:
            return
        every = self.settings.save_every
        if due or (every and self.done % every == 0):
            self._saved_at = time.monotonic()
            self.checkpoints.save(self.done, self._extra(), wait=False)
        else:
            self.checkpoints.poll()

    def _end_if_told(self) -> None:
        if self._any_told():
            self._end()

    def _any_told(self) -> bool:
        """Whether any rank was told to stop; all ranks ask."""
        return any_rank(self._world.everyone, self._stop.asked, "told to stop")

    def _end(self) -> None:
        where = "there is no folder for a checkpoint"
        if self.checkpoints is not None:
            self.checkpoints.save(self.done, self._extra())
            where = f"saved in {self.checkpoints.folder}"
        self._stop.answered = True
        raise Stopped(f"stopped after step {self.done}, as a signal asked; {where}")

    def train_step(self) -> dict[str, Any]:
        """One step; returns what the log line holds (the loss is the mean over the ranks)."""
        start = time.perf_counter()
        context = context_of(self._world)
        batch = self.batches.batch(self.done, context.data_rank, context.data_ranks)
        pieces = share_step(batch.pieces(self.settings.rows or len(batch.ids)), self._world)
        rate = self.manager.rate
        self.manager.zero_grad()
        losses = self._backward(pieces)
        loss = self._mean(losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]))
        grad_norm = self.manager.clip_grad_norm(self.manager.parameters, self.settings.clip)
        updated = self._update(loss, grad_norm, batch)
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
            "tokens_per_second": round(context.data_ranks * batch.ids.size / seconds, 1),
            "memory_mib": memory_mib(),
        }

    def _backward(self, pieces: Sequence[Batch]) -> list[Tensor]:
        """The losses of the step's pieces, one pass after the other. Each draws for its rows what one pass of all would draw."""
        draws, losses, first = context_of(self._world).draws, [], 0
        total, count = sum(len(piece.ids) for piece in pieces), draws.count
        for piece in pieces:
            with draws.numbered(count), draws.among((first, len(piece.ids), total)):
                losses.append(self.manager.backward(self.task.loss, piece))
            first += len(piece.ids)
        return losses

    def evaluate(self, tokens: np.ndarray, length: int, rows: int = 8) -> float:
        """Mean loss per token, in nats, over all whole windows of `tokens`; the same on every rank, for any number of ranks.

        `rows`: windows per call of the model.

        Raises:
            ValueError: there is not one whole window.
            Stopped: a signal came.
        """
        with evaluating(self.model):
            return mean_loss(self.task.loss, tokens, length, rows, self._world.along("dp"), self._end_if_told)

    def save(self) -> None:
        """Write a checkpoint to go on from, and wait for it.

        Raises:
            ValueError: the trainer has no folder.
            CheckpointError: it cannot be written.
            Stopped: it is written, and a signal came.
        """
        self._folder().save(self.done, self._extra())
        if self._any_told():
            self._stop.answered = True
            raise Stopped(f"stopped after step {self.done}, as a signal asked; saved in {self._folder().folder}")

    def close(self) -> None:
        """Finish what is being saved, let another job save to the folder and write the log, and no longer watch for signals."""
        try:
            if self.checkpoints is not None:
                self.checkpoints.close()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._log_file is not None:
            self._log_file.close()
            self._log_file = None
        if self._owns_stop:
            self._stop.release()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, (Stopped, TrainingError, GradientOverflowError, CheckpointError)):
            self.close()
        else:  # maybe on this rank alone: the others would not answer
            self._stop.answered = True
            self._let_go()

    def resume(self, path: str | Path | None = None, other_data: bool = False, keep: str = "own") -> bool:
        """Go on from a checkpoint (default: the latest of the folder), at any number of ranks; the log loses the lines behind it.

        The settings are this run's, and where they differ from those of the run that saved rank 0 tells both: with more `steps`
        than before the schedule is stretched.

        Args:
            other_data: whether the batches may be others than those of the run that saved, of which step `done` is next.
            keep: `saved`: the settings of the optimizer and the schedule are those of the run that saved.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: see `Checkpointer.load`; or another job saves to the folder, whose log this would cut.
            TrainingError: another job writes the log, or it cannot be cut.
            ValueError: the batches are others: data would be repeated or left out.
        """
        log = self.settings.log
        has_log = gather_json(log is not None and log.exists(), self._world.everyone, "log")[0]
        if has_log:
            self._folder().lock()
            self._as_chief(self._open_log)
        resumed = self._folder().load(path, keep=keep)
        if resumed is None:
            return False
        before, now = resumed.extra.get("data"), self.batches.described
        differing = [] if other_data or before is None else _differing(before, now)
        if differing:
            raise ValueError(
                f"{resumed.path} was saved by a run on other data ({'; '.join(differing)}): step {resumed.step} would be at "
                "another place in them. Use the same, or resume(other_data=True)"
            )
        self._check_position(resumed)
        self.done = resumed.step
        self._faults.recent = list(resumed.extra.get("recent_losses", []))
        if has_log:
            self._as_chief(self._trim_log)
        self._stop.watch()
        return True

    def _extra(self) -> dict[str, Any]:
        position = {"position": self.batches.position(self.done)} if isinstance(self.batches, Skipping) else {}
        kept = {} if self._kept is None else {"settings": self._kept}
        recent = {"recent_losses": self._faults.recent} if self.settings.spike else {}
        return {"step": self.done, "data": self.batches.described, **position, **recent, **kept}

    def _check_position(self, resumed: Any) -> None:
        before = resumed.extra.get("position")
        now = self.batches.position(resumed.step) if isinstance(self.batches, Skipping) else None
        if before is not None and now is not None and before != now:
            raise ValueError(
                f"{resumed.path} was saved after batch {before['last_batch']}, with {before['left_out'] or 'none'} left out; "
                f"with those that are to be left out now {resumed.step} steps end at batch {now['last_batch']}: leave out "
                "only batches that are still to come, and all that were left out before"
            )

    def _update(self, loss: float, grad_norm: float, batch: Batch) -> bool:
        """Whether the parameters were updated."""
        finite = self.manager.loss_scale_enabled or (math.isfinite(loss) and math.isfinite(grad_norm))
        why = self._faults.wrong(loss, grad_norm, finite)
        if why is None:
            return self.manager.step().updated
        kept = self._keep(batch)
        if self._faults.in_a_row >= self.settings.bad_steps:
            where = "" if self.checkpoints is None else f" The last good checkpoint is in {self.checkpoints.folder}."
            raise TrainingError(
                f"{why} at step {self.done + 1}: {self._faults.in_a_row} bad step(s) in a row, which were skipped.{where}{kept} "
                "Lower the learning rate, look at the data, or set a loss scale if the model is in float16"
            )
        self.manager.discard_step()
        return False

    def _keep(self, batch: Batch) -> str:
        """Write down what a bad step was computed from, where there is a folder; says where."""
        if self.checkpoints is None:
            return ""
        number = self.batches.number(self.done) if isinstance(self.batches, Skipping) else self.done
        folder = self.checkpoints.folder.parent / "bad-batches"
        mesh, context = self._world.mesh, context_of(self._world)
        if mesh.tp_rank == 0 and mesh.pp_rank == 0:
            keep_batch(folder / f"batch-{number:08}-part-{context.data_rank}.npz", batch, self.done + 1)
        return f" Its batch, number {number}, is kept in {folder}."

    def _folder(self) -> Checkpointer:
        if self.checkpoints is None:
            raise ValueError("this Trainer has no folder for checkpoints: Trainer(task, batches, manager, settings, folder)")
        return self.checkpoints

    def _mean(self, loss: Tensor) -> float:
        """The mean of a loss over the ranks; what any of them was told travels with it."""
        minutes = self.settings.save_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        told = from_host(np.array([self._stop.asked, due], np.float32))
        mean, told = self._world.everyone.all_reduce([loss.reshape(1), told], "mean", "loss").wait()
        stop, due = host_array(told) > 0
        self._told = bool(stop), bool(due)
        return host_array(mean).item()

    def _log(self, record: dict[str, Any]) -> None:
        if self._log_file is not None:
            self._log_file.write(record)

    def _open_log(self) -> None:
        if self._log_file is None and self.settings.log is not None:
            self._log_file = LogFile(self.settings.log)

    def _trim_log(self) -> None:
        if self._log_file is not None:
            self._log_file.trim(self.done)

    def _as_chief(self, action: Callable[[], None]) -> None:
        """Act on rank 0; what goes wrong there is raised on every rank."""
        error = ""
        if self._world.everyone.rank == 0:
            try:
                action()
            except Exception as caught:  # whatever it is: the other ranks wait
                error = str(caught) or type(caught).__name__
        error = gather_json(error, self._world.everyone, "log")[0]
        if error:
            raise TrainingError(error)


def _check_parts(task: Any, batches: Any, manager: Any, settings: Any) -> None:
    given = {
        # a model may have a `model` and a `loss` of its own, as Llama has
        "a task, as train.Pretrain(model)": not isinstance(task, nn.Cell) and hasattr(task, "model") and hasattr(task, "loss"),
        "batches, as a data.TokenSampler": hasattr(batches, "batch") and hasattr(batches, "described"),
        "an OptimManager": isinstance(manager, OptimManager),
        "TrainSettings": isinstance(settings, TrainSettings),
    }
    for (wanted, fits), what in zip(given.items(), (task, batches, manager, settings)):
        if not fits:
            raise TypeError(f"Trainer takes {', '.join(given)} and a folder; instead of {wanted} it got: {type(what).__name__}")
    if not manager.optimizers:
        raise ValueError("the manager has no optimizer yet: call manager.add_optimizer(optimizer, schedule) first")


def _differing(before: Any, now: dict[str, Any]) -> list[str]:
    """What differs, in words. The first versions had no digests, and not everybody knows the tokenizer."""
    if not isinstance(before, dict) or not set(before) & set(now):
        return changes(before, now, "data")
    known = {name: now[name] for name in now if name in before}
    return changes({name: value for name, value in before.items() if name in now or name != "tokenizer"}, known)


def memory_mib() -> int:
    """Resident memory of this process, in MiB."""
    return resident_memory()[0] >> 20
