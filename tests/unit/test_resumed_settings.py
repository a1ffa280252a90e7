"""Whose settings are used when a run goes on from another one's state."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, load_training
from bmtrain_ms.lr_scheduler import WSD, Cosine, WarmupLRScheduler
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from tests.helpers.training_v1 import save_training

pytestmark = pytest.mark.usefixtures("single_world")


def parameter(name: str) -> Parameter:
    return Parameter(Tensor(np.ones(3, np.float32)), name=name)


class Run:
    """Two groups of one parameter each, the second with a rate of its own."""

    def __init__(self, schedule: Any = None, own: float = 0.5, make: Any = None, **adam: Any):
        self.model = nn.Cell()
        self.model.a, self.model.b = parameter("a"), parameter("b")
        groups = [{"params": [self.model.a]}, {"params": [self.model.b], "lr": own}]
        self.optimizer = make(groups) if make else AdamOptimizer(groups, **{"lr": 0.1, **adam})
        self.schedule = schedule(self.optimizer) if schedule else None
        self.manager = OptimManager()
        self.manager.add_optimizer(self.optimizer, self.schedule)

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.manager.zero_grad()
            self.manager.backward(lambda: (self.model.a * 2 + self.model.b).sum())
            self.manager.step()
        return self

    def state(self) -> Any:
        """As a checkpoint keeps it."""
        return json.loads(json.dumps(self.manager.state_dict(tensors=False)))

    def resumed(self, state: Any, **options: Any) -> Run:
        self.manager.load_state_dict(state, **{"keep": "own", **options})
        return self

    @property
    def rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


def cosine(peak: float = 0.1, warmup: int = 2, end: int = 10) -> Any:
    return lambda optimizer: Cosine(optimizer, peak, warmup, end)


def test_the_same_settings_are_not_worth_a_word(capsys):
    saved = Run(cosine()).train(4)
    again = Run(cosine()).resumed(saved.state())
    assert again.rates == saved.rates and again.schedule.num_iter == 4
    assert again.state() == saved.state() and capsys.readouterr().err == ""


def test_a_longer_schedule_is_used_and_told(capsys):
    """At the end of the old one the rate was 0."""
    saved = Run(cosine(end=4)).train(4)
    assert saved.rates == [0.0, 0.0]
    again = Run(cosine(0.2, end=100)).resumed(saved.state())
    fresh = Run(cosine(0.2, end=100))
    fresh.schedule.step(4)
    assert again.rates == fresh.rates and again.schedule.num_iter == 4 and again.rates[0] > 0.19
    told = capsys.readouterr().err
    assert "Cosine: start_lr 0.2 (saved: 0.1)" in told and "Cosine: end_iter 100 (saved: 4)" in told
    assert told.startswith("WARNING: this run has other settings than the one that saved, and uses its own: ")
    assert told.endswith("A script that wants the others loads with keep='saved'\n") and told.count("\n") == 1
    as_saved = Run(cosine(0.2, end=100)).resumed(saved.state(), keep="saved")
    assert as_saved.rates == [0.0, 0.0] and as_saved.schedule.end_iter == 4
    assert (
        "and uses the saved ones: Cosine: start_lr 0.2 (saved: 0.1); Cosine: end_iter 100 (saved: 4). A script"
        in capsys.readouterr().err
    )
    other = Run(cosine(0.2, end=100))
    other.manager.load_state_dict(saved.state())  # a state in hand is what is meant, as in BMTrain; not without a word
    assert other.schedule.end_iter == 4 and "uses the saved ones" in capsys.readouterr().err


def test_settings_of_groups_are_used_and_told(capsys):
    saved = Run().train(1)
    again = Run(own=0.25, betas=(0.5, 0.6), weight_decay=0.3).resumed(saved.state())
    group = again.optimizer.param_groups[1]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.5, 0.6), 0.3)
    told = capsys.readouterr().err
    assert "optimizer 0, group 0: betas (0.5, 0.6) (saved: (0.9, 0.999))" in told and "group 1: lr 0.25 (saved: 0.5)" in told
    assert "group 0: lr" not in told and "eps" not in told
    as_saved = Run(own=0.25, betas=(0.5, 0.6)).resumed(saved.state(), keep="saved")
    assert as_saved.optimizer.param_groups[1]["lr"] == 0.5 and as_saved.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_what_was_changed_by_hand_goes_on(capsys):
    """It is what was in force; the settings are those that the run was made with."""
    saved = Run().train(1)
    saved.optimizer.param_groups[0]["lr"] = 0.01
    state = saved.state()
    again = Run().resumed(state)
    assert again.rates == [0.01, 0.5] and capsys.readouterr().err == ""
    chosen = Run(lr=0.05).resumed(state)
    assert chosen.rates == [0.05, 0.5]
    assert "optimizer 0, group 0: lr 0.05 (saved: 0.01)" in capsys.readouterr().err
    third = Run().resumed(again.train(1).state())  # a resumed run's checkpoints say the same
    assert third.rates == [0.01, 0.5] and capsys.readouterr().err == ""


def test_what_was_changed_by_hand_before_loading_is_replaced_and_told(capsys):
    state = Run().train(1).state()
    again = Run()
    again.optimizer.param_groups[0]["lr"] = 77.0
    again.resumed(state)
    assert again.rates == [0.1, 0.5]
    assert "replaced by what was saved: optimizer 0, group 0: lr 77.0 (saved: 0.1). Change it after" in capsys.readouterr().err


def test_going_back_in_one_process_restores_what_was_in_force(capsys):
    run = Run(cosine()).train(2)
    state = run.state()
    run.train(2)
    run.optimizer.param_groups[0]["weight_decay"] = 0.7
    run.resumed(state)
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.0 and run.schedule.num_iter == 2
    assert capsys.readouterr().err == ""


def test_a_peak_of_a_group_s_own_is_told_and_can_be_taken_over(capsys):
    saved = Run(cosine(), own=0.5).train(3)
    again = Run(cosine(), own=0.25).resumed(saved.state())
    assert again.rates == [saved.rates[0], saved.rates[1] / 2]
    assert "group 1: lr of its own 0.25 (saved: 0.5)" in capsys.readouterr().err
    assert Run(cosine(), own=0.25).resumed(saved.state(), keep="saved").rates == saved.rates


def test_states_of_earlier_versions_do_not_say_what_was_chosen(capsys):
    """Then what is here is used, and told."""
    state = Run(cosine()).train(3).state()
    for saved in state["optimizers"]:
        del saved["made"]
    assert Run(cosine()).resumed(state).schedule.num_iter == 3 and capsys.readouterr().err == ""
    assert Run(cosine(end=20)).resumed(state).schedule.end_iter == 20
    assert "Cosine: end_iter 20 (saved: 10)" in capsys.readouterr().err


class Plateau(WarmupLRScheduler):
    """Counts something."""

    def __init__(self, optimizer: Any, start_lr: float, patience: int = 3):
        self.patience, self.bad = patience, 0
        super().__init__(optimizer, start_lr, 0, 0)

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr / (1 + self.bad // self.patience)


@pytest.mark.parametrize("old", [False, True])
def test_what_a_schedule_counts_is_no_setting(old, capsys):
    saved = Run(lambda o: Plateau(o, 0.1)).train(1)
    saved.schedule.bad = 7
    state = saved.state()
    if old:
        del state["optimizers"][0]["made"]
    again = Run(lambda o: Plateau(o, 0.1, patience=4)).resumed(state)
    assert (again.schedule.bad, again.schedule.patience) == (7, 4)
    assert "Plateau: patience 4 (saved: 3). A script" in capsys.readouterr().err


def test_every_schedule_s_own_settings(capsys):
    state = Run(lambda o: WSD(o, 0.1, 1, 10, decay_iter=5)).train(2).state()
    again = Run(lambda o: WSD(o, 0.1, 1, 10, decay_iter=7, end_lr=0.01)).resumed(state)
    assert (again.schedule.decay_iter, again.schedule.end_lr, again.schedule.num_iter) == (7, 0.01, 2)
    assert "WSD: decay_iter 7 (saved: 5); WSD: end_lr 0.01 (saved: 0.0)" in capsys.readouterr().err


def test_mindspore_s_optimizers_too(capsys):
    def make(rate: float) -> Any:
        return lambda groups: nn.Momentum(groups, rate, 0.9)

    saved = Run(make=make(0.1)).train(1)
    again = Run(make=make(0.05)).resumed(saved.state())
    assert bms.lr_scheduler.group_rates(again.optimizer)[0][0] is None
    assert again.manager.drivers[0].state_dict(tensors=False)["rates"] == pytest.approx([0.05, 0.5])
    assert "group 0: lr 0.05" in capsys.readouterr().err


@pytest.mark.parametrize(
    "made", [3, [], {"groups": 3}, {"groups": [3]}, {"groups": [{"names": 4}], "schedule": []}, {"schedule": 1}]
)
@pytest.mark.parametrize("keep", ["own", "saved"])
def test_what_a_damaged_state_says_of_it_is_not_believed(made, keep):
    state = Run(cosine()).train(3).state()
    state["optimizers"][0]["made"] = made
    assert Run(cosine(end=20)).resumed(state, keep=keep).schedule.num_iter == 3


@pytest.mark.parametrize("file", [False, True], ids=["folder", "file"])
def test_a_checkpoint_s_settings(tmp_path, capsys, file):
    saved = Run(cosine()).train(3)
    if file:
        save_training(tmp_path / "file", saved.model, saved.manager, {})
    else:
        Checkpointer(tmp_path, saved.model, saved.manager).save(3)

    def load(run: Run, **options: Any) -> Run:
        if file:
            load_training(tmp_path / "file", run.model, run.manager, **options)
        else:
            Checkpointer(tmp_path, run.model, run.manager).load(**options)
        return run

    assert load(Run(cosine(end=20))).schedule.end_iter == 20
    assert "end_iter 20 (saved: 10)" in capsys.readouterr().err
    assert load(Run(cosine(end=20)), keep="saved").schedule.end_iter == 10
    with pytest.raises(ValueError, match="keep must be own or saved, not 'mine'"):
        load(Run(cosine()), keep="mine")
    assert load(Run(cosine())).train(2).rates == saved.train(2).rates
