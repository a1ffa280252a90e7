"""What looks at each step of a run: evaluation, TensorBoard, Weights & Biases, figures of the ranks."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Callable

import numpy as np
from mindspore import nn

from bmtrain_ms_base.data import Batches
from bmtrain_ms_base.data.extras import DataError, needed

from ..checkpoint import Checkpointer
from ..comm import World, gather_json
from ..compat.cells import evaluating
from ..ops.in_place import square_sum
from ..optim import OptimManager
from ..zero import context_of
from .evaluate import mean_loss_of
from .tasks import Task

Record = dict[str, Any]


class Evaluation:
    """Evaluates every so many steps, and keeps the best model.

    Args:
        task: the loss of a batch.
        batches: what is evaluated on: always the first ones.
        every: steps; None: only when it is called by `now`.
        count: batches.
        rows: of a call of the model.
        world: the ranks.
        best: where the model with the lowest loss is kept, if it is to be; its state is that of the run.

    Attributes:
        losses: step -> loss.
    """

    def __init__(
        self,
        task: Task,
        batches: Batches,
        every: int | None,
        count: int,
        rows: int,
        world: World,
        best: Checkpointer | None = None,
    ):
        self._task, self._batches, self._every, self._count, self._rows = task, batches, every, count, rows
        self._world, self._best = world, best
        self.losses: dict[int, float] = {}

    def __call__(self, record: Record) -> None:
        """Evaluate, if it is the step for it; adds `valid_loss` to what is logged."""
        if self._every is not None and record["step"] % self._every == 0:
            record["valid_loss"] = self.now(record["step"])

    def now(self, step: int) -> float:
        """Evaluate; all ranks call it."""
        context, model = context_of(self._world), self._task.model
        place = context.data_rank, context.data_ranks
        with evaluating(model):
            loss = mean_loss_of(self._task.loss, self._batches, self._count, self._rows, place, self._world.along("dp"))
        if self._best is not None and math.isfinite(loss) and loss < min(self.losses.values(), default=math.inf):
            self._best.save(step, {"step": step, "valid_loss": loss})
        self.losses[step] = loss
        return loss

    def resume(self, records: list[Record]) -> None:
        """Know what a log says about the steps that are done."""
        self.losses.update({r["step"]: r["valid_loss"] for r in records if "valid_loss" in r})


class RankNorms:
    """Adds the norm of each rank's part of the gradients to what is logged."""

    def __init__(self, manager: OptimManager, world: World):
        self._manager, self._world = manager, world

    def __call__(self, record: Record) -> None:
        """Gather the norms; all ranks call it."""
        grads = [g for g in (self._manager.grad(p) for p in self._manager.parameters) if g is not None]
        own = math.sqrt(sum(square_sum(g) for g in grads)) / self._manager.grads_scale
        record["rank_norms"] = [float(f"{x:.6g}") for x in gather_json(own, self._world.everyone, "norms of ranks")]


class Utilisation:
    """Adds `tflops`, of a rank, to what is logged: those that the model itself needs (6 for a parameter and a token, and those of
    attention), without what is computed again; and `mfu`, which part of the rank's peak that is (Chowdhery et al., 2022).

    Args:
        active: parameters that a token uses.
        attention: numbers that go into a token's scores for each token that it sees: layers * heads * dim_head.
        length: tokens of a row.
        ranks: how many share the work.
        peak: TFLOP/s of a rank, or None.
    """

    def __init__(self, active: int, attention: int, length: int, ranks: int, peak: float | None):
        self._each = (6 * active + 6 * attention * length) / ranks / 1e12  # half of all pairs, of 12
        self._peak = peak

    def __call__(self, record: Record) -> None:
        """Work it out from the tokens per second."""
        rate = self._each * record["tokens_per_second"]
        record["tflops"] = float(f"{rate:.4g}")
        if self._peak is not None:
            record["mfu"] = round(rate / self._peak, 4)


class Board(ABC):
    """Where rank 0 shows each step's numbers.

    Once it is made it never raises: a training that goes well is worth more than its figures. What fails is told once, later steps
    are tried again, and in the end it says how many are missing.
    """

    def __init__(self, name: str):
        self._name = name
        self._failed = 0  # steps

    @abstractmethod
    def _show(self, step: int, numbers: list[tuple[str, float]]) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...

    def __call__(self, record: Record) -> None:
        """Show what is a number."""
        try:
            self._show(record["step"], _numbers(record))
        except Exception as error:  # they have many kinds
            if not self._failed:
                sys.stderr.write(
                    f"WARNING: {self._name} cannot be written since step {record['step']}: {_in_a_line(error)}. Training goes on, "
                    "and later steps are tried again; the log has all of them\n"
                )
            self._failed += 1

    def close(self) -> None:
        """Write what waits."""
        try:
            self._end()
        except Exception as error:
            sys.stderr.write(f"WARNING: the last steps may be missing in {self._name}: {_in_a_line(error)}; the log has them\n")
        if self._failed:
            sys.stderr.write(f"WARNING: {self._failed} step(s) or more are missing in {self._name}; the log has them\n")


class TensorBoard(Board):
    """Writes each step's numbers for TensorBoard; rank 0 has one.

    Raises:
        MissingLibraryError: it is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        super().__init__("TensorBoard's files")
        writer: Callable[..., Any] = needed("tensorboard.summary", "log.tensorboard", "log").Writer
        self._made: Callable[[], Any] = lambda: writer(str(folder))
        self._writer = self._made()

    def _show(self, step: int, numbers: list[tuple[str, float]]) -> None:
        if self._writer is None:
            self._writer = self._made()  # another file, which TensorBoard reads, too
        try:
            for name, value in numbers:
                self._writer.add_scalar(name, np.float32(value), step)
        except Exception:  # its thread has ended, and writes no more
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = None
            raise

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB(Board):
    """Sends each step's numbers to Weights & Biases, or, with `WANDB_MODE=offline`, keeps them in the folder; rank 0 has one.

    Raises:
        MissingLibraryError: it is not installed.
        DataError: the run cannot be begun, e.g. as nobody has logged in.
    """

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]):
        super().__init__("Weights & Biases")
        folder.mkdir(parents=True, exist_ok=True)
        wandb = needed("wandb", "log.wandb", "log")
        run_id = _run_id(folder)
        try:
            self._run = wandb.init(project=project, dir=str(folder), config=settings, id=run_id, resume="allow")
        except Exception as error:  # it has many kinds
            raise DataError(f"log.wandb: {_in_a_line(error)}; log in with wandb login, or set WANDB_MODE=offline") from error

    def _show(self, step: int, numbers: list[tuple[str, float]]) -> None:
        self._run.log(dict(numbers), step=step)

    def _end(self) -> None:
        self._run.finish()


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _run_id(folder: Path) -> str:
    """The run's id, which a run that goes on finds again in the folder."""
    file = folder / "wandb-run-id"
    if not file.exists():
        file.write_text(f"{time.time_ns():x}")
    return file.read_text()


def _numbers(record: Record) -> list[tuple[str, float]]:
    found = [(name, float(value)) for name, value in record.items() if isinstance(value, (int, float)) and name != "step"]
    return found + [(f"rank_norms/{rank}", value) for rank, value in enumerate(record.get("rank_norms", ()))]


def attention_numbers(model: nn.Cell) -> int:
    """What `Utilisation` needs of a model's attention: layers times heads times the size of a head; 0: not known."""
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_heads", 0) * (getattr(config, "dim_head", 0) or 0)
    return getattr(config, "num_layers", 0) * heads
