"""How `bmtrain-ms demo` is refused, told to end, and goes on: one line on one rank, and nothing that another job has is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.checkpoint.folder import FolderLock, latest_in
from bmtrain_ms.data import python_documentation
from bmtrain_ms.optim import GradientOverflowError
from bmtrain_ms.train import EXIT_STOPPED, Stopped, TrainingError
from bmtrain_ms_cli import demo as demo_module
from bmtrain_ms_cli.launch import LaunchError

pytestmark = pytest.mark.ranks


def demo(out: Path, *words: Any, ranks: int = 1, script: str | None = None) -> subprocess.CompletedProcess[str]:
    program = ["-m", "bmtrain_ms_cli"] if script is None else ["-m", "bmtrain_ms_cli", "launch", "-n", str(ranks), script]
    command = [sys.executable, *program, "demo", "--ranks", ranks, "--batch", 4, "--out", out, *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, check=False)


def told(done: subprocess.CompletedProcess[str]) -> str:
    """The line of an error, of which there is one, and no traceback; behind it the launcher may say which rank ended."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("bmtrain-ms: ")]
    if len(lines) == 2 and re.match(r"bmtrain-ms: rank \d+ \(pid \d+\) ended with exit code", lines[-1]):
        assert lines.pop().endswith(f"exit code {done.returncode}")
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0].removeprefix("bmtrain-ms: ")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(python_documentation()[:16]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    """Four steps, saved after three and four."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done = demo(out, "--steps", 4, "--text", text)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def out(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.mark.parametrize("words", [[], ["--resume", "--steps", 6]], ids=["new", "resume"])
def test_a_second_job_is_refused_before_it_writes(finished, text, tmp_path, words):
    """The first one holds `--out` from before it has anything there."""
    out = tmp_path / "out"
    out.mkdir()
    if words:
        shutil.copytree(finished, out, dirs_exist_ok=True)
    else:
        for name in ("log.jsonl", "tokenizer.json", "config.json"):
            (out / name).write_text("the first job's")
    before, lock = contents(out), FolderLock(out)
    done = demo(out, "--text", text, *words, ranks=2)
    assert done.returncode == 2
    assert told(done).startswith(f"another job saves to {out} (process {os.getpid()} on ") and contents(out) == before
    lock.release()


def test_nothing_to_resume(tmp_path, text):
    """It would start over, and write the lines of the log twice."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    done = demo(tmp_path, "--resume", "--text", text, ranks=2)
    assert done.returncode == 2
    assert told(done) == f"--resume: there is no checkpoint in {tmp_path}/checkpoints yet; run without --resume"
    assert contents(tmp_path) == {"log.jsonl": b'{"step": 1}\n'}


def test_more_steps_are_done(out, text):
    before = contents(out)
    done = demo(out, "--resume", "--steps", 3, "--text", text)
    assert done.returncode == 2 and contents(out) == before
    assert told(done).startswith(f"--steps 3: 4 steps are done already in {out}; ask for more, or go on from an earlier one: ")


def test_another_text_is_refused(out, text, tmp_path):
    """Of the same size."""
    other = tmp_path / "other.txt"
    words = text.read_text()
    other.write_text(words.replace("the", "eht", 1) if "the" in words else words[::-1])
    before = contents(out)
    done = demo(out, "--resume", "--steps", 6, "--text", other, ranks=2)
    assert done.returncode == 2 and contents(out) == before
    assert "was saved by a run on other data (" in told(done) and "digest: " in told(done)


def test_from_an_older_checkpoint(out, text):
    """Where the latest is damaged, the error says which is not, and how to go on from it."""
    file = out / "checkpoints" / "step-00000004" / "rank-00000-of-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = demo(out, "--resume", "--steps", 5, "--text", text)
    assert done.returncode == 2
    assert "is damaged" in told(done) and told(done).endswith("step-00000003 is sound: go on from it with --resume 3")
    done = demo(out, "--resume", 7, "--steps", 5, "--text", text)
    assert done.returncode == 2
    named = f"there is no checkpoint {out}/checkpoints/step-00000007; in {out} there are: step-00000003, step-00000004"
    assert told(done) == f"--resume 7: {named}"
    done = demo(out, "--resume", 3, "--steps", 5, "--text", text)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 3" in done.stdout
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert latest_in(out / "checkpoints").name == "step-00000005"


def test_a_finished_run_writes_its_results_again(out, text):
    (out / "model.safetensors").unlink()
    done = demo(out, "--resume", "--steps", 4, "--text", text)
    assert done.returncode == 0 and "resumed at step 4, which is the last" in done.stdout
    assert (out / "model.safetensors").exists()


TOLD = """
import os, signal, sys
os.environ["BMTRAIN_MS_DEMO"] = "rank"
import bmtrain_ms as bms
from bmtrain_ms.train import loop
from bmtrain_ms_cli.main import main
evaluations, evaluate = [], loop.mean_loss

def watched(*args):
    evaluations.append(1)
    if len(evaluations) == int(os.environ["TOLD_IN"]) and bms.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*args)

loop.mean_loss = watched
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("evaluation", [2, 3], ids=["after training", "after going on"])
def test_one_rank_is_told_to_end_in_an_evaluation(text, tmp_path, monkeypatch, evaluation):
    monkeypatch.setenv("TOLD_IN", str(evaluation))
    (tmp_path / "told.py").write_text(TOLD)
    done = demo(tmp_path / "out", "--steps", 4, "--text", text, ranks=2, script=str(tmp_path / "told.py"))
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "stopped after step 3, as a signal asked; saved in" in done.stdout and "Traceback" not in done.stderr
    assert latest_in(tmp_path / "out" / "checkpoints").name == "step-00000003"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingError("bad"), 1),
        (GradientOverflowError("bad"), 1),
        (CheckpointError("bad"), 2),
        (LaunchError("bad"), 2),
        (Stopped("bad"), EXIT_STOPPED),
    ],
    ids=lambda x: type(x).__name__,
)
def test_exit_codes(single_world, monkeypatch, capsys, error, code):
    def train(options: Any) -> None:
        raise error

    monkeypatch.setattr(demo_module, "_train", train)
    assert demo_module._run(None) == code
    out, err = capsys.readouterr()
    assert (out, err) == (("bad; go on with --resume\n", "") if code == EXIT_STOPPED else ("", "bmtrain-ms: bad\n"))


def test_the_rank_that_knows_says_it(single_world, monkeypatch, capsys):
    error = CheckpointError("rank(s) [3] failed; see their messages")
    error.speaker = 3
    monkeypatch.setattr(demo_module, "_train", lambda options: (_ for _ in ()).throw(error))
    assert demo_module._run(None) == 2 and capsys.readouterr().err == ""
