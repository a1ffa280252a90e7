"""Checkpoints of hosts that share no disk, and of ranks that see different folders."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmtrain_ms.checkpoint import CheckpointError, tools
from bmtrain_ms.checkpoint import checkpointer as checkpointer_module
from bmtrain_ms.checkpoint import folder as folder_module
from bmtrain_ms.checkpoint.index import INDEX, _checksum, file_name
from bmtrain_ms.comm import World
from bmtrain_ms.comm.launch import Launch
from tests.helpers.checkpoints import Layout, Run, equal
from tests.ranks.test_checkpointer_ranks import trained_and_saved

pytestmark = pytest.mark.ranks


def host(world: World, size: int) -> Launch:
    """As if `size` neighbouring ranks shared a host."""
    rank = world.engine.rank
    return Launch("mpi", rank, world.engine.size, rank % size, size)


def error_of_loading(world: World, folders: list[str], hosts: int | None = None, layout: Layout | None = None) -> str:
    """With `hosts`: that many ranks on each, without shared storage."""
    options: dict[str, Any] = {} if hosts is None else {"launch": host(world, hosts), "shared_storage": False}
    run = Run(world, folders[world.engine.rank], layout, **options)
    with pytest.raises(CheckpointError) as info:
        run.load()
    return str(info.value)


def test_ranks_that_see_different_folders_are_refused(run_ranks, tmp_path):
    a, b, none = (str(tmp_path / name) for name in ("a", "b", "none"))
    run_ranks(2, trained_and_saved, folder=a, steps=2)
    run_ranks(2, trained_and_saved, folder=b, steps=3)
    for other, name in ((b, "step-00000003"), (none, "none")):
        for folders in ([a, other], [other, a]):
            first, second = ("step-00000002", name) if folders[0] == a else (name, "step-00000002")
            for rank, text in enumerate(run_ranks(2, error_of_loading, folders=folders)):
                assert text.startswith(f"ranks see different latest checkpoints in {folders[rank]}: ")
                assert f"{first} on rank 0, {second} on rank 1" in text and "Is the folder shared?" in text


def on_hosts(world: World, folders: list[str], hosts: int, layout: Layout, resume: bool) -> Any:
    """Without shared storage; `folders` by rank."""
    folder = folders[world.engine.rank]
    run = Run(world, folder, layout, dropout=0.3, launch=host(world, hosts), shared_storage=False)
    if resume:
        run.train(range(8, 9))
        assert run.load().step == 2
    else:
        run.train(range(2))
        run.save(2)
        run.close()
    return run.train(range(2, 5)), run.everything(), run.counters()


@pytest.mark.parametrize(
    ("ranks", "hosts", "layout"),
    [(2, 1, Layout()), (4, 2, Layout()), (4, 2, Layout(shard_size=2)), (4, 4, Layout(shard_size=2)), (4, 2, Layout(shard_size=1))],
    ids=["2x1", "2x2", "replicas on 2 hosts", "replicas on a host", "every rank whole"],
)
def test_without_shared_storage(run_ranks, tmp_path, ranks, hosts, layout):
    """Every host has its ranks' files, index and pointer, and goes on bit by bit."""
    folders = [str(tmp_path / f"host{rank // hosts}") for rank in range(ranks)]
    first = run_ranks(ranks, on_hosts, folders=folders, hosts=hosts, layout=layout, resume=False)
    shards = layout.shard_size or ranks
    for folder in sorted(set(folders)):
        mine = {file_name(rank % shards, shards) for rank in range(ranks) if folders[rank] == folder}
        assert set(os.listdir(f"{folder}/step-00000002")) == {"index.json", *mine}
        assert Path(folder, "latest").read_text() == "step-00000002\n"
    again = run_ranks(ranks, on_hosts, folders=folders, hosts=hosts, layout=layout, resume=True)
    for (losses, state, counters), (later, other, others) in zip(first, again):
        assert later == losses and equal(state, other) and counters == others


def test_hosts_are_not_mixed(run_ranks, tmp_path):
    """Two saves of the same step and layout: each host has files of another one."""
    here = [str(tmp_path / f"host{rank}") for rank in range(2)]
    old = [f"{folder}-old" for folder in here]
    run_ranks(2, on_hosts, folders=old, hosts=1, layout=Layout(), resume=False)
    run_ranks(2, on_hosts, folders=here, hosts=1, layout=Layout(), resume=False)
    for text in run_ranks(2, error_of_loading, folders=[here[0], old[1]], hosts=1):
        assert "holds different checkpoints on different hosts" in text and "they cannot be mixed" in text


def failing_on_one_host(world: World, folders: list[str], again: bool, what: str) -> tuple[str, Any, Any, int]:
    """Host 1 cannot do `what` once; the error, states before and after a load of what is there, and its step."""
    run = Run(world, folders[world.engine.rank], launch=host(world, 1), shared_storage=False, keep_last=1)
    run.train(range(1))
    run.save(1)
    expected = run.everything()
    if not again:
        run.train(range(1, 2))
    place = folder_module if what == "exchange" else checkpointer_module
    function = getattr(place, what)

    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    if world.engine.rank == 1:
        setattr(place, what, refusing)
    try:
        with pytest.raises(CheckpointError) as info:
            run.save(1 if again else 2)
    finally:
        setattr(place, what, function)
    run.close()
    run.train(range(5, 6))
    with contextlib.redirect_stderr(io.StringIO()) as told:
        step = run.load().step
    return f"{info.value} {told.getvalue()}", expected, run.everything(), step


