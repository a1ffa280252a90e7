"""Whole tensors in one or several safetensors files with Hugging Face's index, as `transformers` and others read them.

model-00001-of-00002.safetensors
model-00002-of-00002.safetensors
model.safetensors.index.json     {"metadata": {"total_size": bytes}, "weight_map": {name: file}}

The index cannot name files elsewhere; a file beside it may be a link to one elsewhere, as in Hugging Face's cache.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from bmtrain_ms_base.layout import Box

from ..compat.runtime import numpy_dtype
from .errors import CheckpointError
from .format import Reader, RegularFile, TensorInfo, parsed_json
from .locking import let_go, lock_temporary, sweep_temporaries
from .replacing import replace_text, sync_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LARGEST_INDEX = 1 << 28  # bytes
_UNITS = {"": 1, "B": 1, **{f"{x}B": 10 ** (3 * i + 3) for i, x in enumerate("KMG")}}
_UNITS.update({f"{x}IB": 1 << (10 * i + 10) for i, x in enumerate("KMG")})
_ONE_OF_SEVERAL = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def size_in_bytes(size: int | str) -> int:
    """`5GB`, `1.5 GB`, `200MiB` or a number of bytes.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)", str(size).strip(), re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    count = Fraction(match[1]) * unit if match and unit else Fraction(0)
    if count < 1 or (unit == 1 and count.denominator != 1):  # half a byte
        raise ValueError(f"max_shard_size must be a number of bytes, or like 5GB or 200MiB, not {size!r}")
    return int(count)


def split_by_size(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    """Names in groups of at most so many bytes, in order; a tensor that is larger has a group of its own."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > largest:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def file_names(count: int) -> list[str]:
    """What the files of a model are called if there are `count`."""
    return [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


class Replacement:
    """Files that are written beside a model's folder's own, and take their place when all of them are there.

    Attributes:
        folder: to write `file_names` into; it is gone after the `with` statement.
    """

    def __init__(self, target: Path):
        self._target = target
        self.folder = target / f".new-{os.getpid()}"

    def __enter__(self) -> Replacement:
        sweep_temporaries(self._target, ".new-", "")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._lock = lock_temporary(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        let_go(self._lock)

    def commit(self, groups: Sequence[Sequence[str]], total: int) -> list[Path]:
        """Make the files written here the model: name -> file of several is written last. An old index would mix two models, so it
        goes first.

        Args:
            groups: names of tensors in each file.
            total: bytes of all tensors.

        Returns:
            The files.
        """
        names = file_names(len(groups))
        for path in (self._target / INDEX, self._target / SINGLE):
            path.unlink(missing_ok=True)
        for path in self._target.iterdir():
            if _ONE_OF_SEVERAL.fullmatch(path.name) and path.name not in names:
                path.unlink()
        for name in names:
            os.replace(self.folder / name, self._target / name)
        sync_folder(self._target)
        if len(groups) > 1:
            weights = {x: file for file, group in zip(names, groups) for x in group}
            replace_text(self._target / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=1))
        return [self._target / name for name in names]


class ConsolidatedReader:
    """A safetensors file, a folder with one or several, or their index; read by boxes or ranges of elements.

    Attributes:
        foreign: name -> type of tensors that cannot be read, of types that MindSpore does not have.

    Raises:
        CheckpointError: missing, damaged, or the index names files that cannot be.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._readers: list[Reader] = []
        self._of: dict[str, Reader] = {}
        self.foreign: dict[str, str] = {}
        try:
            for file, names in files_of(self.path):
                reader = Reader(file)
                self._readers.append(reader)
                missing = [name for name in names or () if name not in reader.tensors and name not in reader.foreign]
                if missing:
                    raise CheckpointError(f"{file} has no tensor {missing[0]}, which its index says it has")
                chosen = names if names is not None else [*reader.tensors, *reader.foreign]
                self._of.update({name: reader for name in chosen if name in reader.tensors})
                self.foreign.update({name: reader.foreign[name] for name in chosen if name in reader.foreign})
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> dict[str, str]:
        """The strings in the first file's header."""
        return self._readers[0].metadata

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the files say of each tensor, by its name."""
        return {name: reader.tensors[name] for name, reader in self._of.items()}

    @property
    def described(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> (shape, MindSpore dtype)."""
        return {name: (info.shape, info.dtype) for name, info in self.tensors.items()}

    def read(self, name: str, box: Box, out: np.ndarray | None = None) -> np.ndarray:
        """A box of a tensor; see `ShardedReader.read`."""
        return self._of[name].read(name, box, out)

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor."""
        return self._of[name].read_flat(name, start, stop, out)

    def close(self) -> None:
        """Let go of the files."""
        for reader in self._readers:
            reader.close()
        self._readers = []

    def __enter__(self) -> ConsolidatedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def files_of(path: Path) -> list[tuple[Path, list[str] | None]]:
    """The files of a model, and the names to take from each; None: all.

    Raises:
        CheckpointError: a folder without a model, or the index is damaged.
    """
    if path.is_dir() and (path / INDEX).exists():
        return weight_map(path / INDEX)
    if path.is_dir() and (path / SINGLE).exists():
        return [(path / SINGLE, None)]
    if path.is_dir():
        raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}{_what_is_there(path)}")
    return weight_map(path) if path.name.endswith(".index.json") else [(path, None)]


def _what_is_there(folder: Path) -> str:
    """What a folder that is no model's has in it, and what to do."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    parts = [name for name in names if _ONE_OF_SEVERAL.fullmatch(name)]
    files = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"))]
    steps = [name for name in names if re.fullmatch(r"step-\d+", name)]
    if parts:
        return f", but {len(parts)} parts such as {parts[0]}: the index is missing, get it too (it says what belongs together)"
    if files:
        chosen = next((name for name in files if name.endswith(".json")), files[0])
        return f", but {_first_of(files)}: name the file, as {folder / chosen}"
    if other:
        return (
            f", but {_first_of(other)}, which is not safetensors: get the model as safetensors, or convert it where its library is"
        )
    if steps:
        return f", but checkpoints such as {steps[-1]}: bms.checkpoint.Checkpointer reads them, and bmtrain-ms ckpt consolidate"
    return f"; it has {_first_of(names)}" if names else "; it is empty"


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"


def weight_map(path: Path, ending: str = ".safetensors") -> list[tuple[Path, list[str] | None]]:
    """The files that an index names, all in its folder and of this ending, and the names to take from each.

    Raises:
        CheckpointError: it is missing or damaged, or names files elsewhere.
    """
    with RegularFile(path, links=True) as opened:
        if opened.size > _LARGEST_INDEX:
            raise CheckpointError(f"{path} is {opened.size} bytes long, which no index is")
        text = opened.read(0, opened.size)
    try:
        weights: Any = parsed_json(text)["weight_map"]
        files: dict[str, list[str]] = {}
        if not isinstance(weights, dict):
            raise ValueError(f"its weight_map must be an object, tensors' names and their files, not {reprlib.repr(weights)}")
        for name, file in weights.items():
            if not isinstance(file, str) or not (_PLAIN.fullmatch(file) and file.endswith(ending)):
                raise ValueError(f"tensor {name} is said to be in {file!r}, which is not the name of a file beside the index")
            files.setdefault(file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} is damaged: {what}") from error
    if not files:
        raise CheckpointError(f"{path} names no file")
    return [(path.parent / file, names) for file, names in files.items()]


def tensor_bytes(dtype: Any, shape: Sequence[int]) -> int:
    """How many bytes a tensor of this type and shape takes."""
    return math.prod(shape) * numpy_dtype(dtype).itemsize
