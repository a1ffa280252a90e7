"""Data on hosts that share a disk, or do not: ranks are threads, hosts are folders."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest

from bmtrain_ms_base.data import gpt, gpt_data, storage
from bmtrain_ms_base.data.gpt import open_files
from bmtrain_ms_base.data.gpt_cache import cache_home, cached
from bmtrain_ms_base.data.indexed import IndexedWriter
from bmtrain_ms_base.data.storage import Place, Storage, StorageError
from tests.helpers.threads import Threads
from tests.helpers.tokens import golden_c

SIZES = ([8, 1, 1], 8, "16,2,2")


def write(path: Path, change: Callable[[list[Any]], Any] | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = [list(ids) for ids in golden_c()]
    if change is not None:
        change(documents)
    with IndexedWriter(path, "uint16") as out:
        for ids in documents:
            out.add(np.array(ids, np.int64))
    return str(path)


def rewrite(path: Path, change: Callable[[list[Any]], Any]) -> None:
    for end in ("bin", "idx"):
        os.remove(f"{path}.{end}")
    write(path, change)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Path]]:
    """Folders of three hosts with the same data."""
    folders = [tmp_path / f"host{i}" for i in range(3)]
    for folder in folders:
        write(folder / "c")
    yield folders
    assert not list(tmp_path.rglob("*.marker")) and not list(tmp_path.rglob("*.partial"))


def load(place: Place, path: Path, shared: bool | None = None) -> list[Any]:
    files = Storage(place, shared=shared).together("opening the data", lambda: open_files([str(path)]))[1]
    store = Storage(place, [cache_home(None, files[0].name)], shared)
    store.refuse_differing({file.name: file.digest for file in files})
    return store.made("making indices", lambda build: gpt_data(files, *SIZES, build=build))


def rows(data: list[Any]) -> list[Any]:
    return [part.sample(0)[0].tolist() for part in data]


def errors(found: list[Any]) -> list[str]:
    """Texts of what every rank has raised, which has to be the same."""
    assert all(isinstance(error, StorageError) for error in found), found
    assert len({str(error) for error in found}) == 1
    return [str(error) for error in found]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    build = gpt.build_indices
    monkeypatch.setattr(gpt, "build_indices", lambda *rest: made.append(1) or build(*rest))
    return made


@pytest.mark.parametrize("shared", [None, False])
def test_each_host_makes_its_own_once(hosts, built, shared):
    found = Threads(6, 2).run(lambda place: load(place, hosts[place.host] / "c", shared))
    expected = rows(gpt_data([str(hosts[0] / "c")], *SIZES))
    assert [rows(data) for data in found] == [expected] * 6
    assert len(built) == 3 * 3  # training, validation and test, on each host
    for folder in hosts:
        assert len(list(folder.glob("cache/*/description.json"))) == 3


@pytest.mark.parametrize("shared", [None, True])
def test_one_rank_makes_what_all_share(hosts, built, shared):
    found = Threads(6, 2).run(lambda place: load(place, hosts[0] / "c", shared))
    assert all(rows(data) == rows(found[0]) for data in found) and len(built) == 3


def test_which_ranks_share_is_found_out(tmp_path):
    """Any way of sharing: nobody, all, some of the hosts, some of the folders."""
    a, b, c = (tmp_path / name for name in "abc")
    for folder in (a, b, c):
        folder.mkdir()
    for by_host, builders in (
        ([[a], [a], [a]], [0]),
        ([[a], [b], [c]], [0, 2, 4]),
        ([[a], [b], [a]], [0, 2]),
        ([[a], [b], [b]], [0, 2]),
        ([[a, c], [b, c], [a, c]], [0, 2]),
        ([[a], [None], [None]], [0, 2, 4]),
        ([[None], [b], [b]], [0, 2]),
        ([[tmp_path / "none"], [b], [b]], [0, 2]),
    ):
        found = Threads(6, 2).run(lambda place, by_host=by_host: Storage(place, by_host[place.host]))
        assert [store.builders for store in found] == [builders] * 6
        assert [store.builder for store in found] == [rank in builders for rank in range(6)]
        assert not [file for folder in (a, b, c) for file in os.listdir(folder)]
    assert found_of(tmp_path, False).described() == "3 storages, what is missing is made on h0 (rank 0), h1 (rank 2), h2 (rank 4)"
    assert found_of(tmp_path, True).described() == "all 6 ranks share one storage"


def found_of(folder: Path, shared: bool) -> Storage:
    return Threads(6, 2).run(lambda place: Storage(place, [folder], shared))[0]


def test_told_to_be_shared_and_is_not(hosts):
    for text in errors(Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c", True))):
        assert text.startswith("making indices has failed on h1 (rank 2, 3): indices of ")
        assert "which another rank has made, are not in" in text and "do without shared storage" in text


def test_markers_are_removed_when_a_rank_is_lost(tmp_path):
    def looking(place: Place) -> Any:
        calls: list[int] = []

        def gather(value: Any) -> list[Any]:
            calls.append(1)
            if place.rank == 3 and len(calls) == 4:  # files are written, nobody has looked at them
                assert len(list(tmp_path.glob(".*.marker"))) == 2
                raise ConnectionError("lost")
            return place.gather(value)

        return Storage(Place(place.rank, place.host, place.local_rank, gather, place.name), [tmp_path])

    found = Threads(4, 2).run(looking)
    assert isinstance(found[3], ConnectionError) and all(isinstance(x, threading.BrokenBarrierError) for x in found[:3])
    assert not os.listdir(tmp_path)


# What hosts have #


@pytest.mark.parametrize("shared", [None, False])
def test_a_host_with_other_content(hosts, built, shared):
    rewrite(hosts[1] / "c", lambda documents: documents[3].__setitem__(0, 999))  # the same lengths
    for text in errors(Threads(6, 2).run(lambda place: load(place, hosts[place.host] / "c", shared))):
        assert text.startswith(f"hosts have different data: {hosts[0]}/c on h0 (rank 0, 1), h2 (rank 4, 5) has ")
        assert f"; {hosts[1]}/c on h1 (rank 2, 3) has " in text and text.endswith("to the others, or prepare it anew")
    assert not built


def test_a_host_without_the_file(hosts, built):
    os.remove(hosts[2] / "c.idx")
    for text in errors(Threads(6, 2).run(lambda place: load(place, hosts[place.host] / "c"))):
        assert text == f"opening the data has failed on h2 (rank 4, 5): there is no file {hosts[2]}/c.idx"
    assert not built


def test_nobody_has_the_file(tmp_path):
    for text in errors(Threads(4, 2).run(lambda place: load(place, tmp_path / "c"))):
        assert text == f"opening the data has failed on h0 (rank 0, 1), h1 (rank 2, 3): there is no file {tmp_path}/c.idx"


def test_a_file_that_is_cut_on_a_host(hosts):
    with open(hosts[1] / "c.bin", "r+b") as file:
        file.truncate(10)
    for text in errors(Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c"))):
        assert "has failed on h1 (rank 2, 3): " in text and "c.bin has 10 bytes, less than the" in text


def test_hosts_with_other_numbers_of_files():
    def compare(place: Place) -> None:
        Storage(place).refuse_differing({str(i): "x" for i in range(1 + place.host)})

    expected = "ranks were given different numbers of files: 1 on h0 (rank 0); 2 on h1 (rank 2); give all of them the same"
    assert errors(Threads(4, 2).run(compare))[0] == expected


def test_a_rank_that_need_not_be_compared():
    def compare(place: Place) -> None:
        Storage(place).refuse_differing({"x": str(place.host)} if place.local_rank == 0 else {})

    assert errors(Threads(4, 2).run(compare))[0].startswith(
        "hosts have different data: x on h0 (rank 0) has 0; x on h1 (rank 2) has 1. "
    )


def test_many_hosts_are_not_all_named():
    def compare(place: Place) -> None:
        Storage(place).refuse_differing({"x": str(place.host // 6)})

    assert "h0 (rank 0), h1 (rank 1), h2 (rank 2), h3 (rank 3) and 2 more hosts has 0;" in errors(Threads(12, 1).run(compare))[0]


# What ranks are told #


def test_ranks_that_were_told_different_things():
    found = errors(Threads(2, 1).run(lambda place: Storage(place, shared=place.rank == 0)))
    assert found[0] == (
        "ranks were given different shared storage, and folders that may be shared: [true, 0] on h0 (rank 0); [false, 0] on h1 "
        "(rank 1); give all of them the same"
    )
    found = errors(Threads(2, 1).run(lambda place: Storage(place).refuse_other_settings("seeds", 7 + place.rank)))
    assert found[0] == "ranks were given different seeds: 7 on h0 (rank 0); 8 on h1 (rank 1); give all of them the same"


@pytest.mark.parametrize(("local", "told"), [((1, 2), "1, 2"), ((0, 0), "0, 0")])
def test_ranks_whose_host_has_no_first_rank(local, told):
    found = Threads(2, 2).run(lambda place: Storage(Place(place.rank, 5, local[place.rank], place.gather, "h")))
    assert errors(found)[0] == (
        f"ranks 0, 1 share a host and say that they are {told} of it; one of them has to be 0: give each host neighbouring ranks"
    )


# Builders #


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError(), SystemExit(3)])
def test_a_builder_that_fails(hosts, monkeypatch, error):
    build, calls = gpt.build_indices, []

    def failing(lengths: Any, *rest: Any) -> Any:
        calls.append(threading.current_thread())
        if len(calls) == 2:
            raise error
        return build(lengths, *rest)

    monkeypatch.setattr(gpt, "build_indices", failing)
    (text, *_) = errors(Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c", False)))
    assert text.startswith("making indices has failed on h") and (str(error) or "MemoryError") in text
    monkeypatch.setattr(gpt, "build_indices", build)  # afterwards nothing is in the way
    assert not [x for x in Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c", False)) if not isinstance(x, list)]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing behind so many bytes fails, as on a full disk: what fits is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 200])
def test_a_full_disk(hosts, size):
    with largest_file(size):
        (text, *_) = errors(Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c")))
    assert (
        "indices of " in text and f"cannot be written to {hosts[0]}/cache: " in text and "make room, or give another folder" in text
    )
    assert not list(hosts[0].glob("cache/*/"))
    assert rows(Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c"))[3])


def test_a_builder_that_is_lost(hosts):
    """What notices it is the collective."""

    def losing(place: Place) -> Any:
        def make(build: bool) -> Any:
            if place.rank == 2:
                raise AssertionError("not reached")
            return build

        store = Storage(place, shared=False)
        if place.rank == 2:
            raise ConnectionError("killed")
        return store.made("making indices", make)

    found = Threads(4, 2).run(losing)
    assert [type(x) for x in found] == [*[threading.BrokenBarrierError] * 2, ConnectionError, threading.BrokenBarrierError]


def test_others_are_told_while_a_builder_is_at_work(monkeypatch):
    """A collective gives up after some minutes; an index may take longer."""
    monkeypatch.setattr(storage, "_ROUND", 0.05)
    ranks = Threads(3, 3)
    ended = threading.Event()

    def work(place: Place) -> Any:
        def make(build: bool) -> str:
            if build:
                ended.wait(0.5)
            return f"made {build}"

        return Storage(place, shared=True).made("slow work", make)

    assert ranks.run(work) == ["made True", "made False", "made False"]
    assert ranks.gathers > 7


def test_any_work_is_done_once_for_each_storage(tmp_path):
    """Preparing text, e.g."""
    done: list[int] = []
    found = Threads(6, 2).run(
        lambda place: Storage(place, shared=False).made("x", lambda build: done.append(1) if build else place.host)
    )
    assert len(done) == 3 and found == [None, 0, None, 1, None, 2]


# Caches #


def test_a_cache_of_other_data_is_not_taken(hosts, built):
    Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c"))
    assert len(built) == 6
    for folder in hosts[:2]:  # the same names, lengths and sizes
        rewrite(folder / "c", lambda documents: documents[3].__setitem__(0, 999))
    found = Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c"))
    assert len(built) == 12 and all(rows(data) == rows(found[0]) for data in found)


@pytest.mark.parametrize("name", ["shuffle_index", "sample_index", "document_index"])
def test_a_cache_that_is_damaged_on_one_host(hosts, built, name):
    """A bit of an array: its size and shape are what they were."""
    first = Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c"))
    expected = [rows(data) for data in first]
    del first
    for path in hosts[1].glob(f"cache/*/{name}.npy"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    found = Threads(4, 2).run(lambda place: load(place, hosts[place.host] / "c"))
    assert [rows(data) for data in found] == expected and len(built) == 9


def test_what_was_written_is_read_again(tmp_path, monkeypatch):
    """A disk that gives back other bytes."""
    monkeypatch.setattr(np, "save", lambda file, array, **_: file.write(b"\x93NUMPY"))
    with pytest.raises(ValueError, match="cannot be read as it was written: is its disk damaged"):
        cached(tmp_path, "x", {"a": 1}, lambda: {"x_index": np.arange(3)})
