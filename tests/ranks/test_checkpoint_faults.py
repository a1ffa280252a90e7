"""Checkpoints of jobs that are killed, stopped, told to end, or cannot write: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from bmtrain_ms.checkpoint import tools
from bmtrain_ms.checkpoint.folder import latest_in
from bmtrain_ms.checkpoint.sharded import ShardedReader
from bmtrain_ms.data import python_documentation
from bmtrain_ms.train import EXIT_STOPPED
from tests.helpers.ranks import ROOT, mpiexec
from tests.helpers.saving_job import digest

pytestmark = pytest.mark.ranks

RANKS = 2
SCRIPT = str(ROOT / "tests" / "helpers" / "saving_job.py")
LAUNCH = [sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", str(RANKS), SCRIPT]


@contextlib.contextmanager
def job(mode: str, command: list[str] | None = None, **options: Any) -> Iterator[subprocess.Popen]:
    """Two ranks; whatever is left of them in the end is killed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    command = command or [mpiexec(), "-n", str(RANKS), sys.executable, "-m", "mpi4py", SCRIPT]
    process = subprocess.Popen(
        [*command, mode, json.dumps({name: str(x) if isinstance(x, Path) else x for name, x in options.items()})],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


def notes(folder: Path, kind: str, rank: int) -> list[str]:
    """The complete lines that a rank wrote."""
    path = folder / f"{kind}-{rank}"
    text = path.read_text() if path.exists() else ""
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]


def until(condition: Callable[[], Any], process: subprocess.Popen | None = None, limit: float = 90.0) -> Any:
    """Wait for it."""
    deadline = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        assert process is None or process.poll() is None, process.stderr.read()[-2000:]  # type: ignore[union-attr]
        time.sleep(0.002)
    return found


@pytest.fixture
def places(tmp_path) -> dict[str, Path]:
    """Of the checkpoints, and of what the ranks write down."""
    (tmp_path / "notes").mkdir()
    return {"folder": tmp_path / "checkpoints", "notes": tmp_path / "notes"}


def recorded(folder: Path, rank: int) -> dict[int, str]:
    """Step -> digest of the state that a rank had; the same each time that it came to the step."""
    states: dict[int, str] = {}
    for line in notes(folder, "state", rank):
        step, value = line.split()
        assert states.setdefault(int(step), value) == value, f"step {step} has another state after resuming"
    return states


def check_latest(folder: Path, where: Path) -> int:
    """The latest checkpoint's step: it is complete, not older than the last that was saved, and has the states of that step."""
    latest = latest_in(folder)
    assert latest is not None
    for path in folder.glob("step-*"):
        if path != latest:
            tools.verify(path)
    with ShardedReader(latest) as reader:
        assert sum(reader.verify()) == sum(t.count * t.itemsize for t in reader.index.tensors.values())
        step = reader.index.state["step"]
        assert latest.name == f"step-{step:08}"
        for rank in range(RANKS):
            owned = {name: t.piece(rank).owned for name, t in reader.index.tensors.items()}
            pieces = {name: reader.read_flat(name, *ends) for name, ends in owned.items()}
            assert digest(pieces) == recorded(where, rank)[step], f"rank {rank}'s part of step {step}"
    saved = [int(line) for rank in range(RANKS) for line in notes(where, "saved", rank)]
    assert step >= max(saved, default=0)
    return step


# Killed #


def test_killed_at_30_moments_of_saving(places):
    """One rank, or all; each time the next job goes on from the latest complete checkpoint."""
    random_ = random.Random(5)
    folder, where = places["folder"], places["notes"]
    steps = [0]
    for i in range(30):
        started = len(notes(where, "pid", 0))
        with job("forever", **places) as process:
            until(lambda n=started: all(len(notes(where, "pid", rank)) > n for rank in range(RANKS)), process)
            before = len(notes(where, "saved", 0))
            until(lambda n=before: len(notes(where, "saved", 0)) > n, process)
            time.sleep(random_.uniform(0.0, 0.25))  # some saves further, anywhere in one
            if i % 2:
                os.kill(int(notes(where, "pid", random_.randrange(RANKS))[-1]), signal.SIGKILL)
                process.wait(30)
                assert process.returncode != 0
            kill_all(process)
        steps.append(check_latest(folder, where))
        assert steps[-1] > steps[-2]
    left = [name for name in os.listdir(folder) if name.startswith(".step")]
    assert len(left) <= 2  # each job removes what those before it left


