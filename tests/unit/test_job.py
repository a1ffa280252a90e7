"""A run from its settings to its model, on one rank: what goes wrong is one line, and what is done counts as done."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.comm.trace import Trace
from bmtrain_ms.data import IndexedWriter
from bmtrain_ms.train import job as job_module
from bmtrain_ms.train.begun import named_checkpoint
from bmtrain_ms.train.job import _Job, _told_in_one_line
from bmtrain_ms_base.config import ConfigError, Settings

MODEL = {"family": "llama", "vocab_size": 32, "dim_model": 8, "num_heads": 2, "dim_ff": 16, "num_layers": 1}


@pytest.fixture
def job(single_world: Any, tmp_path: Path) -> Any:
    """What makes a job of two steps in the folder `run`, with these sections besides."""
    with IndexedWriter(tmp_path / "tokens", np.uint16) as writer:
        for i in range(40):
            writer.add(np.full(20, i % 32))

    def make(**sections: Any) -> _Job:
        told = {
            "out": str(tmp_path / "run"),
            "model": MODEL,
            "data": {"files": [str(tmp_path / "tokens")], "length": 8, "cache": str(tmp_path / "cache")},
            "batch": {"size": 2},
            "train": {"steps": 2, "eval_batches": 1},
        }
        return _Job(Settings.model_validate({**told, **sections}), None, single_world)

    return make


@pytest.fixture
def signals() -> Any:
    """What hears signals before a run does so after it, too."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


pytestmark = pytest.mark.usefixtures("signals")


def wrong(job: _Job, resume: str | None = None) -> str:
    """What is said; in one line."""
    with pytest.raises(CheckpointError) as caught:
        job.run(False, resume)
    text = str(caught.value)
    assert "\n" not in text
    del caught
    gc.collect()  # the lock of the folder, which a process that ends lets go of
    return text


def test_a_signal_that_comes_when_all_is_written_ends_nothing(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whenever it comes behind the last checkpoint: while the model is written, and until the process has ended."""
    made = job()
    finish = made._finish

    def told_to_end(*words: Any) -> None:
        finish(*words)
        signal.raise_signal(signal.SIGTERM)

    made._finish = told_to_end
    made.run(False)
    signal.raise_signal(signal.SIGTERM)
    assert (tmp_path / "run" / "model" / "config.json").is_file() and "2 steps, " in capsys.readouterr().out


def test_settings_are_written_whole_or_not_at_all(job: Any, tmp_path: Path):
    kept = tmp_path / "run" / "config.toml"
    kept.mkdir(parents=True)
    assert wrong(job()).startswith(f"{kept} cannot be written: ")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.toml", ".lock"}


def test_data_that_cannot_be_opened(job: Any, monkeypatch: pytest.MonkeyPatch):
    def full(settings: Settings) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(job_module, "make_batches", full)
    assert wrong(job()) == "the data cannot be opened: [Errno 24] Too many open files"


def test_an_error_that_says_it_all_is_said_as_it_is(job: Any, tmp_path: Path):
    text = wrong(job(data={"files": [str(tmp_path / "none")], "length": 8}))
    assert text.startswith("opening the data has failed on ")


def test_weights_and_biases_without_a_key(job: Any, monkeypatch: pytest.MonkeyPatch):
    def refuse(**words: Any) -> Any:  # it remembers in the process what it was told
        raise RuntimeError("No API key.\nUse `wandb login`.")

    monkeypatch.setattr("wandb.init", refuse)
    text = wrong(job(log={"wandb": "tests"}))
    assert text == "log.wandb: No API key. Use `wandb login`; log in with wandb login, or set WANDB_MODE=offline"


def test_tensorboard_that_cannot_be_written(job: Any, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    assert wrong(job(log={"tensorboard": True})).startswith("log.tensorboard: its files cannot be written: ")


def test_a_trace_that_cannot_be_written_costs_nothing_else(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = job(log={"trace": str(tmp_path / "none" / "x.json")})
    made.world = dataclasses.replace(made.world, trace=Trace())

    def full(path: Any, trace: Any, engine: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(job_module, "write_trace", full)
    assert wrong(made) == f"log.trace: {tmp_path / 'none' / 'x.json'} cannot be written: [Errno 28] No space left on device"
    assert {"model", "loss.png", "checkpoints"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_another_beginning_is_refused_and_leaves_what_was_kept(job: Any, tmp_path: Path):
    job().run(False)
    kept = (tmp_path / "run" / "config.toml").read_text()
    for model, what in (
        ({**MODEL, "family": "qwen2"}, "model.family: llama then, qwen2 now"),
        ({"like": str(tmp_path / "run2")}, f"model.family: llama then, None now; model.like: None then, {tmp_path}/run2 now"),
        ({**MODEL, "rope_base": 5000.0}, "model.rope_base: 10000.0 then, 5000.0 now"),
    ):
        started = f"out: {tmp_path}/run/checkpoints/step-00000002 was saved by a run that began otherwise ("
        assert wrong(job(model=model)) == f"{started}{what}): choose another out"
    assert "lora: None then" in wrong(job(lora={"rank": 2}))
    assert (tmp_path / "run" / "config.toml").read_text() == kept
    same = {**MODEL, "rope_base": 10000.0, "num_heads_kv": 2}  # as the family has them
    job(model=same, optimizer={"lr": 1e-3}, train={"steps": 3, "eval_batches": 1}).run(False)


def test_the_folder_of_the_model_is_the_same_by_another_path(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job(out=str(tmp_path / "first")).run(False)
    monkeypatch.chdir(tmp_path)
    job(model={"pretrained": "first/model"}).run(False)
    monkeypatch.chdir("/")
    job(model={"pretrained": str(tmp_path / "first" / ".." / "first" / "model")}).run(False)
    assert "model.pretrained: " in wrong(job(model={"like": str(tmp_path / "first" / "model")}))


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_over_its_results(job: Any, tmp_path: Path):
    job().run(False)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert wrong(job()).startswith(f"out: {tmp_path}/run/model is there, of a run whose checkpoints are gone")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("name", ["like", "pretrained"])
def test_what_the_export_would_replace_is_nothing_to_begin_from(job: Any, tmp_path: Path, name: str):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    text = f"model.{name}: {model} is in {model}, which this run would write at its end: choose another out"
    assert wrong(job(model={name: str(model)})) == text


def test_what_a_command_can_do_is_what_it_is_told_to(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    job(save={"every": 1}).run(False)
    with pytest.raises(CheckpointError, match=r"would differ; use --seed=0$"), _told_in_one_line():
        raise CheckpointError("dropout would differ; use init_distributed(seed=0), or load with strict=False")
    saved = tmp_path / "run" / "checkpoints"
    for file in (saved / "step-00000002").glob("*.safetensors"):
        file.write_bytes(b"")
    assert wrong(job()).endswith("; older ones are there: step-00000001; --resume=1 goes on from that one")
    made = job()
    for name in ("1", "step-00000001", str(saved / "step-00000001")):
        assert named_checkpoint(made.settings, name) == saved / "step-00000001"
    with pytest.raises(ConfigError, match=r"^--resume 3: there is no such checkpoint; .* those of the steps: 1, 2$"):
        named_checkpoint(made.settings, "3")
    capsys.readouterr()
    made.run(False, str(saved / "step-00000001"))
    assert "going on after step 1, " in capsys.readouterr().out
    assert "model.family: llama then, qwen2 now" in wrong(job(model={**MODEL, "family": "qwen2"}), str(saved / "step-00000001"))
    job().run(False)  # the last one is whole again
