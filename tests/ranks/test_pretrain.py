"""`bmtrain-ms pretrain` and `finetune` as their users run them, on CPU ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
[data]
text = ["corpus"]
length = 32

[tokenizer]
train = 400

[model]
family = "llama"
dim_model = 32
num_heads = 4
dim_ff = 48
num_layers = 2

[batch]
size = 8

[optimizer]
lr = 1e-2

[train]
steps = 8
eval_every = 4
eval_batches = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings, text, and a run that was never stopped, on one rank: `whole`."""
    made = tmp_path_factory.mktemp("pretrain")
    (made / "corpus").mkdir()
    known = ["the", "a", "cat", "dog", "sees", "likes", "big", "small", "and", "then", "runs", "away"]
    words = np.random.default_rng(0).choice(known, (200, 40))
    (made / "corpus" / "a.txt").write_text("\n".join(" ".join(row) for row in words) + "\n")
    (made / "run.toml").write_text(SETTINGS)
    code, text = command(made, "pretrain", "run.toml", "--out=whole", "--save.every=4", "--faults.spike=50")
    assert code == 0, text
    return made


def command(folder: Path, *words: str) -> tuple[int, str]:
    """The exit code, and all that was written."""
    done = subprocess.run([sys.executable, "-m", "bmtrain_ms_cli", *words], cwd=folder, text=True, capture_output=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


def log_of(folder: Path, out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]], tolerance: float) -> None:
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for one, other in zip(a, b):
        assert set(one) == set(other)
        for name in {"loss", "grad_norm", "lr", "valid_loss"} & set(one):
            assert math.isclose(one[name], other[name], rel_tol=tolerance, abs_tol=0), (one["step"], name)


def test_a_run_is_there_from_text_to_a_model_that_writes(folder: Path) -> None:
    log = log_of(folder, "whole")
    assert [r["step"] for r in log] == list(range(1, 9))
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert [r["step"] for r in log if "valid_loss" in r] == [4, 8]
    there = {path.name for path in (folder / "whole").iterdir()}
    assert {"config.toml", "tokenizer", "data", "checkpoints", "log.jsonl", "loss.png", "model"} <= there
    code, text = command(folder, "generate", "--model", "whole/model", "--prompt", "the cat", "--max-new-tokens", "4")
    assert code == 0 and text.startswith("the cat")


