"""What `pretrain` and `finetune` look at before a rank is started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms_cli.main import main


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `--print` of settings that are right, and these, says on stderr, in one line; empty: nothing is wrong."""
    for name in ("config.json", "tokens.bin", "tokens.idx"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)

    def say(*words: str) -> str:
        files = json.dumps([str(tmp_path / "tokens")])
        good = [f"--model.pretrained={tmp_path}", "--train.steps=1", f"--data.files={files}", "--out=run", "--print"]
        code = main(["finetune", *good, *words])
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == ((2, 1) if error else (0, 0))
        return error.removeprefix("bmtrain-ms: ").rstrip("\n")

    return say


@pytest.mark.parametrize("name", ["model", "adapters", "checkpoints", "best", "tensorboard"])
def test_a_file_where_a_run_has_a_folder(said: Any, name: str):
    assert said() == ""
    Path("run", name).mkdir(parents=True)
    assert said() == ""
    Path("run", name).rmdir()
    Path("run", name).write_text("")
    assert said() == f"out: run/{name} is in the way: a run has a folder of that name; move it, or name another out"


def test_places_that_cannot_be_written_are_told_before_ranks_start(said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    closed: set[str] = set()
    monkeypatch.setattr("os.access", lambda path, mode: not (str(path) in closed and mode & os.W_OK))
    advice = "let it be written, or name another out"
    closed.add(str(tmp_path))
    place = f"{tmp_path} is not a folder that can be written to: name another place, or let it be written"
    assert said() == said("--out=a/b/c") == f"out: {place}"
    Path("run").mkdir()
    assert said() == ""
    options = {"best": "--save.best=true", "adapters": "--lora.rank=2", "tensorboard": "--log.tensorboard=true"}
    for name in ("checkpoints", "model", *options):
        Path("run", name).mkdir()
        closed.add(f"run/{name}")
        words = [options[name], "--train.eval_every=1"] if name in options else []
        assert said(*words) == f"out: run/{name} cannot be written to: {advice}"
        closed.discard(f"run/{name}")
        assert said(*words) == ""
    for name in ("log.jsonl", "loss.png", "checkpoints/.lock"):
        Path("run", name).write_text("")
        closed.add(f"run/{name}")
        assert said() == f"out: run/{name} cannot be written to: {advice}"
        closed.discard(f"run/{name}")


@pytest.mark.parametrize("name", ["config.toml", "log.jsonl", "loss.png", "checkpoints/latest", "model/tokenizer.json"])
def test_a_folder_where_a_run_has_a_file(said: Any, name: str):
    Path("run", name).mkdir(parents=True)
    assert said() == f"out: run/{name} is in the way: a run writes a file of that name; move it, or name another out"


def test_where_a_trace_is_to_be(said: Any, tmp_path: Path):
    place = "is not a folder that can be written to: make it, or name another place"
    assert said("--log.trace=x.json") == ""
    assert said("--log.trace=none/x.json") == f"log.trace: {tmp_path}/none {place}"
    assert said("--log.trace=config.json/x.json") == f"log.trace: {tmp_path}/config.json {place}"
    Path("folder").mkdir()
    assert said("--log.trace=folder") == f"log.trace: {tmp_path}/folder is not a file that can be written: name another"


def test_variables_of_a_launcher_that_contradict_each_other(said: Any, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"MS_ROLE": "MS_WORKER", "RANK_ID": "1", "RANK_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert said().startswith("the launcher's variables contradict each other: ")


LONG = "x" * 300
PATHS = ("out", "data.cache", "log.trace", "model.like", "tokenizer.path", "data.rows")


@pytest.mark.parametrize("name", [*PATHS, "data.text", "data.files"])
def test_what_no_system_takes_for_a_path_is_told_by_the_settings_name(said: Any, tmp_path: Path, name: str):
    for path, what in (
        ("a\0b", "without NUL"),
        (LONG, "shorter names"),
        ("~nosuchuser/x", "no such user"),
        ("a/" * 3000, "shorter"),
    ):
        value = json.dumps(path if name in PATHS else [path])
        text = said(f"--{name}={value}")
        assert text.startswith(f"{name}{'' if name in PATHS else '.0'}: must be a path") and what in text and len(text) < 400


def test_a_long_value_is_not_said_whole(said: Any):
    for word in (f"--train.steps={LONG * 600}", f"--train.{LONG * 600}=3", f"--lora.pattern={'(' * 100_000}", f"--{LONG * 600}"):
        assert len(said(word)) < 1200


def test_a_second_line_is_no_part_of_a_value(said: Any):
    assert said("--train.steps=3\nother=4").endswith("not '3\\nother=4'")


def test_a_working_folder_that_is_gone(said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert said() == "the folder in which the command was started is not there any more: go to another"


def test_a_checkpoint_that_is_not_there(said: Any):
    assert said("--resume=7") == "--resume 7: there is no such checkpoint; in run/checkpoints there are those of the steps: none"
