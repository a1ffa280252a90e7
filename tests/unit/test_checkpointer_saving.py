"""Saving at one rank: in the background, twice, on disks that are full, read-only or fail; the last checkpoint is always there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
from mindspore import nn

from bmtrain_ms.checkpoint import Checkpointer, CheckpointError
from bmtrain_ms.checkpoint import checkpointer as checkpointer_module
from bmtrain_ms.checkpoint import folder as folder_module
from bmtrain_ms.checkpoint import loading as loading_module
from bmtrain_ms.checkpoint.folder import latest_in
from bmtrain_ms.checkpoint.index import INDEX, file_name
from bmtrain_ms.optim import OptimManager
from tests.helpers.checkpoints import Layout, Run, equal
from tests.helpers.ranks import ROOT

pytestmark = pytest.mark.usefixtures("single_world")

FULL = OSError(28, "No space left on device")


@pytest.fixture
def run(single_world: Any, tmp_path: Path) -> Iterator[Run]:
    """After a step, which is saved."""
    made = Run(single_world, str(tmp_path), keep_last=None)
    made.train(range(1))
    made.save(1)
    yield made
    made.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written until it is set."""
    opened, write = threading.Event(), checkpointer_module.write_rank_file

    def waiting(*args: Any) -> Any:
        assert opened.wait(30)
        return write(*args)

    monkeypatch.setattr(checkpointer_module, "write_rank_file", waiting)
    yield opened
    opened.set()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def steps(folder: Path) -> list[int]:
    return [int(name[5:]) for name in names(folder) if name.startswith("step-")]


def only_the_first_is_there(run: Run, folder: Path) -> None:
    """And loads; nothing else is left."""
    assert names(folder) == [".lock", "latest", "step-00000001"]
    assert run.load().step == 1


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


# What is saved #


def test_extra_is_a_copy(run, tmp_path, gate):
    """Of what was there when `save` was called."""
    extra = {"position": [1, 2], "text": "é", "none": None}
    run.save(2, extra, wait=False)
    extra["position"].append(3)
    gate.set()
    run.checkpoints.finish()
    assert run.load().extra == {"position": [1, 2], "text": "é", "none": None}


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": {1, 2}}, {"x": np.zeros(2)}, {(1, 2): 3}, {1: 2}, {"x": [{None: 1}]}])
def test_extra_must_be_json(run, tmp_path, extra):
    with pytest.raises(ValueError, match="extra must be what JSON can hold: "):
        run.save(2, extra)
    only_the_first_is_there(run, tmp_path)


def test_extra_that_contains_itself(run, tmp_path):
    extra: dict[str, Any] = {}
    extra["x"] = extra
    with pytest.raises(ValueError, match="extra must be what JSON can hold: Circular reference"):
        run.save(2, extra)


@pytest.mark.parametrize("step", [-1, 5.0, True, "3", None, 2**62, np.bool_(True)])
def test_what_is_no_step(run, tmp_path, step):
    """5.0 would be saved under a name that nobody finds."""
    with pytest.raises(ValueError, match=f"step must be a whole number of 0 or more, not {re.escape(repr(step))}"):
        run.save(step)
    only_the_first_is_there(run, tmp_path)


def test_numpy_s_numbers_are_steps(run, tmp_path):
    run.save(np.int64(6))
    assert run.load().step == 6 and steps(tmp_path) == [1, 6]


@pytest.mark.parametrize("extra", [[1, 2], "here", 3, [], 0])
def test_extra_is_a_dictionary(run, tmp_path, extra):
    """What could not be loaded is not saved."""
    with pytest.raises(ValueError, match=f"extra must be a dictionary, not {type(extra).__name__}: save"):
        run.save(2, extra)
    only_the_first_is_there(run, tmp_path)


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": 0}, {"keep_last": -1, "keep_every": 2}])
def test_options_out_of_range(single_world, tmp_path, options):
    with pytest.raises(ValueError, match=r"^keep_(last|every) must be at least 1, not (0|-1)$"):
        Run(single_world, str(tmp_path), **options)


