"""Checkpoints of hostile names and sizes, of folders that are saved to, renamed, or left by jobs that were killed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from safetensors.numpy import save_file

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError, tools
from bmtrain_ms.checkpoint import folder as folder_module
from bmtrain_ms.checkpoint.folder import find_latest, point_to, replace_text
from bmtrain_ms.checkpoint.index import INDEX, Index, IndexedTensor, file_name, read_index
from bmtrain_ms.checkpoint.sharded import ShardedReader, write_rank_file
from bmtrain_ms.files.consolidated import ConsolidatedReader, Replacement
from bmtrain_ms.files.errors import printable
from bmtrain_ms.files.format import AtomicFile
from bmtrain_ms.files.locking import let_go, lock_temporary
from bmtrain_ms_cli.main import main
from tests.helpers.checkpoints import Run

pytestmark = pytest.mark.usefixtures("single_world")

EVIL = "a\x1b[2J\nb\u202ec\x9b\x7f"  # clears the screen, ends the line, writes from right to left


def written(folder: Path, step: int, names: tuple[str, ...] = ("w",), value: float = 1.0, state: Any = None) -> Path:
    """A checkpoint of one rank."""
    target = folder / f"step-{step:08}"
    target.mkdir(parents=True)
    array = np.full(3, value, np.float32)
    hashes = write_rank_file(target / file_name(0, 1), dict.fromkeys(names, (ms.float32, array)), {})
    tensors = {name: IndexedTensor(ms.float32, (3,), None, [hashes[name]]) for name in names}
    state = {"step": step} if state is None else state
    (target / INDEX).write_text(Index(1, f"{step}-{value}", state, tensors).to_json())
    return target


# Names #


def is_safe(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_printable():
    assert printable("layers.0.权重 é") == "layers.0.权重 é"
    assert printable(EVIL) == r"a\x1b[2J\nb\u202ec\x9b\x7f" and printable("\ud800") == r"\ud800"


def test_tools_show_names_that_cannot_act_on_the_terminal(tmp_path, capsys):
    first = written(tmp_path / "a", 1, (EVIL, "x"), state={"step": EVIL, "versions": {EVIL: EVIL}, "extra": {EVIL: EVIL}})
    second = written(tmp_path / "b", 1, (EVIL,), value=2.0)
    third = written(tmp_path / "c", 1, ("x", EVIL + "2"))
    save_file({EVIL: np.ones((2, 2), np.float32)}, tmp_path / "whole.safetensors")
    for words in (["inspect", first], ["inspect", tmp_path / "whole.safetensors"], ["diff", first, second], ["diff", first, third]):
        assert main(["ckpt", *map(str, words)]) in (0, 1)
        out = capsys.readouterr().out
        assert r"a\x1b[2J\nb\u202ec" in out and is_safe(out)
    assert main(["ckpt", "diff", str(second), str(tmp_path / "whole.safetensors")]) == 1
    assert is_safe(capsys.readouterr().out)


def test_errors_show_names_that_cannot_act_on_the_terminal(tmp_path, capsys):
    """Whoever raises them."""
    damaged = written(tmp_path / "damaged", 1, (EVIL,))
    content = (damaged / file_name(0, 1)).read_bytes()
    (damaged / file_name(0, 1)).write_bytes(content[:-1] + b"\0")
    mixed = written(tmp_path / "mixed", 1, (EVIL,))
    shutil.copy(written(tmp_path / "other", 1, ("x",)) / file_name(0, 1), mixed)
    for path in (damaged, mixed):
        assert main(["ckpt", "verify", str(path)]) == 2
        err = capsys.readouterr().err
        assert r"\x1b" in err and err.count("\n") == 1 and is_safe(err)
    save_file({EVIL: np.ones((2, 2), np.float32)}, tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError) as error:
        bms.load(nn.Dense(2, 2), tmp_path / "whole.safetensors")
    assert r"unexpected in the file: a\x1b[2J\nb" in str(error.value) and str(error.value).isprintable()


# Sizes #


@pytest.mark.parametrize("piece", ["[],", "{},", "0,", '"",', "[[],[]],"])
def test_a_file_that_would_need_much_more_memory_than_it_has_bytes(tmp_path, piece):
    """An index, a header, the index of several files: 20 MB of each would take up to a GB."""
    text = '{"a":[' + piece * (20_000_000 // len(piece)) + "0]}"
    (tmp_path / INDEX).write_text(text)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    encoded = text.encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    del text, encoded
    for read in (
        lambda: read_index(tmp_path),
        lambda: ConsolidatedReader(tmp_path / "model.safetensors"),
        lambda: ConsolidatedReader(tmp_path / "model.safetensors.index.json"),
    ):
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="values, which no checkpoint has"):
            read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50 << 20


def test_an_index_of_a_large_run_is_read(tmp_path):
    """A million hashes."""
    hashes = [[f"{i:016x}" for i in range(1_000_000)]]
    tensors = {"w": IndexedTensor(ms.float32, (1_000_000 << 20,), None, hashes)}
    (tmp_path / INDEX).write_text(Index(1, "id", {"step": 1}, tensors).to_json())
    assert read_index(tmp_path).tensors["w"].hashes == hashes


# The step and the name #


def test_a_checkpoint_under_another_step_s_name_is_refused(single_world, tmp_path, capsys):
    run = Run(single_world, str(tmp_path))
    run.train(range(1))
    run.save(1)
    run.close()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000007")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "best")
    point_to(tmp_path, "step-00000007")
    text = f"{tmp_path}/step-00000007 holds step 1, not the one of its name; give it the name step-00000001"
    with pytest.raises(CheckpointError, match=text):
        Run(single_world, str(tmp_path)).load()
    for words in (["verify", tmp_path], ["inspect", tmp_path / "step-00000007"]):
        assert main(["ckpt", *map(str, words)]) == 2
        assert text in capsys.readouterr().err
    assert Run(single_world, str(tmp_path)).load(tmp_path / "best").step == 1


# Folders that are saved to #


def test_the_latest_is_found_while_a_job_saves_and_deletes(tmp_path):
    """What was the latest a moment ago is gone: not an error, and not a warning."""
    written(tmp_path, 1)
    point_to(tmp_path, "step-00000001")
    ended, problems = threading.Event(), []

    def saves() -> None:
        for step in range(2, 300):
            written(tmp_path, step)
            point_to(tmp_path, f"step-{step:08}")
            shutil.rmtree(folder_module.doomed(tmp_path / f"step-{step - 1:08}"))
        ended.set()

    saver = threading.Thread(target=saves)
    saver.start()
    looked = 0
    while not ended.is_set():
        try:
            _, wrong = find_latest(tmp_path)
            problems += [wrong] if wrong else []
            assert "is sound" in tools.verify(tmp_path) and "sharded checkpoint" in tools.inspect(tmp_path)
        except CheckpointError as error:
            problems.append(str(error))
        looked += 1
    saver.join()
    assert not problems and looked > 5


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_loading_while_another_job_moves_the_latest(single_world, tmp_path, monkeypatch, what):
    run = Run(single_world, str(tmp_path))
    run.train(range(1))
    for step in (1, 2):
        run.save(step, {"saved": step})
    run.close()
    other = tmp_path.with_name(tmp_path.name + "-other")
    shutil.copytree(tmp_path / "step-00000002", other / "step-00000002")
    if what == "deleted":
        point_to(tmp_path, "step-00000001")
    opened = []
    make = ShardedReader.__init__

    def opening(self: Any, folder: Path, *args: Any) -> None:
        opened.append(folder.name)
        if len(opened) == 1 and what == "deleted":
            point_to(tmp_path, "step-00000002")
            shutil.rmtree(tmp_path / "step-00000001")
        elif len(opened) == 1:
            file = tmp_path / "step-00000002" / file_name(0, 1)
            file.write_bytes(b"what was there before")
            shutil.rmtree(tmp_path / "step-00000002")
            shutil.copytree(other / "step-00000002", tmp_path / "step-00000002")
            raise CheckpointError("files of different checkpoints are mixed")
        make(self, folder, *args)

    monkeypatch.setattr(ShardedReader, "__init__", opening)
    assert Run(single_world, str(tmp_path)).load().extra == {"saved": 2}
    assert len(opened) == 2


def test_a_checkpoint_that_stays_damaged_is_told_at_once(single_world, tmp_path, monkeypatch):
    written(tmp_path, 1)
    (tmp_path / "step-00000001" / file_name(0, 1)).unlink()
    opened = []
    make = ShardedReader.__init__
    monkeypatch.setattr(ShardedReader, "__init__", lambda self, *args: (opened.append(1), make(self, *args))[-1])
    with pytest.raises(CheckpointError, match="does not exist"):
        tools.verify(tmp_path)
    assert opened == [1]


# What killed jobs leave #

LEAVE = """
import os, sys, signal
from pathlib import Path
import numpy as np
from bmtrain_ms.checkpoint import folder, tools
from bmtrain_ms.files.consolidated import Replacement
from bmtrain_ms.files.format import AtomicFile
where = Path(sys.argv[1])
AtomicFile(where / "m.safetensors", b"header", 100)
Replacement(where).__enter__()
os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "text":
    folder.replace_text(where / "log", "lines")
