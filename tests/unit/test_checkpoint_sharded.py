"""Sharded checkpoints on one host: bytes, ranges, and what is damaged, mixed up, or says what cannot be."""

from __future__ import annotations

import json
import math
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.checkpoint import index as index_module
from bmtrain_ms.checkpoint.index import INDEX, Index, IndexedTensor, _checksum, file_name, read_index
from bmtrain_ms.checkpoint.sharded import ShardedReader, write_rank_file
from bmtrain_ms.compat.runtime import numpy_dtype
from bmtrain_ms.files.format import DTYPES, RegularFile
from tests.helpers.open_files import open_files

BLOCK = 64  # bytes that share a hash, here


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(index_module, "HASHED", BLOCK)


def bits(dtype: Any, count: int, seed: int = 0) -> np.ndarray:
    """Any bits; of bool, only 0 and 1."""
    raw = np.random.default_rng(seed).integers(0, 256, count * numpy_dtype(dtype).itemsize).astype(np.uint8)
    return (raw & 1 if dtype == ms.bool_ else raw).view(numpy_dtype(dtype))


def write(
    folder: Path, tensors: dict[str, tuple[Any, tuple[int, ...], bool]], ranks: int, seed: int = 0
) -> tuple[Index, dict[str, np.ndarray]]:
    """A checkpoint of so many ranks; `tensors`: name -> (dtype, shape, whether it is sharded). Its index, and its flat values."""
    folder.mkdir()
    flat = {n: bits(dtype, math.prod(shape), seed + i) for i, (n, (dtype, shape, _)) in enumerate(tensors.items())}
    indexed = {
        n: IndexedTensor(dtype, shape, max(1, -(-math.prod(shape) // ranks)) if cut else None, [])
        for n, (dtype, shape, cut) in tensors.items()
    }
    hashes = []
    for rank in range(ranks):
        pieces = {}
        for n, t in indexed.items():
            piece = t.piece(rank)
            pieces[n] = t.dtype, flat[n][piece.first : piece.last] if t.shard is not None or rank == 0 else flat[n][:0]
        hashes.append(write_rank_file(folder / file_name(rank, ranks), pieces, {"format": "pt"}))
    indexed = {n: replace(t, hashes=[h[n] for h in hashes[: 1 if t.shard is None else ranks]]) for n, t in indexed.items()}
    index = Index(ranks, f"identity{seed}", {"step": seed}, indexed)
    (folder / INDEX).write_text(index.to_json())
    return index, flat


SMALL = {
    "weight": (ms.float32, (7, 5), True),
    "half": (ms.bfloat16, (3,), True),
    "flags": (ms.bool_, (130,), True),
    "scalar": (ms.int64, (), False),
    "nothing": (ms.float16, (0, 4), True),
}


def read_all(folder: Path) -> dict[str, np.ndarray]:
    with ShardedReader(folder) as reader:
        return {n: reader.read_flat(n, 0, t.count) for n, t in reader.index.tensors.items()}


def refused(folder: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        read_all(folder)


# What was written is read #

counts = st.one_of(st.integers(0, 40), st.sampled_from([BLOCK // 4 + d for d in (-1, 0, 1)] + [BLOCK + d for d in (-1, 0, 1)]))
shapes = st.one_of(st.just(()), counts.map(lambda n: (n,)), st.lists(st.integers(0, 6), min_size=2, max_size=4).map(tuple))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(DTYPES.values())), shapes, st.booleans()), max_size=4), st.integers(1, 5), st.data())
def test_any_range_of_any_tensor(tmp_path_factory, tensors, ranks, data):
    folder = tmp_path_factory.mktemp("any") / "checkpoint"
    index, flat = write(folder, {f"tensor.{i}": t for i, t in enumerate(tensors)}, ranks)
    assert read_index(folder) == index
    with ShardedReader(folder) as reader:
        assert reader.described == {n: (t.shape, t.dtype) for n, t in index.tensors.items()}
        for name, expected in flat.items():
            start = data.draw(st.integers(0, expected.size))
            stop = data.draw(st.integers(start, expected.size))
            for a, b in ((0, expected.size), (start, stop)):
                got = reader.read_flat(name, a, b)
                assert got.dtype == expected.dtype and got.tobytes() == expected[a:b].tobytes()
        assert sum(reader.verify()) == sum(x.nbytes for x in flat.values())
    shutil.rmtree(folder)


def test_a_ranks_file_is_plain_safetensors(tmp_path):
    _, flat = write(tmp_path / "c", SMALL, 2)
    with safetensors.safe_open(str(tmp_path / "c" / file_name(1, 2)), framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {"weight", "half", "flags"}  # what is empty, or rank 0's, is left out
        assert np.array_equal(opened.get_tensor("flags"), flat["flags"][65:])
        assert opened.get_tensor("weight").tobytes() == flat["weight"][18:].tobytes()


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    write(tmp_path / "c", {"a": (ms.float32, (1000,), True), "b": (ms.float32, (1000,), True)}, 2)
    pread, reads = os.pread, []

    def counted(file: int, count: int, start: int) -> bytes:
        reads.append((os.readlink(f"/proc/self/fd/{file}").rsplit("/", 1)[1], count))
        return pread(file, count, start)

    with ShardedReader(tmp_path / "c") as reader:
        monkeypatch.setattr(os, "pread", counted)
        reader.read_flat("b", 0, 0)
        assert reads == []
        reader.read_flat("b", 499, 501)  # the last element of rank 0 and the first of rank 1: a block of each
        last = 500 * 4 % BLOCK
        assert reads == [(file_name(0, 2), last), (file_name(1, 2), BLOCK)]
        reads.clear()
        reader.read_flat("a", 15, 17)  # across a boundary of blocks
        assert reads == [(file_name(0, 2), BLOCK)] * 2


def test_only_some_ranks_files_are_here(tmp_path):
    """Without shared storage."""
    folder = tmp_path / "c"
    _, flat = write(folder, {"a": (ms.float32, (100,), True)}, 4)
    for rank in (0, 1, 3):
        (folder / file_name(rank, 4)).unlink()
    with ShardedReader(folder, only=[2]) as reader:
        assert np.array_equal(reader.read_flat("a", 50, 75), flat["a"][50:75], equal_nan=True)
        assert sum(reader.verify([2])) == 100
        with pytest.raises(CheckpointError, match=r"rank 3's file, which has a part of a, is not on this host"):
            reader.read_flat("a", 70, 80)


def test_files_are_closed(tmp_path):
    write(tmp_path / "c", SMALL, 3)
    reader = ShardedReader(tmp_path / "c")
    assert len(open_files(tmp_path)) == 3
    reader.close()
    reader.close()
    (tmp_path / "c" / file_name(2, 3)).unlink()
    refused(tmp_path / "c", "does not exist")
    assert not open_files(tmp_path)


# Writing #


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write_rank_file(tmp_path / "file", {}, {})
    assert (tmp_path / "file").read_text() == "mine"


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, bytes(data[:7]), position))
    write_rank_file(tmp_path / "file", {"x": (ms.uint8, np.arange(200, dtype=np.uint8))}, {})
    assert (tmp_path / "file").read_bytes().endswith(bytes(range(200)))


def test_a_disk_that_changes_bytes_is_noticed(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, bytes(data).replace(b"\7\7", b"\7\6"), position))
    with pytest.raises(CheckpointError, match="file: tensor x is not on the disk as it was written"):
        write_rank_file(tmp_path / "file", {"x": (ms.uint8, np.full(200, 7, np.uint8))}, {})


def test_a_disk_that_loses_bytes_is_noticed(tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (os.truncate(fd, 100), fsync(fd)))
    with pytest.raises(CheckpointError, match=r"file has 100 bytes on the disk, \d+ were written"):
        write_rank_file(tmp_path / "file", {"x": (ms.uint8, np.zeros(200, np.uint8))}, {})


# Damage #


def test_every_flipped_byte_is_noticed(tmp_path):
    """In the index, in headers, in data: an error that names the file, and the tensor if it is one's data."""
    folder = tmp_path / "c"
    write(folder, {"weight": (ms.float32, (9, 5), True), "flags": (ms.bool_, (70,), True)}, 2)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little") if path.name != INDEX else len(content)
        metadata = content.find(b'{"format":"pt"}') if path.name != INDEX else -1
        for position in range(len(content)):
            if metadata <= position < metadata + 16 or content[position : header or None].strip() == b"":
                continue  # says nothing
            changed = bytearray(content)
            changed[position] ^= 1 + position % 255
            path.write_bytes(bytes(changed))
            with pytest.raises(CheckpointError) as info:
                read_all(folder)
            text = str(info.value)
            assert path.name in text, (position, text)
            if position >= header:
                assert "tensor weight is damaged" in text or "tensor flags is damaged" in text
        path.write_bytes(content)
    read_all(folder)


@pytest.mark.parametrize("rank", [0, 2])
def test_every_truncation_is_noticed(tmp_path, rank):
    folder = tmp_path / "c"
    write(folder, SMALL, 3)
    path = folder / file_name(rank, 3)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        refused(folder, rf"{path.name}.*(truncated|damaged)")
    path.write_bytes(content + b"\0")
    refused(folder, rf"{path.name} is damaged: the file has {len(content) + 1} bytes, its tensors end at {len(content)}")


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    write(tmp_path / "c", {"a": (ms.float32, (100,), True)}, 1)
    with ShardedReader(tmp_path / "c") as reader:
        os.truncate(tmp_path / "c" / file_name(0, 1), 300)
        with pytest.raises(CheckpointError, match=r"ends before byte \d+: it is truncated"):
            reader.read_flat("a", 0, 100)


def test_a_missing_shard(tmp_path):
    write(tmp_path / "c", SMALL, 3)
    (tmp_path / "c" / file_name(1, 3)).unlink()
    refused(tmp_path / "c", r"c/rank-00001-of-00003\.safetensors does not exist")


def test_swapped_shards(tmp_path):
    """Of the same shapes: only the hashes tell."""
    folder = tmp_path / "c"
    write(folder, {"a": (ms.float32, (60,), True)}, 3)
    first, second, spare = folder / file_name(0, 3), folder / file_name(1, 3), folder / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    refused(folder, r"rank-00000-of-00003\.safetensors: tensor a is damaged \(bytes 0 to 64 of its piece do not have the hash")


def test_a_file_of_another_checkpoint(tmp_path):
    """Of the same shapes, and of others."""
    write(tmp_path / "a", SMALL, 2)
    write(tmp_path / "b", SMALL, 2, seed=50)
    write(tmp_path / "d", {**SMALL, "weight": (ms.float32, (5, 5), True)}, 2)
    write(tmp_path / "e", {n: t for n, t in SMALL.items() if n != "weight"}, 2)
    name = file_name(0, 2)
    for other, text in (
        ("b", "tensor flags is damaged"),
        ("d", r"tensor weight is \(13,\) Float32, the index says \(18,\) Float32; files of different checkpoints are mixed"),
        ("e", r"tensor weight is missing, the index says \(18,\) Float32; files of different checkpoints are mixed"),
    ):
        shutil.copy(tmp_path / other / name, tmp_path / "a" / name)
        refused(tmp_path / "a", f"a/{name}: {text}")


# Lies, with a checksum that is right #


def lie(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / INDEX).read_text())
    raw.pop("checksum")
    change(raw)
    (folder / INDEX).write_text(json.dumps({**raw, "checksum": _checksum(raw)}))


