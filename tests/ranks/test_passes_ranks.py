"""Micro-batches in any order on several ranks."""

from __future__ import annotations

from typing import Callable

import pytest

from bmtrain_ms.comm import World
from tests.helpers.passes import equal, gradients, schedule


def interleaved(world: World) -> list[bool]:
    """1F1B, all forward first, and an order that nobody chose; both ZeRO levels."""
    orders = [schedule(4, choices, youngest_first=False) for choices in ([1, 1, 0, 1, 0, 1, 0], [], [1, 2, 1, 0, 5, 3, 4])]
    found = [gradients(world, order, False, level, prefetch) for order in orders for level in (2, 3) for prefetch in (0, 1)]
    youngest = schedule(3, [1, 1, 0, 1], youngest_first=True)
    found += [gradients(world, youngest, True, level, 1) for level in (2, 3)]
    return [equal(x) for x in found]


@pytest.mark.parametrize("ranks", [2, 3])
def test_micro_batches_in_any_order(run_ranks: Callable, ranks: int):
    assert all(all(found) for found in run_ranks(ranks, interleaved))
