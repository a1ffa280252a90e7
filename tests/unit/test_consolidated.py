"""Whole tensors in safetensors files: sizes, splitting, Hugging Face's index, and files that are damaged or are no files."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import nn
from safetensors.numpy import load_file, save_file

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError, LoadResult, tools
from bmtrain_ms.files.consolidated import INDEX, SINGLE, ConsolidatedReader, file_names, size_in_bytes, split_by_size
from bmtrain_ms.files.format import AtomicFile, RegularFile
from tests.helpers.open_files import open_files
from tests.helpers.training_v1 import save_training

pytestmark = pytest.mark.usefixtures("single_world")

SHAPES = {"one": (1,), "prime": (7,), "deep": (2, 3, 5), "matrix": (4, 6)}  # 4, 28, 120 and 96 bytes


class Net(nn.Cell):
    """Parameters with values from a seed."""

    def __init__(self, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES):
        super().__init__()
        for i, (name, shape) in enumerate(shapes.items()):
            values = np.random.default_rng([seed, i]).standard_normal(shape).astype(np.float32)
            setattr(self, name, bms.DistributedParameter(values))


def values(model: nn.Cell) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().reshape(p.full_shape).copy() for p in model.get_parameters()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(x.shape == b[n].shape and x.tobytes() == b[n].tobytes() for n, x in a.items())


def refused(path: Path, text: str) -> None:
    """With the model as it was, and no file left open."""
    model = Net(9)
    before = values(model)
    with pytest.raises(CheckpointError, match=text):
        bms.load(model, path)
    assert same(values(model), before) and not open_files(path.parent)


# Sizes and groups #


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *((1, 1), ("17", 17), (1e9, 10**9), ("2.0", 2), ("7B", 7)),
        *(("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("200MiB", 200 << 20), (" 3KB ", 3000), ("2GiB", 2 << 30)),
        *(("1.5GB", 1_500_000_000), ("512 MB", 512 * 10**6), ("0.5KiB", 512), ("0.0015 KB", 1)),
    ],
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        0,
        -1,
        1.5,
        "",
        "0GB",
        "-1GB",
        "GB",
        "1.5",
        "0.0001KB",
        "1.5B",
        "1.GB",
        "1e3",
        "1,5GB",
        "inf",
        True,
        "5 G B",
        "5TB",
        "5XB",
        None,
        "٣²",
    ],
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="max_shard_size must be a number of bytes, or like 5GB or 200MiB, not "):
        size_in_bytes(text)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_groups(sizes, largest):
    """In order, none left out, none too large that could be split, none begun too early."""
    named = {str(i): size for i, size in enumerate(sizes)}
    groups = split_by_size(named, largest)
    assert [name for group in groups for name in group] == list(named) and all(groups)
    totals = [sum(named[name] for name in group) for group in groups]
    assert all(total <= largest or len(group) == 1 for total, group in zip(totals, groups))
    assert all(total + named[after[0]] > largest for total, after in zip(totals, groups[1:]))


# What is written #


@pytest.mark.parametrize(("largest", "count"), [("1GB", 1), (248, 1), (247, 2), (124, 3), (1, 4)])
def test_files_and_their_index(tmp_path, largest, count):
    """As Hugging Face's libraries write them, and as `safetensors` reads them."""
    folder, model, other = tmp_path / "new" / "folder", Net(), Net(1)
    bms.save(model, folder, max_shard_size=largest)
    names = file_names(count)
    assert sorted(os.listdir(folder)) == sorted([*names, INDEX] if count > 1 else [SINGLE])
    loaded = {name: load_file(folder / name) for name in names}
    assert same({n: x for file in loaded.values() for n, x in file.items()}, values(model))
    if count > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index == {"metadata": {"total_size": 248}, "weight_map": {n: f for f, file in loaded.items() for n in file}}
    assert bms.load(other, folder) == LoadResult([], [])
    assert same(values(other), values(model))
    if count > 1:
        assert bms.load(Net(2), folder / INDEX) == LoadResult([], [])


def test_names_of_many_files():
    assert file_names(1) == ["model.safetensors"]
    assert file_names(12)[::11] == ["model-00001-of-00012.safetensors", "model-00012-of-00012.safetensors"]


