"""Checkpoints of tensors that are cut along dims: saved in any layout, loaded in any other; all ranks are simulated."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bmtrain_ms.checkpoint import CheckpointError, tools
from bmtrain_ms.checkpoint import index as index_module
from bmtrain_ms.checkpoint.index import INDEX, Index, Told, _checksum, by_file, file_name, indexed, odd_layouts, read_index
from bmtrain_ms.checkpoint.pieces import pieces_to_write
from bmtrain_ms.checkpoint.places import Place
from bmtrain_ms.checkpoint.sharded import ShardedReader, write_rank_file
from bmtrain_ms.checkpoint.whole import save_entries, state_dict
from bmtrain_ms.compat.runtime import from_host, host_array, numpy_dtype
from bmtrain_ms.files import format as format_module
from bmtrain_ms.files.consolidated import ConsolidatedReader
from bmtrain_ms.files.entries import Entry
from bmtrain_ms.files.format import DTYPES, RegularFile
from bmtrain_ms_base.layout import Layout, Split
from tests.helpers.open_files import open_files

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(index_module, "HASHED", 64)
    monkeypatch.setattr(format_module, "PIECE", 64)


@dataclass(frozen=True)
class Cut:
    """How a tensor lies on ranks: `splits` are (dim, parts); each part is in so many shards; None: whole on every rank."""

    splits: tuple[tuple[int, int], ...] = ()
    shards: int | None = None

    def layout(self, shape: tuple[int, ...], rank: int) -> Layout | None:
        if self.shards is None:
            return None
        counts = [parts for _, parts in self.splits]
        copy, place = divmod(rank, math.prod(counts) * self.shards)
        part, index = divmod(place, self.shards)
        indices = np.unravel_index(part, counts) if counts else ()
        splits = tuple(Split(dim, int(i), parts) for (dim, parts), i in zip(self.splits, indices))
        return Layout(shape, splits, index, self.shards, copy)


@st.composite
def cuts(draw: Any, shape: tuple[int, ...], ranks: int) -> Cut:
    if draw(st.integers(0, 5)) == 0:
        return Cut()
    splits, left = [], ranks
    for dim in draw(st.permutations(range(len(shape)))):
        parts = draw(st.integers(1, min(left, 4)))
        if parts > 1 or draw(st.integers(0, 5)) == 0:
            splits.append((dim, parts))
            left //= parts
    return Cut(tuple(splits), ranks if not splits and draw(st.booleans()) else draw(st.integers(1, left)))


Tensors = dict[str, tuple[Any, np.ndarray]]  # name -> (MindSpore dtype, whole values)


def tensor(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> tuple[Any, np.ndarray]:
    """Any bits; of bool, only 0 and 1."""
    raw = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * numpy_dtype(dtype).itemsize).astype(np.uint8)
    return dtype, (raw & 1 if dtype == ms.bool_ else raw).view(numpy_dtype(dtype)).reshape(shape)


def entry(dtype: Any, values: np.ndarray, layout: Layout | None) -> Entry:
    kept = from_host(values if layout is None else layout.cut(values))
    return Entry(dtype, lambda: kept, lambda _: None, layout)


def save(folder: Path, here: Any, tensors: Tensors, how: dict[str, Cut], ranks: int) -> Index:
    """What so many ranks would write."""
    folder.mkdir(parents=True)
    told, entries = [], {}
    for rank in range(ranks):
        entries = {n: entry(dtype, x, how[n].layout(x.shape, rank)) for n, (dtype, x) in tensors.items()}
        pieces = pieces_to_write(entries, (), here, Place(rank, ranks, True, (rank,)), True)
        hashes = write_rank_file(folder / file_name(rank, ranks), pieces, {"format": "pt"})
        layouts = odd_layouts({n: e.layout for n, e in entries.items()}, rank, ranks)
        told.append(Told(**json.loads(json.dumps(vars(Told(rank, hashes, layouts))))))
    files = by_file(told)
    made = {n: indexed(n, e.layout, e.dtype, e.shape, files, True) for n, e in entries.items()}
    index = Index(ranks, "identity", {"step": 3}, made)
    (folder / INDEX).write_text(index.to_json())
    return index


shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple), st.lists(st.integers(5, 40), min_size=2, max_size=2).map(tuple)
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(list(DTYPES.values())), shapes), max_size=3), st.integers(1, 6), st.integers(1, 6), st.data()
)
def test_any_layout_is_loaded_into_any_other(tmp_path_factory, single_world, kinds, writers, readers, data):
    root = tmp_path_factory.mktemp("any")
    tensors = {f"t{i}": tensor(*kind, seed=i) for i, kind in enumerate(kinds)}
    how = {n: data.draw(cuts(x.shape, writers), label=f"saved {n}") for n, (_, x) in tensors.items()}
    index = save(root / "step-00000003", single_world, tensors, how, writers)
    assert read_index(root / "step-00000003") == index
    save_file({n: x for n, (dtype, x) in tensors.items() if dtype != ms.bfloat16}, root / "file")
    with ShardedReader(root / "step-00000003") as sharded, ConsolidatedReader(root / "file") as whole:
        for n, (dtype, x) in tensors.items():
            then = data.draw(cuts(x.shape, readers), label=f"loaded {n}")
            starts = [data.draw(st.integers(0, size)) for size in x.shape]
            box = tuple(slice(a, data.draw(st.integers(a, size))) for a, size in zip(starts, x.shape))
            begin = data.draw(st.integers(0, x.size))
            end = data.draw(st.integers(begin, x.size))
            for source in [sharded] if dtype == ms.bfloat16 else [sharded, whole]:
                for rank in range(readers):
                    layout = then.layout(x.shape, rank)
                    wanted = entry(dtype, x, layout)
                    got = wanted.read_from(source, n)
                    expected = x if layout is None else layout.cut(x)
                    assert (got.dtype, got.shape) == (expected.dtype, expected.shape) and got.tobytes() == expected.tobytes()
                assert source.read(n, box).tobytes() == x[box].tobytes() and source.read(n, box).shape == x[box].shape
                assert source.read_flat(n, begin, end).tobytes() == x.reshape(-1)[begin:end].tobytes()
        assert sum(sharded.verify()) >= sum(x.nbytes for _, x in tensors.values())
    shutil.rmtree(root)


TENSORS = {
    "row": tensor(ms.float32, (10, 7), 1),
    "column": tensor(ms.bfloat16, (6, 50), 2),
    "both": tensor(ms.int16, (5, 9, 3), 3),
    "flat": tensor(ms.float32, (11,), 4),
    "some": tensor(ms.int8, (90,), 5),
    "whole": tensor(ms.int64, (), 6),
}
HOW = {
    "row": Cut(((0, 3),), 2),
    "column": Cut(((1, 2),), 3),
    "both": Cut(((2, 2), (1, 3)), 1),
    "flat": Cut((), 6),
    "some": Cut((), 2),
    "whole": Cut(),
}


@pytest.fixture
def checkpoint(tmp_path: Path, single_world: Any) -> Path:
    """Of six ranks."""
    save(tmp_path / "run" / "step-00000003", single_world, TENSORS, HOW, 6)
    return tmp_path / "run" / "step-00000003"


def test_the_common_case_is_as_small_as_in_format_2(checkpoint):
    index = json.loads((checkpoint / INDEX).read_text())["tensors"]
    assert index["flat"].keys() == {"dtype", "shape", "shard", "hashes", "of_model"} and index["flat"]["shard"] == 2
    assert index["whole"]["shard"] is None
    assert (index["row"]["splits"], index["row"]["files"]) == ([[0, 3]], [[0, 1], [2, 3], [4, 5]])
    assert (index["both"]["splits"], index["both"]["files"]) == ([[2, 2], [1, 3]], [[0], [1], [2], [3], [4], [5]])
    assert (index["some"]["splits"], index["some"]["files"]) == ([], [[0, 1]])


def test_values_are_converted_to_the_type_that_is_wanted(checkpoint, single_world):
    layout = Layout((10, 7), (Split(1, 1, 2),), 0, 2)
    with ShardedReader(checkpoint) as reader, np.errstate(all="ignore"):
        wanted = entry(ms.float16, np.zeros((10, 7), np.float16), layout).read_from(reader, "row")
        assert wanted.tobytes() == layout.cut(TENSORS["row"][1].astype(np.float16)).tobytes()


@pytest.mark.parametrize("name", ["row", "column", "both", "flat", "some"])
def test_a_block_is_read_once_for_a_box(checkpoint, monkeypatch, name):
    """And none that has nothing of it."""
    read, seen = RegularFile.read, []

    def counting(self: RegularFile, start: int, count: int) -> bytes:
        seen.append((self.path.name, start, count))
        return read(self, start, count)

    shape = TENSORS[name][1].shape
    with ShardedReader(checkpoint) as reader:
        monkeypatch.setattr(RegularFile, "read", counting)
        reader.read(name, tuple(slice(0, size) for size in shape))
        assert len(seen) == len(set(seen)) and sum(count for *_, count in seen) == TENSORS[name][1].nbytes
        reader._kept.clear()
        seen.clear()
        reader.read(name, tuple(slice(0, 1) for _ in shape))
        assert len(seen) == 1


def test_a_range_of_a_tensor_that_is_cut_reads_its_blocks_once(checkpoint, monkeypatch):
    """As `consolidate` does: every range crosses the same pieces."""
    read, counts = RegularFile.read, []
    with ShardedReader(checkpoint) as reader:
        monkeypatch.setattr(RegularFile, "read", lambda self, start, count: counts.append(count) or read(self, start, count))
        values = [reader.read_flat("column", start, start + 30) for start in range(0, 300, 30)]
    assert np.concatenate(values).tobytes() == TENSORS["column"][1].tobytes() and sum(counts) == TENSORS["column"][1].nbytes


# Tools #


def test_tools_work_on_tensors_that_are_cut(checkpoint, tmp_path):
    assert "every hash is right" in tools.verify(checkpoint)
    text = tools.inspect(checkpoint)
    assert all(any(line.startswith(name) for line in text.splitlines()) for name in TENSORS)
    (path,) = tools.consolidate(checkpoint, tmp_path / "out")
    values = load_file(path)
    assert all(values[name].tobytes() == x.tobytes() and values[name].shape == x.shape for name, (_, x) in TENSORS.items())
    assert tools.diff(checkpoint, path) == []
    again = tools.reshard(checkpoint, tmp_path / "again" / "step-00000003", 4)
    assert tools.diff(checkpoint, again) == [] and "every hash is right" in tools.verify(again)
    index = read_index(again)
    assert index.ranks == 4 and all(t.grid is None for t in index.tensors.values())
    assert {name for name, t in index.tensors.items() if t.is_whole} == {"whole"}


def test_differences_of_tensors_that_are_cut(checkpoint, tmp_path, single_world):
    values = TENSORS["both"][1].copy()
    values[4, 8, 2] ^= 1
    save(
        tmp_path / "other" / "step-00000003", single_world, {**TENSORS, "both": (ms.int16, values)}, {**HOW, "both": Cut((), 6)}, 6
    )
    assert tools.diff(checkpoint, tmp_path / "other") == ["! both: 1 of 135 elements differ, by at most 1"]


# What does not fit #


def test_a_part_that_nobody_has_written(tmp_path, single_world):
    told = []
    for rank in range(3):
        layout = Cut(((1, 2),), 2).layout((4, 4), rank)
        told.append(Told(rank, {"x": ["0"]}, odd_layouts({"x": layout}, rank, 3)))
    with pytest.raises(CheckpointError, match=r"^no rank has written shard 1 of part \(1,\) of tensor x, cut as \(\(1, 2\),\)$"):
        indexed("x", Layout((4, 4)), ms.float32, (4, 4), by_file(told), True)
    other = Told(3, {"x": ["0"]}, odd_layouts({"x": Layout((4, 4), (Split(0, 0, 2),))}, 3, 4))
    with pytest.raises(CheckpointError, match=r"^tensor x is not cut in the same way on all ranks: "):
        indexed("x", Layout((4, 4)), ms.float32, (4, 4), by_file([*told, other]), True)


def test_a_whole_file_of_a_tensor_that_is_elsewhere_too_is_refused(tmp_path, single_world, monkeypatch):
    """The ranks that have its other parts are not among those that gather."""
    cut = entry(*TENSORS["row"], Layout((10, 7), (Split(0, 1, 2),)))
    text = (
        "the ranks of this world have 35 elements of row, of shape (10, 7): a whole file needs ranks that have all of it together"
    )
    with pytest.raises(CheckpointError, match=re.escape(text)):
        save_entries(tmp_path / "file", {"row": cut}, {}, single_world)
    with pytest.raises(CheckpointError, match=r"have 35 elements of row, of shape \(10, 7\): a whole"):
        save_entries(tmp_path / "file", {"row": entry(*TENSORS["row"], Layout((10, 7), (), 0, 2))}, {}, single_world)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("bmtrain_ms.checkpoint.whole.model_entries", lambda model: {"row": cut})
    with pytest.raises(CheckpointError, match=re.escape(text)):
        state_dict(None)  # type: ignore[arg-type]


def lie(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / INDEX).read_text())
    raw.pop("checksum")
    change(raw["tensors"])
    (folder / INDEX).write_text(json.dumps({**raw, "checksum": _checksum(raw)}))


@pytest.mark.parametrize(
    "text, change",
    [
        ("row has impossible splits", {"splits": 3}),
        ("row has impossible splits", {"splits": [[0]]}),
        ("row has impossible splits", {"splits": [[0, 0]]}),
        ("row has impossible splits", {"splits": [[0, 100000]]}),
        ("row has impossible splits", {"splits": [[-1, 3]]}),
        ("row has impossible splits", {"splits": [[0, "3"]]}),
        (r"row is split along dims \[2\] of 2", {"splits": [[2, 3]]}),
        (r"row is split along dims \[0, 0\] of 2", {"splits": [[0, 3], [0, 1]]}),
        ("row does not say which files have its 2 parts", {"splits": [[0, 2]]}),
        ("row does not say which files have its 3 parts", {"files": None}),
        ("row does not say which files have its 3 parts", {"files": [[0, 1], [2, 3], []]}),
        ("row is said to be in impossible files", {"files": [[0, 1], [2, 3], [4, 6]]}),
        ("row is said to be in impossible files", {"files": [[0, 1], [2, 3], [4, 0]]}),
        ("row is said to be in impossible files", {"files": [[0, 1], [2, 3], [4, 5.0]]}),
        ("row has no hashes for 5 pieces", {"files": [[0, 1], [2, 3], [4]]}),
        ("row has the impossible number of copies 2", {"copies": 2}),
        (r"rank-00000-of-00006\.safetensors: tensor row is \(11,\) Float32, the index says \(10,\)", {"splits": [[1, 3]]}),
        (r"tensor row is \(11,\) Float32, the index says \(10,\)", {"files": [[1, 0], [2, 3], [4, 5]]}),
    ],
)
def test_lies_about_files(checkpoint, text, change):
    lie(checkpoint, lambda tensors: tensors["row"].update(change))
    with pytest.raises(CheckpointError, match=text), ShardedReader(checkpoint) as reader:
        reader.read_flat("row", 0, 70)


def test_files_in_another_order(checkpoint):
    """Of pieces of the same sizes: only the hashes tell."""
    lie(checkpoint, lambda tensors: tensors["column"].update(files=[[0, 2, 1], [3, 4, 5]]))
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00006.*tensor column is damaged"):
        tools.verify(checkpoint)


def test_damage_names_the_file_and_the_tensor(checkpoint):
    path = checkpoint / file_name(4, 6)
    content = path.read_bytes()
    path.write_bytes(content.replace(TENSORS["both"][1][:, 3:6, 1:].tobytes(), b"\0" * 60))
    assert path.read_bytes() != content
    with pytest.raises(CheckpointError, match=rf"{path}: tensor both is damaged"):
        tools.verify(checkpoint)
    with ShardedReader(checkpoint) as reader:
        assert reader.read("both", (slice(0, 5), slice(0, 3), slice(0, 3))).any()  # nothing of that file is needed


# Format 2 #


def test_format_2_is_read(checkpoint, tmp_path):
    """What is not cut is in it as it is now; its first writers did not say what is of the model."""
    path = checkpoint / INDEX
    raw = json.loads(path.read_text())
    raw["tensors"] = {"flat": raw["tensors"]["flat"], "whole": raw["tensors"]["whole"]}
    del raw["checksum"], raw["tensors"]["flat"]["of_model"]
    raw["version"] = 2
    path.write_text(json.dumps({**raw, "checksum": _checksum(raw)}))
    layout = Layout((11,), (Split(0, 1, 2),), 1, 3)
    with ShardedReader(checkpoint) as reader:
        assert reader.index.tensors["flat"].of_model
        assert entry(*TENSORS["flat"], layout).read_from(reader, "flat").tobytes() == layout.cut(TENSORS["flat"][1]).tobytes()
        assert reader.read_flat("whole", 0, 1)[0] == TENSORS["whole"][1]


def test_a_checkpoint_of_format_2_that_an_older_version_wrote():
    (folder,) = (DATA / "sharded-v2").iterdir()
    assert json.loads((folder / INDEX).read_text())["version"] == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "HASHED", 4 << 20)
        tools.verify(folder)
        with ShardedReader(folder) as reader:
            for name, (shape, _) in reader.described.items():
                whole = reader.read(name, tuple(slice(0, size) for size in shape))
                assert whole.tobytes() == reader.read_flat(name, 0, whole.size).tobytes()
                for index in range(3 if shape else 0):
                    layout = Layout(shape, (Split(0, index, 3),), 1, 2)
                    assert layout.cut(whole).tobytes() == entry(ms.float32, whole, layout).read_from(reader, name).tobytes()


def test_the_files_of_this_folder_are_closed(checkpoint):
    with ShardedReader(checkpoint) as reader:
        assert len(open_files(checkpoint)) == 6
        assert host_array(from_host(reader.read("row", (slice(0, 10), slice(0, 7))))).shape == (10, 7)
    assert not open_files(checkpoint)
