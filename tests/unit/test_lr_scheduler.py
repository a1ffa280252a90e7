"""Schedules by their formulas, at the edges, through a checkpoint. No MindSpore here."""

from __future__ import annotations

import inspect
import json
import math
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmtrain_ms import lr_scheduler
from bmtrain_ms.lr_scheduler import WSD, Cosine, Exponential, Linear, Noam, NoDecay, WarmupLRScheduler


def optimizer(groups: int = 1) -> Any:
    return SimpleNamespace(param_groups=[{"lr": -1.0} for _ in range(groups)])


def rates(make: Callable[..., WarmupLRScheduler], s: float, w: int, e: int, steps: int, **settings: Any) -> list[float]:
    """The rate in force before step 0, 1, ... `steps`."""
    target = optimizer()
    schedule = make(target, s, w, e, **settings)
    seen = [target.param_groups[0]["lr"]]
    for _ in range(steps):
        schedule.step()
        seen.append(target.param_groups[0]["lr"])
    return seen


# class, settings, rate at n >= w
DECAYS: list[tuple[type, dict, Callable[[float, int, int, int], float]]] = [
    (NoDecay, {}, lambda s, w, e, n: s),
    (Noam, {}, lambda s, w, e, n: s / math.sqrt(n) if n else s),
    (Linear, {}, lambda s, w, e, n: s * (e - n) / (e - w) if n < e else 0.0),
    (Cosine, {}, lambda s, w, e, n: s * (1 + math.cos(math.pi * (n - w) / (e - w))) / 2 if n < e else 0.0),
    (Exponential, {}, lambda s, w, e, n: s * 0.95 ** (n - w)),
    (Exponential, {"gamma": 0.5}, lambda s, w, e, n: s * 0.5 ** (n - w)),
]
EVERY = pytest.mark.parametrize("make, settings, decay", DECAYS, ids=lambda x: getattr(x, "__name__", "") or str(x))


@EVERY
@given(s=st.floats(1e-6, 10.0), w=st.integers(0, 12), length=st.integers(0, 12))
def test_formula(make, settings, decay, s, w, length):
    """w = 0, e = w and n > e among them."""
    e = w + length
    peak = s / math.sqrt(w) if make is Noam and w else s
    for n, rate in enumerate(rates(make, s, w, e, e + 5, **settings)):
        expected = peak * n / w if n < w else decay(s, w, e, n)
        # the cosine just before e is as small as the rounding of its terms
        assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15 * s), n
        assert rate >= 0.0


@given(
    s=st.floats(1e-6, 10.0),
    share=st.floats(0.0, 1.0),
    w=st.integers(0, 6),
    stable=st.integers(0, 6),
    length=st.integers(0, 6),
)
def test_wsd_formula(s, share, w, stable, length):
    decay, e, last = w + stable, w + stable + length, s * share
    seen = rates(WSD, s, w, e, e + 5, decay_iter=decay, end_lr=last)
    for n, rate in enumerate(seen):
        if n < w:
            expected = s * n / w
        elif n < decay:
            expected = s
        else:
            expected = last + (s - last) * (e - n) / (e - decay) if n < e else last
        assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15 * s), n


def test_known_values():
    """Written out by hand, so that the formulas above are not the only witness."""
    assert rates(Linear, 1.0, 2, 6, 8) == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert rates(Cosine, 2.0, 0, 2, 4) == pytest.approx([2.0, 1.0, 0.0, 0.0, 0.0], abs=1e-15)
    assert rates(Noam, 6.0, 4, 100, 9)[::3] == pytest.approx([0.0, 2.25, 6 / math.sqrt(6), 2.0])
    assert rates(WSD, 1.0, 1, 5, 6, decay_iter=3, end_lr=0.5) == [0.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.5]
    assert rates(NoDecay, 1.0, 0, 0, 2) == [1.0, 1.0, 1.0]


def test_noam_at_zero_without_warmup():
    assert rates(Noam, 3.0, 0, 0, 4) == pytest.approx([3.0, 3.0, 3 / math.sqrt(2), math.sqrt(3), 1.5])