@pytest.mark.parametrize("value", ["3", 2.5, True, [3]])
@pytest.mark.parametrize("name", ["keep_last", "keep_every"])
def test_numbers_of_another_type(single_world, tmp_path, name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be a whole number, not {re.escape(repr(value))}$"):
        Run(single_world, str(tmp_path), **{name: value})


def test_a_text_is_no_truth_value(run, tmp_path, single_world):
    """ "no" would count as True."""
    with pytest.raises(TypeError, match=r"^shared_storage must be True or False, not 'no'$"):
        Run(single_world, str(tmp_path), shared_storage="no")
    with pytest.raises(TypeError, match=r"^wait must be True or False, not 'no'$"):
        run.save(2, wait="no")
    with pytest.raises(TypeError, match=r"^strict must be True or False, not None$"):
        run.load(strict=None)
    only_the_first_is_there(run, tmp_path)


def test_every_bit_comes_back(run, tmp_path):
    """NaN with a message in it, infinities, the negative zero, the smallest number."""
    bits = [0x7FC12345, 0xFF812345, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x3F800000]
    p = run.manager.parameters_by_name()["layers.0.b.bias"]
    p.copy_full(np.array(bits, np.uint32).view(np.float32))
    run.save(2)
    p.copy_full(np.zeros(7, np.float32))
    run.load()
    assert p.asnumpy().view(np.uint32)[:7].tolist() == bits


@pytest.mark.parametrize("half", [False, True], ids=["to fp16", "to fp32"])
def test_another_dtype(single_world, tmp_path, half):
    """Masters and parameters stand for each other."""
    before = Run(single_world, str(tmp_path), Layout(half=half))
    before.train(range(2))
    before.save(2)
    before.close()
    after = Run(single_world, str(tmp_path), Layout(half=not half))
    after.train(range(5, 6))
    assert after.load().result.missing == []
    theirs, mine = before.everything(), after.everything()
    for name in (name for name in theirs if " " not in name):
        if half:
            assert mine[name].tobytes() == theirs[f"master {name}"].tobytes()
        else:
            assert mine[f"master {name}"].tobytes() == theirs[name].tobytes()
            assert mine[name].tobytes() == theirs[name].astype(np.float16).astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep_last": 2}, [4, 5]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 5]),
        ({"keep_last": None}, [1, 2, 3, 4, 5]),
        ({}, [3, 4, 5]),
    ],
)
def test_retention(single_world, tmp_path, options, left):
    run = Run(single_world, str(tmp_path), **options)
    for step in range(1, 6):
        run.save(step, wait=step % 2 == 0)
        run.checkpoints.finish()
    run.close()
    assert steps(tmp_path) == left and latest_in(tmp_path).name == "step-00000005"