@pytest.mark.parametrize("again, what", [(True, "write_text"), (True, "exchange"), (False, "write_text"), (False, "sync_folder")])
def test_a_host_that_fails_leaves_the_last_checkpoint_on_all(run_ranks, tmp_path, again, what):
    """Also when the step is saved again: the others take the name back."""
    folders = [str(tmp_path / f"host{rank}") for rank in range(2)]
    for text, before, after, step in run_ranks(2, failing_on_one_host, folders=folders, again=again, what=what):
        assert "cannot be written: " in text and step == 1 and equal(before, after)
    for folder in folders:
        assert sorted(os.listdir(folder)) == [".lock", "latest", "step-00000001"]


def test_the_pointer_moved_on_one_host_only(run_ranks, tmp_path):
    """The checkpoint has its name on both; on both it goes on from what both point to, or have."""
    folders = [str(tmp_path / f"host{rank}") for rank in range(2)]
    (first, *_, step), (second, *_, other) = run_ranks(2, failing_on_one_host, folders=folders, again=False, what="point_to")
    assert step == other == 1
    for text in (first, second):
        assert "was saved, but" in text and "latest cannot be moved to it" in text
    told = "(step-00000001, step-00000002); going on from step-00000001, the last that all have"
    assert f"WARNING: hosts have not the same latest checkpoint in {folders[0]} {told}" in first and "WARNING" not in second


def loaded_apart(world: World, folders: list[str]) -> Any:
    """On a host for each rank, without shared storage."""
    run = Run(world, folders[world.engine.rank], launch=host(world, 1), shared_storage=False)
    assert run.load().step == 2
    return run.everything()


def test_shared_storage_divided_later(run_ranks, tmp_path):
    """Refused as it is, as one file only has what is the same on all ranks; resharded, each host needs its ranks' files only."""
    first = run_ranks(2, trained_and_saved, folder=str(tmp_path), steps=2)
    for text in run_ranks(2, error_of_loading, folders=[str(tmp_path)] * 2, hosts=1):
        assert text.endswith(
            "it was saved with shared storage; resume with it, or write one that hosts may divide: bmtrain-ms ckpt reshard "
            f"{tmp_path}/step-00000002 OUT --ranks 2"
        )
    for rank in range(2):
        copy = tmp_path / f"host{rank}" / "step-00000002"
        tools.reshard(tmp_path, copy, 2)
        if rank:
            shutil.copy(tmp_path / "host0" / "step-00000002" / INDEX, copy / INDEX)
        os.remove(copy / file_name(1 - rank, 2))
    for whole, mine in zip(first, run_ranks(2, loaded_apart, folders=[str(tmp_path / f"host{rank}") for rank in range(2)])):
        assert equal(mine, whole)


def refused_unchanged(world: World, folders: list[str]) -> tuple[str, bool]:
    """What `load` says, and whether everything is as it was."""
    run = Run(world, folders[world.engine.rank], launch=host(world, 1), shared_storage=False)
    run.train(range(5, 6))
    before, counters = run.everything(), run.counters()
    with pytest.raises(CheckpointError) as info:
        run.load()
    return str(info.value), equal(run.everything(), before) and run.counters() == counters


def test_a_state_that_cannot_be_on_one_host(run_ranks, tmp_path):
    """No rank changes anything, and none waits."""
    here = [str(tmp_path / f"host{rank}") for rank in range(2)]
    run_ranks(2, on_hosts, folders=here, hosts=1, layout=Layout(), resume=False)
    index = Path(here[1], "step-00000002", INDEX)
    raw = json.loads(index.read_text())
    del raw["checksum"]
    raw["state"]["clock"] = -1
    index.write_text(json.dumps({**raw, "checksum": _checksum(raw)}))
    (first, kept), (second, other) = run_ranks(2, refused_unchanged, folders=here, timeout=60)
    assert kept and other and "rank(s) [1] failed; see their messages" in first
    assert second == f"{index.parent} cannot be loaded: its clock is -1"


def test_another_layout_needs_shared_storage(run_ranks, tmp_path):
    here = [str(tmp_path / f"host{rank // 2}") for rank in range(4)]
    run_ranks(4, on_hosts, folders=here, hosts=2, layout=Layout(), resume=False)
    for ranks, layout in ((2, Layout()), (4, Layout(shard_size=2))):
        for text in run_ranks(ranks, error_of_loading, folders=here[-ranks:], hosts=2, layout=layout):
            assert "without shared storage a checkpoint is resumed by the layout that wrote it" in text
    swapped = [here[2], here[2], here[0], here[0]]  # the same numbers, other hosts
    for text in run_ranks(4, error_of_loading, folders=swapped, hosts=2):
        assert "does not exist" in text or "rank(s) [" in text
    together = tmp_path / "together"  # as the message advises
    shutil.copytree(tmp_path / "host0", together)
    shutil.copytree(tmp_path / "host1", together, dirs_exist_ok=True)
    expected = run_ranks(4, read_on_hosts, folders=here, hosts=2)[0]
    assert all(equal(found, expected) for found in run_ranks(3, read_on_hosts, folders=[str(together)] * 3))


def read_on_hosts(world: World, folders: list[str], hosts: int | None = None) -> dict[str, np.ndarray]:
    """See `error_of_loading`."""
    options: dict[str, Any] = {} if hosts is None else {"launch": host(world, hosts), "shared_storage": False}
    run = Run(world, folders[world.engine.rank], **options)
    assert run.load().step == 2
    return run.everything()
