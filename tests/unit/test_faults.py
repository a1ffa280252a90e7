"""Steps that go wrong, and batches that are left out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bmtrain_ms.train.faults import Faults, keep_batch
from bmtrain_ms_base.data import Batch
from bmtrain_ms_base.data.skipping import Skipping


class Numbers:
    """Batches that hold their number."""

    @property
    def described(self) -> dict[str, str]:
        return {"data": "numbers"}

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        return Batch(np.array([[step]]), np.array([[rank]]))


def test_a_loss_is_a_spike_beside_the_usual_ones_only():
    faults = Faults(3, 2.0)
    assert faults.wrong(100.0, 1.0, True) is None  # nothing is usual yet
    for _ in range(20):
        assert faults.wrong(3.0, 1.0, True) is None
    assert faults.wrong(5.9, 1.0, True) is None
    told = faults.wrong(6.1, 1.0, True)
    assert told == "loss 6.1, more than 2 times the usual 3,"
    assert faults.in_a_row == 1
    assert faults.wrong(3.0, 1.0, True) is None
    assert faults.in_a_row == 0
    assert 6.1 not in faults.recent


def test_an_overflow_is_for_the_loss_scale_to_see():
    faults = Faults(3, 2.0)
    faults.recent = [1.0] * 64
    assert faults.wrong(math.inf, 1.0, finite=True) is None
    assert faults.wrong(math.nan, 1.0, finite=True) is None
    assert faults.recent == [1.0] * 64
    assert "not finite" in str(faults.wrong(math.nan, 1.0, finite=False))


def test_without_a_bound_nothing_is_a_spike():
    faults = Faults(3, None)
    assert all(faults.wrong(10.0**i, 1.0, True) is None for i in range(30))


def test_a_batch_is_kept(tmp_path: Path):
    batch = Batch(np.array([[1, 2]]), np.array([[2, -100]]), documents=np.array([[0, 1]]))
    keep_batch(tmp_path / "more" / "batch.npz", batch, 7)
    with np.load(tmp_path / "more" / "batch.npz") as found:
        assert {name: found[name].tolist() for name in found} == {
            "step": 7,
            "ids": [[1, 2]],
            "targets": [[2, -100]],
            "documents": [[0, 1]],
        }


def test_a_full_disk_ends_no_training(tmp_path: Path, capfd):
    (tmp_path / "file").write_text("")
    keep_batch(tmp_path / "file" / "batch.npz", Batch(np.array([[1]]), np.array([[1]])), 7)
    assert "cannot be kept" in capfd.readouterr().err


@given(st.sets(st.integers(0, 30)), st.integers(1, 40))
def test_batches_are_left_out_and_no_other(left_out: set[int], steps: int):
    batches = Skipping(Numbers(), sorted(left_out))
    numbers = [int(batches.batch(step, 1, 2).ids[0, 0]) for step in range(steps)]
    assert numbers == [n for n in range(100) if n not in left_out][:steps]
    assert [batches.number(step) for step in range(steps)] == numbers
    place = batches.position(steps)
    assert sorted(numbers + place["left_out"]) == list(range(place["last_batch"] + 1))
    assert batches.described == Numbers().described


@given(st.sets(st.integers(0, 20)), st.integers(0, 10), st.sets(st.integers(0, 60)))
def test_what_is_left_out_later_does_not_move_what_was_done(before: set[int], done: int, more: set[int]):
    first = Skipping(Numbers(), sorted(before))
    behind = {n for n in more if n > first.position(done)["last_batch"]}  # the very next one, too
    later = Skipping(Numbers(), sorted(before | behind))
    assert later.position(done) == first.position(done)
