"""A folder of checkpoints: names, the latest, what is deleted, what a dead job left, and whose it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.checkpoint import folder as folder_module
from bmtrain_ms.checkpoint.folder import (
    LATEST,
    FolderLock,
    Naming,
    checkpoint_name,
    delete,
    doomed,
    exchange,
    find_latest,
    latest_in,
    point_to,
    prune,
    step_of,
    steps_in,
    sweep,
)
from bmtrain_ms.checkpoint.index import INDEX
from tests.helpers.open_files import open_files
from tests.helpers.ranks import ROOT


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        complete(folder / checkpoint_name(step), step)


def complete(path: Path, content: int) -> None:
    path.mkdir(parents=True)
    (path / INDEX).write_text(str(content))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Which there are #


@pytest.mark.parametrize(
    ("step", "name"), [(0, "step-00000000"), (360, "step-00000360"), (99999999, "step-99999999"), (10**8, "step-100000000")]
)
def test_names(tmp_path, step, name):
    assert checkpoint_name(step) == name and step_of(tmp_path / name) == step
    make(tmp_path, step)
    assert steps_in(tmp_path) == [step]


def test_steps(tmp_path):
    """Only what is complete, and is called as we do; by number, not by name."""
    make(tmp_path, 100000000, 7, 99999999, 0)
    for name in (
        "step-7",
        "step-0000000x",
        "step-000000001",
        "step-٠٠٠٠٠٠٠١",
        "xstep-00000001",
        ".step-00000001.x",
        "step-00000001.old",
    ):
        complete(tmp_path / name, 1)
    (tmp_path / "step-00000002").mkdir()  # without an index
    (tmp_path / "step-00000003").write_text("a file")
    (tmp_path / "step-00000004" / INDEX).mkdir(parents=True)
    assert steps_in(tmp_path) == [0, 7, 99999999, 100000000]


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        assert steps_in(path) == [] and latest_in(path) is None


def test_the_pointer_decides(tmp_path):
    """Also for an older one: a run that went back."""
    make(tmp_path, 1, 2, 3)
    assert latest_in(tmp_path) == tmp_path / "step-00000003"
    for step in (1, 2):
        point_to(tmp_path, checkpoint_name(step))
        assert latest_in(tmp_path) == tmp_path / checkpoint_name(step)
        assert (tmp_path / LATEST).read_text() == f"{checkpoint_name(step)}\n"
    assert names(tmp_path) == [LATEST, "step-00000001", "step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"step-00000009\n",
        b"step-00000004\n",
        b"../step-00000001",
        b"/etc",
        b"step-1",
        b"\xff\xfe",
        b"\0",
        b"step-00000001\nx",
    ],
)
def test_a_pointer_at_nothing(tmp_path, content):
    make(tmp_path, 1, 2)
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / LATEST).write_bytes(content)
    found, wrong = find_latest(tmp_path)
    assert found == latest_in(tmp_path) == tmp_path / "step-00000002"
    assert (
        wrong.startswith(f"{tmp_path}/latest says ") and "which is no checkpoint here; going on from step-00000002, which" in wrong
    )


def test_no_pointer(tmp_path):
    make(tmp_path, 1, 2)
    assert find_latest(tmp_path)[1].startswith(
        f"{tmp_path}/latest does not exist (or is not visible from this host); going on from "
    )
    point_to(tmp_path, "step-00000001")
    assert find_latest(tmp_path) == (tmp_path / "step-00000001", "")


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "huge"])
def test_a_pointer_that_is_no_file(tmp_path, kind):
    """Reading a pipe would wait."""
    make(tmp_path, 1, 2)
    if kind == "folder":
        (tmp_path / LATEST).mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / LATEST)
    elif kind == "link":
        (tmp_path / "other").write_text("step-00000001\n")
        (tmp_path / LATEST).symlink_to(tmp_path / "other")
    else:
        (tmp_path / LATEST).write_text("step-00000001\n")
        os.truncate(tmp_path / LATEST, 1 << 40)
    texts = {"folder": "is not a file", "pipe": "is not a file", "link": "is a link, which", "huge": "which is no checkpoint here"}
    found, wrong = find_latest(tmp_path)
    assert found == tmp_path / "step-00000002" and texts[kind] in wrong and "Name another one if that is not right" in wrong


def test_the_pointer_moves_in_one_instant(tmp_path, monkeypatch):
    make(tmp_path, 1, 2)
    point_to(tmp_path, "step-00000001")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        point_to(tmp_path, "step-00000002")
    assert latest_in(tmp_path) == tmp_path / "step-00000001"


# What is deleted #


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (None, None, [2, 4, 5, 6, 8, 10]),
        (1, None, [10]),
        (3, None, [6, 8, 10]),
        (9, None, [2, 4, 5, 6, 8, 10]),
        (1, 5, [5, 10]),
        (2, 4, [4, 8, 10]),
        (None, 4, [2, 4, 5, 6, 8, 10]),
    ],
)
def test_prune(tmp_path, keep_last, keep_every, left):
    steps = [2, 4, 5, 6, 8, 10]
    make(tmp_path, *steps)
    point_to(tmp_path, checkpoint_name(10))
    going = prune(tmp_path, keep_last, keep_every)
    assert [path.name for path in going] == [f".{checkpoint_name(step)}.gone" for step in steps if step not in left]
    assert steps_in(tmp_path) == left  # at once; the files go later
    delete(going)
    assert names(tmp_path) == [LATEST, *map(checkpoint_name, left)]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_what_is_later_than_the_latest_is_not_touched(tmp_path, keep_last):
    """A run that went back to step 5 has left it; nor does it count."""
    make(tmp_path, 3, 4, 5, 7, 8)
    point_to(tmp_path, checkpoint_name(5))
    prune(tmp_path, keep_last, None)
    assert steps_in(tmp_path) == [3, 4, 5, 7, 8][3 - keep_last :]
    assert latest_in(tmp_path) == tmp_path / checkpoint_name(5)


def test_long_names_are_in_order(tmp_path):
    make(tmp_path, 99999998, 99999999, 100000000)
    point_to(tmp_path, checkpoint_name(10**8))
    assert [path.name for path in prune(tmp_path, 2, None)] == [".step-99999998.gone"]


def test_clocks_play_no_part(tmp_path):
    """The newest file is of the oldest step."""
    make(tmp_path, 1, 2, 3)
    for step in (1, 2, 3):
        for path in (tmp_path / checkpoint_name(step), tmp_path / checkpoint_name(step) / INDEX):
            os.utime(path, (10**9 - step, 10**9 - step))
    assert latest_in(tmp_path) == tmp_path / checkpoint_name(3)
    point_to(tmp_path, checkpoint_name(3))
    os.utime(tmp_path / LATEST, (0, 0))
    assert latest_in(tmp_path) == tmp_path / checkpoint_name(3)
    assert [path.name for path in prune(tmp_path, 2, None)] == [".step-00000001.gone"]


def test_nothing_is_pruned_in_an_empty_folder(tmp_path):
    assert prune(tmp_path, 1, None) == [] and prune(tmp_path / "none", 1, 1) == []


def test_a_name_goes_before_files(tmp_path):
    """Of which some may be left: it is never found half deleted."""
    make(tmp_path, 1, 2)
    assert doomed(tmp_path / "step-00000001") == tmp_path / ".step-00000001.gone"
    assert steps_in(tmp_path) == [2] and names(tmp_path) == [".step-00000001.gone", "step-00000002"]
    sweep(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


# What dead jobs left #


def test_sweep(tmp_path):
    make(tmp_path, 1, 2)
    point_to(tmp_path, "step-00000001")
    for name in (".step-00000003.abc", ".step-00000001.gone", ".step-00000001.old.gone"):
        complete(tmp_path / name, 9)
    (tmp_path / ".step-00000004.def").mkdir()
    (tmp_path / f".{LATEST}.123").touch()
    (tmp_path / "mine").touch()
    sweep(tmp_path)
    assert names(tmp_path) == [LATEST, "mine", "step-00000001", "step-00000002"]
    assert (tmp_path / "step-00000001" / INDEX).read_text() == "1"


@pytest.mark.parametrize("final", [True, False], ids=["there", "missing"])
@pytest.mark.parametrize("index", [True, False], ids=["complete", "incomplete"])
def test_a_checkpoint_that_was_being_replaced(tmp_path, final, index):
    """Where names cannot be exchanged, the old one moves aside first: it gets its name back if there is none of that name."""
    complete(tmp_path / ".step-00000002.old", 7)
    complete(tmp_path / ".step-00000002.abc", 8)
    make(tmp_path, 1, *([2] if final else []))
    if not index:
        (tmp_path / ".step-00000002.old" / INDEX).unlink()
    sweep(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"][: 2 if final or index else 1]
    if final or index:
        assert (tmp_path / "step-00000002" / INDEX).read_text() == ("2" if final else "7")


def test_exchange(tmp_path):
    make(tmp_path, 1, 2)
    assert exchange(tmp_path / "step-00000001", tmp_path / "step-00000002")
    assert (tmp_path / "step-00000001" / INDEX).read_text() == "2" and (tmp_path / "step-00000002" / INDEX).read_text() == "1"
    assert not exchange(tmp_path / "step-00000001", tmp_path / "none")


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["replaces", "new"])
def test_naming_and_undoing_it(tmp_path, monkeypatch, exchanges, before):
    if not exchanges:
        monkeypatch.setattr(folder_module, "exchange", lambda *paths: False)
    complete(tmp_path / ".step-00000001.abc", 8)
    if before:
        make(tmp_path, 1)
    naming = Naming(tmp_path / ".step-00000001.abc", tmp_path / "step-00000001")
    naming.do()
    assert (tmp_path / "step-00000001" / INDEX).read_text() == "8"
    if before:
        assert naming.replaced is not None and (naming.replaced / INDEX).read_text() == "1"
    else:
        assert naming.replaced is None
    naming.undo()
    assert names(tmp_path) == ["step-00000001"] * before
    assert not before or (tmp_path / "step-00000001" / INDEX).read_text() == "1"


@pytest.mark.parametrize("fails_at", [1, 2])
def test_undoing_half_of_a_naming(tmp_path, monkeypatch, fails_at):
    """Where names cannot be exchanged: one rename of two."""
    complete(tmp_path / ".step-00000001.abc", 8)
    make(tmp_path, 1)
    calls, replace = [], os.replace

    def failing(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == fails_at:
            raise OSError(5, "Input/output error")
        replace(*paths)

    monkeypatch.setattr(folder_module, "exchange", lambda *paths: False)
    monkeypatch.setattr(os, "replace", failing)
    naming = Naming(tmp_path / ".step-00000001.abc", tmp_path / "step-00000001")
    with pytest.raises(OSError, match="Input/output error"):
        naming.do()
    naming.undo()
    assert names(tmp_path) == ["step-00000001"] and (tmp_path / "step-00000001" / INDEX).read_text() == "1"


# Whose it is #


def test_a_lock_that_is_a_link(tmp_path):
    """What it points to is not written to."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        FolderLock(tmp_path)
    assert victim.read_text() == "mine"


