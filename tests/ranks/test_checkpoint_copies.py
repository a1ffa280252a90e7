"""Tensors that are whole on every rank and not the same there, as running statistics of batches are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, tools
from bmtrain_ms.checkpoint.sharded import ShardedReader
from bmtrain_ms.comm import Mesh, World, use_world
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from tests.helpers.checkpoints import counted_bytes

pytestmark = pytest.mark.ranks


class Net(nn.Cell):
    """A sharded weight, statistics that each rank has for itself, and others that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = bms.DistributedParameter(np.arange(6, dtype=np.float32))
        self.mean = Parameter(Tensor(np.zeros(3, np.float32)), requires_grad=False)
        self.count = Parameter(Tensor(np.zeros((), np.int32)), requires_grad=False)
        self.shared = Parameter(Tensor(np.full(5, 7.0, np.float32)), requires_grad=False)


class Job:
    """In a world of its own, of any sharding."""

    def __init__(self, world: World, folder: str, shard_size: int | None = None, shared_storage: bool = True):
        self.world = World(world.engine, Mesh.data_parallel(world.engine.size, world.engine.rank, shard_size), 5, world.launch)
        with use_world(self.world):
            self.model = Net()
            self.manager = OptimManager()
            self.manager.add_optimizer(AdamOptimizer([self.model.weight]))
            self.checkpoints = Checkpointer(folder, self.model, self.manager, shared_storage=shared_storage)

    def save(self, wait: bool = True) -> None:
        rank = self.world.engine.rank
        self.model.mean.set_data(Tensor(np.full(3, rank + 0.5, np.float32)))
        self.model.count.set_data(Tensor(np.array(10 * rank, np.int32)))
        with use_world(self.world):
            self.checkpoints.save(1, wait=wait)
            self.checkpoints.close()

    def load(self, path: str | None = None) -> list[float]:
        with use_world(self.world):
            assert self.checkpoints.load(path) is not None
            values = self.model.mean.asnumpy()
            assert (values == values[0]).all() and (self.model.shared.asnumpy() == 7.0).all()
            return [float(values[0]), int(self.model.count.asnumpy())]


def save(world: World, folder: str, wait: bool = True, **options: Any) -> None:
    Job(world, folder, **options).save(wait)


def load(world: World, folder: str, path: str | None = None, **options: Any) -> list[float]:
    return Job(world, folder, **options).load(path)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, {}), (2, {"wait": False}), (4, {"shard_size": 2}), (2, {"shared_storage": False})],
    ids=["2", "background", "replicas", "no shared storage"],
)
def test_every_rank_goes_on_with_its_own(run_ranks, tmp_path, ranks, options):
    run_ranks(ranks, save, folder=str(tmp_path), **options)
    options.pop("wait", None)
    assert run_ranks(ranks, load, folder=str(tmp_path), **options) == [[rank + 0.5, 10 * rank] for rank in range(ranks)]
    with ShardedReader(tmp_path / "step-00000001") as reader:
        copies = {name: t.copies for name, t in reader.index.tensors.items() if t.of_model}
        assert copies == {"weight": 1, "mean": ranks, "count": ranks, "shared": 1}
        assert "is sound" in tools.verify(tmp_path)


@pytest.fixture(scope="module")
def saved(run_ranks, tmp_path_factory) -> Path:
    """By four ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(4, save, folder=str(folder))
    return folder


@pytest.mark.parametrize(("ranks", "taken"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2])])
def test_other_numbers_of_ranks_take_the_copy_in_their_place(run_ranks, saved, ranks, taken):
    assert run_ranks(ranks, load, folder=str(saved)) == [[rank + 0.5, 10 * rank] for rank in taken]


def test_more_ranks_share_copies(run_ranks, tmp_path):
    run_ranks(2, save, folder=str(tmp_path))
    assert run_ranks(4, load, folder=str(tmp_path)) == [[rank + 0.5, 10 * rank] for rank in (0, 0, 1, 1)]


def test_resharded_copies_stay(run_ranks, saved, tmp_path):
    tools.reshard(saved, tmp_path / "three", 3)
    assert tools.diff(saved, tmp_path / "three") == []
    again = str(tmp_path / "three")
    assert run_ranks(3, load, folder=str(tmp_path / "empty"), path=again) == [[rank + 0.5, 10 * rank] for rank in (0, 1, 2)]
    assert run_ranks(3, load, folder=str(tmp_path / "empty"), path=again, shared_storage=False)[2] == [2.5, 20]


def test_the_tools_know_them(run_ranks, saved, tmp_path, capsys):
    lines = tools.inspect(saved).splitlines()
    (mean,) = [line for line in lines if line.startswith("mean ")]
    assert mean.split() == ["mean", "Float32", "(3,)", "12", "B", "on", "each", "of", "4", "ranks"]
    assert not [line for line in lines if line.startswith("shared ") and "ranks" in line]
    tools.consolidate(saved, tmp_path / "whole")
    assert "NOTE: count and 1 other tensors had other values on other ranks; rank 0's are written" in capsys.readouterr().err
    with tools.open_checkpoint(tmp_path / "whole") as reader:
        assert reader.read_flat("mean", 0, 3).tolist() == [0.5] * 3
    run_ranks(2, save, folder=str(tmp_path / "two"))
    assert "! mean: Float32 (3,) on each of 4 ranks against Float32 (3,) on each of 2 ranks" in tools.diff(saved, tmp_path / "two")


def test_a_copy_that_is_damaged_is_noticed(run_ranks, tmp_path):
    """Not only the first."""
    run_ranks(2, save, folder=str(tmp_path))
    file = tmp_path / "step-00000001" / "rank-00000-of-00002.safetensors"
    content = file.read_bytes()
    other = np.full(3, 1.5, np.float32).tobytes()
    assert content.count(other) == 1
    file.write_bytes(content.replace(other, np.full(3, 2.5, np.float32).tobytes()))
    with pytest.raises(tools.CheckpointError, match="tensor mean is damaged"):
        tools.verify(tmp_path)


def test_equal_ones_are_written_once(single_world, tmp_path):
    """Also where only bits are equal: NaN."""
    job = Job(single_world, str(tmp_path))
    job.model.mean.set_data(Tensor(np.full(3, np.nan, np.float32)))
    with counted_bytes():
        job.checkpoints.save(1)
    with ShardedReader(tmp_path / "step-00000001") as reader:
        assert {t.copies for t in reader.index.tensors.values()} == {1}
    job.checkpoints.close()
