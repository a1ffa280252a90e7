"""Signals that come at other times than in a step: in evaluations, while saving, between calls, too early and too late."""

from __future__ import annotations

import contextlib
import gc
import signal
from typing import Any, Iterator

import pytest

import bmtrain_ms as bms
from bmtrain_ms.checkpoint.folder import latest_in
from bmtrain_ms.train import Stopped, StopSignals
from tests.unit.test_train import TOKENS, trainer

pytestmark = pytest.mark.usefixtures("single_world")

ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture
def came() -> Iterator[list[int]]:
    """Signals that had what stands for their usual effect here."""
    seen: list[int] = []
    before = {signum: signal.signal(signum, lambda got, frame: seen.append(got)) for signum in ALL}
    yield seen
    for signum, handler in before.items():
        signal.signal(signum, handler)


def during(t: Any, name: str, monkeypatch: Any, signum: int = signal.SIGTERM) -> None:
    """The signal comes while the trainer's function of this name runs, the first time."""
    function, left = getattr(t, name), [signum]

    def call(*args: Any) -> Any:
        while left:
            signal.raise_signal(left.pop())
        return function(*args)

    monkeypatch.setattr(t, name, call)


@pytest.mark.parametrize("signum", ALL)
def test_a_signal_in_an_evaluation_saves_what_was_trained(tmp_path, monkeypatch, came, signum):
    t = trainer(folder=tmp_path)
    t.fit(until=2)
    assert latest_in(tmp_path) is None
    calls = []
    loss = t.task.loss
    monkeypatch.setattr(t.task, "loss", lambda *args: (calls.append(1), signal.raise_signal(signum), loss(*args))[-1])
    with pytest.raises(Stopped, match=f"stopped after step 2, as a signal asked; saved in {tmp_path}"):
        t.evaluate(TOKENS, 6, rows=8)
    assert len(calls) == 1 and t.model.training  # of many rounds
    assert latest_in(tmp_path) == tmp_path / "step-00000002"
    t.close()
    assert not came


def test_without_a_folder_an_evaluation_stops_too(monkeypatch, came):
    t = trainer()
    t.fit(until=1)
    during(t.task, "loss", monkeypatch)
    with pytest.raises(Stopped, match="stopped after step 1, as a signal asked; there is no folder for a checkpoint"):
        t.evaluate(TOKENS, 6)
    t.close()
    assert not came


def test_before_the_first_step_a_signal_has_its_usual_effect(tmp_path, monkeypatch, came):
    """There is nothing to save."""
    t = trainer(folder=tmp_path)
    during(t.task, "loss", monkeypatch)
    t.evaluate(TOKENS, 6)
    assert came == [signal.SIGTERM]
    t.fit(until=1)
    t.close()
    assert came == [signal.SIGTERM] and t.done == 1


def test_a_signal_between_two_calls_stops_the_next(tmp_path, came):
    for call in (lambda t: t.fit(), lambda t: t.evaluate(TOKENS, 6), lambda t: t.save()):
        t = trainer(folder=tmp_path)
        t.fit(until=2)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped after step 2"):
            call(t)
        t.close()
    assert latest_in(tmp_path) == tmp_path / "step-00000002" and not came


def test_a_signal_while_a_checkpoint_is_saved(tmp_path, monkeypatch, came):
    t = trainer(folder=tmp_path)
    t.fit(until=2)
    during(t, "_extra", monkeypatch)
    with pytest.raises(Stopped, match=f"stopped after step 2, as a signal asked; saved in {tmp_path}"):
        t.save()
    t.close()
    assert not came


def test_a_resumed_run_is_watched_before_its_first_step(tmp_path, monkeypatch, came):
    t = trainer(folder=tmp_path)
    t.fit(until=2)
    t.save()
    t.close()
    again = trainer(folder=tmp_path)
    assert again.resume()
    during(again.task, "loss", monkeypatch)
    with pytest.raises(Stopped, match="stopped after step 2"):
        again.evaluate(TOKENS, 6)
    again.close()
    assert not came


def test_a_signal_after_the_last_call_has_its_usual_effect_at_the_end(tmp_path, came):
    t = trainer(folder=tmp_path)
    t.fit()
    t.save()
    signal.raise_signal(signal.SIGHUP)
    assert not came
    t.close()
    assert came == [signal.SIGHUP]
    t.close()
    assert came == [signal.SIGHUP]
    signal.raise_signal(signal.SIGHUP)
    assert came == [signal.SIGHUP] * 2


def test_a_trainer_that_is_forgotten_watches_no_longer(came):
    t = trainer()
    t.fit(until=1)
    signal.raise_signal(signal.SIGUSR1)
    assert not came
    del t
    gc.collect()
    assert came == [signal.SIGUSR1]
    signal.raise_signal(signal.SIGUSR1)
    assert came == [signal.SIGUSR1] * 2


def test_one_watch_for_two_trainers(tmp_path, came):
    """Nothing is lost between them."""
    stop = StopSignals()
    first = bms.train.Trainer(*(lambda t: (t.task, t.batches, t.manager, t.settings))(trainer()), tmp_path, signals=stop)
    first.fit(until=1)
    first.save()
    first.close()
    signal.raise_signal(signal.SIGTERM)
    second = bms.train.Trainer(*(lambda t: (t.task, t.batches, t.manager, t.settings))(trainer()), tmp_path, signals=stop)
    assert second.resume()
    with pytest.raises(Stopped):
        second.fit()
    second.close()
    stop.release()
    assert not came
    signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM]


def test_watches_may_end_in_any_order(came):
    first, second = StopSignals(), StopSignals()
    first.watch()
    second.watch()
    first.release()
    signal.raise_signal(signal.SIGTERM)
    assert second.asked and not first.asked and not came
    second.answered = True
    second.release()
    signal.raise_signal(signal.SIGTERM)  # the handler is the first's again, which has ended
    assert came == [signal.SIGTERM]


def test_under_nohup_a_lost_terminal_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [None, Stopped, KeyError])
def test_a_with_statement_closes(tmp_path, came, error):
    with contextlib.suppress(*([error] if error else [])), trainer(folder=tmp_path, log=tmp_path / "log") as t:
        t.fit(until=1)
        if error:
            raise error
    signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM]
    with trainer(log=tmp_path / "log") as other:
        other.fit(until=1)
