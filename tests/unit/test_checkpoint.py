"""Checkpoints at one rank: bytes, names, errors, memory, and training that goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any, Iterator

import mindspore as ms
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError, load_training
from bmtrain_ms.comm import world
from bmtrain_ms.compat.runtime import numpy_dtype
from bmtrain_ms.files import format as format_module
from bmtrain_ms.files import gathering
from bmtrain_ms.files.format import AtomicFile
from bmtrain_ms.lr_scheduler import Cosine
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from tests.helpers.training_v1 import save_training

pytestmark = pytest.mark.usefixtures("single_world")

SHAPES = {"one": (1,), "prime": (7,), "deep": (2, 3, 5), "matrix": (4, 6)}
DTYPES = [ms.float32, ms.float16, ms.bfloat16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Odd(nn.Cell):
    """Parameters of awkward shapes with values from a seed."""

    def __init__(self, dtype: Any = ms.float32, shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0):
        super().__init__()
        for i, (name, shape) in enumerate(shapes.items()):
            p = bms.DistributedParameter(bms.empty(*shape, dtype=dtype))
            values = np.random.default_rng([seed, i]).standard_normal(shape).astype(np.float32)
            setattr(self, name, p)
            p.copy_full(Tensor(values).astype(dtype))


def raw(cell: nn.Cell) -> dict[str, bytes]:
    """The bits of every parameter."""
    return {p.name: p.asnumpy().tobytes() for p in cell.get_parameters()}


def values(cell: nn.Cell) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().reshape(getattr(p, "full_shape", p.shape)).copy() for p in cell.get_parameters()}


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# The file #


@EVERY_DTYPE
def test_round_trip_is_bit_exact(tmp_path, dtype):
    model, other = Odd(dtype), Odd(dtype, seed=1)
    assert raw(model) != raw(other)
    bms.save(model, tmp_path / "model.safetensors")
    assert bms.load(other, str(tmp_path / "model.safetensors")) == bms.checkpoint.LoadResult([], [])
    assert raw(other) == raw(model)
    assert files(tmp_path) == ["model.safetensors"]


@EVERY_DTYPE
def test_the_file_is_plain_safetensors(tmp_path, dtype):
    """As their library reads it, and byte by byte."""
    model = Odd(dtype)
    path = tmp_path / "model.safetensors"
    bms.save(model, path)
    with safetensors.safe_open(str(path), framework="np") as opened:
        assert list(opened.keys()) == sorted(SHAPES) and opened.metadata() == {"format": "pt"}
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in SHAPES} == SHAPES
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0  # aligned, as the format asks
    for name, bits in raw(model).items():
        begin, end = header[name]["data_offsets"]
        assert content[8 + length + begin : 8 + length + end] == bits
    if dtype is not ms.bfloat16:  # NumPy has none
        loaded = safetensors.numpy.load_file(path)
        expected = values(model)
        assert set(loaded) == set(expected)
        assert all(loaded[n].dtype == x.dtype and np.array_equal(loaded[n], x) for n, x in expected.items())


def test_their_file_is_read(tmp_path):
    """No metadata, another order, other dtypes."""
    tensors = {name: np.random.default_rng(5).standard_normal(shape) for name, shape in reversed(SHAPES.items())}
    tensors["one"] = tensors["one"].astype(np.float16)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs")
    model = Odd()
    bms.load(model, tmp_path / "theirs")
    assert all(np.array_equal(x, tensors[name].astype(np.float32)) for name, x in values(model).items())


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_values_are_converted(tmp_path, source, target):
    bms.save(Odd(source), tmp_path / "file")
    model = Odd(target, seed=1)
    bms.load(model, tmp_path / "file")
    for p, original in zip(model.get_parameters(), Odd(source).get_parameters()):
        assert p.dtype == target
        expected = original.asnumpy().astype(np.float32).astype(numpy_dtype(target))
        assert p.asnumpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        bms.save(Odd(), tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_plain_parameters_and_buffers_are_saved_too(tmp_path):
    class Mixed(Odd):
        def __init__(self, value: float):
            super().__init__(seed=int(value))
            self.counter = Parameter(Tensor(np.full((2, 2), value, np.float32)), name="counter", requires_grad=False)
            self.steps = Parameter(Tensor(np.array([int(value)], np.int64)), name="steps", requires_grad=False)

    model, other = Mixed(3.0), Mixed(4.0)
    bms.save(model, tmp_path / "file")
    bms.load(other, tmp_path / "file")
    assert raw(other) == raw(model) and other.steps.asnumpy().tolist() == [3]
    assert safetensors.numpy.load_file(tmp_path / "file")["steps"].dtype == np.int64


def test_tied_weights_are_stored_once(tmp_path):
    config = LlamaConfig(11, 8, 2, dim_ff=6, num_layers=1, tied=True)
    model, other = Llama(config), Llama(config)
    bms.init_parameters(model)
    bms.save(model, tmp_path / "file")
    names = safetensors.numpy.load_file(tmp_path / "file")
    assert [name for name in names if "embed" in name or "head" in name] == ["model.embed_tokens.weight"]
    bms.load(other, tmp_path / "file")
    assert raw(other) == raw(model)


def test_names_are_unique(tmp_path):
    class Twice(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layers = [Odd(), Odd()]

        def get_parameters(self, expand: bool = True) -> Iterator[Parameter]:
            return (p for layer in self.layers for p in layer.get_parameters())

    with pytest.raises(CheckpointError, match=r"two parameters are called one; call model\.check_names_and_refresh_name\(\)"):
        bms.save(Twice(), tmp_path / "file")
    assert files(tmp_path) == []


def test_types_that_the_format_does_not_have(tmp_path):
    model = nn.Cell()
    model.wave = Parameter(Tensor(np.zeros(2, np.complex64)), name="wave")
    with pytest.raises(CheckpointError, match="tensor wave is Complex64, which safetensors cannot store"):
        bms.save(model, tmp_path / "file")
    assert files(tmp_path) == []


# What is there when writing fails #


def test_the_old_file_stays_when_the_disk_is_full(tmp_path, monkeypatch):
    bms.save(Odd(), tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    written = []

    def full(self: AtomicFile, position: int, data: np.ndarray) -> None:
        written.append(position)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AtomicFile, "write", full)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file cannot be written: \[Errno 28\] No space left") as info:
        bms.save(Odd(seed=1), tmp_path / "file")
    assert isinstance(info.value.__cause__, OSError)
    assert len(written) == 1  # nothing more is tried
    assert files(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == before
    monkeypatch.undo()
    bms.save(Odd(seed=1), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() != before


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_the_old_file_stays_when_the_end_fails(tmp_path, monkeypatch, where):
    bms.save(Odd(), tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(CheckpointError, match=r"cannot be written: \[Errno 5\] Input/output error"):
        bms.save(Odd(seed=1), tmp_path / "file")
    assert files(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == before


def test_nowhere_to_write(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/missing/file cannot be written: \[Errno 2\]"):
        bms.save(Odd(), tmp_path / "missing" / "file")


def test_data_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    """fsync of the file, rename, fsync of the folder."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    bms.save(Odd(), tmp_path / "file")
    assert events[1:] == ["rename", str(tmp_path)]
    assert events[0].startswith(f"{tmp_path}/.file.") and events[0].endswith(".tmp")


