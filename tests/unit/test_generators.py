"""States of Python's and NumPy's global generators: whatever is drawn is seen, and nothing else."""

from __future__ import annotations

import random
from typing import Any, Callable, Iterator

import numpy as np
import pytest

from bmtrain_ms_base import generators


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Generators go on as if no test had been here."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    random.seed(3)
    np.random.seed(3)
    yield
    random.setstate(python)
    np.random.set_state(numpy)


def _spare_normal() -> None:
    """Draws what the last draw has left: the words of the generator stay as they are."""
    before = np.random.get_state(legacy=False)
    np.random.randn()
    after = np.random.get_state(legacy=False)
    assert np.array_equal(before["state"]["key"], after["state"]["key"]) and before["state"]["pos"] == after["state"]["pos"]


DRAWS: dict[str, Callable[[], Any]] = {
    "random": random.random,
    "gauss, of which Python keeps another": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.shuffle([1, 2, 3]),
    "seed": lambda: random.seed(4),
    "rand": np.random.rand,
    "one byte": lambda: np.random.bytes(1),
    "randn": np.random.randn,
    "np.seed": lambda: np.random.seed(4),
    "700 numbers": lambda: np.random.rand(700),
}


def test_their_memory_is_known_here():
    assert generators._memory() is not None  # or states are read each time, and nobody notices


@pytest.mark.parametrize("known", [True, False], ids=["memory compared", "states read"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_each_draw_is_seen_and_drawn_again(draw: Callable[[], Any], known: bool, monkeypatch: pytest.MonkeyPatch):
    if not known:
        monkeypatch.setattr(generators, "_SPARE", None)
    before = generators.states()
    assert generators.same(before, generators.states())
    draw()
    after = generators.states()
    assert not generators.same(before, after)
    expected = random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()
    generators.restore(after)
    assert (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()) == expected
    generators.restore(before)
    assert generators.same(before, generators.states())


@pytest.mark.parametrize("known", [True, False], ids=["memory compared", "states read"])
def test_a_normal_number_that_was_left_is_seen_when_it_is_taken(known: bool, monkeypatch: pytest.MonkeyPatch):
    if not known:
        monkeypatch.setattr(generators, "_SPARE", None)
    np.random.randn()
    before = generators.states()
    _spare_normal()
    assert not generators.same(before, generators.states())
    generators.restore(before)
    assert np.random.get_state(legacy=False)["has_gauss"] == 1 and generators.same(before, generators.states())


def test_pythons_spare_gauss_is_seen_when_it_is_taken():
    random.gauss(0, 1)
    before, words = generators.states(), random.getstate()[1]
    random.gauss(0, 1)
    assert random.getstate()[1] == words and not generators.same(before, generators.states())


def test_states_are_read_once_while_nothing_is_drawn():
    first = generators.states()
    assert generators.states() is first
    random.random()
    second = generators.states()
    assert second is not first and generators.states() is second


def test_another_kind_of_generator_is_read_each_time():
    mine = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        assert generators._memory() is None
        before = generators.states()
        assert generators.same(before, generators.states())
        np.random.rand()
        assert not generators.same(before, generators.states())
    finally:
        np.random.set_bit_generator(mine)
