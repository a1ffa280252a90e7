"""Fixtures for all tests."""

from __future__ import annotations

import os
from typing import Any, Callable, Iterator

os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ warnings

import pytest

from tests.helpers.ranks import RankPool


@pytest.fixture(scope="session")
def _rank_pools() -> Iterator[dict[int, RankPool]]:
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.kill()


@pytest.fixture(scope="session")
def run_ranks(_rank_pools: dict[int, RankPool]) -> Callable[..., list[Any]]:
    """`run_ranks(n, function, timeout=120, **kwargs)`: module-level `function(world, **kwargs)` on n ranks; results by rank."""

    def run(size: int, function: Callable, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        return _rank_pools.setdefault(size, RankPool(size)).run(function, timeout, **kwargs)

    return run


@pytest.fixture
def single_world() -> Iterator[Any]:
    """A world of one rank in this process."""
    import bmtrain_ms

    bmtrain_ms.init_distributed(seed=0)
    yield bmtrain_ms.comm.world()
    bmtrain_ms.shutdown()
