"""The local reduction: rank order, float32 accumulation, one rounding."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms.comm.reduce import _CHUNK, accumulator_dtype, in_batches, reduce_rows
from bmtrain_ms.compat.runtime import numpy_dtype

DTYPES = [ms.float16, ms.bfloat16, ms.float32, ms.float64, ms.int32, ms.int64, ms.uint8]
FLOATS = DTYPES[:4]
SIZES = [0, 1, 2, 7, 64, 1009]


def rows_of(ranks: int, size: int, dtype: object, seed: int, spread: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((ranks, size)) * spread
    if dtype in FLOATS:
        return values.astype(np.float32).astype(numpy_dtype(dtype)) if dtype != ms.float64 else values
    return np.rint(np.abs(values) * 50).astype(numpy_dtype(dtype))


def reduced(rows: np.ndarray, op: str) -> np.ndarray:
    out = np.empty(rows.shape[1], rows.dtype)
    before = rows.tobytes()
    reduce_rows(rows, op, out)
    assert rows.tobytes() == before, "the inputs were changed"
    return out


def reference(rows: np.ndarray, op: str) -> list:
    """One element after the other, in plain Python order, with NumPy scalars of the accumulator's type."""
    kind = {2: np.float32, 4: np.float32, 8: np.float64}[rows.dtype.itemsize]
    results = []
    for column in rows.astype(kind).T:
        total = column[0]
        for value in column[1:]:
            total = {"sum": total + value, "mean": total + value, "max": max(total, value), "min": min(total, value)}[op]
        results.append(total * kind(1 / len(column)) if op == "mean" else total)
    return np.array(results, kind).astype(rows.dtype).tobytes()


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 9),
    size=st.sampled_from(SIZES[:-1]) | st.integers(1, 200),
    dtype=st.sampled_from(FLOATS),
    op=st.sampled_from(["sum", "mean", "max", "min"]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_floats_are_reduced_in_rank_order(ranks: int, size: int, dtype: object, op: str, seed: int, spread: float):
    rows = rows_of(ranks, size, dtype, seed, spread)
    assert reduced(rows, op).tobytes() == reference(rows, op)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.integers(1, 9),
    size=st.integers(0, 200),
    dtype=st.sampled_from([ms.int32, ms.int64, ms.uint8]),
    op=st.sampled_from(["sum", "max", "min"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_integers_are_exact(ranks: int, size: int, dtype: object, op: str, seed: int):
    rows = rows_of(ranks, size, dtype, seed)
    function = {"sum": lambda r: r.sum(0, dtype=r.dtype), "max": lambda r: r.max(0), "min": lambda r: r.min(0)}[op]
    np.testing.assert_array_equal(reduced(rows, op), function(rows))


def test_large_integers_do_not_pass_through_floats():
    rows = np.array([[2**31 - 3, 2**24 + 1], [1, 0]], np.int32)
    assert reduced(rows, "sum").tolist() == [2**31 - 2, 2**24 + 1]
    assert reduced(np.array([[2**60 + 1], [1]]), "sum").tolist() == [2**60 + 2]


def test_the_order_is_the_rank_order():
    """(big + small) - big loses small; (big - big) + small does not."""
    big = np.float32(2.0**24)
    assert reduced(np.array([[big], [1], [-big]], np.float32), "sum").tolist() == [0.0]
    assert reduced(np.array([[big], [-big], [1]], np.float32), "sum").tolist() == [1.0]


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_sixteen_bit_sums_are_rounded_once(dtype: object):
    one, tiny = 1.0, 2.0**-12  # in 16 bits, 1 + tiny is 1
    rows = np.array([[one]] + [[tiny]] * 16, np.float32).astype(numpy_dtype(dtype))
    assert reduced(rows, "sum").astype(np.float32).tolist() == [1 + 16 * tiny if dtype == ms.float16 else 1.0]
    rows = np.array([[one]] + [[2.0**-9]] * 16, np.float32).astype(numpy_dtype(dtype))
    assert reduced(rows, "sum").astype(np.float32).tolist() == [1 + 2.0**-5]


@pytest.mark.parametrize("size", [_CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK + 3])
def test_chunks_leave_no_seam(size: int):
    rows = rows_of(3, size, ms.float32, seed=size)
    expected = ((rows[0] + rows[1]) + rows[2]).tobytes()
    assert reduced(rows, "sum").tobytes() == expected


def test_mean_multiplies_the_sum_once():
    rows = rows_of(3, 100, ms.float32, seed=1)
    expected = ((rows[0] + rows[1]) + rows[2]) * np.float32(1 / 3)
    assert reduced(rows, "mean").tobytes() == expected.tobytes()


def test_overflow_is_inf_without_a_warning():
    """Warnings are errors in this suite: an overflowing fp16 gradient is what loss scaling looks for."""
    rows = np.array([[60000.0, -60000.0, np.inf, np.nan], [60000.0, -60000.0, -np.inf, 1.0]], np.float16)
    np.testing.assert_array_equal(reduced(rows, "sum"), np.array([np.inf, -np.inf, np.nan, np.nan], np.float16))
    assert reduced(rows[:, :2], "mean").tolist() == [60000.0, -60000.0]
    largest = np.finfo(np.float32).max
    assert reduced(np.array([[largest], [largest]]), "sum").tolist() == [np.inf]


def test_nan_wins_max_and_min():
    rows = np.array([[np.nan, 1.0], [1.0, np.nan]], np.float32)
    assert np.isnan(reduced(rows, "max")).all() and np.isnan(reduced(rows, "min")).all()


def test_into_part_of_a_larger_array():
    out = np.zeros(10, np.float32)
    reduce_rows(np.ones((2, 4), np.float32), "sum", out[3:7])
    assert out.tolist() == [0, 0, 0, 2, 2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (ms.float16, np.float32),
        (ms.bfloat16, np.float32),
        (ms.float32, np.float32),
        (ms.float64, np.float64),
        (ms.int32, np.int32),
        (ms.uint8, np.uint8),
        (ms.bool_, np.bool_),
        (ms.complex64, np.complex64),
    ],
)
def test_accumulators(dtype: object, kind: type):
    assert accumulator_dtype(numpy_dtype(dtype)) == np.dtype(kind)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 50), st.sampled_from([np.uint8, np.float16, np.float32, np.float64])), max_size=6),
    nbytes=st.integers(1, 200),
)
def test_batches_are_all_elements_in_order(sizes: list, nbytes: int):
    arrays = [np.arange(n).astype(dtype) for n, dtype in sizes]
    seen: list[list] = [[] for _ in arrays]
    last = 0
    for batch in in_batches(arrays, nbytes):
        parts = [arrays[i][part] for i, part in batch]
        assert all(part.size for part in parts)
        assert sum(part.nbytes for part in parts) <= nbytes or sum(part.size for part in parts) == 1
        assert all(last <= i for i, _ in batch)
        last = batch[-1][0]
        for (i, _), part in zip(batch, parts):
            seen[i] += part.tolist()
    assert seen == [x.tolist() for x in arrays]
