"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Iterator

os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ warnings
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).with_name(".hypothesis")))

import pytest

from tests.helpers.apart import APART, set_apart
from tests.helpers.ranks import RankPool

OF_MINDSPORE = {"rank_0", "kernel_meta"}  # folders that it makes when it compiles

# `-m quick`: what breaks first when something is changed, in under three minutes on 2 cores. Whole files, and single tests.
QUICK = {
    "unit": {
        "test_block_groups",
        "test_block_twins",
        "test_checks",
        "test_comm_simulated",
        "test_comm_single",
        "test_compat_parameter",
        "test_cross_entropy",
        "test_data",
        "test_generation",
        "test_gpt_data",
        "test_indexed",
        "test_layout",
        "test_llama",
        "test_lr_scheduler",
        "test_mesh",
        "test_optim_adam",
        "test_optim_manager",
        "test_passes",
        "test_public_names",
        "test_schedule",
        "test_stage",
        "test_stages",
        "test_structure",
        "test_world_axes",
        "test_zero_block",
        "test_zero_collectives",
        "test_zero_init",
        "test_zero_wire",
    },
    "ranks": {"test_padding", "test_passes_ranks"},
}
QUICK_TESTS = {"tests/ranks/test_parity.py::test_parity_with_the_unsharded_twin[2]"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the quick tier; leave out what asserts that engines are one where they are to be apart."""
    if os.environ.get(APART) == "1":
        items[:] = [item for item in items if item.get_closest_marker("one_engine") is None]
    for item in items:
        if item.path.stem in QUICK.get(item.path.parent.name, ()) or item.nodeid in QUICK_TESTS:
            item.add_marker("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--apart`: see `tests.helpers.apart`."""
    parser.addoption("--apart", action="store_true", help="each axis of a world has an engine of its own, also over all ranks")


def pytest_configure(config: pytest.Config) -> None:
    """For this process and the ranks that it starts."""
    if config.getoption("--apart"):
        os.environ[APART] = "1"
        set_apart()


@pytest.fixture(scope="session", autouse=True)
def _empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this process is, with all that it starts: what a user's working folder holds must not matter to a test."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("cwd")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def _left_empty(_empty_folder: Path) -> Iterator[None]:
    """No test may leave files where it was started."""
    yield
    left = sorted(set(os.listdir(_empty_folder)) - OF_MINDSPORE)
    for name in left:  # the tests that come after are not to blame
        (_empty_folder / name).rename(_empty_folder.with_name(f"left-{os.urandom(4).hex()}-{name}"))
    assert not left, f"files in the working folder: {', '.join(left)}; write to tmp_path"


@pytest.fixture(scope="session")
def _rank_pools() -> Iterator[dict[tuple[int, bool], RankPool]]:
    pools: dict[tuple[int, bool], RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.kill()


@pytest.fixture(scope="session")
def run_ranks(_rank_pools: dict[tuple[int, bool], RankPool]) -> Callable[..., list[Any]]:
    """`run_ranks(n, function, timeout=120, **kwargs)`: module-level `function(world, **kwargs)` on n ranks; results by rank."""
    return _runner(_rank_pools, rehearse=False)


@pytest.fixture(scope="session")
def rehearsing_ranks(_rank_pools: dict[tuple[int, bool], RankPool]) -> Callable[..., list[Any]]:
    """`run_ranks`, on ranks that compute as on devices: a module whose `run_ranks` is this one rehearses its tests."""
    return _runner(_rank_pools, rehearse=True)


def _runner(pools: dict[tuple[int, bool], RankPool], rehearse: bool) -> Callable[..., list[Any]]:
    def run(size: int, function: Callable, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        return pools.setdefault((size, rehearse), RankPool(size, rehearse)).run(function, timeout, **kwargs)

    return run


@pytest.fixture
def single_world() -> Iterator[Any]:
    """A world of one rank in this process."""
    import bmtrain_ms

    bmtrain_ms.init_distributed(seed=0)
    yield bmtrain_ms.comm.world()
    bmtrain_ms.shutdown()


@pytest.fixture
def rehearsed_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A world of one rank in this process, which computes as on a device."""
    import bmtrain_ms
    from bmtrain_ms.compat.device import Device, choose

    monkeypatch.setenv("BMTRAIN_MS_REHEARSE", "1")
    bmtrain_ms.init_distributed(seed=0)
    yield bmtrain_ms.comm.world()
    bmtrain_ms.shutdown()
    choose(Device("CPU"))
    bmtrain_ms.ops.use_default()


@pytest.fixture(params=["host", "device"])
def implementation(request: pytest.FixtureRequest, single_world: Any) -> Iterator[str]:
    """Every implementation of the operations; the one for devices runs on CPU too."""
    from bmtrain_ms import ops

    ops.use(request.param)
    yield request.param
    ops.use("host")