NUMBERS = (-1, 2**62, 2**63, 2**64, 10**30, 1.0, 2.5, "5", None, True, [], float("nan"), float("inf"))


def test_numbers_that_cannot_be(tmp_path):
    folder = tmp_path / "c"
    write(folder, SMALL, 2)
    before = (folder / INDEX).read_text()
    for number in NUMBERS:
        changes: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
            ("impossible shape|too large", lambda raw, n=number: raw["tensors"]["weight"].update(shape=[7, n])),
            ("ranks wrote it", lambda raw, n=number: raw.update(ranks=n)),
            ("no version|upgrade", lambda raw, n=number: raw.update(version=n)),
            ("has no hashes", lambda raw, n=number: raw["tensors"]["weight"].update(hashes=n)),
            ("has no hashes", lambda raw, n=number: raw["tensors"]["weight"].update(hashes=[["1"], [n]]) if n != "5" else None),
        ]
        if number is not None:
            changes.append(
                ("impossible shard|hashes of rank", lambda raw, n=number: raw["tensors"]["weight"].update(shard=n)),
            )
        for text, change in changes:
            if text == "has no hashes" and number == "5":
                continue  # a hash is a string
            lie(folder, change)
            refused(folder, rf"^{folder}/index\.json: .*({text})")
            (folder / INDEX).write_text(before)


