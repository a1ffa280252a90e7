"""Reductions on the host in a fixed order, so that every rank and every run gets the same bits."""

from __future__ import annotations

from typing import Iterator, Sequence

import numpy as np

_CHUNK = 1 << 16  # elements: keeps the accumulator in cache


def accumulator_dtype(dtype: np.dtype) -> np.dtype:
    """What sums of `dtype` are made in: float32 for floats up to 32 bits (bfloat16 too), otherwise the type itself."""
    if dtype.kind == "f" and dtype.itemsize > 4:
        return dtype
    return dtype if dtype.kind in "iubc" else np.dtype(np.float32)


def reduce_rows(rows: np.ndarray | Sequence[np.ndarray], op: str, out: np.ndarray) -> None:
    """`out[...] = op over rows`, taken in row order.

    Args:
        rows: one (n,) array for each rank.
        op: `sum`, `mean` (of floats only), `max` or `min`.
        out: (n,), of the dtype of the rows; shares no memory with them.
    """
    kind = accumulator_dtype(out.dtype)
    combine = {"sum": np.add, "mean": np.add, "max": np.maximum, "min": np.minimum}[op]
    with np.errstate(all="ignore"):  # inf and nan are answers: a loss scaler looks for them
        for start in range(0, out.size, _CHUNK):
            part = slice(start, min(start + _CHUNK, out.size))
            same = kind == out.dtype
            total = out[part] if same else np.empty(part.stop - start, kind)
            first = rows[0][part] if same else rows[0][part].astype(kind)
            if len(rows) == 1:
                total[...] = first
            for row in rows[1:]:
                combine(first, row[part].astype(kind, copy=False), out=total)
                first = total
            if op == "mean":
                total *= kind.type(1.0 / len(rows))
            if not same:
                out[part] = total.astype(out.dtype)


def in_batches(arrays: Sequence[np.ndarray], nbytes: int) -> Iterator[list[tuple[int, slice]]]:
    """Parts of flat arrays, in order and as (index, slice), in batches of at most so many bytes, or one element each."""
    batch: list[tuple[int, slice]] = []
    room = nbytes
    for i, x in enumerate(arrays):
        start = 0
        while start < x.size:
            if batch and room < x.itemsize:
                yield batch
                batch, room = [], nbytes
            stop = min(x.size, start + max(1, room // x.itemsize))
            batch.append((i, slice(start, stop)))
            room -= (stop - start) * x.itemsize
            start = stop
    if batch:
        yield batch
