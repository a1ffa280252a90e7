"""Layout: every element of the whole tensor is stored where it says, once for each copy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmtrain_ms_base.layout import Layout, Split, part_of


@st.composite
def grids(draw) -> list[Layout]:
    """The layouts of all ranks that share a tensor: any shape, any dims cut into any number of parts, any number of shards."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    dims = draw(st.lists(st.sampled_from(range(len(shape))), unique=True, max_size=2)) if shape else []
    counts = [draw(st.integers(1, 4)) for _ in dims]
    ranks = draw(st.integers(1, 5))
    cuts: list[tuple[Split, ...]] = [()]
    for dim, parts in zip(dims, counts):
        cuts = [(*cut, Split(dim, i, parts)) for cut in cuts for i in range(parts)]
    return [Layout(shape, cut, index, ranks) for cut in cuts for index in range(ranks)]


@given(grids())
def test_shards_put_together_are_the_whole_tensor(layouts: list[Layout]):
    shape = layouts[0].whole
    whole = np.arange(1, math.prod(shape) + 1, dtype=np.int32).reshape(shape)
    out, times = np.zeros_like(whole), np.zeros(shape, np.int32)
    for layout in layouts:
        shard = layout.cut(whole)
        owned = layout.owned[1] - layout.owned[0]
        assert shard.shape == (layout.length,) and shard.dtype == np.int32
        assert not shard[owned:].any() and shard[:owned].all()
        layout.paste(shard, out)
        for _, box in layout.boxes():
            times[box] += 1
    np.testing.assert_array_equal(out, whole)
    assert (times == 1).all()


@given(grids())
def test_boxes_are_few_in_order_and_where_the_local_tensor_says(layouts: list[Layout]):
    shape = layouts[0].whole
    whole = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    for layout in layouts:
        local = whole[layout.box]
        assert local.shape == layout.local and local.size == layout.local_size
        start, stop = layout.owned
        mine = local.reshape(-1)[start:stop]
        found = list(layout.boxes())
        assert len(found) <= max(1, 2 * len(shape) - 1)
        assert [piece.start for piece, _ in found] == [0, *(piece.stop for piece, _ in found)][: len(found)]
        np.testing.assert_array_equal(np.concatenate([whole[box].reshape(-1) for _, box in found] or [mine]), mine)
        np.testing.assert_array_equal(layout.positions(0, layout.length), mine)
        np.testing.assert_array_equal(layout.positions(1, 3), mine[1:3])


@given(grids())
def test_a_layout_survives_json(layouts: list[Layout]):
    for layout in layouts:
        assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
        assert layouts[0].of_rank(layout.index).index == layout.index


def test_worked_example():
    """(3, 4), cut along dim 1 into two, the second half over two ranks: 3 elements each, the first in two boxes."""
    first, second = (Layout((3, 4), (Split(1, 1, 2),), index, 2) for index in (0, 1))
    assert (first.local, first.length, first.owned, second.owned) == ((3, 2), 3, (0, 3), (3, 6))
    assert list(first.boxes()) == [
        (slice(0, 2), (slice(0, 1), slice(2, 4))),
        (slice(2, 3), (slice(1, 2), slice(2, 3))),
    ]
    assert first.cut(np.arange(12).reshape(3, 4)).tolist() == [2, 3, 6]
    assert second.positions(0, 3).tolist() == [7, 10, 11]


@pytest.mark.parametrize(("size", "parts"), [(7, 3), (2, 3), (0, 2), (8, 4), (13, 5)])
def test_parts_are_contiguous_and_of_nearly_one_size(size: int, parts: int):
    ends = [part_of(size, i, parts) for i in range(parts)]
    assert ends[0][0] == 0 and ends[-1][1] == size
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:]))
    assert max(b - a for a, b in ends) - min(b - a for a, b in ends) <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"splits": (Split(2, 0, 2),)},
        {"splits": (Split(-1, 0, 2),)},
        {"splits": (Split(0, 0, 2), Split(0, 1, 2))},
        {"splits": (Split(0, 2, 2),)},
        {"index": 2, "ranks": 2},
        {"index": -1},
        {"copy": -1},
    ],
    ids=str,
)
def test_what_is_no_layout(arguments: dict):
    with pytest.raises(ValueError, match=r"cannot be split|an index is below its number"):
        Layout((4, 6), **arguments)


@pytest.mark.parametrize(
    "change",
    [{"whole": None}, {"whole": [2.5]}, {"splits": [[0, 1]]}, {"index": 9}, {"ranks": True}, {"index": "0"}, {"whole": [1 << 63]}],
    ids=str,
)
def test_json_that_is_no_layout(change: dict):
    with pytest.raises(ValueError, match="this is not a layout"):
        Layout.from_json({**Layout((2, 3)).to_json(), **change})