@pytest.mark.parametrize("atomic", [True, False], ids=["exchanged", "moved aside"])
def test_a_step_that_is_saved_again(run, tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(folder_module, "exchange", lambda new, old: False)
    run.train(range(1, 2))
    expected = run.everything()
    run.save(1)
    run.train(range(2, 3))
    only_the_first_is_there(run, tmp_path)
    assert equal(run.everything(), expected)


def test_the_process_ends_while_a_step_is_moved_aside(single_world, run, tmp_path, monkeypatch):
    """Between the two renames: the next job has the one from before."""
    monkeypatch.setattr(folder_module, "exchange", lambda new, old: False)
    expected, replace, calls = run.everything(), os.replace, []

    def dying(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    run.train(range(1, 2))
    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        run.save(1)
    monkeypatch.undo()
    assert latest_in(tmp_path) is None
    run.checkpoints._unlock()
    other = Run(single_world, str(tmp_path), keep_last=None)
    other.save(0)
    assert other.load(tmp_path / "step-00000001").step == 1 and equal(other.everything(), expected)
    other.close()
    assert steps(tmp_path) == [0, 1] and not [name for name in names(tmp_path) if name.startswith(".step")]


# In the background #


def test_training_goes_on_while_a_step_is_saved(run, tmp_path, gate):
    """What is saved is what was there when `save` was called; memory for the copies is used again."""
    for step in (2, 3):
        gate.clear()
        expected = run.everything()
        run.save(step, wait=False)
        run.train(range(step, step + 1))
        assert not equal(run.everything(), expected)
        gate.set()
        run.checkpoints.finish()
        run.load()
        assert equal(run.everything(), expected)
        run.train(range(8, 9))


def test_a_second_save_waits(run, tmp_path, gate, monkeypatch):
    run.save(2, wait=False)
    assert not run.checkpoints.poll() and steps(tmp_path) == [1]
    finish = run.checkpoints.finish

    def opening() -> None:
        gate.set()
        finish()

    monkeypatch.setattr(run.checkpoints, "finish", opening)
    run.save(3, wait=False)
    assert 2 in steps(tmp_path)
    run.checkpoints.finish()
    assert steps(tmp_path) == [1, 2, 3] and run.checkpoints.poll()


def test_a_second_save_is_refused(run, single_world, tmp_path, gate):
    run.close()
    other = Run(single_world, str(tmp_path), on_busy="refuse")
    other.save(2, wait=False)
    for wait in (True, False):
        with pytest.raises(CheckpointError, match="step 2 is still being saved; wait for it, or use on_busy='wait'"):
            other.save(3, wait=wait)
    gate.set()
    other.checkpoints.finish()
    other.save(3)
    other.close()
    assert steps(tmp_path) == [1, 2, 3]
    with pytest.raises(ValueError, match="on_busy must be wait or refuse, not 'drop'"):
        Run(single_world, str(tmp_path), on_busy="drop")


def test_what_a_checkpointer_is_made_of(run, tmp_path):
    model, manager = nn.Dense(2, 2), OptimManager()
    for wrong in ((None, manager), (model, None), (manager, model)):
        with pytest.raises(TypeError, match=r"^a Checkpointer takes a folder, the model and its OptimManager, in this order"):
            Checkpointer(tmp_path, *wrong)
    with pytest.raises(ValueError, match=r"^a Checkpointer needs a folder, and its name is empty: for the working folder"):
        Checkpointer("", model, manager)


NEXT: dict[str, Callable[[Run], Any]] = {
    "poll": lambda run: run.checkpoints.poll(),
    "finish": lambda run: run.checkpoints.finish(),
    "save": lambda run: run.save(3),
    "load": lambda run: run.load(),
    "close": lambda run: run.close(),
}


@pytest.mark.parametrize("what", NEXT)
@pytest.mark.parametrize("error", [FULL, MemoryError("no memory"), AssertionError("a defect")], ids=lambda e: type(e).__name__)
def test_an_error_is_raised_by_what_comes_next(run, tmp_path, monkeypatch, what, error):
    """Once; the one from before is there."""
    monkeypatch.setattr(checkpointer_module, "write_rank_file", failing(error))
    run.save(2, wait=False)
    run.checkpoints._running.writer._thread.join(30)
    with pytest.raises(CheckpointError) as info:
        NEXT[what](run)
    assert str(info.value) == f"{tmp_path}/step-00000002 cannot be written: {error}"
    monkeypatch.undo()
    assert run.checkpoints.poll()
    only_the_first_is_there(run, tmp_path)
    run.save(3)
    assert steps(tmp_path) == [1, 3]


AT_EXIT = """
import sys
import numpy as np
import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer
from bmtrain_ms.optim import AdamOptimizer, OptimManager
bms.init_distributed(seed=0)
model = bms.DistributedModule()
model.weight = bms.DistributedParameter(np.ones(9, np.float32))
manager = OptimManager()
manager.add_optimizer(AdamOptimizer(model.trainable_params()))
def main():
    checkpoints = Checkpointer(sys.argv[1], model, manager)
    checkpoints.save(1)
    checkpoints.save(2, wait=False)
main()
"""


def test_a_process_that_ends_at_once(tmp_path):
    """What nobody waited for is told, if nobody keeps the Checkpointer too; it is no checkpoint."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "GLOG_v": "3"}
    command = [sys.executable, "-W", "ignore", "-c", AT_EXIT, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    where = tmp_path / "step-00000002"
    assert done.stderr.count("ERROR") == 1
    assert f"ERROR: {where} was not saved: the process ends before Checkpointer.finish() or close()\n" in done.stderr
    assert done.returncode == 0 and latest_in(tmp_path).name == "step-00000001"


def test_an_error_that_nobody_asked_for_is_told_at_exit(tmp_path):
    """Itself: the disk is full, and not that the process ends."""
    limited = AT_EXIT.replace("checkpoints.save(2", "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n    checkpoints.save(2")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "GLOG_v": "3"}
    command = [sys.executable, "-W", "ignore", "-c", f"import resource\n{limited}", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert f"ERROR: {tmp_path}/step-00000002 was not saved: [Errno 27] File too large\n" in done.stderr
    assert latest_in(tmp_path).name == "step-00000001"


# Disks #


@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "in the background"])
def test_a_full_disk(run, tmp_path, monkeypatch, wait):
    """At every write of a save: the last checkpoint stays, nothing else does."""
    pwrite, allowed = os.pwrite, [0]

    def limited(*args: Any) -> int:
        if allowed[0] == 0:
            raise FULL
        allowed[0] -= 1
        return pwrite(*args)

    run.train(range(1, 2))
    expected = run.everything()
    monkeypatch.setattr(os, "pwrite", limited)
    for count in (0, 1, 2, 20):
        allowed[0] = count
        with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: \[Errno 28\] No space left on device"):
            run.save(2, wait=wait)
            run.checkpoints.finish()
        assert names(tmp_path) == [".lock", "latest", "step-00000001"]
    monkeypatch.undo()
    run.save(2, wait=wait)
    run.checkpoints.finish()
    run.load()
    assert equal(run.everything(), expected) and steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", ["write_text", "sync_folder", "exchange"])
@pytest.mark.parametrize("error", [FULL, RuntimeError("a defect")], ids=["OSError", "RuntimeError"])
def test_an_error_at_the_end(run, tmp_path, monkeypatch, name, error):
    """Whatever it is, it is a CheckpointError; there is a checkpoint, and nothing half done."""
    monkeypatch.setattr(folder_module if name == "exchange" else checkpointer_module, name, failing(error))
    with pytest.raises(CheckpointError) as info:
        run.save(1 if name == "exchange" else 2)
    assert "cannot be written: " in str(info.value) and str(error) in str(info.value)
    monkeypatch.undo()
    assert latest_in(tmp_path).name == "step-00000001" and not [name for name in names(tmp_path) if name.startswith(".step")]
    assert run.load().step == 1


@pytest.mark.parametrize("step", [1, 2], ids=["again", "new"])
def test_an_error_after_the_naming_is_undone(run, tmp_path, monkeypatch, step):
    """The name is there, and cannot be brought to the disk: the one from before gets it back."""
    before = (tmp_path / "step-00000001" / INDEX).read_bytes()
    monkeypatch.setattr(folder_module, "sync_folder", failing(FULL))
    with pytest.raises(CheckpointError, match=rf"step-0000000{step} cannot be written: \[Errno 28\]"):
        run.save(step)
    monkeypatch.undo()
    only_the_first_is_there(run, tmp_path)
    assert (tmp_path / "step-00000001" / INDEX).read_bytes() == before


def test_a_pointer_that_cannot_be_moved(run, tmp_path, monkeypatch):
    """The checkpoint is there, and the message says so."""
    monkeypatch.setattr(checkpointer_module, "point_to", failing(FULL))
    text = rf"^{tmp_path}/step-00000002 was saved, but {tmp_path}/latest cannot be moved to it: \[Errno 28\]"
    with pytest.raises(CheckpointError, match=text):
        run.save(2)
    monkeypatch.undo()
    assert steps(tmp_path) == [1, 2] and latest_in(tmp_path).name == "step-00000001"
    assert run.load(tmp_path / "step-00000002").step == 2


def test_no_memory_for_a_copy(run, tmp_path, monkeypatch):
    """Told as what it is, and nothing is left of it; the next one succeeds."""
    monkeypatch.setattr(checkpointer_module.np, "empty_like", failing(MemoryError("no memory")))
    with pytest.raises(CheckpointError, match=r"step-00000002\.[0-9a-f]+ cannot be written: no memory"):
        run.save(2, wait=False)
    monkeypatch.undo()
    only_the_first_is_there(run, tmp_path)
    run.save(2, wait=False)
    run.checkpoints.finish()
    assert steps(tmp_path) == [1, 2]


def test_interrupted_while_it_saves(run, tmp_path, monkeypatch):
    """Ctrl-C in Python: the next save is not that one's end."""
    monkeypatch.setattr(checkpointer_module, "write_rank_file", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run.save(2)
    monkeypatch.undo()
    only_the_first_is_there(run, tmp_path)
    run.save(3)
    assert steps(tmp_path) == [1, 3]


def test_files_are_deleted_while_training_goes_on(single_world, tmp_path, monkeypatch):
    """Which takes as long as writing them; the next save waits for it, as there may not be room for both."""
    run, may, delete = Run(single_world, str(tmp_path), keep_last=1), threading.Event(), checkpointer_module.delete

    def waiting(folders: Any) -> None:
        assert may.wait(30)
        delete(folders)

    run.save(1)
    monkeypatch.setattr(checkpointer_module, "delete", waiting)
    run.save(2, wait=False)
    run.checkpoints.finish()
    assert names(tmp_path) == [".lock", ".step-00000001.gone", "latest", "step-00000002"]
    threading.Timer(0.2, may.set).start()
    run.save(3, wait=False)
    assert may.is_set() and ".step-00000001.gone" not in names(tmp_path)
    run.close()
    assert names(tmp_path) == [".lock", "latest", "step-00000003"]
    assert not run.checkpoints._snapshots  # nor is memory kept


def test_nowhere_to_save(single_world, tmp_path):
    """A folder in the place of which is a file; a file system that cannot be written to."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/checkpoints")):
        run = Run(single_world, str(folder))
        for _ in range(2):
            with pytest.raises(CheckpointError, match=rf"{folder} cannot be used: \[Errno "):
                run.save(1)


def test_a_folder_that_is_gone(run, tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError, match=r"\.step-00000002\.[0-9a-f]+ cannot be made: \[Errno 2\] No such file"):
        run.save(2)


def test_a_sweep_that_fails_does_not_keep_the_lock(single_world, tmp_path, monkeypatch):
    run = Run(single_world, str(tmp_path))
    monkeypatch.setattr(checkpointer_module, "sweep", failing(OSError(5, "Input/output error")))
    with pytest.raises(CheckpointError, match=rf"{tmp_path} cannot be used: \[Errno 5\]"):
        run.save(1)
    monkeypatch.undo()
    run.save(1)
    run.close()
    assert steps(tmp_path) == [1]


def test_an_old_one_that_cannot_be_deleted(single_world, tmp_path, monkeypatch):
    """The new one is complete, and the message says so, and which is in the way."""
    run = Run(single_world, str(tmp_path), keep_last=1)
    run.save(1)
    monkeypatch.setattr(
        checkpointer_module, "prune", failing(PermissionError(13, "Permission denied", str(tmp_path / "step-00000001")))
    )
    text = rf"^{tmp_path}/step-00000002 was saved, but an older checkpoint cannot be deleted: .*denied: '{tmp_path}/step-00000001'"
    with pytest.raises(CheckpointError, match=text):
        run.save(2)
    monkeypatch.undo()
    assert latest_in(tmp_path).name == "step-00000002" and run.load().step == 2
    run.save(3)
    run.close()
    assert steps(tmp_path) == [3]


# Damage #


def test_a_damaged_checkpoint_names_older_ones(run, tmp_path):
    """It is not passed over in silence; a step that a run that went back has left is no advice."""
    for step in (2, 3, 4):
        run.save(step)
    run.close()
    (tmp_path / "latest").write_text("step-00000003\n")
    rank = tmp_path / "step-00000003" / file_name(0, 1)
    content = rank.read_bytes()
    advice = rf"; older ones are there: step-00000002, step-00000001; load\('{tmp_path}/step-00000002'\) goes on from one$"
    flipped = bytes([*content[:-1], content[-1] ^ 1])
    for damaged, text in (
        (b"", "is 0 bytes long: it is truncated"),
        (flipped, "is damaged .* do not have the hash that the index says.*"),
    ):
        rank.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{file_name(0, 1)}.*{text}{advice}"):
            run.load()
        with pytest.raises(CheckpointError) as info:
            run.load(tmp_path / "step-00000003")  # this one was meant
        assert "older ones" not in str(info.value)
    assert run.load(tmp_path / "step-00000002").step == 2
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step:08}")
    with pytest.raises(CheckpointError) as info:
        run.load()
    assert "older ones" not in str(info.value)


def test_nothing_to_load(single_world, tmp_path):
    run = Run(single_world, str(tmp_path / "none"))
    assert run.load() is None
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "other", tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match=f"{path} is no checkpoint, and there is none in it"):
            run.load(path)


def test_a_folder_that_cannot_be_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(loading_module, "find_latest", failing(PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match=rf"{tmp_path} cannot be read: \[Errno 13\] Permission denied"):
        run.load()


def test_the_index_is_json_without_surprises(run, tmp_path):
    """For other programs: every key is a string, and what is where is said."""
    index = json.loads((tmp_path / "step-00000001" / "index.json").read_text())
    assert (index["format"], index["version"], index["ranks"]) == ("bmtrain_ms", 3, 1)
    assert index["state"]["seed"] == 5 and index["state"]["layout"] == [1] and index["state"]["step"] == 1
    assert index["tensors"]["head.weight"]["shape"] == [11, 7]
    assert isinstance(run.checkpoints, Checkpointer)