def test_cosine_does_not_rise_again():
    seen = rates(Cosine, 1.0, 3, 10, 40)
    assert all(later <= earlier for earlier, later in zip(seen[3:], seen[4:]))


@EVERY
def test_end_at_warmup(make, settings, decay):
    """No division by e - w = 0; the decays that end are at their end."""
    seen = rates(make, 1.0, 4, 4, 6, **settings)
    assert seen[:4] == pytest.approx([(0.5 if make is Noam else 1.0) * n / 4 for n in range(4)])
    assert (seen[4] == 0.0) == (make in (Linear, Cosine))
    assert (seen[5] == 0.0) == (make in (Linear, Cosine))


def test_the_optimizer_gets_every_rate_in_all_groups():
    target = optimizer(3)
    schedule = Linear(target, 0.5, 2, 10, num_iter=1)  # construction applies at once
    assert [g["lr"] for g in target.param_groups] == [0.25] * 3 and schedule.current_lr == 0.25
    schedule.step()
    assert [g["lr"] for g in target.param_groups] == [0.5] * 3 and schedule.current_lr == 0.5
    target.param_groups[0]["lr"] = 7.0
    assert schedule.get_lr() == 0.5 and target.param_groups[0]["lr"] == 7.0  # asking changes nothing
    schedule.step(8)
    assert schedule.num_iter == 8 and target.param_groups[0]["lr"] == schedule.current_lr == 0.125
    schedule.step(0)
    assert target.param_groups[2]["lr"] == 0.0


ALL = [(make, settings) for make, settings, _ in DECAYS] + [(WSD, {"decay_iter": 5, "end_lr": 0.125})]


@pytest.mark.parametrize("make, settings", ALL, ids=lambda x: getattr(x, "__name__", "") or str(x))
def test_state_round_trip(make, settings):
    """Through JSON, into a schedule of other settings, which then goes on alike."""
    schedule = make(optimizer(), 0.75, 3, 9, **settings)
    for _ in range(4):
        schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    assert state == {
        "start_lr": 0.75,
        "warmup_iter": 3,
        "end_iter": 9,
        "num_iter": 4,
        **({"gamma": 0.95} if make is Exponential else {"end_lr": 0.0} if make in (Linear, Cosine) else {}),
        **({"shape": "linear"} if make is WSD else {}),
        **settings,
    }
    others = {"decay_iter": 2, "end_lr": 0.0} if make is WSD else {}
    target = optimizer(2)
    other = make(target, 9.0, 1, 2, **others)
    other.load_state_dict(state)
    assert other.optimizer is target
    for _ in range(8):
        assert [g["lr"] for g in target.param_groups] == [schedule.current_lr] * 2
        assert other.current_lr == schedule.current_lr
        schedule.step()
        other.step()


def test_state_of_another_class():
    state = Exponential(optimizer(), 1.0, 0, 1).state_dict()
    with pytest.raises(
        ValueError, match=r"not the state of a Cosine: it has \['end_iter', 'gamma', .*expected \['end_iter', 'end_lr', 'num_iter'"
    ):
        Cosine(optimizer(), 1.0, 0, 1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"not the state of a WSD"):
        WSD(optimizer(), 1.0, 0, 1, decay_iter=0).load_state_dict(state)


@pytest.mark.parametrize("w, e", [(-1, 5), (6, 5), (0, -1)])
def test_bad_lengths(w, e):
    target = optimizer()
    with pytest.raises(ValueError, match=f"need 0 <= warmup_iter <= end_iter, not warmup_iter={w}, end_iter={e}"):
        Cosine(target, 1.0, w, e)
    assert target.param_groups[0]["lr"] == -1.0


@pytest.mark.parametrize("end", [-1, None, 3])
def test_schedules_that_have_no_end_take_anything_as_one(end):

    class Own(WarmupLRScheduler):
        def get_lr_decay(self, num_iter: int) -> float:
            return self.start_lr / 2

    for kind in (NoDecay, Noam, Exponential, Own):
        ours, other = (kind(optimizer(), 1.0, 4, e) for e in (end, 1000))
        for _ in range(8):
            assert ours.current_lr == other.current_lr
            ours.step()
            other.step()


