"""The training loop at one rank: steps, log, evaluation, errors, resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.checkpoint import checkpointer as checkpointer_module
from bmtrain_ms.data import Batch, EndOfDataError, GPTBatches, GPTData, IndexedWriter, TokenSampler
from bmtrain_ms.model_center import Spread, spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig, Qwen3Moe, Qwen3MoeConfig
from bmtrain_ms.optim import AdamOptimizer, GradientOverflowError, OptimManager
from bmtrain_ms.train import (
    Pretrain,
    Stopped,
    StopSignals,
    Trainer,
    TrainingError,
    TrainSettings,
    memory_mib,
    plot_log,
    read_log,
    share_step,
)
from bmtrain_ms.train import signals as signals_module
from bmtrain_ms.train.evaluate import mean_loss_of
from tests.helpers.trainers import pretrainer

pytestmark = pytest.mark.usefixtures("single_world")

VOCAB = 13
TOKENS = np.tile(np.arange(VOCAB), 40).astype(np.int32)  # every token has one successor


FIELDS = {"step", "loss", "lr", "grad_norm", "loss_scale", "skipped", "seconds", "tokens_per_second", "memory_mib"}


def trainer(steps: int = 6, half: bool = False, folder: Any = None, **settings: Any) -> Trainer:
    config = LlamaConfig(VOCAB, 16, 2, dim_ff=12, num_layers=1, dtype="float16" if half else "float32")
    model = spread(Llama(config), Spread(recompute=False))
    bms.init_parameters(model)
    settings = {"lr": 0.03, "warmup": 2, **settings}
    return pretrainer(model, TokenSampler(TOKENS, length=6, global_batch=4), steps, folder, **settings)


def weights(t: Trainer) -> list[bytes]:
    return [p.asnumpy().tobytes() for p in t.model.get_parameters()]


def steady(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what differs from run to run."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second", "memory_mib")} for r in records]


def test_fit_trains_and_logs(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    t = trainer(steps=22, log=log)
    t.fit()
    records = read_log(log)
    assert t.done == 22 and [r["step"] for r in records] == list(range(1, 23))
    assert records[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.1) and records[-1]["loss"] < 0.5
    rates = [0.0, 0.015, *(0.03 * (1 + math.cos(math.pi * n / 20)) / 2 for n in range(20))]
    assert [r["lr"] for r in records] == pytest.approx(rates, rel=1e-12)
    for r in records:
        assert set(r) == FIELDS
        assert r["grad_norm"] > 0 and r["loss_scale"] == 1.0 and r["skipped"] is False
        assert r["seconds"] > 0 and r["tokens_per_second"] == pytest.approx(24 / r["seconds"], rel=0.2)
        assert 50 < r["memory_mib"] < 1 << 20
    assert "train: step 22 of 22, loss 0." in capsys.readouterr().err


def test_fit_in_parts_is_fit(tmp_path):
    whole, parts = trainer(log=tmp_path / "whole"), trainer(log=tmp_path / "parts")
    whole.fit()
    for until, done in ((1, 1), (1, 1), (4, 4), (99, 6)):
        parts.fit(until=until)
        assert parts.done == done
    assert weights(parts) == weights(whole)
    assert steady(read_log(tmp_path / "parts")) == steady(read_log(tmp_path / "whole"))


def test_no_log_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(steps=1).fit()
    assert not list(tmp_path.iterdir())


def test_the_first_loss_is_that_of_the_first_batch():
    t = trainer()
    batch = t.batches.batch(0)
    inputs, targets = batch.ids, batch.targets
    logits = t.model(Tensor(inputs)).asnumpy().astype(np.float64)
    rows = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert t.train_step()["loss"] == pytest.approx(rows.mean(), rel=1e-6)


def test_clipping_is_applied():
    """With a tiny limit the first update of Adam, which knows no scale but eps, nearly vanishes against eps."""
    records = []
    for clip in (1.0, 1e-9):
        t = trainer(clip=clip, warmup=0, weight_decay=0.0)
        before = np.concatenate([p.asnumpy() for p in t.model.get_parameters()])
        record = t.train_step()
        moved = np.abs(np.concatenate([p.asnumpy() for p in t.model.get_parameters()]) - before).max()
        records.append((record["grad_norm"], moved))
    assert records[0][0] == records[1][0] > 1e-3  # before clipping
    assert records[0][1] == pytest.approx(0.03, rel=1e-2) and records[1][1] < 0.005


class Recorded:
    """A task and batches of another kind than the demo's: rows, weights and a loss of their own."""

    def __init__(self) -> None:
        self.model = trainer().model
        self.asked: list[tuple[int, int, int]] = []
        self.described = {"rows": 2}

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        self.asked.append((step, rank, ranks))
        ids = (np.arange(10, dtype=np.int32).reshape(2, 5) + step) % VOCAB
        return Batch(ids, np.roll(ids, -1, 1), weights=np.float32([[1, 0, 2, 0, 0], [0, 0, 0, 0, 1]]))

    def loss(self, batch: Batch) -> Tensor:
        return Pretrain(self.model).loss(batch) * 2.0