@pytest.mark.parametrize(("before", "after"), [(124, "1GB"), ("1GB", 124), (124, 1), (1, 124)])
def test_an_earlier_save_is_not_mixed_in(tmp_path, before, after):
    """Its files may stay; what is read is the later one's."""
    bms.save(Net(5, {**SHAPES, "more": (9,)}), tmp_path, max_shard_size=before)
    model, other = Net(), Net(1)
    bms.save(model, tmp_path, max_shard_size=after)
    assert bms.load(other, tmp_path) == LoadResult([], [])
    assert same(values(other), values(model))


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    before = Net(5)
    bms.save(before, tmp_path, max_shard_size=124)
    there = sorted(os.listdir(tmp_path))
    replace, calls = os.replace, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors cannot be written: .*No space left"):
        bms.save(Net(), tmp_path, max_shard_size=124)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == there
    model = Net()
    bms.load(model, tmp_path)
    assert same(values(model), values(before))


@pytest.mark.parametrize("dtype, name", [(np.int32, "Int32"), (np.bool_, "Bool"), (np.uint16, "UInt16")])
def test_types_that_hold_other_values(tmp_path, dtype, name):
    """A float is no integer, and no truth value; without `strict` it becomes one, and that is returned."""
    save_file({"p": np.ones(3, dtype)}, tmp_path / "file")
    model = bms.DistributedModule()
    model.p = bms.DistributedParameter(np.zeros(3, np.float32), name="p")
    text = f"{name} in the file, Float32 here"
    with pytest.raises(CheckpointError, match=f"file does not fit the model; 1 types differ: p: {text}$"):
        bms.load(model, tmp_path / "file")
    assert not model.p.asnumpy().any()
    assert bms.load(model, tmp_path / "file", strict=False) == LoadResult([], [], [f"p: {text}"])
    assert model.p.asnumpy().tolist() == [1.0] * 3


def test_floats_of_another_size_are_converted(tmp_path):
    """And that is returned too."""
    save_file({"p": np.ones(3, np.float16)}, tmp_path / "file")
    model = bms.DistributedModule()
    model.p = bms.DistributedParameter(np.zeros(3, np.float32), name="p")
    assert bms.load(model, tmp_path / "file").converted == ["p: Float16 in the file, Float32 here"]


def test_fewer_files_than_before(tmp_path):
    """None of the others is left."""
    bms.save(Net(5), tmp_path, max_shard_size=124)
    (tmp_path / "config.json").write_text("{}")
    bms.save(Net(), tmp_path, max_shard_size="1GB")
    assert sorted(os.listdir(tmp_path)) == ["config.json", SINGLE]


# What is read #


def split_save(folder: Path) -> dict[str, Any]:
    """A model in two files; its index."""
    bms.save(Net(), folder, max_shard_size=200)
    return json.loads((folder / INDEX).read_text())


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", ".x.safetensors", "x", "x.bin", 3, None, ["x"]],
)
def test_an_index_that_names_what_is_not_beside_it(tmp_path, name):
    index = split_save(tmp_path)
    index["weight_map"]["one"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(tmp_path, rf"{INDEX} is damaged: tensor one is said to be in .*, which is not the name of a file beside the index")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is damaged: Expecting value"),
        (b"{", "is damaged: Expecting property name"),
        (b"\xff\xfe\xfd", "is damaged: "),
        (b"[]", "is damaged: "),
        (b"3", "is damaged: "),
        (b"{}", "is damaged: it has no 'weight_map'"),
        (b'{"weight_map": []}', r"is damaged: its weight_map must be an object, tensors' names and their files, not \[\]"),
        (b'{"weight_map": {}}', "names no file"),
        (b"[" * 100_000, "is damaged: "),
    ],
)
def test_an_index_that_is_none(tmp_path, content, text):
    split_save(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    refused(tmp_path, f"{INDEX} {text}")


def test_an_index_that_does_not_fit_its_files(tmp_path):
    index = split_save(tmp_path)
    first, second = file_names(2)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "matrix": first}}))
    refused(tmp_path, rf"{first} has no tensor matrix, which its index says it has")
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / second).unlink()
    refused(tmp_path, rf"{second} does not exist \(or is not visible from this host\)")