def test_a_state_whose_next_rate_cannot_be():
    """It would be refused in the middle of the first step."""
    schedule = Exponential(optimizer(), 1.0, 0, 9)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match="this is not the state of a Exponential: no rate follows from "):
        schedule.load_state_dict({**before, "num_iter": 1, "gamma": 1e200})
    assert schedule.state_dict() == before and schedule.current_lr == 1.0


@pytest.mark.parametrize("decay", [1, 11])
def test_bad_decay_start(decay):
    with pytest.raises(ValueError, match=f"need warmup_iter <= decay_iter <= end_iter, not 2, {decay}, 10"):
        WSD(optimizer(), 1.0, 2, 10, decay_iter=decay)


def test_a_schedule_without_a_decay_cannot_be_made():
    """Rather than fail when the warm-up ends, after hours."""

    class Forgotten(WarmupLRScheduler):
        def get_lr_warmup(self, num_iter: int) -> float:
            return 0.5

    for kind in (WarmupLRScheduler, Forgotten):
        with pytest.raises(TypeError, match=f"abstract class {kind.__name__} .*get_lr_decay"):
            kind(optimizer(), 1.0, 2, 4)


def test_own_schedule():
    class Halved(WarmupLRScheduler):
        def get_lr_decay(self, num_iter: int) -> float:
            return self.start_lr / 2

    assert rates(Halved, 1.0, 2, 4, 3) == [0.0, 0.5, 0.5, 0.5]


def test_every_schedule_is_tested():
    defined = {c for c in vars(lr_scheduler).values() if WarmupLRScheduler in getattr(c, "__mro__", ())}
    assert {c for c in defined if not c.__name__.startswith("_")} == {make for make, _ in ALL} | {WarmupLRScheduler}


# A group's own rate #

EVERY_CLASS = pytest.mark.parametrize("make, settings", ALL, ids=lambda x: getattr(x, "__name__", "") or str(x))


def with_own_rates(own: list[float | None]) -> Any:
    return SimpleNamespace(param_groups=[{"lr": -1.0, "own_lr": rate} for rate in own])


@EVERY_CLASS
def test_a_groups_own_rate_is_its_peak(make, settings):
    """It follows the others in proportion, and every write starts from it: also after going back, and after loading."""
    target = with_own_rates([None, 0.125, 0.0, 3.0])
    schedule = make(target, 0.5, 3, 9, **settings)
    reference = rates(make, 0.5, 3, 9, 14, **settings)

    def check(n: int) -> None:
        assert [g["lr"] for g in target.param_groups] == pytest.approx(
            [reference[n], 0.25 * reference[n], 0.0, 6.0 * reference[n]], rel=1e-12
        )

    check(0)
    for n in range(1, 15):
        schedule.step()
        check(n)
    for n in (5, 0, 3):
        schedule.step(n)
        check(n)
    schedule.load_state_dict({**schedule.state_dict(), "num_iter": 4})
    check(4)


@EVERY_CLASS
def test_an_own_rate_that_equals_the_peak_is_no_exception(make, settings):
    target = with_own_rates([0.5, None])
    schedule = make(target, 0.5, 2, 8, **settings)
    for _ in range(12):
        assert target.param_groups[0]["lr"] == pytest.approx(target.param_groups[1]["lr"], rel=1e-12)
        schedule.step()


def test_own_rates_of_groups_that_do_not_say():
    """Another rate than the default's was given to the group."""
    groups = [{"lr": 0.1}, {"lr": 0.4}, {"lr": 0.1}]
    target = SimpleNamespace(param_groups=groups, defaults={"lr": 0.1})
    schedule = Linear(target, 0.2, 2, 4, num_iter=1)
    assert [g["lr"] for g in groups] == [0.1, 0.2, 0.1]
    schedule.step()
    assert [g["lr"] for g in groups] == [0.2, 0.4, 0.2]
    schedule.step()
    assert [g["lr"] for g in groups] == [0.1, 0.2, 0.1]


@EVERY_CLASS
def test_a_peak_of_zero(make, settings):
    """Nothing is divided by it; own rates are off too."""
    target = with_own_rates([None, 0.3])
    schedule = make(target, 0.0, 2, 6, **{**settings, **({"end_lr": 0.0} if make is WSD else {})})
    for _ in range(9):
        assert [g["lr"] for g in target.param_groups] == [0.0, 0.0]
        schedule.step()