@pytest.mark.parametrize(
    "text, change",
    [
        ("it is not the index of a bmtrain_ms checkpoint", lambda raw: raw.update(format="other")),
        ("it has format version 1, which no bmtrain_ms wrote as a folder", lambda raw: raw.update(version=1)),
        ("it has format version 4, this bmtrain_ms reads up to 3; upgrade bmtrain_ms", lambda raw: raw.update(version=4)),
        ("parts of it are missing", lambda raw: raw.pop("tensors")),
        ("parts of it are missing", lambda raw: raw.pop("state")),
        ("parts of it are missing", lambda raw: raw.pop("identity")),
        ("it says that None ranks wrote it", lambda raw: raw.pop("ranks")),
        ("tensor weight has no description", lambda raw: raw["tensors"].update(weight=[])),
        ("tensor weight is of the unknown type 'F8'", lambda raw: raw["tensors"]["weight"].update(dtype="F8")),
        ("tensor weight is of the unknown type None", lambda raw: raw["tensors"]["weight"].pop("dtype")),
        ("tensor weight has the impossible shape None", lambda raw: raw["tensors"]["weight"].pop("shape")),
        ("tensor weight has no hashes for 2 pieces", lambda raw: raw["tensors"]["weight"].pop("hashes")),
        ("tensor weight has no hashes for 1 pieces", lambda raw: raw["tensors"]["weight"].pop("shard")),
        ("tensor weight has the impossible shard length 0", lambda raw: raw["tensors"]["weight"].update(shard=0)),
        ("tensor weight has pieces for fewer elements", lambda raw: raw["tensors"]["weight"].update(shard=17)),
        (r"tensor weight of shape \[2147483648, 2147483648\] is too", lambda r: r["tensors"]["weight"].update(shape=[2**31] * 2)),
        ("tensor weight has 2 hashes of rank 0's piece, which needs 3", lambda raw: raw["tensors"]["weight"].update(shard=33)),
    ],
)
def test_parts_that_cannot_be(tmp_path, text, change):
    folder = tmp_path / "c"
    write(folder, SMALL, 2)
    lie(folder, change)
    refused(folder, rf"^{folder}/index\.json: {text}")