def test_task_batches_and_optimizers_are_the_users():
    parts = Recorded()
    first, *others = parts.model.trainable_params()
    manager = OptimManager()
    for params, lr in (([first], 0.25), (others, 0.125)):
        manager.add_optimizer(AdamOptimizer(params, lr))
    t = Trainer(parts, parts, manager, TrainSettings(2))
    assert manager.parameters == [first, *others] and manager.rate == 0.25
    expected = parts.loss(parts.batch(0)).asnumpy().item()
    parts.asked.clear()
    record = t.train_step()
    assert (record["loss"], record["lr"]) == (expected, 0.25) and record["grad_norm"] > 0
    t.fit()
    assert parts.asked == [(0, 0, 1), (1, 0, 1)] and t.done == 2


class Wrapped(nn.Cell):
    """A language model that is no Llama: its logits are all that is known of it."""

    def __init__(self, model: nn.Cell):
        super().__init__()
        self.model = model

    def construct(self, ids: Tensor, documents: Any = None) -> Tensor:
        return self.model(ids, documents=documents)


@pytest.mark.parametrize("plain", [False, True])
def test_what_a_batch_says_counts(plain):
    """Weights, targets that are none, and documents, against the logits."""
    model = trainer().model
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, VOCAB, (2, 3, 5)).astype(np.int32)
    targets[0, 2] = -100
    weights = rng.random((3, 5)).astype(np.float32)
    documents = np.int32([[0, 0, 1, 1, 1], [0] * 5, [0, 1, 2, 3, 4]])
    logits = model(Tensor(ids), documents=Tensor(documents)).asnumpy().astype(np.float64)
    rows = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    counts = targets != -100
    loss = Pretrain(Wrapped(model) if plain else model).loss
    assert loss(Batch(ids, targets, documents=documents)).asnumpy() == pytest.approx(rows[counts].mean(), rel=1e-6)
    mean = (rows * weights * counts).sum() / (weights * counts).sum()
    assert loss(Batch(ids, targets, weights, documents)).asnumpy() == pytest.approx(mean, rel=1e-6)
    assert loss(Batch(ids, targets, 0 * weights)).asnumpy() == 0.0


