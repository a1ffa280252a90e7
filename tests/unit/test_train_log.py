"""The log of a run whose disk is full, that another job writes, or that somebody moves."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any, Iterator

import pytest

from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.train import TrainingError, plot_log, read_log
from bmtrain_ms.train import log as log_module
from bmtrain_ms.train.log import LogFile
from tests.unit.test_train import trainer, weights

pytestmark = pytest.mark.usefixtures("single_world")


def steps(log: Path) -> list[int]:
    return [record["step"] for record in read_log(log)]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing behind so many bytes fails, as on a full disk: what fits is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_does_not_end_training_and_the_log_catches_up(tmp_path, capsys):
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    log = tmp_path / "log"
    t, plain = trainer(log=log), trainer()
    t.fit(until=1)
    with largest_file(log.stat().st_size + 10):  # the next line begins, and does not end
        t.fit(until=4)
        assert steps(log) == [1] and not log.read_bytes().endswith(b"\n")
        assert [r["step"] for r in read_log(log)] == [1]  # of which another reader sees whole lines
    t.fit()
    plain.fit()
    assert steps(log) == [1, 2, 3, 4, 5, 6] and weights(t) == weights(plain)
    assert capsys.readouterr().err.count(f"WARNING: the log {log} cannot be written: File too large. Training goes on;") == 1
    t.close()
    assert "missing" not in capsys.readouterr().err


def test_a_disk_that_stays_full(tmp_path, capsys, monkeypatch):
    """What waits is bounded, and is said to be missing in the end."""
    monkeypatch.setattr(log_module, "_MOST_WAITING", 2)
    (tmp_path / "log").symlink_to("/dev/full")
    t = trainer(log=tmp_path / "log")
    t.fit()
    assert t.done == 6 and len(t._log_file._waiting) == 2
    t.close()
    told = capsys.readouterr().err
    assert told.count("cannot be written: No space left on device") == 1
    assert "WARNING: 6 line(s) are missing in the log /dev/full" in told


def test_lines_that_begun_are_not_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "_MOST_WAITING", 2)
    log = LogFile(tmp_path / "log")
    with largest_file(5):
        for step in range(1, 5):
            log.write({"step": step})
    log.close()
    assert steps(tmp_path / "log") == [1, 4]


def test_a_half_line_of_a_killed_job_does_not_swallow_the_next(tmp_path):
    log = tmp_path / "log"
    for rest, left in ((b'{"step": 8, "lo', [7, 1]), (b'{"step": 8}', [7, 8, 1]), (b"\0\0\0", [7, 1])):
        log.write_bytes(b'{"step": 7}\n' + rest)
        t = trainer(log=log)
        t.fit(until=1)
        t.close()
        assert steps(log) == left


def test_resuming_cuts_the_log_where_nothing_can_be_written(tmp_path, monkeypatch):
    log = tmp_path / "log"
    t = trainer(folder=tmp_path / "saved", log=log)
    t.fit(until=2)
    t.save()
    t.fit(until=4)
    t.close()
    log.write_bytes(log.read_bytes() + b'{"st')
    again = trainer(folder=tmp_path / "saved", log=log)
    again.checkpoints.lock()
    with monkeypatch.context() as full:
        full.setattr(log_module.os, "write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert again.resume()
    assert steps(log) == [1, 2]
    again.fit(until=3)
    again.close()
    assert steps(log) == [1, 2, 3]


def test_a_log_that_cannot_be_cut_is_told(tmp_path, monkeypatch):
    log = tmp_path / "log"
    t = trainer(folder=tmp_path / "saved", log=log)
    t.fit(until=2)
    t.save()
    t.close()
    log.write_bytes(b"damaged\n" + log.read_bytes())  # so that it must be written anew
    again = trainer(folder=tmp_path / "saved", log=log)
    monkeypatch.setattr(log_module.os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    text = f"the lines behind step 2 cannot be cut from the log {log}: No space left on device"
    with pytest.raises(TrainingError, match=text):
        again.resume()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "saved"] and log.read_bytes().startswith(b"damaged\n")


def test_two_jobs_do_not_write_one_log(tmp_path):
    """Nor one of them through a link; forked children have no part in it."""
    log = tmp_path / "log"
    (tmp_path / "link").symlink_to(log)
    first = trainer(log=log)
    first.fit(until=1)
    second = trainer(log=tmp_path / "link")
    with pytest.raises(TrainingError, match=f"another job logs to {tmp_path}/link; end it, or choose another file"):
        second.fit()
    assert second.done == 0 and steps(log) == [1]
    ended, release = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(release)
        os.read(ended, 1)
        os._exit(0)
    os.close(ended)
    first.close()
    second.fit(until=1)  # though the child lives
    second.close()
    os.close(release)
    assert os.waitpid(child, 0)[1] == 0 and steps(log) == [1, 1]


def test_a_second_job_that_resumes_does_not_cut_the_first_ones_log(tmp_path):
    log = tmp_path / "log"
    t = trainer(folder=tmp_path / "saved", log=log)
    t.fit(until=2)
    t.save()
    t.fit(until=4)
    with pytest.raises(CheckpointError, match="another job saves to"):
        trainer(folder=tmp_path / "saved", log=log).resume()
    assert steps(log) == [1, 2, 3, 4]
    t.close()


def test_a_log_that_is_moved_begins_anew(tmp_path):
    log = tmp_path / "log"
    t = trainer(log=log)
    t.fit(until=2)
    log.rename(tmp_path / "old")
    t.fit(until=4)
    log.unlink()
    t.fit()
    assert steps(tmp_path / "old") == [1, 2] and steps(log) == [5, 6]
    t.close()


@pytest.mark.parametrize("where", ["nowhere/log", "."])
def test_a_log_that_cannot_be(tmp_path, where):
    """Told before training."""
    t = trainer(log=tmp_path / where)
    with pytest.raises(TrainingError, match=rf"the log {tmp_path}/?.* cannot be written: (No such file|Is a directory)"):
        t.fit()
    assert t.done == 0


def test_a_picture_that_cannot_be_drawn_is_a_note(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    log = tmp_path / "log"
    log.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    cases: list[tuple[Any, Any]] = [(log, tmp_path / "nowhere" / "loss.png"), (tmp_path / "missing", tmp_path / "loss.png")]
    for source, picture in cases:
        assert plot_log(source, picture, {}, 2.5) is False
        assert capsys.readouterr().err.startswith("no loss curve: ")
