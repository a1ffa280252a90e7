"""Thousands of mutated checkpoints: each gives a CheckpointError, or values that are right, and no more memory than it has bytes.

Mutations are those of bytes, and of the JSON of indexes and headers; where there is a checksum, it is made right again. The inputs
are the same in every run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import struct
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError, tools
from bmtrain_ms.checkpoint import index as index_module
from bmtrain_ms.checkpoint.index import INDEX, Grid, Index, IndexedTensor, _checksum, file_name
from bmtrain_ms.checkpoint.sharded import ShardedReader, write_rank_file
from bmtrain_ms.compat.runtime import numpy_dtype
from bmtrain_ms.files import consolidated
from bmtrain_ms.files.consolidated import ConsolidatedReader
from bmtrain_ms.files.format import plan_file
from tests.helpers.checkpoints import Run
from tests.helpers.open_files import open_files

pytestmark = pytest.mark.usefixtures("single_world")

SLACK = 1 << 20  # bytes; what parsing small files takes, and errors with their tracebacks
TENSORS = {
    "layer.weight": (ms.float32, (9, 4)),
    "layer.bias": (ms.bfloat16, (5,)),
    "mask": (ms.bool_, (70,)),
    "steps": (ms.int64, ()),
    "none": (ms.float16, (0, 3)),
    "columns": (ms.int16, (3, 5)),  # of which rank 1 has the first two, and rank 0 the others
}


@functools.cache
def originals() -> dict[str, np.ndarray]:
    """Flat."""
    return {
        name: np.random.default_rng(i).integers(0, 2, math.prod(shape)).astype(numpy_dtype(dtype))
        for i, (name, (dtype, shape)) in enumerate(TENSORS.items())
    }


def fuzzed(count: int) -> Callable[[Any], Any]:
    """So many inputs, always the same; nothing is written beside the tests."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking what fails takes minutes
        suppress_health_check=list(HealthCheck),
    )


# Mutations #

ODD_NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 4, 7, 8, 9, 36, 40, 144, 2**31, 2**32, 2**53 + 1, 2**61, 2**62, 2**63, 2**64, 10**40]
ODD_VALUES = [None, True, False, 0.0, 1.5, -1e400, float("nan"), "", "F32", "I64", "../x", "\ud800", "a" * 300, [], [0], [[]], {}]
odd = st.sampled_from([*ODD_NUMBERS, *ODD_VALUES, [2**63, 0], [0, 2**62], [2**32, 2**32], [0, 2**63, 2**63]])

edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("delete"), st.floats(0, 1, exclude_max=True), st.integers(1, 20)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("length"), st.just(0.0), st.sampled_from([0, 1, 2, 8, 200, 2**20, 2**32, 2**63, 2**64 - 1])),
    ),
    min_size=1,
    max_size=3,
)


def edited(content: bytes, changes: list[tuple[str, float, Any]]) -> bytes:
    data = bytearray(content)
    for kind, where, what in changes:
        at = int(where * len(data))
        if kind == "flip" and data:
            data[at] ^= what
        elif kind == "insert":
            data[at:at] = what
        elif kind == "delete":
            del data[at : at + what]
        elif kind == "cut":
            del data[at:]
        elif kind == "length":
            data[:8] = struct.pack("<Q", what)
    return bytes(data)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


json_edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "set", "set", "drop", "copy", "rename", "deep"]), odd),
    min_size=1,
    max_size=2,
)


def json_edited(tree: Any, changes: list[tuple[float, str, Any]]) -> Any:
    tree = json.loads(json.dumps(tree))
    for where, kind, value in changes:
        all_places = list(places(tree))
        if not all_places:
            break
        container, key = all_places[int(where * len(all_places))]
        value = copy.deepcopy(value)  # the next change may be one inside of it
        if kind == "set":
            container[key] = value
        elif kind == "drop":
            del container[key]
        elif kind == "copy":
            other, source = all_places[int(where * 7919 * len(all_places)) % len(all_places)]
            container[key] = json.loads(json.dumps(other[source]))
        elif kind == "rename" and isinstance(container, dict):
            container[str(value)] = container.pop(key)
        elif kind == "deep":
            for _ in range(150):
                value = [value]
            container[key] = value
    return tree


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Checking #


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory, where there is one: thousands of files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)
        assert not open_files(Path(folder))  # every file is closed, whatever was wrong with it