@pytest.mark.parametrize("plain", [False, True])
def test_a_batch_that_is_one_of_several(plain):
    """Its loss is its share of the mean over all targets of the step, of which each rank has `count` on average."""
    model = trainer().model
    loss = Pretrain(Wrapped(model) if plain else model).loss
    ids, targets = np.random.default_rng(0).integers(0, VOCAB, (2, 3, 5)).astype(np.int32)
    targets[0, 2] = -100
    alone = loss(Batch(ids, targets)).asnumpy().item()
    assert Batch(ids, targets).counted == 14
    for part in (1.0, 0.25):
        found = loss(Batch(ids, targets, count=35.0, part=part)).asnumpy().item()
        assert found == pytest.approx(alone * 14 / 35, rel=1e-6)
    weights = np.random.default_rng(1).random((3, 5)).astype(np.float32)
    batch = Batch(ids, targets, weights)
    assert batch.counted == pytest.approx((weights * (targets != -100)).sum())
    found = loss(dataclasses.replace(batch, count=35.0, part=0.25)).asnumpy().item()
    assert found == pytest.approx(loss(batch).asnumpy().item() * batch.counted / 35, rel=1e-6)
    nothing = Batch(ids, np.full_like(targets, -100))
    for batch in (nothing, dataclasses.replace(nothing, count=35.0), dataclasses.replace(nothing, count=0.0)):
        assert loss(batch).asnumpy() == 0.0


def test_the_batches_of_a_step_share_its_targets():
    """On one rank nobody is asked."""
    ids = np.zeros((4, 5), np.int32)
    targets = np.where(np.arange(20).reshape(4, 5) < 7, 1, -100).astype(np.int32)
    found = share_step([Batch(ids[:1], targets[:1]), Batch(ids[1:], targets[1:])])
    assert [(batch.count, batch.part) for batch in found] == [(7.0, 0.25), (7.0, 0.75)]


def test_what_routers_add_is_learnt_by_any_task_of_a_language_model():
    """Of a family that is no Llama too: by its logits alone their loss would be left out without a word."""
    sizes: dict[str, Any] = {
        "dense_layers": (),
        "num_experts": 4,
        "top_k": 2,
        "dim_expert": 8,
        "balance": "sequence",
        "balance_coef": 0.5,
    }
    model = Qwen3Moe(Qwen3MoeConfig(VOCAB, 16, 2, dim_ff=12, num_layers=1, **sizes))
    bms.init_parameters(model)
    spread(model, Spread(recompute=False))
    ids, targets = np.random.default_rng(0).integers(0, VOCAB, (2, 3, 5)).astype(np.int32)
    targets[0] = -100
    whole = Pretrain(model).loss(Batch(ids, targets)).asnumpy().item()
    cross_entropy = Pretrain(Wrapped(model)).loss(Batch(ids, targets)).asnumpy().item()
    routers = whole - cross_entropy
    assert routers > 0.4  # one for each layer where tokens are even, times the coefficient
    assert whole == pytest.approx(model.loss(Tensor(ids), Tensor(targets)).asnumpy().item(), rel=1e-6)
    found = Pretrain(model).loss(Batch(ids, targets, count=20.0, part=0.5)).asnumpy().item()
    assert found == pytest.approx(cross_entropy * 10 / 20 + routers * 0.5, rel=1e-5)


