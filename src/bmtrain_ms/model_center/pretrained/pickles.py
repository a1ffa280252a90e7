"""Tensors of a file of `torch.save`, by an interpreter that builds tensors and calls nothing.

The pickle in such a file is a program. Python's own reader would do whatever it says; this one knows the operations that a
dictionary of tensors needs, takes a name for a name, and stops at any that is not on its list.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import mindspore as ms

from ...compat.runtime import numpy_dtype
from ...files.errors import CheckpointError
from ...files.format import Reader, RegularFile, TensorInfo, is_count

_LARGEST = 1 << 28  # bytes of the pickle, which has names and shapes only
_HEADER = 30  # bytes of a zip file's local header, before the name
_STORAGES: dict[str, Any] = {
    "torch.FloatStorage": ms.float32,
    "torch.DoubleStorage": ms.float64,
    "torch.HalfStorage": ms.float16,
    "torch.BFloat16Storage": ms.bfloat16,
    "torch.ByteStorage": ms.uint8,
    "torch.CharStorage": ms.int8,
    "torch.ShortStorage": ms.int16,
    "torch.IntStorage": ms.int32,
    "torch.LongStorage": ms.int64,
    "torch.BoolStorage": ms.bool_,
}
_DICT, _TENSOR, _PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_KNOWN = {*_STORAGES, _DICT, _TENSOR, _PARAMETER}


class PickleReader(Reader):
    """A file of `torch.save` (of torch 1.6 and later) that holds a dictionary of contiguous tensors; read as safetensors are.

    Raises:
        CheckpointError: it holds anything else, or is damaged, or compressed.
    """

    def __init__(self, path: str | Path):
        self.path, self.foreign, self.metadata = Path(path), {}, {}
        self._file = RegularFile(self.path, links=True)
        try:
            self.tensors = _tensors(self._file)
        except BaseException:
            self.close()
            raise


def _tensors(file: RegularFile) -> dict[str, TensorInfo]:
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in members or _read(file, members, "byteorder", b"little") != b"little":
            raise ValueError("it is not a file of torch.save, or of a machine of another byte order")
        found = _interpreted(_read(file, members, "data.pkl"))
        if not isinstance(found, dict):
            raise ValueError("it does not hold a dictionary of tensors")
        return {str(name): _place(file, members, str(name), value) for name, value in found.items()}
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged bytes make of zip files and pickles
        if isinstance(error, zipfile.BadZipFile):
            error = ValueError("it is no zip file: torch before 1.6 wrote others, which are not read here")
        raise CheckpointError(f"{file.path} cannot be read as tensors: {error}") from error


def _read(file: RegularFile, members: dict[str, zipfile.ZipInfo], name: str, otherwise: bytes = b"") -> bytes:
    if name not in members:
        return otherwise
    start, size = _span(file, members[name])
    if size > _LARGEST:
        raise ValueError(f"{name} in it has {size} bytes")
    return file.read(start, size).strip() if name == "byteorder" else file.read(start, size)


def _span(file: RegularFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a member's bytes are."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} in it is compressed")
    header = file.read(info.header_offset, _HEADER)
    start = info.header_offset + _HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\3\4" or start + info.file_size > file.size:
        raise ValueError(f"{info.filename} in it is truncated")
    return start, info.file_size


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: Any


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _place(file: RegularFile, members: dict[str, zipfile.ZipInfo], name: str, value: Any) -> TensorInfo:
    if not isinstance(value, _Tensor):
        raise ValueError(f"{name} in it is a {type(value).__name__.lstrip('_')}, not a tensor")
    numbers = value.offset, *value.shape, *value.strides
    expected = [math.prod(value.shape[i + 1 :]) for i in range(len(value.shape))]
    if not all(map(is_count, numbers)) or any(n > 1 and a != b for n, a, b in zip(value.shape, value.strides, expected)):
        raise ValueError(f"{name} in it is a view of another tensor, transposed for example: save it contiguous")
    start, size = _span(file, members[f"data/{value.storage.key}"])
    item = numpy_dtype(value.storage.dtype).itemsize
    if (value.offset + math.prod(value.shape)) * item > size:
        raise ValueError(f"{name} in it has more elements than its storage")
    return TensorInfo(value.storage.dtype, value.shape, start + value.offset * item)


_MARK = object()


class _Machine:
    """The stack and the memo of a pickle. A method for each operation, by its name in `pickletools`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, operation: str, argument: Any) -> None:
        if operation in _CONSTANTS:
            self.stack.append(_CONSTANTS[operation]())
        elif operation in _LITERALS:
            self.stack.append(argument)
        elif operation in _TUPLES:
            self.stack.append(tuple(self.several(_TUPLES[operation])))
        elif operation not in ("PROTO", "FRAME", "STOP"):
            method: Callable[[Any], None] | None = getattr(self, f"do_{operation.lower()}", None)
            if method is None:
                raise ValueError(f"it has the operation {operation}, which tensors do not need")
            method(argument)

    def several(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("its program is damaged")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def marked(self) -> list[Any]:
        at = max(i for i, value in enumerate(self.stack) if value is _MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def do_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.marked()))

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_binput(self, at: int) -> None:
        self.memo[at] = self.stack[-1]

    def do_binget(self, at: int) -> None:
        self.stack.append(self.memo[at])

    do_long_binput, do_long_binget = do_binput, do_binget

    def do_global(self, argument: str) -> None:
        self.named(argument.replace(" ", "."))

    def do_stack_global(self, _: Any) -> None:
        self.named(".".join(self.several(2)))

    def named(self, name: str) -> None:
        if name not in _KNOWN:
            raise ValueError(f"it names {name}, which is no part of a dictionary of tensors: nothing of it was run")
        self.stack.append(_Name(name))

    def do_binpersid(self, _: Any) -> None:
        kind, storage, key, *_rest = self.stack.pop()
        if kind != "storage" or storage.name not in _STORAGES:
            raise ValueError(f"it refers to a {kind}, which is no storage")
        self.stack.append(_Storage(str(key), _STORAGES[storage.name]))

    def do_reduce(self, _: Any) -> None:
        function, arguments = self.several(2)
        if function == _Name(_TENSOR):
            storage, offset, shape, strides = arguments[:4]
            self.stack.append(_Tensor(storage, offset, tuple(shape), tuple(strides)))
        elif function == _Name(_PARAMETER):
            self.stack.append(arguments[0])
        elif function == _Name(_DICT) and not arguments:
            self.stack.append({})
        else:
            raise ValueError(f"it calls {getattr(function, 'name', function)!r}, which builds no tensor")

    def do_build(self, _: Any) -> None:
        self.stack.pop()  # attributes of the dictionary: `_metadata` of torch's modules

    def do_setitem(self, _: Any) -> None:
        key, value = self.several(2)
        self.stack[-1][key] = value

    def do_setitems(self, _: Any) -> None:
        values = self.marked()
        self.stack[-1].update(zip(values[::2], values[1::2]))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _interpreted(program: bytes) -> Any:
    machine = _Machine()
    for operation, argument, _ in pickletools.genops(program):
        machine.run(operation.name, argument)
    return machine.stack.pop()
