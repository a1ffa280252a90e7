"""Tensors of ours, written as somebody else's files have them, piece by piece: no more than a piece is held, and of what lies the
other way round there, a tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from bmtrain_ms_base.layout import Box

from ...compat.runtime import numpy_dtype
from ...files import boxes
from ...files.consolidated import Replacement, file_names, size_in_bytes, split_by_size, tensor_bytes
from ...files.format import AtomicFile, TensorInfo, plan_file
from .family import Piece
from .reading import Names, first_of, parts_in, runs, their_view

Described = Mapping[str, tuple[Any, tuple[int, ...]]]  # name -> (MindSpore dtype, whole shape)


class Target:
    """A model's safetensors files, and their index, that appear in a folder when all of them are complete.

    Args:
        folder: of the model, which may have another one in it.
        ours: all our tensors.
        names: where each is in theirs; the first way is written.
        largest: bytes of a file, or like `5GB`; a tensor that is larger has one of its own.

    Raises:
        ValueError: `largest` is no size.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, ours: Described, names: Names, largest: int | str = "5GB"):
        self._shapes = {name: shape for name, (_, shape) in ours.items()}
        self._pieces: dict[str, list[Piece]] = {name: names(name, shape)[0] for name, shape in self._shapes.items()}
        theirs = {piece.name: (ours[name][0], piece.shape) for name, pieces in self._pieces.items() for piece in pieces}
        sizes = {name: tensor_bytes(*described) for name, described in theirs.items()}
        self._groups, self._total = split_by_size(sizes, size_in_bytes(largest)), sum(sizes.values())
        # Of a transposed one each piece is a few bytes of every row: it is put together first. Its pieces come one after the other.
        self._apart = {piece.name for pieces in self._pieces.values() for piece in pieces if piece.transposed}
        self._together: dict[str, np.ndarray] = {}
        self._missing = {name: math.prod(theirs[name][1]) for name in self._apart}
        self._files: list[AtomicFile] = []
        self._places: dict[str, tuple[AtomicFile, TensorInfo]] = {}
        self._new = Replacement(folder)
        self._new.__enter__()
        try:
            for file_name, group in zip(file_names(len(self._groups)), self._groups):
                header, infos, size = plan_file({name: theirs[name] for name in group}, {"format": "pt"})
                file = AtomicFile(self._new.folder / file_name, header, size)
                self._files.append(file)
                self._places.update({name: (file, info) for name, info in infos.items()})
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Elements of one of our tensors, flat, from `start` on."""
        for inside, box in boxes.Piece(self._shapes[name], first=start, last=start + values.size).boxes():
            block = values[inside].reshape(boxes.extents(box))
            for piece, part, there in parts_in(self._pieces[name], box):
                file, info = self._places[piece.name]
                view = their_view(piece, block[part])
                if piece.name in self._apart:
                    self._put_together(piece.name, there, view)
                    continue
                for piece_of_view, run in runs(info.shape, there):
                    _write(file, info, run, view[piece_of_view])

    def _put_together(self, name: str, box: Box, values: np.ndarray) -> None:
        file, info = self._places[name]
        if name not in self._together:
            self._together[name] = np.empty(info.shape, numpy_dtype(info.dtype))
        self._together[name][box] = values
        self._missing[name] -= values.size
        if not self._missing[name]:
            file.write(info.start, self._together.pop(name))

    def commit(self) -> list[Path]:
        """Make the files written here the model; returns their paths."""
        for file in self._files:
            file.commit()
        paths = self._new.commit(self._groups, self._total)
        self._new.__exit__()
        return paths

    def discard(self) -> None:
        """Leave nothing behind, and what was there before as it was."""
        for file in self._files:
            file.discard()
        self._new.__exit__()


def _write(file: AtomicFile, info: TensorInfo, box: Box, values: np.ndarray) -> None:
    """A contiguous part of a tensor; values are converted to its type."""
    dtype = numpy_dtype(info.dtype)
    file.write(info.start + first_of(info.shape, box) * dtype.itemsize, values.astype(dtype, copy=False))
