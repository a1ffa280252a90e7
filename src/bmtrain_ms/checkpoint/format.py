"""One safetensors file: its header, and byte ranges of its tensors.

Reading goes through the `safetensors` library for validation and through a memory map for ranges; writing makes the header here,
because the library wants the whole model in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Mapping

import mindspore as ms
import numpy as np
from safetensors import SafetensorError, safe_open

from ..compat.runtime import numpy_dtype
from .errors import CheckpointError

TYPE_NAMES = {
    ms.float16: "F16",
    ms.bfloat16: "BF16",
    ms.float32: "F32",
    ms.float64: "F64",
    ms.int8: "I8",
    ms.uint8: "U8",
    ms.int16: "I16",
    ms.int32: "I32",
    ms.int64: "I64",
    ms.bool_: "BOOL",
}
DTYPES: dict[str, Any] = {name: dtype for dtype, name in TYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: MindSpore dtype, shape, and where its bytes start in the file."""

    dtype: Any
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


def plan(
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo], int]:
    """Lay out a file.

    Args:
        tensors: name -> (dtype, shape), in file order.
        metadata: strings for the header.

    Returns:
        The header's bytes, where each tensor goes, and the file's size.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in TYPE_NAMES:
            raise CheckpointError(f"tensor {name} is {dtype}, which safetensors cannot store")
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize
        entries[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        spans[name] = begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    infos = {name: TensorInfo(dtype, tuple(shape), len(header) + spans[name]) for name, (dtype, shape) in tensors.items()}
    return header, infos, len(header) + end


def check_header(path: Path, read: Callable[[int, int], bytes], size: int) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file of `size` bytes, from its header, of which nothing is believed.

    Args:
        read: (position, count) -> bytes of the file.

    Raises:
        CheckpointError: it is no safetensors file, or truncated, or tensors overlap or leave the file.
    """
    if size < 8:
        raise CheckpointError(f"{path} is {size} bytes long: it is truncated")
    length = struct.unpack("<Q", read(0, 8))[0]
    if length > size - 8:
        raise CheckpointError(f"{path} is truncated, or not a safetensors file: its header would be {length} bytes long")
    try:
        entries = json.loads(read(8, length))
        if not isinstance(entries, dict):
            raise ValueError("the header is not an object")
        entries.pop("__metadata__", None)
        infos, spans = {}, []
        for name, entry in entries.items():
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end)):
                raise ValueError(f"tensor {name} has an impossible shape or place")
            if end - begin != math.prod(shape) * numpy_dtype(dtype).itemsize:
                raise ValueError(f"tensor {name} has {end - begin} bytes, its shape {shape} needs another number")
            infos[name] = TensorInfo(dtype, shape, 8 + length + begin)
            spans.append((begin, end))
        reached = 0
        for begin, end in sorted(spans):
            if begin != reached:
                raise ValueError("tensors overlap, or leave a gap")
            reached = end
        if 8 + length + reached != size:
            raise ValueError(f"the file has {size} bytes, its tensors end at {8 + length + reached}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return infos


class AtomicFile:
    """A file that appears under its name complete, or not at all; the one before stays until then."""

    def __init__(self, path: Path, header: bytes, size: int):
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by commit or discard)
        try:
            self._file.truncate(size)
            self._file.write(header)
        except BaseException:
            self.discard()
            raise

    def write(self, position: int, data: np.ndarray) -> None:
        """Write the array's bytes at a position of the file."""
        self._file.seek(position)
        self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)

    def commit(self) -> None:
        """Bring everything to the disk, then give the file its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # closing writes what is buffered: on a full disk that fails again
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class Reader:
    """A safetensors file, validated on opening, read by ranges.

    Raises:
        CheckpointError: missing, truncated or malformed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with safe_open(str(self.path), framework="np") as checked:  # offsets, overlaps, sizes, dtypes
                self.metadata: dict[str, str] = dict(checked.metadata() or {})
            self._map = np.memmap(str(self.path), np.uint8, "r")
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} does not exist (or is not visible from this host)") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{self.path} is not a complete safetensors file: {error}") from error
        length = int(self._map[:8].view("<u8")[0])
        entries = json.loads(bytes(self._map[8 : 8 + length]))
        entries.pop("__metadata__", None)
        unknown = {e["dtype"] for e in entries.values()} - set(DTYPES)
        if unknown:
            raise CheckpointError(f"{self.path} has tensors of types {sorted(unknown)}, which MindSpore does not have")
        self.tensors = {
            name: TensorInfo(DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
            for name, e in entries.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor; a copy, only those bytes are read."""
        info = self.tensors[name]
        dtype = numpy_dtype(info.dtype)
        stop = info.count if stop is None else stop
        raw = self._map[info.start + start * dtype.itemsize : info.start + stop * dtype.itemsize]
        return np.array(raw).view(dtype)

    def close(self) -> None:
        """Let go of the file."""
        del self._map

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()
