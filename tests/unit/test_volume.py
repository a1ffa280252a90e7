"""Communication volume equals the formula to the byte, padding included."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

import bmtrain_ms as bms
from tests.helpers.models import WIDTH, Residual
from tests.helpers.volume import Setting, expected, received

SETTINGS = [
    *(Setting(level, dtype) for level, dtype in product((2, 3), (None, "bfloat16", "float16", "int8"))),
    *(Setting(3, dtype, size) for dtype, size in product((None, "int8"), (1, 2, 6))),
]


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_bytes_received(single_world: Any, setting: Setting, use_checkpoint: bool):
    for ranks in (1, 2, 3, 12, 64):
        if ranks % (setting.shard_size or 1):
            continue

        def make() -> bms.TransformerBlockList:
            return bms.TransformerBlockList(bms.Block(Residual(), use_checkpoint, setting.zero_level) for _ in range(3))

        counted = received(make, (2, WIDTH), (), ranks, setting)
        assert len(counted.parameters) == 18
        if setting.shard_size is None:
            assert counted.bytes == expected(counted.parameters, ranks, setting), ranks
        else:  # an all-reduce carries all tensors of a block: its division rounds once
            assert abs(counted.bytes - expected(counted.parameters, ranks, setting)) <= len(counted.parameters), ranks
        assert counted.scalars <= 8


def test_the_formula_in_words(single_world: Any):
    """3 (N-1)/N P, and 2 (N-1)/N P."""
    parameters, ranks = [35 * 4, 5 * 4], 4
    padded = 4 * sum(parameters)
    assert expected(parameters, ranks, Setting()) == 3 * (ranks - 1) * padded // ranks
    assert expected(parameters, ranks, Setting(zero_level=2)) == 2 * (ranks - 1) * padded // ranks
