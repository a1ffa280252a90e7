"""Data of real ranks whose hosts, folders here, have a disk each, or share one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmtrain_ms.comm import World
from bmtrain_ms.comm.launch import Launch
from bmtrain_ms.data import StorageError
from bmtrain_ms.train import load_gpt_data, load_instructions
from bmtrain_ms_base.data import gpt_cache
from bmtrain_ms_base.data.indexed import IndexedWriter
from bmtrain_ms_base.data.instructions import OUTPUTS
from tests.helpers.jobs import job
from tests.helpers.tokens import golden_c

pytestmark = pytest.mark.ranks

SIZES: dict[str, Any] = {"samples": [8, 1, 1], "length": 8, "split": "16,2,2"}


def write(folder: Path, name: str, documents: Any, dtype: str = "uint16") -> None:
    folder.mkdir(exist_ok=True)
    with IndexedWriter(folder / name, dtype) as out:
        for ids in documents:
            out.add(np.array(ids, np.int64))


@pytest.fixture
def hosts(tmp_path: Path) -> list[str]:
    """Two folders with the same data, of two files, and of conversations."""
    for i in range(2):
        folder = tmp_path / f"host{i}"
        write(folder, "a", golden_c())
        write(folder, "b", golden_c()[::-1])
        for output in OUTPUTS:
            write(folder, f"x_{output}_document", [[1, 2, 3], [1, 1]], "int32")
    return [str(tmp_path / f"host{i}") for i in range(2)]


def on_hosts(world: World, per_host: int) -> World:
    """As if `per_host` neighbouring ranks shared a host."""
    rank = world.engine.rank
    return replace(world, launch=Launch("mpi", rank, world.engine.size, rank % per_host, per_host))


def loaded(
    world: World, folders: list[str], per_host: int, shared: bool | None = None, fail: int | None = None, **rest: Any
) -> Any:
    """First samples and which ranks have saved something, or the error. Rank `fail` cannot write."""
    folder = folders[world.engine.rank // per_host]
    saved: list[int] = []
    save = gpt_cache._save

    def noted(*arguments: Any) -> None:
        if world.engine.rank == fail:
            raise OSError(28, "No space left on device")
        saved.append(1)
        save(*arguments)

    gpt_cache._save = noted
    try:
        paths = ["0.7", f"{folder}/a", "0.3", f"{folder}/b"]
        options = {**SIZES, "shared_storage": shared, "in_world": on_hosts(world, per_host), **rest}
        made = load_gpt_data(paths, **options)
        return [[part.sample(i)[0].tolist() for i in range(len(part))] for part in made if part], len(saved)
    except StorageError as error:
        return str(error)
    finally:
        gpt_cache._save = save


@pytest.mark.parametrize("shared", [None, False])
def test_each_host_makes_its_own(run_ranks, hosts, shared):
    """Of a blend too."""
    found = run_ranks(4, loaded, folders=hosts, per_host=2, shared=shared)
    assert [rows for rows, _ in found] == [found[0][0]] * 4
    assert [saved for _, saved in found] == [8, 0, 8, 0]  # 2 files x 3 splits, and the blends, of which two are one
    assert [len(list(Path(folder).glob("cache/*/description.json"))) for folder in hosts] == [8, 8]
    assert not [name for folder in hosts for name in os.listdir(folder) if name.endswith(".marker")]
    assert [saved for _, saved in run_ranks(4, loaded, folders=hosts, per_host=2, shared=shared)] == [0] * 4


@pytest.mark.parametrize("shared", [None, True])
def test_one_rank_makes_what_hosts_share(run_ranks, hosts, shared):
    found = run_ranks(4, loaded, folders=[hosts[0]] * 2, per_host=2, shared=shared)
    assert [saved for _, saved in found] == [8, 0, 0, 0] and [rows for rows, _ in found] == [found[0][0]] * 4


def test_a_builder_whose_disk_is_full(run_ranks, hosts):
    found = run_ranks(4, loaded, folders=hosts, per_host=2, fail=2)
    assert found == [found[0]] * 4
    assert (
        found[0].startswith("making indices has failed on ")
        and f"(rank 2): indices of {hosts[1]}/a cannot be written to" in found[0]
    )
    assert "No space left on device; make room" in found[0]


def test_hosts_with_other_data(run_ranks, hosts):
    for end in ("bin", "idx"):
        os.remove(f"{hosts[1]}/b.{end}")
    write(Path(hosts[1]), "b", [[9, *ids[1:]] for ids in golden_c()[::-1]])
    found = run_ranks(4, loaded, folders=hosts, per_host=2)
    assert (
        found == [found[0]] * 4 and f"hosts have different data: {hosts[0]}/b on " in found[0] and f"{hosts[1]}/b on " in found[0]
    )
    os.remove(f"{hosts[1]}/b.bin")
    found = run_ranks(4, loaded, folders=hosts, per_host=2)
    assert found == [found[0]] * 4 and found[0].endswith(f"(rank 2, 3): there is no file {hosts[1]}/b.bin")


def test_a_token_between_those_that_are_looked_at(run_ranks, tmp_path):
    """Only reading every byte finds it."""
    folders = [str(tmp_path / f"host{i}") for i in range(2)]
    for i, folder in enumerate(folders):
        tokens = np.zeros(600_000, np.int64)
        tokens[1500] = i  # between the first and the second block
        write(Path(folder), "a", [tokens])
        write(Path(folder), "b", [tokens[:100]])
    found = run_ranks(2, loaded, folders=folders, per_host=1, samples=[8, 0, 0], split="1,0,0")
    assert all(isinstance(one, tuple) for one in found)
    found = run_ranks(2, loaded, folders=folders, per_host=1, samples=[8, 0, 0], split="1,0,0", every_byte=True)
    assert found == [found[0]] * 2 and found[0].startswith(f"hosts have different data: {folders[0]}/a on ")


def other_seeds(world: World, folder: str) -> str:
    with pytest.raises(StorageError) as info:
        load_gpt_data([f"{folder}/a"], **SIZES, seed=world.engine.rank)
    return str(info.value)


def test_ranks_with_other_settings(run_ranks, hosts):
    found = run_ranks(2, other_seeds, folder=hosts[0])
    assert found[0] == found[1] and 'different settings of the data: [[1.0], [8, 1, 1], 8, "16,2,2", 0] on ' in found[0]


def conversations(world: World, folders: list[str], **rest: Any) -> Any:
    try:
        batches = load_instructions(f"{folders[world.engine.rank]}/x", 4, 2, in_world=on_hosts(world, 1), **rest)
        return batches.batch(0, world.engine.rank, 2).ids.tolist()
    except StorageError as error:
        return str(error)


def test_conversations(run_ranks, hosts):
    for rest in ({}, {"every_byte": True}):
        assert sorted(map(str, run_ranks(2, conversations, folders=hosts, **rest))) == ["[[1, 1, 0, 0]]", "[[1, 2, 3, 0]]"]
    for end in ("bin", "idx"):
        os.remove(f"{hosts[1]}/x_{OUTPUTS[2]}_document.{end}")
    write(Path(hosts[1]), f"x_{OUTPUTS[2]}_document", [[1, 2, 4], [1, 1]], "int32")
    found = run_ranks(2, conversations, folders=hosts)
    assert found[0] == found[1] and f"{hosts[1]}/x_{OUTPUTS[2]}_document on " in found[0]


KILLED = """
import numpy as np
import bmtrain_ms as bms
from bmtrain_ms.train import load_gpt_data
from bmtrain_ms_base.data import gpt
bms.init_distributed()
build = gpt.build_indices

def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

if not os.path.exists(sys.argv[1] + "/again"):
    gpt.build_indices = killed
data = load_gpt_data([sys.argv[1] + "/host0/a"], [8, 1, 1], 8, "16,2,2")
note("sample", data[0].sample(0)[0][0])
"""


@pytest.mark.parametrize("launcher", ["auto", "mpi"])
def test_a_builder_that_is_killed(tmp_path, hosts, launcher):
    """The job ends, and the next one makes what is missing."""
    with job(tmp_path, KILLED, 2, launcher) as made:
        assert made.ended() == 137, made.err
        assert "rank 0 " in made.last_line and "was killed by SIGKILL" in made.last_line
    (tmp_path / "again").touch()
    with job(tmp_path, KILLED, 2, launcher) as made:
        assert made.ended() == 0, made.err
        assert len(set(made.written("sample"))) == 1