tools.reshard(where / "run", where / "out", 2)
"""


def test_what_killed_jobs_leave_is_swept_by_the_next(tmp_path):
    written(tmp_path / "run", 1)
    env = {**os.environ, "PYTHONPATH": str(Path(tools.__file__).parents[2]), "GLOG_v": "3"}
    for kind in ("text", "reshard"):
        command = [sys.executable, "-W", "ignore", "-c", LEAVE, str(tmp_path), kind]
        assert subprocess.run(command, env=env, capture_output=True, timeout=100, check=False).returncode == -9
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert [re.sub(r"\d+", "PID", name) for name in left] == [".log.PID", ".m.safetensors.PID.tmp", ".new-PID", ".out.PID.new"]
    AtomicFile(tmp_path / "m.safetensors", b"header", 100).discard()
    with Replacement(tmp_path):
        pass
    replace_text(tmp_path / "log", "lines")
    tools.reshard(tmp_path / "run", tmp_path / "out", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out", "run"]


def test_what_living_jobs_write_is_left_alone(tmp_path):
    """Of this host by its process, of another one by its lock."""
    nobody = 2**22 - 1  # not a process here, or ours
    mine = AtomicFile(tmp_path / "m", b"header", 100)
    elsewhere = tmp_path / f".m.{nobody}.tmp"
    shutil.copy(mine._temporary, elsewhere)
    lock = lock_temporary(elsewhere)
    child = os.fork()
    if child == 0:
        AtomicFile(tmp_path / "m", b"header", 100).discard()
        os._exit(0)
    os.waitpid(child, 0)
    assert mine._temporary.exists() and elsewhere.exists()
    let_go(lock)
    (tmp_path / ".m.keep.tmp").touch()
    (tmp_path / f".m.{nobody - 1}.tmp").symlink_to("elsewhere")
    mine.commit()
    AtomicFile(tmp_path / "m", b"header", 100).discard()
    assert sorted(os.listdir(tmp_path)) == [f".m.{nobody - 1}.tmp", ".m.keep.tmp", "m"]