# What does not fit #


def renamed(**names: str) -> dict[str, tuple[int, ...]]:
    return {names.get(name, name): shape for name, shape in SHAPES.items()}


def refused(model: nn.Cell, path: Path, text: str) -> None:
    """Loading raises, and nothing has changed."""
    before = raw(model)
    with pytest.raises(CheckpointError, match=text):
        bms.load(model, path)
    assert raw(model) == before


def test_other_names(tmp_path):
    bms.save(Odd(shapes=renamed(prime="prims", matrix="x")), tmp_path / "file")
    refused(
        Odd(),
        tmp_path / "file",
        rf"{tmp_path}/file does not fit the model; 2 missing in the file: prime \(did you mean prims\?\), matrix; "
        r"2 unexpected in the file: prims, x$",
    )


def test_many_other_names(tmp_path):
    bms.save(Odd(shapes={"one": (1,)}), tmp_path / "file")
    model = Odd(shapes={"one": (1,), **{f"layer{i}": (1,) for i in range(13)}})
    refused(model, tmp_path / "file", r"13 missing in the file: layer0, layer1, .*, layer9 and 3 more$")


def test_other_shapes(tmp_path):
    bms.save(Odd(shapes={**SHAPES, "matrix": (6, 4)}), tmp_path / "file")
    refused(Odd(), tmp_path / "file", r"1 shapes differ: matrix: \(6, 4\) in the file, \(4, 6\) here$")
    with pytest.raises(CheckpointError, match="1 shapes differ"):  # never a matter of strictness
        bms.load(Odd(), tmp_path / "file", strict=False)