def test_killed_before_every_change_of_the_disk(places):
    """Of one rank: there is a sound checkpoint at every instant, and a step that is saved again is never gone."""
    with job("crash", [sys.executable, SCRIPT], **places) as process:
        assert process.wait(120) == 0, process.stderr.read()
    crashes = [json.loads(line) for line in notes(places["notes"], "crash", 0)]
    for again in (False, True):
        chosen = [crash for crash in crashes if crash[0] is again]
        assert len(chosen) > 7
        codes = [code for _, _, code, _, _ in chosen]
        assert codes == [signal.SIGKILL] * (len(chosen) - 1) + [0]  # the last child had no more changes to make
        for _, n, code, latest, names in chosen:
            step = Path(latest).name[5:].lstrip("0")
            assert step == "3" if again or not code else step in "23", (n, latest)
            assert latest.endswith(tuple(names)) and (again or "step-00000002" in names), (n, names)


# Full disks #


@pytest.mark.parametrize("broken", range(RANKS))
def test_a_full_disk_of_one_rank(places, broken):
    with job("full", broken=broken, **places) as process:
        assert process.wait(60) == 0, process.stderr.read()
    for rank in range(RANKS):
        errors = notes(places["notes"], "error", rank)
        for step, text in zip((2, 3), errors):
            assert text.startswith(f"{places['folder']}/step-{step:08} cannot be written: ")
            assert ("File too large" if rank == broken else f"rank(s) [{broken}] failed") in text
        assert len(errors) == 2
        assert notes(places["notes"], "there", rank) == [".lock latest step-00000001"] * 2
    assert check_latest(places["folder"], places["notes"]) == 4