# Evaluation #


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_evaluate_is_the_mean_over_all_whole_windows(rows):
    t = trainer()
    tokens = np.random.default_rng(0).integers(0, VOCAB, 7 * 5 + 3)  # seven windows of 5, and a rest
    ids, targets = tokens[:35].reshape(7, 5), tokens[1:36].reshape(7, 5)
    logits = t.model(Tensor(ids.astype(np.int32))).asnumpy().astype(np.float64)
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert t.evaluate(tokens, 5, rows) == pytest.approx(each.mean(), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_mean_loss_of_batches_whose_targets_have_weights(single_world, scale):
    """Of any sum, and in parts of which some have no target that counts."""
    values, weights = np.random.default_rng(0).random((2, 4, 5)).astype(np.float32)
    targets = np.zeros((4, 5), np.int32)
    targets[1], targets[2, 1:] = -100, -100

    class Weighted:
        described: dict[str, Any] = {}  # noqa: RUF012 - a protocol's

        def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
            return Batch(np.arange(20, dtype=np.int32).reshape(4, 5), targets, scale * weights)

    def loss(batch: Batch) -> Tensor:
        assert batch.weights is not None
        counts = batch.weights * (batch.targets != -100)
        return Tensor(np.float32((values.reshape(-1)[batch.ids] * counts).sum() / max(counts.sum(), 1e-30)))

    counts = weights * (targets != -100)
    expected = (values * counts).sum() / counts.sum()
    for rows in (1, 2, 4):
        found = mean_loss_of(loss, Weighted(), 2, rows, (0, 1), single_world.everyone)
        assert found == pytest.approx(expected, rel=1e-6)
    targets[:] = -100
    assert mean_loss_of(loss, Weighted(), 1, 2, (0, 1), single_world.everyone) == 0.0


def test_evaluate_changes_nothing(single_world):
    t = trainer()
    t.fit(until=1)
    before, clock = weights(t), single_world.engine.clock.step
    first = t.evaluate(TOKENS[:50], 6)
    assert t.evaluate(TOKENS[:50], 6) == first
    assert weights(t) == before and single_world.engine.clock.step == clock and t.model.training


@pytest.mark.parametrize("count", [0, 6])
def test_too_little_to_evaluate(count):
    with pytest.raises(ValueError, match=f"{count} held-out tokens do not fill one window of 6"):
        trainer().evaluate(TOKENS[:count], 6)


# What goes wrong #


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training(bad, tmp_path):
    """With the parameters as they were, and a remedy."""
    t = trainer(log=tmp_path / "log")
    t.fit(until=2)
    p = next(p for p in t.model.get_parameters() if p.name == "model.norm.weight")
    values = p.asnumpy().copy()
    values[0] = bad
    p.copy_full(values)
    before = weights(t)
    text = r"loss nan, gradient norm nan, not finite, at step 5: 3 bad step\(s\) in a row, which were skipped\. Lower the"
    with pytest.raises(TrainingError, match=text):
        t.fit()
    assert weights(t) == before and t.done == 4
    assert [r["skipped"] for r in read_log(tmp_path / "log")] == [False, False, True, True]
    assert t.manager.lr_schedulers[0].num_iter == 2  # the schedule waits


def test_a_gradient_that_is_not_finite_ends_training(monkeypatch):
    t = trainer(bad_steps=1)
    before = weights(t)
    monkeypatch.setattr(t.manager, "clip_grad_norm", lambda *args: math.inf)
    with pytest.raises(TrainingError, match=r"loss 2\.5\d+, gradient norm inf, not finite, at step 1: 1 bad"):
        t.train_step()
    assert weights(t) == before


def test_with_a_loss_scale_the_step_is_skipped(tmp_path, capsys):
    """2^24 times the gradient does not fit into float16; training goes on with less."""
    t = trainer(steps=12, half=True, loss_scale=2.0**24, log=tmp_path / "log")
    t.fit()
    records = read_log(tmp_path / "log")
    skipped = [r["skipped"] for r in records]
    count = sum(skipped)
    assert 0 < count < 12 and skipped == [True] * count + [False] * (12 - count)
    assert [r["loss_scale"] for r in records] == [2.0 ** (24 - min(n, count)) for n in range(1, 13)]
    assert [r["lr"] for r in records[: count + 1]] == [0.0] * (count + 1)  # the schedule waits
    assert t.manager.skipped_steps == count and records[-1]["loss"] < records[0]["loss"]
    assert capsys.readouterr().err.count("Gradient overflow: step skipped") == count


# Signals #


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_the_process(monkeypatch, signum):
    """Unless it comes within a second of the first: a scheduler's `kill` of the whole group comes from the launcher once more."""
    now, ended, before = [100.0], [], signal.getsignal(signum)
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals_module.os, "_exit", ended.append)
    with StopSignals() as stop:
        assert not stop.asked
        for seconds, codes in ((0.0, []), (0.0, []), (0.4, []), (0.5, []), (0.1, [128 + signum]), (9.0, [128 + signum] * 2)):
            now[0] += seconds
            signal.raise_signal(signum)
            assert stop.asked and ended == codes
        stop.asked = False
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan])
def test_minutes_that_cannot_be(value):
    with pytest.raises(ValueError, match=f"save_minutes must be positive, not {value}"):
        TrainSettings(3, save_minutes=value)