# Edges, for every class #

ENDS = {Linear: 0.0, Cosine: 0.0, WSD: 0.125}


def at_once(make: Any, w: int, e: int) -> dict[str, Any]:
    return {"decay_iter": w, "end_lr": 0.125} if make is WSD else {}


@pytest.mark.parametrize("make", dict.fromkeys(make for make, _ in ALL))
@pytest.mark.parametrize("w, e", [(0, 0), (0, 1), (0, 5), (4, 4), (4, 5)])
def test_edges(make, w, e):
    """No warm-up, no decay, one step of it: peak where it belongs, the end from e on, nothing undefined."""
    seen = rates(make, 1.0, w, e, e + 20, **at_once(make, w, e))
    peak = 0.5 if make is Noam and w else 1.0
    assert seen[:w] == pytest.approx([peak * n / w for n in range(w)])
    assert seen[w] == pytest.approx(ENDS[make] if make in ENDS and e == w else peak)
    assert all(0.0 <= rate <= 1.0 for rate in seen)
    if make in ENDS:
        assert seen[e:] == [ENDS[make]] * 21
    else:
        assert all(later <= earlier for earlier, later in zip(seen[w:], seen[w + 1 :]))


def test_states_hold_every_setting():
    """What a class takes besides the optimizer, it saves."""
    for make, settings in ALL:
        taken = set(inspect.signature(make.__init__).parameters) - {"self", "optimizer"}
        assert set(make(optimizer(), 1.0, 2, 8, **settings).state_dict()) == taken, make


@pytest.mark.parametrize("make", [Linear, Cosine])
def test_rates_fall_to_the_one_that_is_wanted(make):
    """As Megatron's `--min-lr`: at both ends and, for the half way, by the formulas."""
    schedule = make(optimizer(), 1.0, 2, 10, end_lr=0.2)
    rates = []
    for _ in range(14):
        rates.append(schedule.current_lr)
        schedule.step()
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[6] == pytest.approx(0.6)
    assert rates[10:] == [0.2] * 4
    with pytest.raises(ValueError, match="0 <= end_lr <= start_lr"):
        make(optimizer(), 1.0, 2, 10, end_lr=1.5)


@pytest.mark.parametrize("make", [Linear, Cosine])
def test_states_of_before_there_was_an_end_lr_are_read(make):
    schedule = make(optimizer(), 1.0, 2, 10, end_lr=0.2)
    state = {"start_lr": 1.0, "warmup_iter": 2, "end_iter": 10, "num_iter": 10}
    schedule.load_state_dict(state)
    assert (schedule.end_lr, schedule.current_lr) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("shape", "quarter", "half", "three"),
    [
        ("linear", 0.75, 0.5, 0.25),
        ("exponential", 0.681793, 0.414214, 0.189207),
        ("minus_sqrt", 0.5, 0.292893, 0.133975),
        ("cosine", 0.853553, 0.5, 0.146447),
    ],
)
def test_shapes_of_the_decay_are_megatrons(shape, quarter, half, three):
    schedule = WSD(optimizer(), 1.0, 0, 12, decay_iter=4, shape=shape)
    assert [schedule.get_lr_decay(n) for n in (3, 4, 6, 8, 10, 12)] == pytest.approx([1, 1, quarter, half, three, 0], abs=1e-6)


def test_a_shape_that_is_none_and_states_without_one():
    with pytest.raises(ValueError, match="shape must be one of linear, exponential, minus_sqrt, cosine, not 'round'"):
        WSD(optimizer(), 1.0, 0, 9, decay_iter=3, shape="round")
    schedule = WSD(optimizer(), 1.0, 0, 9, decay_iter=3, shape="cosine")
    state = {name: value for name, value in schedule.state_dict().items() if name != "shape"}
    schedule.load_state_dict(state)
    assert schedule.shape == "linear"
    with pytest.raises(ValueError, match="not the state of a WSD: shape is 'round'"):
        schedule.load_state_dict({**state, "shape": "round"})