@pytest.mark.parametrize("shape", [[0, 2**62], [2**63, 0], [0] * 33, [1] * 100_000], ids=["2^62", "2^63", "33", "100000"])
def test_shapes_that_overflow(tmp_path, shape):
    folder = tmp_path / "c"
    write(folder, SMALL, 2)
    lie(folder, lambda raw: raw["tensors"]["nothing"].update(shape=shape))
    with pytest.raises(CheckpointError, match="tensor nothing has the impossible shape") as info:
        read_all(folder)
    assert len(str(info.value)) < 400


def test_many_axes_without_elements(tmp_path):
    folder = tmp_path / "c"
    write(folder, SMALL, 2)
    lie(folder, lambda raw: raw["tensors"]["nothing"].update(shape=[2**61, 2**61, 0]))
    assert read_all(folder)["nothing"].size == 0


def test_shapes_that_files_do_not_have(tmp_path):
    folder = tmp_path / "c"
    write(folder, {"a": (ms.float32, (10,), True)}, 1)
    lie(folder, lambda raw: raw["tensors"]["a"].update(shape=[9], shard=9))
    refused(folder, r"tensor a is \(10,\) Float32, the index says \(9,\) Float32")
    lie(folder, lambda raw: raw["tensors"]["a"].update(shape=[10], shard=10, dtype="I32"))
    refused(folder, r"tensor a is \(10,\) Float32, the index says \(10,\) Int32")
    lie(folder, lambda raw: raw["tensors"].update(b=dict(raw["tensors"]["a"])))
    lie(folder, lambda raw: raw["tensors"]["a"].update(dtype="F32"))
    refused(folder, "tensor b is missing")