def test_a_signal_that_comes_too_late(monkeypatch):
    """It has its usual effect, and is not swallowed; unless what was asked was done."""
    came = []
    before = signal.signal(signal.SIGUSR1, lambda *args: came.append(args[0]))
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGUSR1)
            assert not came
        assert came == [signal.SIGUSR1]
        with pytest.raises(Stopped), StopSignals():
            signal.raise_signal(signal.SIGUSR1)
            raise Stopped
        assert came == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_in_the_last_step(tmp_path, monkeypatch):
    """After its loss was known: `fit` stops as if it had come before."""
    t = trainer(steps=3, folder=tmp_path)
    monkeypatch.setattr(t, "_log", lambda record: signal.raise_signal(signal.SIGTERM) if record["step"] == 2 else None)
    with pytest.raises(Stopped, match=f"stopped after step 2, as a signal asked; saved in {tmp_path}"):
        t.fit(until=2)
    again = trainer(steps=3, folder=tmp_path)
    t.close()
    assert again.resume() and again.done == 2


# Saving in the background #


@pytest.mark.parametrize("how", ["ends", "TrainingError", "GradientOverflowError"])
def test_fit_finishes_what_it_saves(tmp_path, monkeypatch, how):
    """The last save is complete when `fit` returns, or ends with an error of training."""
    scaled = how == "GradientOverflowError"
    t = trainer(steps=4, folder=tmp_path, save_every=3 if how == "ends" else 2, bad_steps=1, loss_scale=2.0 if scaled else None)
    started = threading.Event()
    write = checkpointer_module.write_rank_file

    def slow(*args: Any) -> Any:
        assert started.wait(30)
        return write(*args)

    monkeypatch.setattr(checkpointer_module, "write_rank_file", slow)
    step = t.train_step

    def stepping() -> Any:
        if t.done == 2 and how != "ends":
            threading.Timer(0.2, started.set).start()
            raise TrainingError("bad") if not scaled else GradientOverflowError("bad")
        return step()

    monkeypatch.setattr(t, "train_step", stepping)
    if how == "ends":
        threading.Timer(0.2, started.set).start()
        t.fit(until=3)
    else:
        with pytest.raises((TrainingError, GradientOverflowError), match="bad"):
            t.fit()
    assert t.checkpoints._running is None and (tmp_path / f"step-0000000{3 if how == 'ends' else 2}" / "index.json").exists()
    t.close()


def test_another_job_is_told_before_it_trains(tmp_path):
    first, second = trainer(folder=tmp_path), trainer(folder=tmp_path, log=tmp_path / "log")
    first.fit(until=1)
    with pytest.raises(CheckpointError, match=f"another job saves to {tmp_path}"):
        second.fit(until=1)
    assert second.done == 0
    first.close()
    second.fit(until=1)
    second.close()


# Resuming #


def test_resume_with_other_data(tmp_path):
    """Nobody notices that some are left out, or come twice."""
    t = trainer(folder=tmp_path)
    t.fit(until=2)
    t.save()
    t.close()
    for options in (
        {"length": 6, "global_batch": 8},
        {"length": 5, "global_batch": 4},
        {"length": 6, "global_batch": 4, "seed": 1},
    ):
        other = trainer(folder=tmp_path)
        other.batches = TokenSampler(TOKENS, **options)
        with pytest.raises(ValueError, match=r"was saved by a run on other data \(.* then, .* now\): step 2 would be at another"):
            other.resume()
        assert other.done == 0 and other.resume(other_data=True) and other.done == 2


