"""A run from its settings to its model: what `bmtrain-ms pretrain` and `finetune` do on each rank."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator

from bmtrain_ms_base.config import ConfigError, Settings, passes_of, to_toml
from bmtrain_ms_base.data import DataError
from bmtrain_ms_base.data.storage import Storage

from ..checkpoint import Checkpointer, CheckpointError, lock_folder
from ..comm import World, write_trace
from ..files.errors import agree_or_fail
from ..files.replacing import replace_text
from ..model_center import PretrainedError, parameter_count, save_adapters
from ..model_center.model import CausalLM
from ..model_center.pretrained.folder import copy_beside
from ..optim import GradientOverflowError
from .begun import begun_from, begun_otherwise
from .data import place_of
from .errors import Stopped, TrainingError
from .log import plot_log, read_log
from .loop import Trainer, TrainSettings
from .parts import RunBatches, join, make_batches, make_manager, make_model
from .signals import EXIT_STOPPED, StopSignals
from .tasks import Pretrain
from .watchers import Evaluation, RankNorms, TensorBoard, Utilisation, WandB, attention_numbers

_MENDED_BY_USER = (ConfigError, DataError, CheckpointError, PretrainedError)
_FAILED = (TrainingError, GradientOverflowError)


def run_job(settings: Settings, tokenizer: str | None, other_data: bool = False, resume: str | None = None) -> int:
    """Train as the settings say, go on where an earlier run in the same folder ended, and write the model. All ranks call it.

    Args:
        settings: with `data.files` or `data.rows`; text has become that.
        tokenizer: a folder or file that is put beside the model.
        other_data: go on although the data are others than those of the run that saved.
        resume: the checkpoint to go on from; None: the latest of the folder, if there is one.

    Returns:
        What the process ends with: 0; 75, told to stop and saved; 1, training failed; 2, a setting or a file is wrong. What that is
        has been written on one rank.
    """
    world = None
    try:
        world = join(settings)
        with warnings.catch_warnings():
            if world.everyone.rank:
                warnings.simplefilter("ignore", UserWarning)  # rank 0 says it
            _Job(settings, tokenizer, world).run(other_data, resume)
    except Stopped as stopped:
        if world is not None and world.everyone.rank == 0:
            sys.stdout.write(f"{stopped}; the same command goes on\n")
        return EXIT_STOPPED
    except (*_MENDED_BY_USER, *_FAILED) as error:
        if world is None or world.everyone.rank == getattr(error, "speaker", 0):
            sys.stderr.write("".join(f"bmtrain-ms: {line}\n" for line in str(error).splitlines()))
        if world is not None:
            world.everyone.barrier("the end").wait()  # the first rank that ends with an error ends the others
        return 1 if isinstance(error, _FAILED) else 2
    return 0


class _Job:
    """A run on one rank."""

    def __init__(self, settings: Settings, tokenizer: str | None, world: World):
        self.settings, self.tokenizer, self.world = settings, tokenizer, world
        self.out = Path(settings.out).expanduser()
        self.chief = world.everyone.rank == 0
        self.started = time.monotonic()

    def run(self, other_data: bool, resume: str | None = None) -> None:
        """Train and evaluate as the settings say, from the start or from a checkpoint on, and write the results."""
        stop = StopSignals()
        lock = lock_folder(self.out)
        self._as_chief(lambda: self._check_begun(resume), f"{self.out} cannot be read")
        kept = self.out / "config.toml"
        self._as_chief(lambda: replace_text(kept, to_toml(self.settings)), f"{kept} cannot be written")
        storage = Storage(place_of(self.world), [self.out], self.settings.data.shared_storage)
        self.shared = len(storage.builders) == 1
        batches = self._together(lambda: make_batches(self.settings), "the data cannot be opened")
        model = make_model(self.settings, batches.vocab_size)
        manager = make_manager(self.settings, model)
        task = Pretrain(model)
        self._describe(model, batches)
        evaluation = self._evaluation(task, manager, batches)
        with contextlib.ExitStack() as stack:
            watchers = [*self._figures(model, manager), *([] if evaluation is None else [evaluation]), *self._writers(stack)]
            trainer = self._trainer(task, manager, batches, stop, watchers)
            with trainer:
                self._resume(trainer, resume, other_data, evaluation)
                trainer.fit()
                self._finish(trainer, evaluation)
        if lock is not None:
            lock.release()
        # `stop` is not released: all is written, and a signal that is heard now must not make of it a run that was ended

    def _check_begun(self, resume: str | None) -> None:
        """Before anything is written: what was kept of the run that began otherwise stays."""
        otherwise = begun_otherwise(self.settings, resume)
        if otherwise:
            raise ConfigError(otherwise)

    def _together(self, make: Callable[[], Any], what: str) -> Any:
        """What each rank makes by itself; what goes wrong on one is raised on all, behind `what` where it does not say that."""
        made, error = None, None
        try:
            made = make()
        except (ConfigError, DataError) as caught:
            error = CheckpointError(str(caught))
        except Exception as caught:  # whatever it is: the other ranks wait
            error = caught
        agree_or_fail(self.world.everyone, error, what)
        return made

    def _as_chief(self, make: Callable[[], Any], what: str) -> Any:
        """What rank 0 makes; None on the others."""
        return self._together(make if self.chief else lambda: None, what)

    def _describe(self, model: CausalLM, batches: RunBatches) -> None:
        """Say what is trained on how many ranks."""
        mesh, settings = self.world.mesh, self.settings
        kind: Any = type(model)
        self.parameters = parameter_count(kind, model.config)
        self.active = parameter_count(kind, model.config, active=True)
        used = f", {self.active:,} of them for a token" if self.active != self.parameters else ""
        rows, micro = passes_of(settings, self.world.everyone.size)
        self._say(
            f"{kind.__name__} with {self.parameters:,} parameters{used}; {self.world.everyone.size} rank(s): tp {mesh.tp}, "
            f"pp {mesh.pp}, dp {mesh.dp}, ep {settings.layout.ep}, ZeRO-{settings.layout.zero_level}; "
            f"{settings.train.steps:,} steps of "
            f"{settings.batch.size} rows of {settings.data.length} tokens, {rows // micro} of them at a time; folder {self.out}"
        )

    def _evaluation(self, task: Pretrain, manager: Any, batches: RunBatches) -> Evaluation | None:
        settings, world = self.settings, self.world
        if batches.valid is None:
            if settings.train.eval_every is not None:
                raise ConfigError("train.eval_every: there are no validation data: data.split has none, or data are conversations")
            return None
        best = None
        if settings.save.best:
            best = Checkpointer(self.out / "best", task.model, manager, keep_last=1, shared_storage=self.shared)
        rows, _ = passes_of(settings, world.everyone.size)
        return Evaluation(task, batches.valid, settings.train.eval_every, settings.train.eval_batches, rows, world, best)

    def _figures(self, model: CausalLM, manager: Any) -> list[Any]:
        log, ranks = self.settings.log, self.world.everyone.size
        utilisation = Utilisation(self.active, attention_numbers(model), self.settings.data.length, ranks, log.peak_tflops)
        return [utilisation, *([RankNorms(manager, self.world)] if log.rank_norms else [])]

    def _writers(self, stack: contextlib.ExitStack) -> list[Any]:
        log, settings = self.settings.log, self.settings.model_dump(mode="json")
        makers: dict[str, Callable[[], Any]] = {}
        if log.tensorboard:
            makers["log.tensorboard: its files cannot be written"] = lambda: TensorBoard(self.out / "tensorboard")
        if log.wandb is not None:
            makers["log.wandb: the run cannot be begun"] = lambda: WandB(str(log.wandb), self.out, settings)
        made = (self._as_chief(make, what) for what, make in makers.items())  # each is closed, also where the next one fails
        return [stack.enter_context(contextlib.closing(writer)) for writer in made if writer is not None]

    def _trainer(self, task: Pretrain, manager: Any, batches: RunBatches, stop: StopSignals, watchers: list[Any]) -> Trainer:
        settings = self.settings
        rows, _ = passes_of(settings, self.world.everyone.size)
        how = TrainSettings(
            steps=settings.train.steps,
            clip=settings.optimizer.clip,
            log=self.out / "log.jsonl",
            rows=rows,
            bad_steps=settings.faults.bad_steps,
            spike=settings.faults.spike,
            save_every=settings.save.every,
            save_minutes=settings.save.minutes,
            keep_last=settings.save.keep_last,
            keep_every=settings.save.keep_every,
            shared_storage=self.shared,
        )
        kept = begun_from(settings.model_dump(mode="json"))
        folder = self.out / "checkpoints"
        return Trainer(task, batches.train, manager, how, folder, signals=stop, watchers=watchers, kept=kept)

    def _resume(self, trainer: Trainer, path: str | None, other_data: bool, evaluation: Evaluation | None) -> None:
        log = self.out / "log.jsonl"
        with _told_in_one_line():
            resumed = trainer.resume(path, other_data=other_data)
        if not resumed:
            self._as_chief(lambda: log.unlink(missing_ok=True), f"{log}, of a run that saved nothing, cannot be deleted")
            return
        self._say(f"going on after step {trainer.done}, saved in {trainer.checkpoints and trainer.checkpoints.folder}")
        if trainer.done > self.settings.train.steps:
            raise ConfigError(
                f"train.steps: {trainer.done} steps are done already in {self.out}, {self.settings.train.steps} are asked for"
            )
        if evaluation is not None:
            evaluation.resume(self._together(lambda: read_log(log) if log.exists() else [], f"{log} cannot be read"))

    def _finish(self, trainer: Trainer, evaluation: Evaluation | None) -> None:
        """Evaluate, save, and write the model."""
        final = None
        if evaluation is not None:
            final = evaluation.losses.get(trainer.done)
            final = evaluation.now(trainer.done) if final is None else final
        trainer.save()
        if final is not None:
            self._say(f"validation loss {final:.4f}")
        model: Any = trainer.model
        if self.settings.lora is not None:
            save_adapters(model, self.out / "adapters", str(self.settings.model.pretrained))
            self._say(f"adapters are in {self.out / 'adapters'}")
        elif self.settings.save.export:
            model.save_pretrained(self.out / "model", proven=self.shared)  # other hosts would not see it
            beside = self._beside()
            if beside is not None:
                self._as_chief(lambda: copy_beside(self.out / "model", beside), f"files of {beside} cannot be put beside the model")
            self._say(f"the model is in {self.out / 'model'}")
        if self.chief:
            plot_log(self.out / "log.jsonl", self.out / "loss.png", {} if evaluation is None else evaluation.losses)
        path, trace = self.settings.log.trace, self.world.trace
        if path is not None and trace is not None:
            self._together(lambda: write_trace(path, trace, self.world.everyone), f"log.trace: {path} cannot be written")
        self._say(f"{trainer.done} steps, {time.monotonic() - self.started:.0f} s")

    def _beside(self) -> Path | None:
        """Where tokenizer files for the model's folder are, if not where the model was."""
        if self.tokenizer is None or self.settings.model.pretrained is not None:
            return None
        path = Path(self.tokenizer).expanduser()
        return path if path.is_dir() else path.parent

    def _say(self, text: str) -> None:
        if self.chief:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()


_REMEDIES = (  # of functions, and what the command has for them
    (re.compile(r"resume\(other_data=True\)"), "--other-data"),
    (re.compile(r"init_distributed\(seed=(\d+)\), or load with strict=False"), r"--seed=\1"),
    (re.compile(r"load\('[^']*?step-0*(\d+)'\) goes on from one"), r"--resume=\1 goes on from that one"),
)


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Turn what is wrong with what a run goes on from into an error that the user can mend, by what the command understands."""
    try:
        yield
    except (ValueError, CheckpointError) as error:
        text = str(error)
        for function, option in _REMEDIES:
            text = function.sub(option, text)
        if not isinstance(error, _MENDED_BY_USER):
            raise ConfigError(text) from error
        if text == str(error):
            raise
        told = type(error)(text)
        told.__dict__.update(error.__dict__)  # who says it
        raise told from error
