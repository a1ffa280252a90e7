"""The fixture itself: a failing rank is reported first, a hang ends, and the next test gets healthy ranks."""

from __future__ import annotations

import os
import time

import pytest

from tests.helpers.ranks import RankError


def rank_and_size(world, add):
    return world.engine.rank + add, world.engine.size


def fail_on_one(world):
    if world.engine.rank == 1:
        raise ValueError("the reason")
    world.engine.barrier("waits for rank 1").wait()


def hang(world):
    time.sleep(60)


def die(world):
    if world.engine.rank == 0:
        os._exit(3)
    world.engine.barrier().wait()


def process_id(world):
    return os.getpid()


def test_results_come_in_rank_order(run_ranks):
    assert run_ranks(2, rank_and_size, add=10) == [(10, 2), (11, 2)]


def test_ranks_are_kept_alive(run_ranks):
    assert run_ranks(2, process_id) == run_ranks(2, process_id)


def test_failing_rank_comes_first_and_the_pool_recovers(run_ranks):
    with pytest.raises(RankError, match=r"^rank 1 of 2 failed:\nTraceback(.|\n)*ValueError: the reason"):
        run_ranks(2, fail_on_one)
    assert run_ranks(2, rank_and_size, add=0) == [(0, 2), (1, 2)]


def test_hang_ends(run_ranks):
    with pytest.raises(RankError, match=r"without an answer: \[0, 1\] \(time-out 1 s"):
        run_ranks(2, hang, timeout=1)


def test_death_is_reported(run_ranks):
    with pytest.raises(RankError, match="rank 0 of 2 failed:\nthe process died"):
        run_ranks(2, die, timeout=20)