def test_resume_with_another_text_of_the_same_size(tmp_path):
    """Nobody would notice. A checkpoint from before there were digests still loads."""
    t = trainer(folder=tmp_path)
    t.fit(until=2)
    t.save()
    t.close()
    for tokens, tokenizer, same in ((TOKENS, "a", True), (TOKENS[::-1].copy(), None, False)):
        other = trainer(folder=tmp_path)
        other.batches = TokenSampler(tokens, 6, 4, tokenizer=tokenizer)
        if not same:
            with pytest.raises(ValueError, match=r"other data \(digest: \w{16} then, \w{16} now\): step 2 would be"):
                other.resume()
        assert other.resume(other_data=not same) and other.done == 2
    t.checkpoints.save(3, {"step": 3, "data": {"tokens": len(TOKENS), "length": 6, "global_batch": 4, "seed": 0}})
    t.close()
    assert trainer(folder=tmp_path).resume()
    t.checkpoints.save(4, {"step": 4, "data": {"samples": 12}})
    t.close()
    with pytest.raises(ValueError, match="was saved by a run on other data"):
        trainer(folder=tmp_path).resume()


def test_the_tokenizer_is_compared_where_both_know_it(tmp_path):
    t = trainer(folder=tmp_path)
    t.batches = TokenSampler(TOKENS, 6, 4, tokenizer="a")
    t.fit(until=1)
    t.save()
    t.close()
    other = trainer(folder=tmp_path)
    assert other.resume()
    other.batches = TokenSampler(TOKENS, 6, 4, tokenizer="b")
    with pytest.raises(ValueError, match=r"other data \(tokenizer: \w+ then, \w+ now\)"):
        other.resume()


def test_more_steps_are_done_than_are_asked_for(tmp_path):
    t = trainer(steps=4, folder=tmp_path)
    t.fit()
    t.save()
    t.close()
    fewer = trainer(steps=3, folder=tmp_path)
    assert fewer.resume()
    with pytest.raises(ValueError, match="4 steps are done already, the settings ask for 3 in all: ask for more"):
        fewer.fit()


def test_a_damaged_log_does_not_keep_a_run_from_resuming(tmp_path, capsys):
    """As a power loss leaves it; what is readable stays."""
    log = tmp_path / "log"
    t = trainer(folder=tmp_path, log=log)
    t.fit(until=3)
    t.save()
    t.close()
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([lines[0], b"\0" * 50, b"\xff\xfe{", b"3", b'{"stop": 1}', lines[1], lines[2][:9]]))
    assert trainer(folder=tmp_path, log=log).resume()
    assert [r["step"] for r in read_log(log)] == [1, 2]
    assert f"WARNING: {log} has 5 damaged line(s), which are left out" in capsys.readouterr().err


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_resume_is_bit_equal_and_mends_the_log(tmp_path, half):
    """The checkpoint is older than the log: the lines behind it are written again."""
    scale = 256.0 if half else None
    t = trainer(half=half, folder=tmp_path / "saved", loss_scale=scale, log=tmp_path / "log")
    t.fit(until=3)
    t.save()
    t.fit()
    t.close()
    expected, final = steady(read_log(tmp_path / "log")), weights(t)
    bms.shutdown()
    bms.init_distributed(seed=0)
    again = trainer(half=half, folder=tmp_path / "saved", loss_scale=scale, log=tmp_path / "log")
    again.resume()
    assert again.done == 3 and steady(read_log(tmp_path / "log")) == expected[:3]
    again.fit()
    assert weights(again) == final and steady(read_log(tmp_path / "log")) == expected


