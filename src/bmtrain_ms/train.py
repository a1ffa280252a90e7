"""The training loop of a language model: steps, log, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from .checkpoint import load_training, save_training
from .comm import world
from .compat.autograd import no_grad
from .compat.runtime import from_host, host_array
from .data import TokenSampler
from .lr_scheduler import Cosine
from .nn.functional import cross_entropy
from .optim import AdamOptimizer, OptimManager


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    `steps`: in all, resumed ones included.  `lr`, `warmup`: peak rate and its warm-up steps; cosine to zero at `steps`.
    `clip`: largest gradient norm.  `loss_scale`: initial one, None for off.  `log`: JSONL file, one line per step, or None.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    loss_scale: float | None = None
    log: Path | None = None


class Trainer:
    """Trains `model` on batches of `sampler`. All ranks make one and call its methods together.

    Args:
        model: token ids (batch, length) -> logits (batch, length, vocab); initialised or to be loaded.
        sampler: the training text.
        settings: how to train.
    """

    def __init__(self, model: nn.Cell, sampler: TokenSampler, settings: TrainSettings):
        self.model, self.sampler, self.settings = model, sampler, settings
        self.done = 0  # steps
        optimizer = AdamOptimizer(model.trainable_params(), settings.lr, settings.betas, weight_decay=settings.weight_decay)
        self.manager = OptimManager(loss_scale=settings.loss_scale)
        self._schedule = Cosine(optimizer, settings.lr, min(settings.warmup, settings.steps), settings.steps)
        self.manager.add_optimizer(optimizer, self._schedule)
        self._optimizer = optimizer
        self._engine = world().engine

    def fit(self, until: int | None = None) -> None:
        """Train up to step `until` (default: all), with a progress bar and a log line per step on rank 0.

        Raises:
            TrainingError: the loss or the gradient is not finite, and no loss scaling is there to skip the step.
        """
        until = self.settings.steps if until is None else min(until, self.settings.steps)
        self.model.set_train(True)
        chief = self._engine.rank == 0
        with tqdm(total=self.settings.steps, initial=self.done, disable=not chief, desc="train", mininterval=1.0) as bar:
            while self.done < until:
                record = self.train_step()
                if chief:
                    self._log(record)
                    bar.update()
                    bar.set_postfix_str(
                        f"loss {record['loss']:.3f} lr {record['lr']:.1e} |g| {record['grad_norm']:.2f} "
                        f"{record['tokens_per_second']:.0f} tok/s {record['memory_mib']} MiB"
                    )

    def train_step(self) -> dict[str, Any]:
        """One step; returns what the log line holds (the loss is the mean over the ranks)."""
        start = time.perf_counter()
        inputs, targets = self.sampler.batch(self.done, self._engine.rank, self._engine.size)
        rate = self._optimizer.param_groups[0]["lr"]
        self.manager.zero_grad()
        loss = self._mean(self.manager.backward(self._loss, from_host(inputs), from_host(targets.reshape(-1))))
        grad_norm = self.manager.clip_grad_norm(self._optimizer.param_groups, self.settings.clip)
        if self.settings.loss_scale is None and not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"loss {loss}, gradient norm {grad_norm} at step {self.done + 1}; the parameters are as before this step. "
                "Lower the learning rate, or set a loss scale if the model is in float16"
            )
        updated = self.manager.step()
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

    def save(self, path: str | Path) -> None:
        """Write a checkpoint to go on from."""
        save_training(path, self.model, self.manager, {"step": self.done})

    def resume(self, path: str | Path) -> None:
        """Go on from a checkpoint, at any number of ranks; the log loses the lines behind it.

        The schedule is that of this run's settings: with more `steps` than before it is stretched.
        """
        planned = self._schedule.state_dict()
        self.done = int(load_training(path, self.model, self.manager)["step"])
        self._schedule.load_state_dict({**planned, "num_iter": self._schedule.num_iter})
        log = self.settings.log
        if self._engine.rank == 0 and log is not None and log.exists():
            kept = [line for line in read_log(log) if line["step"] <= self.done]
            log.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs)
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)

    def _mean(self, loss: Tensor) -> float:
        return host_array(self._engine.all_reduce([loss.reshape(1)], "mean", "loss").wait()[0]).item()

    def _log(self, record: dict[str, Any]) -> None:
        if self.settings.log is not None:
            with open(self.settings.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL log, without a last line that was cut when the run was killed.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
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
    """Resident memory of this process now, in MiB (Linux; elsewhere its peak)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    import os

    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