def test_temporary_names_that_are_links(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".{LATEST}.{os.getpid()}").symlink_to(victim)
    point_to(tmp_path, "step-00000001")
    assert victim.read_text() == "mine" and (tmp_path / LATEST).read_text() == "step-00000001\n"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Not another job's."""
    monkeypatch.setattr(folder_module.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.raises(
        CheckpointError, match=rf"^{tmp_path}/\.lock cannot be locked, so .*: No locks available; choose a folder on"
    ):
        FolderLock(tmp_path)


def test_one_job_at_a_time(tmp_path):
    """In this process too; the first is named."""
    lock = FolderLock(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"another job saves to {tmp_path} \(process {os.getpid()} on .+\); end it, or"):
            FolderLock(tmp_path)
    assert len(open_files(tmp_path)) == 1
    lock.release()
    lock.release()
    FolderLock(tmp_path).release()
    FolderLock(tmp_path)  # forgotten: its file is closed


def test_a_lock_that_is_forgotten(tmp_path):
    FolderLock(tmp_path)
    FolderLock(tmp_path).release()


HOLD = """
import sys
from pathlib import Path
from bmtrain_ms.checkpoint.folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_goes_with_its_process(tmp_path):
    """Killed: it cannot tidy up."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "GLOG_v": "3"}
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"another job saves to {tmp_path} \(process {holder.pid} on "):
            FolderLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        FolderLock(tmp_path).release()
    assert names(tmp_path) == [".lock"]