def test_resume_to_more_steps(tmp_path):
    """The schedule is stretched: at the end of the old one the rate was 0."""
    t = trainer(steps=3, folder=tmp_path / "saved", log=tmp_path / "log")
    t.fit()
    t.save()
    t.close()
    assert t.manager.optimizers[0].param_groups[0]["lr"] == 0.0
    more = trainer(steps=6, folder=tmp_path / "saved", log=tmp_path / "log")
    more.resume()
    before = weights(more)
    more.fit()
    records = read_log(tmp_path / "log")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    rates = [0.03 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3)]
    assert [r["lr"] for r in records[3:]] == pytest.approx(rates) and weights(more) != before


def test_resume_without_a_log(tmp_path):
    t = trainer(steps=2, folder=tmp_path / "saved")
    t.fit(until=1)
    t.save()
    again = trainer(steps=2, folder=tmp_path / "saved", log=tmp_path / "log")
    again.resume()
    assert again.done == 1 and not (tmp_path / "log").exists()


# Log and picture #


def log_file(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 3.0 / i}) + "\n" for i in range(1, 6)))
    return path


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_log(log_file(tmp_path), tmp_path / "loss.png", {0: 3.2, 5: 0.8}, 2.5) is True
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    assert (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")) == (960, 540)


def test_no_plot_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_log(log_file(tmp_path), tmp_path / "loss.png", {}, 2.5) is False
    assert capsys.readouterr().err == "no loss curve: matplotlib is not installed (pip install matplotlib)\n"
    assert not (tmp_path / "loss.png").exists()


def test_memory_is_this_process():
    before = memory_mib()
    with mmap.mmap(-1, 64 << 20) as ballast:  # and not malloc, which may have as much left over, resident already
        for _ in range(64):
            ballast.write(b"1" * (1 << 20))
        assert 50 < memory_mib() - before < 80


def test_a_log_that_was_cut(tmp_path):
    """A killed run leaves half a line at the end; damage anywhere else is told."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_log(log) == [{"step": 1}, {"step": 2}]
    log.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2 is not JSON"):
        read_log(log)
    log.write_text("")
    assert read_log(log) == []


# Files of tokens #


def test_training_on_files_of_tokens(tmp_path):
    """Documents packed into rows by their index: the loss is that of each alone. What would change their order is named."""
    with IndexedWriter(tmp_path / "x", "uint16") as out:
        for i in range(60):
            out.add((np.arange(9 + i % 5) * 3 + i) % VOCAB)
    data = GPTData(tmp_path / "x", 24, 12)
    t = trainer(folder=tmp_path / "run")
    t.batches = GPTBatches(data, 4)
    batch = t.batches.batch(0)
    alone, count = 0.0, 0
    for ids, targets, documents in zip(batch.ids, batch.targets, batch.documents):
        for number in range(documents.max() + 1):
            chosen = documents == number
            if (targets[chosen] != -100).any():
                kept = Batch(ids[None, chosen], targets[None, chosen])
                learnt = int((kept.targets != -100).sum())
                alone, count = alone + float(t.task.loss(kept).asnumpy()) * learnt, count + learnt
    assert count < batch.ids.size and float(t.task.loss(batch).asnumpy()) == pytest.approx(alone / count, rel=1e-5)
    t.fit(until=2)
    t.save()
    t.close()
    other = trainer(folder=tmp_path / "run")
    other.batches = GPTBatches(GPTData(tmp_path / "x", 24, 12, seed=1), 4)
    with pytest.raises(ValueError, match=r"on other data \(samples\.seed: 1234 then, 1 now\): step 2 would be at another place"):
        other.resume()
    other.batches = TokenSampler(TOKENS, length=6, global_batch=4)
    with pytest.raises(ValueError, match="on other data"):
        other.resume()
    other.batches = GPTBatches(GPTData(tmp_path / "x", 25, 12), 4)  # more of the same
    assert other.resume() and other.done == 2
    other.settings = dataclasses.replace(other.settings, steps=20)
    with pytest.raises(EndOfDataError, match="step 6 needs samples up to 28, there are 25, for 6 steps"):
        other.fit()
    other.close()
