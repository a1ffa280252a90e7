"""One safetensors file: its header, and byte ranges of its tensors.

Both are made and read here, and not by the `safetensors` library: it wants the whole model in memory to write it, and reads through
a memory map, where a file that another process cuts ends this one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Mapping, Sequence

import mindspore as ms
import numpy as np

from bmtrain_ms_base.layout import Box

from ..compat.runtime import numpy_dtype
from .boxes import Piece, extents, fill
from .errors import CheckpointError
from .locking import let_go, lock_temporary, sweep_temporaries

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
    ms.uint16: "U16",
    ms.uint32: "U32",
    ms.uint64: "U64",
    ms.bool_: "BOOL",
}
DTYPES: dict[str, Any] = {name: dtype for dtype, name in TYPE_NAMES.items()}
PIECE = 4 << 20  # bytes of a tensor that are read, or travel between ranks, at once
LARGEST = 1 << 62  # no number of elements or bytes reaches it
_MOST_AXES = 32  # NumPy's limit
_LONGEST_HEADER = 100_000_000  # bytes; the `safetensors` library's limit
_MOST_VALUES = 4_000_000  # in JSON: of 64 bytes and more each in memory; the index of 15 TB has as many
_SEPARATORS = (b",", b":", b"[", b"{")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: MindSpore dtype, shape, and where its bytes start in the file."""

    dtype: Any
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def is_count(x: Any) -> bool:
    """Whether it can be a number of elements or bytes: not negative, and not too large to calculate with."""
    return type(x) is int and 0 <= x < LARGEST


def is_shape(x: Any) -> bool:
    """Whether it can be a tensor's shape, as JSON has it."""
    return isinstance(x, list) and len(x) <= _MOST_AXES and all(map(is_count, x))


def parsed_json(text: bytes) -> Any:
    """What JSON says, if it is of a size that a checkpoint has: a few bytes in a file can become a hundred in memory.

    Raises:
        ValueError: it is not JSON, or too much.
    """
    values = sum(map(text.count, _SEPARATORS))
    if values > _MOST_VALUES:
        raise ValueError(f"it has up to {values} values, which no checkpoint has")
    return json.loads(text)


def plan_file(
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
        begin, end = end, end + math.prod(shape) * numpy_dtype(dtype).itemsize
        entries[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        spans[name] = begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    infos = {name: TensorInfo(dtype, tuple(shape), len(header) + spans[name]) for name, (dtype, shape) in tensors.items()}
    return header, infos, len(header) + end


class RegularFile:
    """A file that is nothing but a file, read at positions. Anything else is refused before it is opened: a pipe would wait.

    Args:
        path: of the file.
        links: whether a link to a file will do.

    Raises:
        CheckpointError: it is missing, not a file, or cannot be opened.
    """

    def __init__(self, path: Path, links: bool = False):
        self.path = path
        self._file = -1
        try:
            if not links and path.is_symlink():
                raise CheckpointError(f"{path} is a link, which a checkpoint does not have")
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointError(f"{path} is not a file")
            follow = 0 if links else getattr(os, "O_NOFOLLOW", 0)
            self._file = os.open(path, os.O_RDONLY | follow | getattr(os, "O_NONBLOCK", 0))
            info = os.fstat(self._file)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist (or is not visible from this host)") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be opened: {getattr(error, 'strerror', error)}") from error
        if not stat.S_ISREG(info.st_mode):  # changed in between
            self.close()
            raise CheckpointError(f"{path} is not a file")
        self.size = info.st_size

    def read(self, start: int, count: int) -> bytes:
        """Exactly `count` bytes of the file, from `start` on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        if start + count > self.size:  # before they are allocated
            raise CheckpointError(f"{self.path} ends before byte {start + count}: it is truncated")
        pieces, missing = [], count
        while missing:
            try:
                piece = os.pread(self._file, missing, start + count - missing)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
            if not piece:
                raise CheckpointError(f"{self.path} ends before byte {start + count}: it is truncated")
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill a contiguous array with the bytes of the file from `start` on; they are copied once, by the system.

        Raises:
            CheckpointError: as `read`.
        """
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._file, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
            if not count:
                raise CheckpointError(f"{self.path} ends before byte {start + len(view)}: it is truncated")
            done += count

    def close(self) -> None:
        """A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> RegularFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_NEW_COPY = "get it again"
_CONVERT = (
    "which may run anything when it is read. Convert it where torch is, once: safetensors.torch.save_file(torch.load(file, "
    "weights_only=True), file + '.safetensors')"
)
# How files begin that are given the wrong name, or were not downloaded: what they are, and what to do.
_OTHER_KINDS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself, which was not downloaded: git lfs pull",
    b"<": f"is a web page, maybe of an error or a login, not a model: {_NEW_COPY}",
    b"PK": f"looks like a file of torch.save, {_CONVERT}",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), f"looks like a file of torch.save, {_CONVERT}"),
    b"GGUF": "is a GGUF file, of llama.cpp, not safetensors: get the model as safetensors",
    b"\x89HDF": "is an HDF5 file, not safetensors: get the model as safetensors",
    b"\x93NUMPY": "is a NumPy array, not safetensors: bms.checkpoint.load_state_dict takes arrays by name",
    b"\x1f\x8b": "is compressed by gzip: gunzip it",
    b"{": "is JSON, not safetensors: give the folder, or the file of the weights",
}


def _other_kind(file: RegularFile) -> str | None:
    """What a file is that cannot be safetensors, and what to do; None: who knows."""
    start = file.read(0, min(file.size, 64)).lstrip(b" \t\r\n\xef\xbb\xbf")
    return next((what for begins, what in _OTHER_KINDS.items() if start.startswith(begins)), None)


def read_header(file: RegularFile, foreign: dict[str, str] | None = None) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file, and the strings beside them, from its header, of which nothing is believed.

    Args:
        foreign: takes the names and types of tensors of types that MindSpore does not have. Default: they are an error.

    Raises:
        CheckpointError: it is no safetensors file, or truncated, or tensors overlap or leave the file.
    """
    path, size = file.path, file.size
    if size < 8:
        raise CheckpointError(f"{path} is {size} bytes long: it is truncated")
    start = file.read(0, 8)
    length = struct.unpack("<Q", start)[0]
    if length > min(size - 8, _LONGEST_HEADER):
        what = _other_kind(file) or f"is truncated, or not a safetensors file: its header would be {length} bytes long"
        raise CheckpointError(f"{path} {what}")
    try:
        entries = parsed_json(file.read(8, length))
        if not isinstance(entries, dict):
            raise ValueError("the header is not an object")
        metadata = entries.pop("__metadata__", {})
        if not (isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())):
            raise ValueError("the metadata are not strings")
        unknown = {name: str(entry["dtype"]) for name, entry in entries.items() if str(entry["dtype"]) not in DTYPES}
        if unknown and foreign is None:
            raise CheckpointError(f"{path} has tensors of types {sorted(set(unknown.values()))}, which MindSpore does not have")
        infos, spans = {}, []
        for name, entry in entries.items():
            dtype, shape, (begin, end) = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
            if dtype is None and foreign is not None and is_count(begin) and is_count(end) and begin <= end:
                foreign[name] = unknown[name]
                spans.append((begin, end))
                continue
            if not (is_shape(shape) and is_count(begin) and is_count(end)):
                raise ValueError(f"tensor {name} has an impossible shape or place")
            if end - begin != math.prod(shape) * numpy_dtype(dtype).itemsize:
                raise ValueError(f"tensor {name} has {end - begin} bytes, its shape {tuple(shape)} needs another number")
            infos[name] = TensorInfo(dtype, tuple(shape), 8 + length + begin)
            spans.append((begin, end))
        _check_spans(spans, 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"a tensor has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} is damaged: {what}") from error
    return infos, metadata


