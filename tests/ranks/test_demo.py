"""The commands, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from bmtrain_ms.data import python_documentation

pytestmark = pytest.mark.ranks


def command(*words, **options):
    program = [sys.executable, "-m", "bmtrain_ms_cli", *map(str, words)]
    return subprocess.run(program, capture_output=True, text=True, timeout=240, check=False, **options)


def losses(folder: Path):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [r["loss"] for r in records]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options for a short run: a tenth of the documentation, small batches."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n\n".join(python_documentation()[:16]), encoding="utf-8")
    return ["--text", text, "--batch", 4]


@pytest.fixture(scope="module")
def demo(small, tmp_path_factory):
    """Six steps on two ranks."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = command("demo", "--steps", 6, "--out", folder, *small)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_demo_leaves_its_results(demo):
    folder, done = demo
    assert len(losses(folder)) == 6
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {"checkpoints", "model.safetensors", "tokenizer.json", "config.json"} <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    assert "2 rank(s), ZeRO-3" in done.stdout
    resumed = next(line for line in done.stdout.splitlines() if line.startswith("saved and resumed at step 4"))
    before, after = (float(word) for word in resumed.split() if word.replace(".", "").isdigit() and "." in word)
    assert before == after
    assert "unigram entropy of the same text" in done.stdout and "> The |" in done.stdout
    assert "train: step 6 of 6" in done.stderr and "tok/s" in done.stderr


def test_resume_goes_on(demo, small, tmp_path):
    """In a copy: the other tests read the log of the first run."""
    folder = shutil.copytree(demo[0], tmp_path / "out")
    first = losses(folder)
    done = command("demo", "--steps", 8, "--out", folder, "--resume", "--ranks", 1, *small)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 6" in done.stdout
    assert losses(folder)[:6] == first and len(losses(folder)) == 8


def test_one_rank_and_zero2_follow_the_same_curve(demo, small, tmp_path):
    two = losses(demo[0])
    done = command("demo", "--steps", 6, "--out", tmp_path, "--ranks", 1, "--zero", 2, "--prefetch", 0, *small)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path), two, rtol=2e-5)


def test_own_text_and_loss_scaling(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the {i} quick brown foxes jump over {i * 7} lazy dogs " * 6 for i in range(200)))
    out = tmp_path / "out"
    done = command("demo", "--steps", 3, "--out", out, "--text", text, "--batch", 4, "--fp16", "--loss-scale", 1024)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["loss_scale"] for line in (out / "log.jsonl").read_text().splitlines()] == [1024.0] * 3


def test_text_that_is_not_utf8_is_told(capsys, monkeypatch, tmp_path):
    from bmtrain_ms_cli.main import main

    monkeypatch.delenv("BMTRAIN_MS_DEMO", raising=False)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert main(["demo", "--text", str(tmp_path / "latin.txt")]) == 2
    assert "latin.txt is not UTF-8 text: byte 2 is 0xef; convert it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--batch", "7"], "--batch 7 is not a multiple of --ranks 2"),
        (["demo", "--fp16"], "--fp16 needs --loss-scale"),
        (["demo", "--loss-scale", "-1"], "--loss-scale must be positive and finite, not -1.0"),
        (["demo", "--prefetch", "-1"], "--prefetch must be 0 or more, not -1"),
        (["demo", "--text", "/nonexistent.txt"], "--text /nonexistent.txt does not exist"),
        (["demo", "--resume", "--out", "/nonexistent"], "there is no folder checkpoints in /nonexistent"),
        (["demo", "--steps", "0"], "must be at least 1, not 0"),
        (["demo", "--shard-size", "2", "--ranks", "3", "--batch", "6"], "--shard-size 2 does not divide --ranks 3"),
        (["demo", "--trace", "/nonexistent/t.json"], "--trace /nonexistent/t.json: there is no folder /nonexistent"),
        (["launch", "-n", "2", "/nonexistent.py"], "/nonexistent.py does not exist"),
    ],
)
def test_bad_input_is_told_and_ends_with_2(words, message, capsys, monkeypatch):
    from bmtrain_ms_cli.main import main

    monkeypatch.delenv("BMTRAIN_MS_DEMO", raising=False)
    try:
        code = main(words)
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    path.write_text("import sys, os, time\n" + textwrap.dedent(body))
    return path


def test_launch_passes_arguments_on(tmp_path):
    path = script(
        tmp_path,
        """
        import bmtrain_ms as bms
        bms.init_distributed()
        with open(f"{sys.argv[1]}/rank{bms.rank()}", "w") as file:
            file.write(f"{bms.world_size()} {sys.argv[2:]}")
        bms.synchronize()
        """,
    )
    done = command("launch", "-n", 2, path, tmp_path, "--a", "b c", "-n", "5")
    assert done.returncode == 0, done.stderr
    written = {f.name: f.read_text() for f in tmp_path.glob("rank*")}
    assert written == {f"rank{i}": "2 ['--a', 'b c', '-n', '5']" for i in range(2)}


def test_launch_passes_the_exit_code_on(tmp_path):
    done = command("launch", "-n", 2, script(tmp_path, "sys.exit(7)"))
    assert done.returncode == 7


def test_a_failing_rank_ends_the_job_with_its_traceback(tmp_path):
    path = script(
        tmp_path,
        """
        import bmtrain_ms as bms
        bms.init_distributed()
        if bms.rank() == 1:
            raise ValueError("the reason")
        bms.synchronize()
        """,
    )
    done = command("launch", "-n", 2, path)
    assert done.returncode != 0
    assert "[rank 1] ValueError: the reason" in done.stderr


def test_sigterm_to_the_launcher_ends_every_rank(tmp_path):
    path = script(tmp_path, "open(sys.argv[1] + f'/{os.getpid()}', 'w').close(); time.sleep(120)")
    launcher = subprocess.Popen([sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", "2", str(path), str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while len(ranks := [int(f.name) for f in tmp_path.iterdir() if f.name.isdigit()]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) != 0
    finally:
        launcher.kill()
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            for _ in range(50):
                os.kill(pid, 0)
                time.sleep(0.1)