def test_a_run_that_is_told_to_stop_goes_on(folder: Path) -> None:
    words = ["pretrain", "run.toml", "--out=stopped", "--train.steps=60", "--train.eval_every=60", "--save.export=false"]
    program = [sys.executable, "-m", "bmtrain_ms_cli", *words]
    job = subprocess.Popen(program, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = folder / "stopped" / "log.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 75, errors
    done = len(log_of(folder, "stopped"))
    assert done < 60
    code, text = command(folder, *words)
    assert code == 0 and f"going on after step {done}" in text
    assert [r["step"] for r in log_of(folder, "stopped")] == list(range(1, 61))
    code, text = command(folder, *words, "--train.steps=600")  # which takes the data several times, in another order
    assert code == 2 and "was saved by a run on other data" in text and "epochs" in text and "--other-data" in text


def test_two_ranks_that_went_on_are_the_same_run(folder: Path) -> None:
    """With rows a few at a time; to rounding."""
    words = ["pretrain", "run.toml", "--ranks", "2", "--out=two", "--batch.micro=2", "--log.tensorboard=true", "--schedule.end=8"]
    for steps in (4, 8):
        code, text = command(folder, *words, f"--train.steps={steps}", "--log.rank_norms=true")
        assert code == 0, text
    assert "going on after step 4" in text
    log = log_of(folder, "two")
    for record in log:
        norms = record.pop("rank_norms")
        assert math.hypot(*norms) == pytest.approx(min(record["grad_norm"], 1.0), rel=1e-3)  # they are those of the clipped ones
    same(log, log_of(folder, "whole"), 2e-4)
    assert list((folder / "two" / "tensorboard").glob("events*"))


def test_the_same_run_again_has_the_same_bits(folder: Path) -> None:
    """Also one that was killed after step 4 was saved, and one that leaves out a batch that is still to come."""
    shutil.copytree(folder / "whole", folder / "again")
    for step in (folder / "again" / "checkpoints").glob("step-00000008"):
        shutil.rmtree(step)
    (folder / "again" / "checkpoints" / "latest").write_text("step-00000004\n")
    code, text = command(folder, "pretrain", "again/config.toml", "--out=again")
    assert code == 0 and "going on after step 4" in text
    same(log_of(folder, "again"), log_of(folder, "whole"), 0.0)
    code, text = command(folder, "pretrain", "run.toml", "--out=again", "--faults.skip=[2]", "--train.steps=9")
    assert code == 2 and "leave out only batches that are still to come" in text


def test_tensor_parallel_ranks_and_stages_are_the_same_run(folder: Path) -> None:
    words = ["--ranks", "4", "--layout.tp=2", "--layout.pp=2", "--batch.micro=1", "--save.export=false"]
    code, text = command(folder, "pretrain", "run.toml", "--out=layout", *words)
    assert code == 0, text
    same(log_of(folder, "layout"), log_of(folder, "whole"), 2e-4)


def test_adapters_are_trained_on_conversations(folder: Path) -> None:
    rows = [
        {"instruction": f"say {word}", "input": "", "output": f"{word} {word}"}
        for word in ["the", "cat", "dog", "runs", "away"] * 12
    ]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model.pretrained=whole/model", "--data.text=['talk.jsonl']", "--data.handler=alpaca", "--data.length=96"]
    more = [
        "--lora.rank=4",
        "--lora.pattern=q_proj|v_proj|o_proj|up_proj|down_proj",
        "--train.steps=16",
        "--optimizer.lr=3e-2",
        "--batch.size=4",
        "--ranks=2",
    ]
    code, text = command(folder, "finetune", "--out=tuned", *words, *more)
    assert code == 0, text
    log = log_of(folder, "tuned")
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    talk = ["--chat", "--adapters", "tuned/adapters", "--model", "whole/model", "--max-new-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "bmtrain_ms_cli", "generate", *talk], cwd=folder, input="say cat\n\n", text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_hosts_that_share_no_disk(folder: Path) -> None:
    """Each reads its own copy and keeps its own checkpoints; one whose copy is another is refused by name."""
    for host in ("a", "b"):
        shutil.copytree(folder / "whole" / "data", folder / host / "data", ignore=shutil.ignore_patterns("cache"))
        shutil.copytree(folder / "whole" / "tokenizer", folder / host / "tokenizer")
    words = ["--data.text=[]", "--data.files=['data/tokens_text_document']", "--tokenizer.path=tokenizer"]
    (folder / "hosts.toml").write_text(SETTINGS.replace("train = 400", ""))
    code, text = command(folder, "pretrain", "hosts.toml", "--ranks=2", "--folders", "a,b", "--out=run", *words)
    assert code == 0, text
    same(log_of(folder / "a", "run"), log_of(folder, "whole"), 2e-4)
    files = [sorted(path.name for path in (folder / host / "run" / "checkpoints" / "step-00000008").iterdir()) for host in "ab"]
    assert files == [["index.json", f"rank-0000{i}-of-00002.safetensors"] for i in range(2)]
    changed = folder / "b" / "data" / "tokens_text_document.bin"
    changed.write_bytes(changed.read_bytes()[:-2] + b"\1\0")
    code, text = command(folder, "pretrain", "hosts.toml", "--ranks=2", "--folders", "a,b", "--out=other", *words)
    assert code == 2 and "hosts have different data" in text and "tokens_text_document" in text


def test_what_is_wrong_is_said_before_a_rank_is_started(folder: Path) -> None:
    code, text = command(folder, "pretrain", "run.toml", "--train.stepz=3", "--optimizer.lr=-1")
    assert code == 2
    assert text.splitlines() == [
        "bmtrain-ms: 2 settings are wrong:",
        "  optimizer.lr: must be greater than 0, not -1",
        "  train.stepz: there is no such setting; did you mean steps?",
    ]
    code, text = command(folder, "pretrain", "run.toml", "--model.dim_modle=3")
    assert code == 2 and "did you mean dim_model?" in text
    code, text = command(folder, "pretrain", "run.toml", "train.steps=3")
    assert code == 2 and "settings are written --section.key=value" in text
    (folder / "other.txt").write_text("the cat\n")
    code, text = command(folder, "pretrain", "run.toml", "--out=whole", "--data.text=['other.txt', 'corpus']")
    assert code == 2 and "tokenizer was made with another data.text than now" in text


def test_a_run_that_diverges_keeps_what_it_was_computed_from(folder: Path) -> None:
    words = ["--optimizer.lr=1e30", "--optimizer.clip=1e30", "--train.steps=40", "--schedule.name=constant"]
    code, text = command(folder, "pretrain", "run.toml", "--out=bad", *words)
    assert code == 1, text
    assert "not finite" in text and "bad step(s) in a row" in text and "bad-batches" in text
    kept = sorted((folder / "bad" / "bad-batches").iterdir())
    assert len(kept) == 3
    with np.load(kept[0]) as found:
        assert found["ids"].shape == (8, 32)
    log = log_of(folder, "bad")
    assert sum(r["skipped"] for r in log) == 2 and os.path.exists(folder / "bad" / "config.toml")


def test_under_a_launcher_it_joins_the_ranks_that_there_are(folder: Path) -> None:
    """What is wrong is said once."""
    words = ["launch", "-n", "2", "-m", "bmtrain_ms_cli", "pretrain"]
    code, text = command(folder, *words, "whole/config.toml", "--out=joined", "--save.export=false")
    assert code == 0, text
    same(log_of(folder, "joined"), log_of(folder, "whole"), 2e-4)
    code, text = command(folder, *words, "run.toml", "--out=never")
    assert code == 2 and text.count("data.text is prepared by who starts the ranks") == 1
    code, text = command(folder, *words, "whole/config.toml", "--out=never", "--train.stepz=1")
    assert code == 2 and text.count("did you mean steps?") == 1


def test_a_blend_goes_on_where_it_stopped(folder: Path) -> None:
    """Of two files by weights, on two ranks, behind a first part on one: documents are drawn as if nothing had happened."""
    (folder / "more.txt").write_text("\n".join("one two three four five six seven" for _ in range(120)) + "\n")
    tokenizer = "whole/model"
    for name, source in (("first", "corpus/a.txt"), ("second", "more.txt")):
        words = ("--input", source, "--tokenizer-name-or-path", tokenizer, "--append-eod", "--output-prefix", f"tokens/{name}")
        code, text = command(folder, "prepare", *words)
        assert code == 0, text
    files = json.dumps([0.3, "tokens/first_text_document", 0.7, "tokens/second_text_document"])
    (folder / "blend.toml").write_text(SETTINGS.replace('text = ["corpus"]\n', "").replace("train = 400", f'path = "{tokenizer}"'))
    base = ("pretrain", "blend.toml", f"--data.files={files}", "--save.every=3", "--schedule.end=8")
    code, text = command(folder, *base, "--out=blend-whole")
    assert code == 0, text
    code, text = command(folder, *base, "--out=blend", "--train.steps=3")
    assert code == 0, text
    code, text = command(folder, *base, "--out=blend", "--ranks=2")
    assert code == 0 and "going on after step 3" in text, text
    same(log_of(folder, "blend"), log_of(folder, "blend-whole"), 1e-5)
    other = json.dumps([0.7, "tokens/first_text_document", 0.3, "tokens/second_text_document"])
    code, text = command(folder, *base[:2], f"--data.files={other}", "--out=blend", "--train.steps=9")
    assert code == 2 and "Traceback" not in text, text


def test_another_model_in_the_folder_of_a_run_is_refused_before_a_rank_is_started(folder: Path) -> None:
    kept = (folder / "whole" / "config.toml").read_text()
    shutil.copytree(folder / "whole" / "model", folder / "other-model")
    words = ["finetune", "whole/config.toml", "--out=whole", "--model={pretrained='other-model'}", "--tokenizer.path=null"]
    code, text = command(folder, *words)
    assert code == 2 and text.count("\n") == 1 and "model.family: llama then, None now" in text, text
    code, text = command(folder, *words[:2], "--out=whole", "--model={pretrained='whole/model'}", "--tokenizer.path=null")
    assert code == 2 and text.count("\n") == 1 and "which this run would write at its end" in text, text
    assert (folder / "whole" / "config.toml").read_text() == kept