def _check_spans(spans: Sequence[tuple[int, int]], start: int, size: int) -> None:
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise ValueError("tensors overlap, or leave a gap")
        reached = end
    if start + reached != size:
        raise ValueError(f"the file has {size} bytes, its tensors end at {start + reached}")


class AtomicFile:
    """A file that appears under its name complete, or not at all; the one before stays until then.

    Raises:
        CheckpointError: what has the name is no file: a device would become one.
    """

    def __init__(self, path: Path, header: bytes, size: int):
        self.path = path
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is there, and is not a file: choose another name")
        sweep_temporaries(path.parent, f".{path.name}.", ".tmp")
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._temporary.unlink(missing_ok=True)
        self._file = open(self._temporary, "xb")  # noqa: SIM115  (closed by commit or discard)
        self._lock = lock_temporary(self._temporary)
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
        self._unlock()
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
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        let_go(lock)


class Reader:
    """A safetensors file, checked on opening, read by boxes or ranges of elements.

    Attributes:
        foreign: name -> type of tensors that cannot be read, of types that MindSpore does not have.

    Raises:
        CheckpointError: missing, truncated or malformed.
    """

    def __init__(self, path: str | Path):
        self.path, self.foreign = Path(path), {}
        self._file = RegularFile(self.path, links=True)  # Hugging Face's cache is made of links
        try:
            self.tensors, self.metadata = read_header(self._file, self.foreign)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, box: Box, out: np.ndarray | None = None) -> np.ndarray:
        """A box of a tensor; see `ShardedReader.read`."""
        info = self.tensors[name]
        dtype = numpy_dtype(info.dtype)
        out = np.empty(extents(box), dtype) if out is None else out
        fill(out, box, Piece(info.shape, last=info.count), max(1, PIECE // dtype.itemsize), partial(self._elements, info))
        return out

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor, as `read` returns them; only their bytes are read."""
        info = self.tensors[name]
        if out is None:
            return self._elements(info, start, stop)
        step = max(1, PIECE // numpy_dtype(info.dtype).itemsize)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            out[begin - start : end - start] = self._elements(info, begin, end)
        return out

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill a contiguous array of the tensor's type with its elements from `start` on, without a copy in between."""
        info = self.tensors[name]
        self._file.read_into(info.start + start * out.itemsize, out)

    def _elements(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        dtype = numpy_dtype(info.dtype)
        raw = self._file.read(info.start + start * dtype.itemsize, max(0, stop - start) * dtype.itemsize)
        return np.frombuffer(raw, np.uint8).view(dtype)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()