def test_not_strict(tmp_path):
    saved = Odd(shapes=renamed(prime="other"), seed=1)
    bms.save(saved, tmp_path / "file")
    model = Odd()
    before = raw(model)
    result = bms.load(model, tmp_path / "file", strict=False)
    assert (result.missing, result.unexpected) == (["prime"], ["other"])
    assert raw(model) == {**{n: b for n, b in raw(saved).items() if n != "other"}, "prime": before["prime"]}


# What is no checkpoint #


@pytest.mark.parametrize("keep", [0, 5, 20, -1], ids=["empty", "in length", "in header", "in data"])
def test_truncated(tmp_path, keep):
    path = tmp_path / "file"
    bms.save(Odd(), path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(
        Odd(seed=1),
        path,
        rf"{path} (is \d+ bytes long: it is truncated|is truncated, or not a safetensors file|is damaged: the file has)",
    )


@pytest.mark.parametrize("content", [b"\xff" * 64, b"hello, world"], ids=["ones", "text"])
def test_garbage(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    refused(
        Odd(), tmp_path / "file", rf"{tmp_path}/file is truncated, or not a safetensors file: its header would be \d+ bytes long"
    )


@pytest.mark.parametrize("start", [b"PK\x03\x04\0\0\x08\x08", b"\x80\x02}q\0(X\x06"], ids=["zip", "pickle"])
def test_a_file_of_torch_is_not_read_but_advice_is_given(tmp_path, start):
    (tmp_path / "model.pt").write_bytes(start + b"\0" * 60)
    refused(
        Odd(), tmp_path / "model.pt", r"model.pt looks like a file of torch.save, .* safetensors.torch.save_file\(torch.load\(file"
    )


def test_missing(tmp_path):
    refused(Odd(), tmp_path / "file", rf"{tmp_path}/file does not exist \(or is not visible from this host\)")


def test_folder(tmp_path):
    refused(Odd(), tmp_path, rf"{tmp_path} has neither model\.safetensors nor model\.safetensors\.index\.json")


def test_types_that_mindspore_does_not_have(tmp_path):
    header = json.dumps({"one": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    refused(Odd(), tmp_path / "file", r"has tensors of types \['F8_E4M3'\], which MindSpore does not have")


def test_a_name_that_is_no_file_s_is_refused(tmp_path):
    """What had it, a device as well, became a file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/{name} is there, and is not a file: choose another name"):
            bms.save(Odd(), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"] and not (tmp_path / "pipe").is_file()


# Memory #


@pytest.fixture
def allocated(monkeypatch) -> Iterator[Any]:
    """The most that NumPy and Python allocated at once, in bytes; pieces are 64 KiB."""
    for module in (gathering, format_module):
        monkeypatch.setattr(module, "PIECE", 1 << 16)

    def peak(function: Any, *args: Any) -> int:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        function(*args)
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    yield peak
    tracemalloc.stop()


def test_memory(tmp_path, allocated):
    """Saving holds a few pieces, loading a shard and a few pieces; the parameter is 128 pieces."""
    size = 8 << 20
    model, other = Odd(shapes={"large": (2, size // 8)}), Odd(shapes={"large": (2, size // 8)}, seed=1)
    assert allocated(lambda: np.zeros(size // 8)) >= size  # NumPy's memory is counted
    assert allocated(bms.save, model, tmp_path / "file") < 6 << 16
    assert size < allocated(bms.load, other, tmp_path / "file") < size + (6 << 16)
    assert raw(other) == raw(model)
    half = Odd(ms.float16, {"large": (2, size // 8)})
    assert allocated(bms.load, half, tmp_path / "file") < size // 2 + (6 << 16)
    assert np.array_equal(half.large.asnumpy(), model.large.asnumpy().astype(np.float16))


# Training #


class Run:
    """A Llama with dropout behind it, in training; everything that a checkpoint holds."""

    def __init__(self, half: bool, seed: int = 0):
        bms.shutdown()
        bms.init_distributed(seed=seed)
        config = LlamaConfig(17, 12, 2, dim_ff=10, num_layers=2, dtype="float16" if half else "float32")
        self.model = spread(Llama(config)).set_train(True)
        self.dropout = bms.nn.Dropout(0.2).set_train(True)
        bms.init_parameters(self.model)
        params = self.model.trainable_params()
        optimizer = AdamOptimizer([{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.2}], weight_decay=0.1)
        self.manager = OptimManager(loss_scale=2.0**14 if half else None, loss_scale_steps=4)
        self.manager.add_optimizer(optimizer, Cosine(optimizer, 0.02, 2, 10))
        self.optimizer = optimizer

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            random = np.random.default_rng(step)
            ids, targets = (Tensor(random.integers(0, 17, (2, 5)).astype(np.int32)) for _ in range(2))
            self.manager.zero_grad()
            loss = self.manager.backward(self.loss, ids, targets, math_inf=step == 1 and self.manager.loss_scale_enabled)
            self.manager.clip_grad_norm(self.optimizer.param_groups, 1.0)
            self.manager.step()
            losses.append(float(loss.asnumpy()))
        return losses

    def loss(self, ids: Tensor, targets: Tensor, math_inf: bool) -> Tensor:
        logits = self.dropout(self.model(ids)).reshape(-1, 17)
        loss = bms.nn.functional.cross_entropy(logits, targets.reshape(-1))
        return loss * float("inf") if math_inf else loss

    def everything(self) -> dict[str, Any]:
        tensors = {
            f"{name} {p.name}": t.asnumpy().tobytes()
            for p in self.optimizer.parameters
            for name, t in self.optimizer.state_of(p).items()
        }
        return {**raw(self.model), **tensors, "manager": self.manager.state_dict(tensors=False), "clock": world().engine.clock.step}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_resumed_training_is_bit_equal(tmp_path, half, capsys):
    """3 steps (one skipped, in fp16), save, 3 more; and the last 3 in new objects from the file."""
    run = Run(half)
    run.train(range(3))
    save_training(tmp_path / "file", run.model, run.manager, {"step": 3, "note": "größer"})
    saved = run.everything()
    losses = run.train(range(3, 6))
    final = run.everything()
    assert final != saved and (run.manager.skipped_steps, run.manager.loss_scale) == ((1, 2.0**14) if half else (0, 1.0))

    resumed = Run(half)
    assert resumed.everything() != saved
    resumed.train(range(7, 9))  # new objects that have seen other things
    assert load_training(tmp_path / "file", resumed.model, resumed.manager) == {"step": 3, "note": "größer"}
    assert resumed.everything() == saved
    assert resumed.train(range(3, 6)) == losses
    assert resumed.everything() == final
    assert files(tmp_path) == ["file"]


def test_a_training_file_holds_the_weights_for_load(tmp_path):
    run = Run(half=False)
    run.train(range(1))
    save_training(tmp_path / "file", run.model, run.manager, {})
    model = Llama(run.model.config)
    result = bms.load(model, tmp_path / "file", strict=False)
    assert raw(model) == raw(run.model)
    assert result.missing == [] and all(name.startswith("optimizer.0.") for name in result.unexpected)
    assert len(result.unexpected) == 2 * len(raw(model))


def test_weights_are_no_training_state(tmp_path):
    run = Run(half=False)
    bms.save(run.model, tmp_path / "file")
    before = run.everything()
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file holds weights only; load it with bmtrain_ms\.load\(model"):
        load_training(tmp_path / "file", run.model, run.manager)
    assert run.everything() == before


def test_one_file_of_a_training_state_is_not_written_any_more():
    with pytest.raises(
        AttributeError, match=r"no attribute 'save_training': Checkpointer\(.*save\(step, extra\) saves what it did"
    ):
        bms.checkpoint.save_training  # noqa: B018


def test_a_later_version_is_refused(tmp_path):
    run = Run(half=False)
    save_training(tmp_path / "file", run.model, run.manager, {})
    content = (tmp_path / "file").read_bytes()
    assert content.count(b'\\"version\\": 1') == 1
    (tmp_path / "file").write_bytes(content.replace(b'\\"version\\": 1', b'\\"version\\": 2'))
    before = run.everything()
    with pytest.raises(CheckpointError, match=r"file has format version 2, this bmtrain_ms reads up to 1; upgrade"):
        load_training(tmp_path / "file", run.model, run.manager)
    assert run.everything() == before


@pytest.mark.parametrize("kind", ["missing", "garbage"])
def test_no_training_file(tmp_path, kind):
    if kind == "garbage":
        (tmp_path / "file").write_bytes(b"garbage")
    run = Run(half=False)
    with pytest.raises(CheckpointError, match="does not exist" if kind == "missing" else "file is 7 bytes long: it is truncated"):
        load_training(tmp_path / "file", run.model, run.manager)


def test_half_state_does_not_fit_a_float_model(tmp_path):
    """The masters would be lost."""
    half, full = Run(half=True), None
    save_training(tmp_path / "file", half.model, half.manager, {})
    full = Run(half=False)
    with pytest.raises(CheckpointError, match=r"unexpected in the file: optimizer\.0\.master\.model\.embed_tokens\.weight, "):
        load_training(tmp_path / "file", full.model, full.manager)


def test_the_state_of_plain_parameters_is_saved_too(tmp_path):
    """Every rank has all of it: replicated tensors."""

    def with_plain(value: float) -> tuple[Run, AdamOptimizer]:
        run = Run(half=False)
        plain = Parameter(Tensor(np.full(2, value, np.float32)), name="plain")
        optimizer = AdamOptimizer([plain], lr=0.1)
        run.manager.add_optimizer(optimizer)
        run.model.plain = plain
        return run, optimizer

    run, optimizer = with_plain(3.0)
    optimizer([Tensor(np.array([1.0, -2.0], np.float32))])
    save_training(tmp_path / "file", run.model, run.manager, {})
    other, restored = with_plain(4.0)
    load_training(tmp_path / "file", other.model, other.manager)
    assert other.everything() == run.everything()
    (p,), (q,) = optimizer.parameters, restored.parameters
    for name, tensor in optimizer.state_of(p).items():
        assert np.array_equal(restored.state_of(q)[name].asnumpy(), tensor.asnumpy()) and tensor.asnumpy().all()
    for each in (optimizer, restored):
        each([Tensor(np.ones(2, np.float32))])
    assert np.array_equal(p.asnumpy(), q.asnumpy())