def attempted(folder: Path, action: Callable[[], Any]) -> bool:
    """Run it: whether it went well. Any error but a CheckpointError, or memory beyond the files' size, fails the test."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    tracemalloc.start()
    try:
        action()
        return True
    except CheckpointError as error:
        assert str(error)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()  # tracing what makes the inputs takes most of the time
        assert peak < size + SLACK


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


# Sharded checkpoints #


@pytest.fixture
def shards(place, monkeypatch) -> dict[str, bytes]:
    """The files of a checkpoint of two ranks."""
    monkeypatch.setattr(index_module, "HASHED", 64)
    hashes, tensors = [], {}
    for rank in range(2):
        pieces = {}
        for name, (dtype, shape) in TENSORS.items():
            grid = Grid(((1, 2),), ((1,), (0,))) if name == "columns" else None
            shard = None if name == "steps" or grid else max(1, -(-math.prod(shape) // 2))
            tensors[name] = IndexedTensor(dtype, shape, shard, [], grid=grid)
            positions = tensors[name].piece(rank).positions(0, math.prod(shape))
            pieces[name] = dtype, originals()[name][positions if name != "steps" or rank == 0 else positions[:0]]
        hashes.append(write_rank_file(place / file_name(rank, 2), pieces, {"format": "pt"}))
    for name, t in tensors.items():
        order = [1, 0] if t.grid else [0, 1] if t.shard else [0]
        tensors[name] = replace(t, hashes=[hashes[rank][name] for rank in order])
    state = {"step": 3, "extra": {"epoch": 1}, "versions": {"python": "3"}}
    (place / INDEX).write_text(Index(2, "identity", state, tensors).to_json())
    return {path.name: path.read_bytes() for path in place.iterdir()}


def read_shards(folder: Path) -> None:
    """What can be read is what was written."""
    with ShardedReader(folder) as reader:
        for name, tensor in reader.index.tensors.items():
            values = reader.read_flat(name, 0, tensor.count)
            assert values.size == tensor.count
            if values.size:
                assert values.tobytes() in {x.tobytes() for x in originals().values()}, name
        for _ in reader.verify():
            pass
    tools.inspect(folder)


def test_untouched_shards(place, shards):
    assert attempted(place, lambda: read_shards(place))


def test_bytes_of_shards(place, shards):
    good = []

    @fuzzed(350)
    @given(st.sampled_from(sorted(shards)), edits)
    def check(name: str, changes: list[Any]) -> None:
        put(place, {**shards, name: edited(shards[name], changes)})
        good.append(attempted(place, lambda: read_shards(place)))

    check()
    assert len(good) == 350 and sum(good) < 35


def test_indexes_of_shards(place, shards):
    """Lies that the checksum does not tell."""
    body = json.loads(shards[INDEX])
    del body["checksum"]
    good = []

    @fuzzed(450)
    @given(json_edits)
    def check(changes: list[Any]) -> None:
        lie = json_edited(body, changes)
        lie["checksum"] = _checksum(lie)
        put(place, {**shards, INDEX: json.dumps(lie).encode()})
        good.append(attempted(place, lambda: read_shards(place)))

    check()
    assert len(good) == 450 and 0 < sum(good) < 110  # e.g. the state may be anything


def test_headers_of_shards(place, shards):
    good = []

    @fuzzed(200)
    @given(st.integers(0, 1), json_edits)
    def check(rank: int, changes: list[Any]) -> None:
        header, data = header_of(shards[file_name(rank, 2)])
        put(place, {**shards, file_name(rank, 2): with_header(json_edited(header, changes), data)})
        good.append(attempted(place, lambda: read_shards(place)))

    check()
    assert len(good) == 200 and sum(good) < 60  # e.g. metadata


# Safetensors with whole tensors #


@pytest.fixture
def whole(place) -> dict[str, bytes]:
    """Two files and their index."""
    groups = [list(TENSORS)[:2], list(TENSORS)[2:]]
    with consolidated.Replacement(place) as new:
        write_files(new.folder, groups)
        new.commit(groups, 0)
    return {path.name: path.read_bytes() for path in place.iterdir()}


def write_files(folder: Path, groups: list[list[str]]) -> None:
    for name, group in zip(consolidated.file_names(2), groups):
        header, _, size = plan_file({x: TENSORS[x] for x in group}, {"format": "pt"})
        content = header + b"".join(originals()[x].tobytes() for x in group)
        assert len(content) == size
        (folder / name).write_bytes(content)


def read_whole(folder: Path, right: bool) -> None:
    """`right`: data were not changed."""
    with ConsolidatedReader(folder) as reader:
        for name, tensor in reader.tensors.items():
            values = reader.read_flat(name, 0, tensor.count)
            assert values.size == tensor.count
            if right and name in TENSORS and (tensor.dtype, tensor.shape) == TENSORS[name]:
                assert values.tobytes() == originals()[name].tobytes()
    tools.inspect(folder)


def test_untouched_files(place, whole):
    assert attempted(place, lambda: read_whole(place, True))


def test_bytes_of_files(place, whole):
    good = []

    @fuzzed(300)
    @given(st.sampled_from(sorted(whole)), edits)
    def check(name: str, changes: list[Any]) -> None:
        put(place, {**whole, name: edited(whole[name], changes)})
        good.append(attempted(place, lambda: read_whole(place, False)))

    check()
    assert len(good) == 300 and sum(good) < 60  # e.g. bytes of data: there are no hashes


def test_the_index_of_files(place, whole):
    index = json.loads(whole[consolidated.INDEX])
    good = []

    @fuzzed(200)
    @given(json_edits)
    def check(changes: list[Any]) -> None:
        put(place, {**whole, consolidated.INDEX: json.dumps(json_edited(index, changes)).encode()})
        good.append(attempted(place, lambda: read_whole(place, True)))

    check()
    assert len(good) == 200 and 0 < sum(good) < 150  # e.g. the total size is not used


def test_headers_of_files(place, whole):
    good = []

    @fuzzed(350)
    @given(st.sampled_from(consolidated.file_names(2)), json_edits)
    def check(name: str, changes: list[Any]) -> None:
        header, data = header_of(whole[name])
        put(place, {**whole, name: with_header(json_edited(header, changes), data)})
        good.append(attempted(place, lambda: read_whole(place, False)))

    check()
    assert len(good) == 350 and sum(good) < 80


def test_loading_a_model(place):
    """A file with any header either loads, or not."""
    model = bms.DistributedModule()
    for name in ("weight", "bias"):
        setattr(model, name, bms.DistributedParameter(np.arange(12 if name == "weight" else 5, dtype=np.float32)))
    path = place / "model.safetensors"
    bms.save(model, path)
    content = path.read_bytes()
    expected = {p.name: p.asnumpy().tobytes() for p in model.get_parameters()}
    good = []

    @fuzzed(200)
    @given(json_edits, st.booleans())
    def check(changes: list[Any], strict: bool) -> None:
        header, data = header_of(content)
        path.write_bytes(with_header(json_edited(header, changes), data))
        good.append(attempted(place, lambda: bms.load(model, path, strict=strict)))
        if good[-1] and strict:
            assert {p.name for p in model.get_parameters()} == set(expected)
        path.write_bytes(content)
        bms.load(model, path)
        assert {p.name: p.asnumpy().tobytes() for p in model.get_parameters()} == expected

    check()
    assert len(good) == 200 and 0 < sum(good) < 80


@pytest.mark.parametrize("part", ["manager", "others"])
def test_states(place, single_world, part):
    """Any state, the manager's or the rest: it loads, and training goes on, or nothing is changed."""
    saved = Run(single_world, str(place))
    saved.train(range(1))
    saved.save(1)
    run, index = Run(single_world, str(place)), place / "step-00000001" / INDEX
    run.train(range(2, 3))
    body = json.loads(index.read_text())
    del body["checksum"]
    manager = body["state"].pop("manager")
    good, content = [], index.read_text()

    def everything() -> Any:
        tensors = {name: x.tobytes() for name, x in run.everything().items()}
        return tensors, run.world.engine.clock.step, random.getstate(), np.random.get_state()[1].tobytes()

    @fuzzed(200)
    @given(json_edits, st.booleans())
    def check(changes: list[Any], strict: bool) -> None:
        if part == "manager":
            lie = {**body, "state": {**body["state"], "manager": json_edited(manager, changes)}}
        else:
            lie = {**body, "state": {**json_edited(body["state"], changes), "manager": manager}}
        lie["checksum"] = _checksum(lie)
        index.write_text(json.dumps(lie))
        before = everything()
        good.append(attempted(index.parent, lambda: run.load(strict=strict)))
        assert good[-1] or everything() == before
        if good[-1]:
            with contextlib.redirect_stderr(io.StringIO()):
                run.train(range(3, 4))
            index.write_text(content)
            run.load()

    check()
    saved.close()
    assert len(good) == 200 and 0 < sum(good) < 130  # e.g. extra may be anything
