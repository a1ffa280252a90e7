"""Sharded training against an unsharded twin: loss, gradients, and parameters after 5 steps."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tests.helpers.models import train_sharded, train_twin

GRID = list(product((2, 3), (True, False), (False, True)))  # ZeRO level, checkpoint, half


def train_all(world):
    """All settings in one visit: results by setting (the pools live long, pickling is cheap)."""
    return {setting: train_sharded(world, 5, *setting) for setting in GRID}


@pytest.fixture(scope="module")
def twins():
    cache = {}

    def twin(initial, half):
        if half not in cache:
            cache[half] = train_twin(initial, 5, half)
        return cache[half]

    return twin


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parity_with_the_unsharded_twin(run_ranks, single_world, twins, ranks):
    results = run_ranks(ranks, train_all)
    for setting in GRID:
        half = setting[2]
        got = [r[setting] for r in results]
        for other in got[1:]:
            assert other["losses"] == got[0]["losses"], f"ranks disagree on the loss: {setting}"
            for name, value in got[0]["final"].items():
                np.testing.assert_array_equal(other["final"][name], value, err_msg=f"ranks disagree on {name}: {setting}")
        twin = twins(got[0]["initial"], half)
        loss_rtol, grad_atol, final_atol = (2e-3, 2e-3, 2e-2) if half else (1e-6, 1e-6, 2e-5)
        np.testing.assert_allclose(got[0]["losses"], twin["losses"], rtol=loss_rtol, err_msg=str(setting))
        for name, expected in twin["grads"].items():
            np.testing.assert_allclose(got[0]["grads"][name], expected, atol=grad_atol, err_msg=f"{name} {setting}")
        for name, expected in twin["final"].items():
            np.testing.assert_allclose(got[0]["final"][name], expected, atol=final_atol, err_msg=f"{name} {setting}")


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3])
def test_level_checkpoint_and_prefetch_do_not_change_a_bit(run_ranks, ranks):
    reference, *others = run_ranks(ranks, every_schedule)[0]
    for other in others:
        assert other["losses"] == reference["losses"]
        for name, value in reference["final"].items():
            np.testing.assert_array_equal(other["final"][name], value, err_msg=name)


def every_schedule(world):
    schedules = product((3, 2), (True, False), (0, 1, 2))
    return [train_sharded(world, 3, level, checkpoint, False, prefetch) for level, checkpoint, prefetch in schedules]
