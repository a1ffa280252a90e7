"""The benchmark of collectives: what it measures and in which order, its table, its picture, its command."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import bmtrain_ms as bms
from bmtrain_ms import benchmark
from bmtrain_ms.benchmark import SIZES, Result, format_results, plot
from bmtrain_ms.comm import World, use_world
from tests.helpers.models import recorded

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., list[Any]]
HEAD = "collective             bytes          ms     GiB/s"
NAMES = ("all_gather", "reduce_scatter", "send_recv")


def measured(world: World, name: str) -> tuple[list[Result], str, list[tuple[str, str, int]]]:
    """Results, what was printed, and the operations with the bytes that they receive."""
    out = io.StringIO()
    with use_world(recorded(world)) as here, contextlib.redirect_stdout(out):
        results = getattr(benchmark, name)([2048, 1024], repeats=2, warm_up=1)
        events = [(event.op, event.label, event.received) for event in here.engine.events]
    return results, out.getvalue(), events


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_results(run_ranks: Run, name: str, ranks: int):
    """In the order of the sizes, the same on every rank; rank 0 prints them."""
    answers = run_ranks(ranks, measured, name=name)
    first = answers[0][0]
    assert [(r.name, r.nbytes) for r in first] == [(name, 2048), (name, 1024)]
    others = 1 if name == "send_recv" else ranks - 1
    for r in first:
        assert r.seconds > 0 and r.gib_per_second == pytest.approx(others * r.nbytes / r.seconds / 2**30)
    assert all(results == first for results, _, _ in answers)
    assert [text for _, text, _ in answers] == [format_results(first) + "\n"] + [""] * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_measured(run_ranks: Run, name: str, ranks: int):
    """A warm-up and two repetitions of each size, each behind a barrier, then the slowest rank's times."""
    for rank, (_, _, events) in enumerate(run_ranks(ranks, measured, name=name)):
        op = ("send", "recv")[rank % 2] if name == "send_recv" else name
        expected = []
        for nbytes in (2048, 1024):
            received = {"send": 0, "recv": nbytes}.get(op, (ranks - 1) * nbytes)
            alone = name == "send_recv" and rank ^ 1 >= ranks
            expected += [("barrier", 0), *([] if alone else [(op, received)])] * 3 + [("all_reduce", None)]
        seen = [(op, None if op == "all_reduce" else received) for op, label, received in events]
        assert seen == expected and {label for _, label, _ in events} == {"benchmark"}


def test_one_rank(single_world: World, capsys: pytest.CaptureFixture):
    (result,) = benchmark.all_gather([1024], 1)
    assert result.gib_per_second == 0.0 and capsys.readouterr().out.startswith(HEAD)
    with pytest.raises(ValueError, match=r"send_recv needs two ranks: bmtrain-ms launch -n 2 \.\.\."):
        benchmark.send_recv([1024])


def test_the_median_without_the_warm_up(single_world: World, monkeypatch: pytest.MonkeyPatch):
    """The start of two warm-ups, then start and end of three repetitions."""
    moments = iter([0, 100, 200, 203, 300, 301, 400, 402])
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    (result,) = benchmark.reduce_scatter([1024], repeats=3, warm_up=2)
    assert result.seconds == 2.0 and next(moments, None) is None


def test_sizes():
    assert SIZES == (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)


# Table and picture #

RESULTS = [Result("all_gather", 1024, 0.001, 0.25), Result("all_gather", 1 << 26, 0.5, 12.345), Result("send_recv", 1024, 1e-6, 0)]


def test_format_results():
    assert format_results(RESULTS).split("\n") == [
        HEAD,
        "all_gather              1024       1.000      0.25",
        "all_gather          67108864     500.000     12.35",
        "send_recv               1024       0.001      0.00",
    ]
    assert format_results([]) == HEAD


def test_plot_writes_a_png(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for results in (RESULTS, RESULTS[:1]):
        plot(results, str(tmp_path / "picture.png"))
        data = (tmp_path / "picture.png").read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000


# The command #


def test_main_measures_everything(single_world: World, capsys: pytest.CaptureFixture, tmp_path: Path):
    """What cannot be measured is said, and the rest goes on."""
    pytest.importorskip("matplotlib")
    benchmark.main(["--max-bytes", "5000", "--repeats", "1", "--plot", str(tmp_path / "picture.png")])
    out, err = capsys.readouterr()
    rows = [line.split()[:2] for line in out.splitlines() if line != HEAD]
    assert rows == [[name, size] for name in NAMES[:2] for size in ("1024", "4096")]
    assert err == "send_recv: not measured: send_recv needs two ranks: bmtrain-ms launch -n 2 ...\n"
    assert (tmp_path / "picture.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "words, text",
    [
        (["--max-bytes", "1023"], "error: --max-bytes must be at least 1024 and --repeats at least 1"),
        (["--repeats", "0"], "error: --max-bytes must be at least 1024 and --repeats at least 1"),
        (["--max-bytes", "many"], "error: argument --max-bytes: invalid int value: 'many'"),
        (["--nonsense"], "error: unrecognized arguments: --nonsense"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options(words: list[str], text: str, capsys: pytest.CaptureFixture):
    """Refused before the ranks are connected."""
    bms.shutdown()
    with pytest.raises(SystemExit) as info:
        benchmark.main(words)
    assert info.value.code == 2 and text in capsys.readouterr().err and not bms.is_initialized()


def test_the_command_of_the_docstring(tmp_path: Path):
    """With `launch -m`, on two ranks."""
    assert benchmark.__doc__ is not None
    words = benchmark.__doc__.splitlines()[2].split()
    assert words[:6] == ["bmtrain-ms", "launch", "-n", "2", "-m", "bmtrain_ms.benchmark"] and words[6] == "--plot"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "bmtrain_ms_cli", *words[1:], "--max-bytes", "4096"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line != HEAD]
    assert rows == [[name, size] for name in NAMES for size in ("1024", "4096")]
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [words[7]]