def test_two_jobs_in_one_folder(places, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    with job("forever", **places) as first:
        until(lambda: notes(places["notes"], "saved", 0), first)
        with job("once", folder=places["folder"], notes=second) as other:
            assert other.wait(60) == 0
        assert first.poll() is None
        holder = notes(places["notes"], "pid", 0)[0]
        text = notes(second, "error", 0)[0]
        assert text.startswith(f"another job saves to {places['folder']} (process {holder} on ")
        assert "rank(s) [0] failed" in notes(second, "error", 1)[0]
        count = len(notes(places["notes"], "saved", 0))
        until(lambda: len(notes(places["notes"], "saved", 0)) > count, first)  # it is not disturbed
    check_latest(places["folder"], places["notes"])
    with job("once", folder=places["folder"], notes=second) as other:  # the dead do not hold it
        assert other.wait(60) == 0
    assert notes(second, "error", 0)[1:] == ["none"]


@pytest.mark.parametrize("broken", range(RANKS))
def test_a_rank_that_stops_answering_is_named(places, broken):
    with job("stuck", broken=broken, timeout=4.0, **places) as process:
        text = until(lambda: notes(places["notes"], "error", 1 - broken), limit=60)[0]
        kill_all(process)
    assert f"rank {broken}" in text.replace("ranks [", "rank ").replace("rank(s) [", "rank "), text
    assert check_latest(places["folder"], places["notes"]) == 1


# Told to end #


def losses(where: Path) -> list[float]:
    records = [json.loads(line) for line in (where / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [r["loss"] for r in records]


def final(where: Path) -> list[str]:
    return [(where / f"final-{rank}").read_text() for rank in range(RANKS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Twelve steps that nothing interrupts."""
    where = tmp_path_factory.mktemp("whole")
    with job("train", LAUNCH, folder=where / "checkpoints", notes=where, steps=12) as process:
        assert process.wait(90) == 0, process.stderr.read()
    assert len(losses(where)) == 12
    return where


@pytest.mark.parametrize(
    ("signum", "to"),
    [(signal.SIGTERM, "launcher"), (signal.SIGINT, "launcher"), (signal.SIGTERM, "rank 1")],
    ids=["SIGTERM", "SIGINT", "SIGTERM to one rank"],
)
def test_told_to_end(places, whole, signum, to):
    """The step is finished and saved, the exit code says so, and going on gives what the run without an end gave."""
    where = places["notes"]
    pause = [1] if to == "rank 1" else [0, 1]
    with job("train", LAUNCH, steps=12, pause=pause, **places) as process:
        until(lambda: all(notes(where, "pid", rank) for rank in pause), process)
        os.kill(process.pid if to == "launcher" else int(notes(where, "pid", 1)[0]), signum)
        assert process.wait(60) == EXIT_STOPPED, process.stderr.read()
    assert losses(where) == losses(whole)[:7]
    assert latest_in(places["folder"]).name == "step-00000007" and not (where / "final-0").exists()
    with job("train", LAUNCH, steps=12, resume=True, **places) as process:
        assert process.wait(90) == 0, process.stderr.read()
    assert losses(where) == losses(whole) and final(where) == final(whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_told_twice(places, whole, signum):
    """It ends in the middle of the step, unless both came in the same second; the last checkpoint is intact."""
    where = places["notes"]
    with job("train", LAUNCH, steps=12, pause=[0, 1], signals=2, save_every=3, **places) as process:
        until(lambda: all(notes(where, "pid", rank) for rank in range(RANKS)), process)
        process.send_signal(signum)
        until(lambda: all((where / f"asked-{rank}").exists() for rank in range(RANKS)), process)
        start = time.monotonic()
        process.send_signal(signum)
        for rank in range(RANKS):  # within a second: the same request once more, as a scheduler sends it to all processes
            os.kill(int(notes(where, "pid", rank)[0]), signum)
        until(lambda: time.monotonic() - start > 1.1, process)
        process.send_signal(signum)
        assert process.wait(30) not in (0, EXIT_STOPPED)
    for rank in range(RANKS):
        with pytest.raises(ProcessLookupError):
            os.kill(int(notes(where, "pid", rank)[0]), 0)
    assert len(losses(where)) == 6
    latest = latest_in(places["folder"])
    assert latest.name in ("step-00000003", "step-00000006")  # the second may still have been in the background
    tools.verify(latest)
    with job("train", LAUNCH, steps=12, resume=True, **places) as process:
        assert process.wait(90) == 0, process.stderr.read()
    assert losses(where) == losses(whole) and final(where) == final(whole)


def test_a_loss_that_stays_nan_ends_with_advice(places, whole):
    """The checkpoint from before is kept, and goes on where the data are good."""
    where = places["notes"]
    with job("train", LAUNCH, steps=12, bad_from=5, save_every=5, **places) as process:
        _, errors = process.communicate(timeout=90)
    assert process.returncode not in (0, EXIT_STOPPED)
    assert "TrainingError: loss nan" in errors and "3 bad step(s) in a row" in errors
    assert f"The last good checkpoint is in {places['folder']}." in errors and "Lower the learning rate" in errors
    latest = latest_in(places["folder"])
    assert latest.name == "step-00000005"
    tools.verify(latest)
    with job("train", LAUNCH, steps=12, resume=True, **places) as process:
        assert process.wait(90) == 0, process.stderr.read()
    assert losses(where) == losses(whole) and final(where) == final(whole)


# The demo #


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    """A tenth of the documentation, small batches."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(python_documentation()[:16]), encoding="utf-8")
    return ["--text", str(path), "--batch", "4"]


def demo(*words: Any) -> list[str]:
    return [sys.executable, "-m", "bmtrain_ms_cli", "demo", *map(str, words)]


def test_demo_goes_on_after_everything_was_killed(tmp_path, text):
    """Saved by steps; at most `--keep-last` stay."""
    out = tmp_path / "out"
    options = ["--steps", 12, "--out", out, "--save-interval", 2, "--keep-last", 2, *text]
    process = subprocess.Popen(demo(*options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: (latest_in(out / "checkpoints") or Path("step-0")).name >= "step-00000004", process, 150)
    finally:
        end_demo(process)
    latest = latest_in(out / "checkpoints")
    tools.verify(latest)
    done = int(latest.name[5:])
    before = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()[:done]]
    resumed = subprocess.run(demo(*options, "--resume"), capture_output=True, text=True, timeout=200, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at step {done}" in resumed.stdout
    assert losses_of(out)[:done] == before and len(losses_of(out)) == 12
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-00000010", "step-00000012"]


def losses_of(out: Path) -> list[float]:
    """Of the demo's log."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [r["loss"] for r in records]


def end_demo(process: subprocess.Popen) -> None:
    """Kill -9 of the command and of the ranks, which have a session of their own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    launchers = [int(pid) for pid in children.read_text().split()] if process.poll() is None else []
    for group in [*launchers, process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.wait(30)


def test_demo_saves_by_minutes(tmp_path, text):
    """A time that every step exceeds: each is saved."""
    out = tmp_path / "out"
    words = ["--steps", 4, "--out", out, "--save-minutes", 1e-6, "--keep-last", 9, *text]
    done = subprocess.run(demo(*words), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == [f"step-{i:08}" for i in range(1, 5)]
    tools.verify(out / "checkpoints")