def test_tensors_that_the_index_does_not_name_are_not_there(tmp_path):
    index = split_save(tmp_path)
    del index["weight_map"]["one"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert bms.load(Net(1), tmp_path, strict=False) == LoadResult(["one"], [])


def test_links_to_files_are_followed(tmp_path):
    """Hugging Face's cache has its files elsewhere, under their hashes."""
    split_save(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in os.listdir(tmp_path / "blobs"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    model = Net(1)
    bms.load(model, tmp_path / "snapshot")
    assert same(values(model), values(Net()))


def put(path: Path, kind: str, target: Path) -> None:
    """Something that is no file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        if kind == "link to a pipe":
            os.mkfifo(target)
        path.symlink_to("/dev/zero" if kind == "link to a device" else target)


@pytest.mark.parametrize("name", ["file", SINGLE, INDEX, file_names(2)[1]])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to a device", "link to nothing", "folder"])
def test_what_is_no_file(tmp_path, name, kind):
    """It is refused without being opened: opening a pipe waits for the other end."""
    folder = tmp_path / "folder"
    split_save(folder)
    if name == SINGLE:
        (folder / INDEX).unlink()
    (folder / name).unlink(missing_ok=True)
    put(folder / name, kind, tmp_path / "target")
    text = "does not exist" if kind == "link to nothing" else "is not a file"
    if name in (SINGLE, INDEX) and kind == "link to nothing":
        refused(folder, rf"{folder} has neither")
    elif name == "file" and kind == "folder":
        refused(folder / name, rf"{folder}/file has neither")
    else:
        refused(folder / name if name == "file" else folder, rf"{folder}/{name} {text}")


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, kind):
    """Opening a device may do something."""
    put(tmp_path / "it", kind, tmp_path / "target")
    monkeypatch.setattr(os, "open", lambda *args: pytest.fail("it was opened"))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/it is not a file"):
        RegularFile(tmp_path / "it", links=True)


def test_nothing_is_allocated_for_bytes_that_are_not_there(tmp_path):
    (tmp_path / "file").write_bytes(b"12345678")
    with RegularFile(tmp_path / "file") as file:
        assert (file.read(2, 3), file.read(8, 0)) == (b"345", b"")
        tracemalloc.start()
        for start, count in ((0, 9), (8, 1), (1 << 40, 1), (0, 1 << 32)):
            with pytest.raises(CheckpointError, match=rf"file ends before byte {start + count}: it is truncated"):
                file.read(start, count)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


# Headers #


def header(entries: Any, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([], "the header is not an object"),
        ("x", "the header is not an object"),
        ({"one": None}, "'NoneType' object is not subscriptable"),
        ({"one": {}}, "a tensor has no 'dtype'"),
        ({"one": {"dtype": "F32"}}, "a tensor has no 'shape'"),
        ({"one": {"dtype": "F32", "shape": [2]}}, "a tensor has no 'data_offsets'"),
        ({"one": {**tensor(), "data_offsets": [0]}}, "not enough values to unpack"),
        ({"one": {**tensor(), "data_offsets": 3}}, "cannot unpack"),
        ({"__metadata__": 3, "one": tensor()}, "the metadata are not strings"),
        ({"__metadata__": {"a": 3}, "one": tensor()}, "the metadata are not strings"),
        ({"one": tensor([2**63, 0], 0, 0)}, "tensor one has an impossible shape or place"),
        ({"one": tensor([0, 2**62], 0, 0)}, "tensor one has an impossible shape or place"),
        ({"one": tensor([1] * 100_000)}, "tensor one has an impossible shape or place"),
        ({"one": tensor([-2])}, "tensor one has an impossible shape or place"),
        ({"one": tensor([True, 2])}, "tensor one has an impossible shape or place"),
        ({"one": tensor([2.0])}, "tensor one has an impossible shape or place"),
        ({"one": tensor("2")}, "tensor one has an impossible shape or place"),
        ({"one": tensor([2], -8, 0)}, "tensor one has an impossible shape or place"),
        ({"one": tensor([2], 0, 2**63)}, "tensor one has an impossible shape or place"),
        ({"one": tensor([3])}, r"tensor one has 8 bytes, its shape \(3,\) needs another number"),
        ({"one": tensor([2**61, 2**61])}, "tensor one has 8 bytes, its shape .* needs another number"),
        ({"one": tensor([2], 8, 16)}, "tensors overlap, or leave a gap"),
        ({"one": tensor(), "two": tensor([1], 4, 8)}, "tensors overlap, or leave a gap"),
        ({"one": tensor([4], 0, 16)}, r"the file has \d+ bytes, its tensors end at \d+"),
        ({"one": tensor([1], 0, 4)}, r"the file has \d+ bytes, its tensors end at \d+"),
    ],
)
def test_headers_that_cannot_be(tmp_path, entries, text):
    (tmp_path / "file").write_bytes(header(entries, bytes(8)))
    refused(tmp_path / "file", f"{tmp_path}/file is damaged: {text}")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "f32", "", None, 3, [], {"a": 1}])
def test_types_that_are_not_ours(tmp_path, dtype):
    (tmp_path / "file").write_bytes(header({"one": tensor(dtype=dtype)}, bytes(8)))
    refused(tmp_path / "file", r"file has tensors of types \[.*\], which MindSpore does not have")


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{" * 9, b"\xff" * 9, b"1" * 5000, b'{"a": 1' + b"0" * 5000 + b"}"])
def test_headers_that_are_not_json(tmp_path, text):
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(tmp_path / "file", f"{tmp_path}/file is damaged: ")


def test_many_axes_without_elements(tmp_path):
    (tmp_path / "file").write_bytes(header({"one": tensor([2**61, 0, 2**61], 0, 0)}))
    with ConsolidatedReader(tmp_path / "file") as reader:
        assert reader.tensors["one"].count == 0 and reader.read_flat("one", 0, 0).size == 0
    refused(tmp_path / "file", r"one: \(2305843009213693952, 0, 2305843009213693952\) in the file, \(1,\) here")


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    """A memory map would end the process."""
    save_file({"one": np.zeros(5000, np.float32)}, tmp_path / "file")
    with ConsolidatedReader(tmp_path / "file") as reader:
        os.truncate(tmp_path / "file", 4096)
        with pytest.raises(CheckpointError, match=r"file ends before byte \d+: it is truncated"):
            reader.read_flat("one", 0, 5000)


def test_their_types_are_ours(tmp_path):
    """What the `safetensors` library writes, bit by bit."""
    kinds = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int16, np.int32, np.int64, np.bool_]
    arrays = {np.dtype(kind).name: np.arange(5).astype(kind) for kind in kinds}
    save_file(arrays, tmp_path / "file", {"by": "them"})
    with ConsolidatedReader(tmp_path / "file") as reader:
        assert reader.metadata == {"by": "them"} and reader.tensors["float16"].dtype == ms.float16
        for name, array in arrays.items():
            found = reader.read_flat(name, 1, 4)
            assert found.dtype == array.dtype and found.tobytes() == array[1:4].tobytes()


@pytest.mark.parametrize("where", ["write", "commit"])
def test_a_defect_while_saving_is_told_as_an_error_of_the_checkpoint(single_world, tmp_path, monkeypatch, where):
    """Whatever it is: on several ranks the others wait to hear of it."""
    layer = bms.nn.Linear(2, 2)

    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(AtomicFile, where, broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be written: a defect"):
        bms.save(layer, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


# What people have instead of a safetensors file #

KINDS = {
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "is a Git LFS pointer.*git lfs pull",
    ),
    "web page": (b"<!DOCTYPE html><html>404</html>" * 30, "is a web page.*get it again"),
    "web page, indented": (b"\n  <html><head></head></html>", "is a web page"),
    "web page, marked": (b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
    "torch.save": (b"PK\x03\x04" + bytes(200), "looks like a file of torch.save, which may run anything"),
    **{f"pickle {i}": (b"\x80" + bytes([i]) + b"\xff" * 50, "looks like a file of torch.save") for i in (2, 3, 4, 5)},
    "GGUF": (b"GGUF\x03\x00\x00\x00" + b"\x01" * 50, "is a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file"),
    "NumPy": (b"\x93NUMPY\x01\x00" + bytes(50), "is a NumPy array"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x01" + bytes(50), "is compressed by gzip"),
    "config": (b'{"hidden_size": 64, "architectures": []}', "is JSON, not safetensors"),
    "short": (b"404", "is 3 bytes long"),
    "noise": (b"\xff" * 50, "is truncated, or not a safetensors file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, kind):
    content, text = KINDS[kind]
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", rf"^{tmp_path}/x.safetensors {text}[^\n]*$")
    if content.startswith(b"version"):  # where the folder was cloned
        (tmp_path / "x.safetensors").rename(tmp_path / SINGLE)
        refused(tmp_path, "is a Git LFS pointer")


def with_foreign(path: Path, kind: str, named: str) -> None:
    """A file for `Net`, with 5 bytes of another type: beside its tensors, or in place of one."""
    tensors = values(Net(1))
    tensors.pop(named, None)
    header, data = {}, b""
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    header[named] = {"dtype": kind, "shape": [5], "data_offsets": [len(data), len(data) + 5]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data + b"12345")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "NEW"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_tensor_that_nobody_reads_may_be_of_any_type(tmp_path, kind, indexed):
    with_foreign(tmp_path / SINGLE, kind, "scale")
    if indexed:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys([*SHAPES, "scale"], SINGLE)}))
    model = Net(9)
    assert bms.load(model, tmp_path, strict=False) == LoadResult([], ["scale"])
    assert same(values(model), values(Net(1)))
    refused(tmp_path, "does not fit the model; 1 unexpected in the file: scale")
    for use in (
        lambda: tools.consolidate(tmp_path, tmp_path / "out"),
        lambda: tools.inspect(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=rf"has tensors of types \['{kind}'\], which MindSpore does not have"):
            use()  # it would be lost


@pytest.mark.parametrize("strict", [False, True])
def test_a_tensor_that_is_read_must_be_of_a_type_that_mindspore_has(tmp_path, strict):
    with_foreign(tmp_path / SINGLE, "F8_E4M3", "prime")
    model = Net(9)
    with pytest.raises(
        CheckpointError, match=r"types \['F8_E4M3'\], which MindSpore does not have, such as prime: convert the file"
    ):
        bms.load(model, tmp_path, strict)
    assert same(values(model), values(Net(9)))


@pytest.mark.parametrize("places", [[3, -1], [-1, 3], ["a", 5], [416, 10**30], None, [1, 2]])
def test_a_tensor_of_another_type_is_somewhere_in_the_file(tmp_path, places):
    with_foreign(tmp_path / SINGLE, "F4", "scale")
    raw = (tmp_path / SINGLE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["scale"]["data_offsets"] = places
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match="is damaged"):
        bms.load(Net(9), tmp_path, strict=False)


FOLDERS = {
    "parts without an index": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        r"but 2 parts such as \S+: the index",
    ),
    "one part": (["model-00001-of-00002.safetensors"], "but 1 parts such as .*: the index is missing, get it too"),
    "a variant": (["model.fp16.safetensors"], r"but model.fp16.safetensors: name the file, as \S+/model.fp16.safetensors"),
    "variants": (["a.safetensors", "model.fp16.safetensors", "b.safetensors"], "but a.safetensors and 2 others: name the file, as"),
    "a variant's index": (["model.fp16.safetensors.index.json"], r"name the file, as \S+/model.fp16.safetensors.index.json"),
    "torch": (
        ["config.json", "pytorch_model.bin"],
        "but pytorch_model.bin, which is not safetensors: get the model as safetensors",
    ),
    "mindspore": (["x.ckpt", "y.ckpt"], "but x.ckpt and 1 others, which is not safetensors"),
    "checkpoints": (
        ["step-00000004", "step-00000008"],
        "but checkpoints such as step-00000008: bms.checkpoint.Checkpointer reads them",
    ),
    "config only": (["config.json", ".gitattributes"], "; it has config.json$"),
    "nothing": ([], "; it is empty$"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_model_s_says_what_is_there(tmp_path, kind):
    names, text = FOLDERS[kind]
    for name in names:
        (tmp_path / name).touch()
    refused(tmp_path, rf"^{tmp_path} has neither {SINGLE} nor {INDEX}.*{text}")


def test_the_file_that_the_message_names_is_read(tmp_path):
    bms.save(Net(1), tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError) as error:
        bms.load(Net(9), tmp_path)
    model = Net(9)
    bms.load(model, str(error.value).split("name the file, as ")[1])
    assert same(values(model), values(Net(1)))


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = Net(9)
    bms.save(Net(1), "~/x.safetensors")
    bms.load(model, "~/x.safetensors")
    bms.save(Net(1), "~/folder", max_shard_size=124)
    assert same(values(model), values(Net(1))) and bms.load(model, Path("~/folder/") / INDEX)
    assert "4 tensors" in tools.inspect("~/folder")
    manager = bms.optim.OptimManager()
    manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
    with_home = bms.checkpoint.Checkpointer("~/run", model, manager)
    with_home.save(1, {})
    assert with_home.load("~/run/step-00000001")
    with_home.close()
    save_training("~/state.safetensors", model, manager, {"a": 1})
    assert bms.checkpoint.load_training("~/state.safetensors", model, manager) == {"a": 1}
    assert bms.train.TrainSettings(steps=1, log=Path("~/log.jsonl")).log == tmp_path / "log.jsonl"
    config = bms.model_center.model.LlamaConfig(vocab_size=8, dim_model=8, num_heads=2, dim_ff=8, num_layers=1)
    config.to_json_file("~/config.json")
    assert bms.model_center.model.LlamaConfig.from_json_file("~/config.json") == config
    made = {path.name for path in tmp_path.iterdir()} - {".cache"}  # of loops that are compiled here for the first time
    assert made == {"x.safetensors", "folder", "run", "state.safetensors", "config.json"}