def test_more_ranks_than_files(tmp_path):
    folder = tmp_path / "c"
    write(folder, {"a": (ms.float32, (3,), False)}, 1)
    lie(folder, lambda raw: raw.update(ranks=2))
    refused(folder, "rank-00000-of-00002.safetensors does not exist")


def test_the_index_has_a_checksum(tmp_path):
    folder = tmp_path / "c"
    write(folder, SMALL, 1)
    raw = json.loads((folder / INDEX).read_text())
    for changed in ({**raw, "state": {"step": 1}}, {**raw, "checksum": None}, {**raw, "checksum": "0" * 16}, {**raw, "more": 1}):
        (folder / INDEX).write_text(json.dumps(changed))
        refused(folder, r"index\.json: it is damaged: its checksum differs")
    (folder / INDEX).write_text(json.dumps(raw, indent=2))  # how it is written is of no matter
    read_all(folder)


def test_numbers_as_keys_of_the_state(tmp_path):
    """JSON makes them strings, which sort otherwise."""
    index = Index(1, "x", {"extra": {2: "a", 10: "b", True: (1, 2)}}, {})
    (tmp_path / INDEX).write_text(index.to_json())
    assert read_index(tmp_path).state == {"extra": {"2": "a", "10": "b", "true": [1, 2]}}


# What is not a file #


@pytest.mark.parametrize("name", [INDEX, file_name(0, 1)])
@pytest.mark.parametrize(
    "kind, text",
    [
        ("link", "is a link, which a checkpoint does not have"),
        ("link to nothing", "is a link, which a checkpoint does not have"),
        ("folder", "is not a file"),
        ("pipe", "is not a file"),
        ("nothing", "does not exist"),
        ("empty", "is (damaged|0 bytes long)"),
    ],
)
def test_something_else_in_the_place_of_a_file(tmp_path, name, kind, text):
    write(tmp_path / "c", SMALL, 1)
    path, moved = tmp_path / "c" / name, tmp_path / "moved"
    path.rename(moved)
    if kind.startswith("link"):
        path.symlink_to(moved if kind == "link" else tmp_path / "gone")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    refused(tmp_path / "c", f"{path} {text}")
    assert not open_files(tmp_path)


def test_a_device_is_not_opened(monkeypatch):
    """It has no end; a checkpoint cannot link to it, but its folder could be one of devices."""
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(CheckpointError, match=r"^/dev/zero is not a file$"):
        RegularFile(Path("/dev/zero"))


def test_lies_allocate_nothing(tmp_path):
    folder = tmp_path / "c"
    write(folder, {"a": (ms.float32, (10,), True)}, 1)
    rank = folder / file_name(0, 1)
    content = rank.read_bytes()
    huge = 2**40
    lies: list[Callable[[], Any]] = [
        lambda: lie(folder, lambda raw: raw["tensors"]["a"].update(shape=[huge], shard=huge)),
        lambda: lie(folder, lambda raw: raw["tensors"]["a"].update(shape=[huge], shard=None)),
        lambda: rank.write_bytes(huge.to_bytes(8, "little") + content[8:]),
        lambda: rank.write_bytes((2**63).to_bytes(8, "little") + content[8:]),
        lambda: rank.write_bytes(content.replace(b"[0,40]", b"[0,80]")),
        lambda: os.truncate(folder / INDEX, 2 << 30),  # sparse: no index is so long
    ]
    good = (folder / INDEX).read_text()
    for change in lies:
        change()
        tracemalloc.start()
        try:
            refused(folder, f"^{folder}")
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        rank.write_bytes(content)
        (folder / INDEX).write_text(good)
