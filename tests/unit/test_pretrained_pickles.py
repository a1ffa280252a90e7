"""Files of `torch.save`: tensors are read, and nothing else is, nor run."""

from __future__ import annotations

import collections
import os
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.model_center.pretrained import load_pretrained
from bmtrain_ms.model_center.pretrained.pickles import PickleReader
from tests.helpers.pretrained import DATA

pytestmark = pytest.mark.usefixtures("single_world")
BIN = DATA / "llama.bin"  # torch 2.14: a state dict of bfloat16
SIZES: Any = {"vocab_size": 11, "dim_model": 8, "num_heads": 2, "dim_ff": 6, "num_layers": 1, "tied": True, "dtype": "bfloat16"}


def test_what_torch_has_saved(tmp_path: Path):
    shutil.copy(BIN, tmp_path / "pytorch_model.bin")
    model = Llama(LlamaConfig(**SIZES))
    with pytest.raises(CheckpointError, match=r"has pytorch_model.bin only, pickles, which may run anything .* Pass pickles=True"):
        load_pretrained(model, tmp_path)
    load_pretrained(model, tmp_path, pickles=True)
    sums = {p.name: p.asnumpy().astype(np.float32).sum() for p in model.get_parameters()}
    assert sums["model.norm.weight"] == 8.0
    np.testing.assert_allclose(sums["model.embed_tokens.weight"], 0.3190031051635742, rtol=1e-5)  # torch's own sums
    np.testing.assert_allclose(sums["model.layers.0.self_attn.o_proj.weight"], -0.3895988464355469, rtol=1e-5)
    model.save_pretrained(tmp_path, proven=False)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # safetensors come first
    load_pretrained(model, tmp_path, pickles=True)
    (tmp_path / "model.safetensors").unlink()
    shutil.copy(BIN, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-1.bin")
    index = '{"weight_map": {' + ", ".join(f'"{name}": "pytorch_model-1.bin"' for name in sums) + "}}"
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    again = Llama(LlamaConfig(**SIZES))
    load_pretrained(again, tmp_path, pickles=True)
    for a, b in zip(model.get_parameters(), again.get_parameters()):
        assert a.asnumpy().tobytes() == b.asnumpy().tobytes()


class Call:
    """Something that a pickle calls when it is read."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def saved(path: Path, value: Any, **members: bytes) -> Path:
    """A file as `torch.save` writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", value if isinstance(value, bytes) else pickle.dumps(value, 2))
        for name, data in members.items():
            archive.writestr(f"x/{name}", data)
    return path


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Functions and classes with the names of torch's, for pickles that name them."""
    made = types.SimpleNamespace()
    for module, name in (("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"), ("torch.nn", "Module")):
        space = sys.modules.get(module) or types.ModuleType(module)
        monkeypatch.setitem(sys.modules, module, space)

        def function(*_: Any) -> None:
            raise AssertionError("it was called")

        function.__module__, function.__qualname__, function.__name__ = module, name, name
        monkeypatch.setattr(space, name, function, raising=False)
        setattr(made, name.lstrip("_"), function)
    return made


def refused(path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        PickleReader(path)


def test_programs_are_not_run(tmp_path: Path, torch: Any):
    path = tmp_path / "x.bin"
    refused(
        saved(path, {"a": Call(os.mkdir, str(tmp_path / "made"))}), r"it names posix.mkdir, which is no part of .*nothing of it"
    )
    refused(saved(path, pickle.dumps(Call(eval, "1"), 4)), r"it names builtins.eval, which")
    refused(saved(path, {"a": Call(torch.Module)}), r"it names torch.nn.Module, which")
    refused(saved(path, Call(torch.FloatStorage, 3)), r"it calls 'torch.FloatStorage', which builds no tensor")
    refused(saved(path, Call(collections.OrderedDict, [("a", 1)])), r"it has the operation EMPTY_LIST|it calls")
    assert os.listdir(tmp_path) == ["x.bin"]


def test_what_is_no_dictionary_of_tensors(tmp_path: Path):
    path = tmp_path / "x.bin"
    refused(saved(path, {"a": 1}), r"a in it is a int, not a tensor")
    refused(saved(path, (1, 2)), r"does not hold a dictionary of tensors")
    refused(saved(path, b"\x80\x02\x85."), r"cannot be read as tensors: its program is damaged")
    refused(saved(path, {}, byteorder=b"big"), r"not a file of torch.save, or of a machine of another byte order")
    path.write_bytes(b"\x80\x02}.")
    refused(path, r"it is no zip file: torch before 1.6 wrote others")
    path.write_bytes(BIN.read_bytes()[:-100])
    refused(path, r"it is no zip file")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2) * 100)
    refused(path, r"data.pkl in it is compressed")


def program(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """One tensor of 6 floats in storage 0, in the operations that torch uses."""

    def numbers(x: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"K" + bytes([n]) for n in x) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"
    tensor = b"(" + storage + b"K" + bytes([offset]) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n" + tensor + b"Rs."


def test_views(tmp_path: Path):
    path, data = tmp_path / "x.bin", np.arange(6, dtype=np.float32).tobytes()
    with PickleReader(saved(path, program((2, 2), (2, 1), 1), **{"data/0": data})) as reader:
        assert reader.read_flat("a", 0, 4).tolist() == [1.0, 2.0, 3.0, 4.0]
    refused(saved(path, program((3, 2), (1, 3)), **{"data/0": data}), r"a in it is a view of another tensor, transposed")
    refused(saved(path, program((2, 3), (3, 1), 1), **{"data/0": data}), r"a in it has more elements than its storage")
    refused(saved(path, program((2, 3), (3, 1))), r"cannot be read as tensors: 'data/0'")


def test_damaged_bytes_are_refused_or_read(tmp_path: Path):
    """Whatever they are, nothing else happens."""
    random, whole, path = np.random.default_rng(0), BIN.read_bytes(), tmp_path / "x.bin"
    refusals = 0
    for number in range(500):
        data = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            data[random.integers(len(data))] = random.integers(256)
        path.write_bytes(data if number % 5 else data[: random.integers(len(data))])
        try:
            with PickleReader(path) as reader:
                for name, info in reader.tensors.items():
                    reader.read_flat(name, 0, info.count)
        except CheckpointError:
            refusals += 1
    assert 250 < refusals < 500
