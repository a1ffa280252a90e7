"""Tensors of ours, read from somebody's files: which parts of which of their tensors, and nothing else of them.

Files are read at positions, not through a memory map: what a map has touched counts as memory of the process, and a file that is
cut meanwhile would end it.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from bmtrain_ms_base.layout import Box

from ...compat.runtime import numpy_dtype
from ...files import boxes
from ...files.consolidated import INDEX, SINGLE, files_of, weight_map
from ...files.errors import CheckpointError
from ...files.format import PIECE, TYPE_NAMES, Reader, TensorInfo
from .differences import Difference
from .family import Piece
from .pickles import PickleReader

Names = Callable[[str, tuple[int, ...]], list[list[Piece]]]  # our name, whole shape -> alternatives of where it is

_FLOATS = ("F16", "BF16", "F32", "F64")
_PAGE = 4096  # what a system reads at least: parts that lie nearer to each other are read with what is between them
_PICKLE, _PICKLES = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Buffers that older releases of transformers wrote; they are computed.
_NEVER_USED = re.compile(r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")


class Files:
    """The tensors of a model's files. A file is opened when it is first asked for one of its tensors.

    Args:
        path: a folder, an index, or a file.
        pickles: read `pytorch_model.bin`, where there are no safetensors files, by an interpreter that knows tensors only.

    Attributes:
        where: name -> its file.

    Raises:
        CheckpointError: there is no model, or its index, or its only file, is damaged.
    """

    def __init__(self, path: Path, pickles: bool = False):
        self.path, self.where = path, {}
        self._readers: dict[Path, Reader] = {}
        try:
            for file, names in _files(path, pickles):
                found = names if names is not None else [*self._reader(file).tensors, *self._reader(file).foreign]
                self.where.update(dict.fromkeys(found, file))
        except BaseException:
            self.close()
            raise

    def find(self, name: str) -> str | None:
        """What a tensor of that name is called in the files, which may leave out its first part (GPT-2's `transformer.`)."""
        short = name.partition(".")[2]
        return name if name in self.where else short if "." in short and short in self.where else None

    def info(self, name: str) -> TensorInfo | str:
        """Type, shape and place; the type's name where MindSpore does not have it.

        Raises:
            CheckpointError: the file is damaged, or the index says that it has this tensor, and it has not.
        """
        reader = self._reader(self.where[name])
        if name in reader.foreign:
            return reader.foreign[name]
        if name not in reader.tensors:
            raise CheckpointError(f"{reader.path} has no tensor {name}, which its index says it has")
        return reader.tensors[name]

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        """Write a box of a tensor to `out`, whose type it is converted to.

        Raises:
            CheckpointError: a value is larger than that type's largest.
        """
        reader, info = self._reader(self.where[name]), self.info(name)
        assert isinstance(info, TensorInfo)
        dtype = numpy_dtype(info.dtype)
        if out.dtype == dtype and out.flags.c_contiguous:
            _fill(reader, name, box, out)
            return
        for inside, block in blocks(box, PIECE // dtype.itemsize):
            values = np.empty(boxes.extents(block), dtype)
            _fill(reader, name, block, values)
            with np.errstate(over="ignore"):
                out[inside] = values
            if out.dtype.itemsize <= dtype.itemsize:
                self._refuse_lost(reader.path, name, _wide(values), out[inside])

    @staticmethod
    def _refuse_lost(path: Path, name: str, values: np.ndarray, written: np.ndarray) -> None:
        lost = np.isfinite(values) & ~np.isfinite(_wide(written))
        if lost.any():
            raise CheckpointError(
                f"{path}: {name} has values that {written.dtype} cannot hold, as {values[lost][0]:g}: load it, or write it, as "
                "float32 or bfloat16"
            )

    def close(self) -> None:
        """Let go of the files."""
        for reader in self._readers.values():
            reader.close()
        self._readers = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reader(self, file: Path) -> Reader:
        if file not in self._readers:
            self._readers[file] = PickleReader(file) if file.suffix == ".bin" else Reader(file)
        return self._readers[file]


def _files(path: Path, pickles: bool) -> list[tuple[Path, list[str] | None]]:
    there = {name for name in (INDEX, SINGLE, _PICKLES, _PICKLE) if (path / name).exists()}
    if there & {INDEX, SINGLE} or not there:
        return files_of(path)
    if not pickles:
        raise CheckpointError(
            f"{path} has pytorch_model.bin only, pickles, which may run anything where they are read. Pass pickles=True to read "
            "the tensors in them by an interpreter that knows nothing else, or get the model as safetensors"
        )
    return weight_map(path / _PICKLES, ".bin") if _PICKLES in there else [(path / _PICKLE, None)]


def _fill(reader: Reader, name: str, box: Box, out: np.ndarray) -> None:
    """Write a box of a tensor to a contiguous array of its type."""
    shape = reader.tensors[name].shape
    run = math.prod(boxes.extents(box)[_run_axis(shape, box) :])
    if run < out.size and run * out.itemsize < _PAGE:
        reader.read(name, box, out)
        return
    for inside, there in runs(shape, box):
        reader.read_into(name, first_of(shape, there), out[inside])


def _run_axis(shape: Sequence[int], box: Box) -> int:
    """The first of the last dims over which a box is contiguous in a tensor of that shape."""
    axis = max(len(box) - 1, 0)
    while axis and boxes.extents(box)[axis] == shape[axis]:
        axis -= 1
    return axis


def runs(shape: Sequence[int], box: Box) -> Iterator[tuple[Box, Box]]:
    """A box in parts that are contiguous in a tensor of that shape: (where in the box, where in the tensor)."""
    axis = _run_axis(shape, box)
    inner = tuple(slice(0, n) for n in boxes.extents(box)[axis:])
    for corner in np.ndindex(*boxes.extents(box)[:axis]):
        at = tuple(slice(i + part.start, i + part.start + 1) for i, part in zip(corner, box))
        yield (*(slice(i, i + 1) for i in corner), *inner), (*at, *box[axis:])


def blocks(box: Box, most: int) -> Iterator[tuple[Box, Box]]:
    """A box in parts of at most so many elements: (where in the box, where in the tensor)."""
    sizes = boxes.extents(box)
    axis = next((i for i, n in enumerate(sizes) if n > 1), len(sizes))
    if math.prod(sizes) <= most or axis == len(sizes):
        yield tuple(slice(0, n) for n in sizes), box
        return
    step = max(1, most // math.prod(sizes[axis + 1 :]))
    for start in range(0, sizes[axis], step):
        stop, first = min(start + step, sizes[axis]), box[axis].start
        part = (*box[:axis], slice(first + start, first + stop), *box[axis + 1 :])
        for inside, block in blocks(part, most):
            yield (*inside[:axis], slice(start + inside[axis].start, start + inside[axis].stop), *inside[axis + 1 :]), block


def first_of(shape: Sequence[int], box: Box) -> int:
    """The place of a box's first element in the flattened tensor."""
    return sum(part.start * math.prod(shape[i + 1 :]) for i, part in enumerate(box))


def theirs_of(piece: Piece, common: Box) -> Box:
    """Where a box of ours, which lies in a piece, is in their tensor."""
    inside = [slice(x.start - y.start, x.stop - y.start) for x, y in zip(common, piece.ours)]
    inside = inside[len(inside) - len(piece.theirs) :]  # one expert's tensor has no dim of experts
    if piece.transposed:
        inside[-2:] = inside[:-3:-1]
    return tuple(slice(x.start + y.start, x.stop + y.start) for x, y in zip(inside, piece.theirs))


def their_view(piece: Piece, block: np.ndarray) -> np.ndarray:
    """The same memory as their tensor has it: without a dim of experts, transposed."""
    block = block[(0,) * (block.ndim - len(piece.theirs))]
    return block.swapaxes(-1, -2) if piece.transposed else block


def parts_in(pieces: Sequence[Piece], box: Box) -> Iterator[tuple[Piece, Box, Box]]:
    """The pieces that have something of a box of ours: (piece, where in the box, where in their tensor)."""
    for piece in pieces:
        common = boxes.shared(box, piece.ours)
        if common is not None:
            yield piece, tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(common, box)), theirs_of(piece, common)


class Source:
    """Tensors of ours as their files have them, `Readable`: what `Entry.read_from` asks for.

    Args:
        files: of theirs.
        chosen: our name -> its pieces, called as the files call them.
        shapes: our name -> shape of the whole tensor.
    """

    def __init__(self, files: Files, chosen: Mapping[str, Sequence[Piece]], shapes: Mapping[str, tuple[int, ...]]):
        self._files, self._chosen, self._shapes = files, chosen, shapes

    def pieces(self, name: str) -> Sequence[Piece]:
        """Where a tensor is, called as the files call it."""
        return self._chosen[name]

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        """Write a box of the whole tensor to `out`."""
        for piece, inside, there in parts_in(self._chosen[name], box):
            self._files.read(piece.name, there, their_view(piece, out[inside]))

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Write elements [start, stop) of the flattened whole tensor to `out`."""
        for inside, box in boxes.Piece(self._shapes[name], first=start, last=stop).boxes():
            self.read(name, box, out[inside].reshape(boxes.extents(box)))


def choose(files: Files, names: Names, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, list[Piece]], list[Difference]]:
    """Where each of our tensors is, by the names that are in the files, and which names are missing or unexpected.

    Of several ways to write a tensor the first counts of which all names are there.
    """
    chosen: dict[str, list[Piece]] = {}
    found: list[Difference] = []
    known: set[str] = set()
    for name, shape in shapes.items():
        ways = names(name, shape)
        way = next((way for way in ways if all(files.find(piece.name) for piece in way)), None)
        if way is None:
            way = max(ways, key=lambda way: sum(files.find(piece.name) is not None for piece in way))
            absent = {piece.name: piece.shape for piece in way if files.find(piece.name) is None}
            found += [Difference("missing", absent_name, "", str(tuple(shape))) for absent_name, shape in absent.items()]
        else:
            chosen[name] = [replace(piece, name=files.find(piece.name) or piece.name) for piece in way]
        known |= {files.find(piece.name) or piece.name for piece in way}
    extra = [name for name in files.where if name not in known and not _NEVER_USED.fullmatch(name)]
    found += [Difference("unexpected", name, f"in {files.where[name].name}", "") for name in extra]
    return chosen, found


def compare(files: Files, chosen: Mapping[str, Sequence[Piece]], dtypes: Mapping[str, Any]) -> list[Difference]:
    """Tensors whose shape is another one, or whose values are no floats; opens the files that have them, and no others.

    `dtypes`: of the tensors of ours that are looked at.
    """
    found = {}
    for name, dtype in dtypes.items():
        for piece in chosen.get(name, ()):
            info, own_kind = files.info(piece.name), TYPE_NAMES[dtype]
            kind = info if isinstance(info, str) else TYPE_NAMES[info.dtype]
            if kind not in _FLOATS:
                found[piece.name] = Difference("type", piece.name, kind, own_kind)
            elif isinstance(info, TensorInfo) and info.shape != tuple(piece.shape):
                found[piece.name] = Difference("shape", piece.name, str(info.shape), str(tuple(piece.shape)))
    return list(found.values())


def _wide(values: np.ndarray) -> np.ndarray:
    """In a type that NumPy knows, which bfloat16 is not."""
    return values if values.dtype.kind == "f" else np.ascontiguousarray(values).astype(np.float32)
