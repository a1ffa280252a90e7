"""One sharded checkpoint: a folder with one safetensors file for each rank that wrote it, and an index.

    index.json                       what there is: shapes, types, hashes, and everything that is not a tensor
    rank-00000-of-00004.safetensors  what rank 0 owned: of each tensor a flat piece, without padding

The index says of each tensor, beside its `dtype`, its whole `shape`, and whether it is `of_model`, where its pieces are:

- `shard`, a number: the pieces are, by rank and one behind the other, the flattened tensor, so many elements each.
- `shard`, null: it is whole in rank 0's file, without shared storage in every one. If it is not the same on every rank (running
  statistics of a batch norm), the file has it once for each of so many `copies`, one behind the other.
- `splits` and `files`: it is cut along dims, each [dim, number of parts]; part i of n of a dim of size s begins at s * i // n.
  For each part, in row-major order of its indices, `files` has ranks: their pieces are, one behind the other, the flattened part,
  in shards of ceil(elements / ranks).

So ranks of any number and layout can read the boxes that they need. `hashes` has, of every piece in this order, a hash (xxh3) for
each 4 MiB, which reading checks. Nothing in a file is trusted: names are made here, and not read; sizes are compared with those of
the files before anything is allocated; links are refused. Format 2, which is read too, has no `splits`.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
import xxhash

from bmtrain_ms_base import system
from bmtrain_ms_base.layout import Box

from ..compat.runtime import numpy_dtype
from ..files.boxes import Piece, extents, fill
from ..files.errors import CheckpointError
from ..files.format import RegularFile, TensorInfo, plan_file, read_header
from . import index as index_module
from .index import IndexedTensor, check_name, file_name, read_index

# Bytes of a `pwrite`: larger ones take larger pages of the page cache, which a virtual machine may have to ask its host for. 2 GB
# took 0.5 s in pieces of 64 or 128 KiB, and 0.5 to 5.5 s in larger ones.
WRITTEN = 128 << 10
FLUSHED = 64 << 20  # bytes after which the system is asked to bring them to the disk
_KEPT = 16  # blocks of a tensor that is cut along dims: a range of it crosses several pieces, and the next range the same ones


class ShardedReader:
    """The tensors of a checkpoint, read by boxes or ranges of elements; only what is asked for is read, and checked.

    Args:
        folder: of the checkpoint.
        only: ranks whose files are here (no shared storage); default: all.
        place: (rank, number of ranks) of who reads, which gets the copy of the rank in that place among those that wrote: of n
            copies the one of rank * n // ranks, so its own at equal numbers.

    Raises:
        CheckpointError: the index or a file is missing, damaged, or they do not belong together; or the folder has the name of
            another step.
    """

    def __init__(self, folder: Path, only: Sequence[int] | None = None, place: tuple[int, int] = (0, 1)):
        self.folder, self.index, self._place = folder, read_index(folder), place
        check_name(folder, self.index.state.get("step"))
        self._whole = 0 if only is None else only[0]  # whose file whole tensors are read from
        self._files: dict[int, tuple[RegularFile, dict[str, TensorInfo]]] = {}
        # The blocks that were read last, by name, rank and number: the next range may begin in one.
        self._kept: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()
        try:
            for rank in range(self.index.ranks) if only is None else only:
                self._files[rank] = self._open(rank)
        except BaseException:
            self.close()
            raise

    @property
    def stored(self) -> int:
        """Bytes of the tensors in the files that are here, copies counted."""
        return sum(info.count * numpy_dtype(info.dtype).itemsize for _, infos in self._files.values() for info in infos.values())

    @property
    def described(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> (shape of the whole tensor, MindSpore dtype)."""
        return {name: (t.shape, t.dtype) for name, t in self.index.tensors.items()}

    def read(self, name: str, box: Box, out: np.ndarray | None = None) -> np.ndarray:
        """A box of the whole tensor.

        Args:
            out: an array of the box's shape to write into, converted to its dtype; default: a new one of the tensor's.

        Raises:
            CheckpointError: a hash differs, or the file ends too early.
        """
        tensor = self.index.tensors[name]
        out = np.empty(extents(box), numpy_dtype(tensor.dtype)) if out is None else out
        block, first = index_module.HASHED // tensor.itemsize, self._first(tensor)
        for rank in (self._whole,) if tensor.is_whole else tensor.holders(box, self.index.ranks):
            fill(out, box, tensor.piece(rank), block, partial(self._elements, name, rank, first))
        return out

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor, as `read` returns them."""
        first = self._first(self.index.tensors[name])
        return self.read_stored(name, first + start, first + stop, out)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop) of all stored copies of the flattened tensor, one behind the other."""
        tensor = self.index.tensors[name]
        out = np.empty(stop - start, numpy_dtype(tensor.dtype)) if out is None else out
        if tensor.grid is not None:
            for inside, box in Piece(tensor.shape, first=start, last=stop).boxes():
                self.read(name, box, out[inside].reshape(extents(box)))
        elif start < stop:
            shard = stop if tensor.shard is None else tensor.shard
            for rank in (self._whole,) if tensor.is_whole else range(start // shard, (stop - 1) // shard + 1):
                first = 0 if tensor.is_whole else rank * shard
                low, high = max(start, first), min(stop, first + shard)
                for position, values in self._blocks(name, rank, low - first, high - first):
                    out[first + position - start : first + position - start + values.size] = values
        return out

    def verify(self, ranks: Sequence[int] | None = None) -> Iterator[int]:
        """Check every hash of those ranks' files (default: all); yields numbers of bytes as it goes.

        Raises:
            CheckpointError: one differs.
        """
        for rank in range(self.index.ranks) if ranks is None else ranks:
            for name, tensor in self.index.tensors.items():
                if name in self._files[rank][1]:  # else nothing of it is in this file, which `_open` allowed
                    for _, values in self._blocks(name, rank, 0, tensor.size_in(rank)):
                        yield values.nbytes

    def close(self) -> None:
        """Let go of the files."""
        for file, _ in self._files.values():
            file.close()

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _first(self, tensor: IndexedTensor) -> int:
        """Where this reader's copy begins."""
        rank, ranks = self._place
        return rank * tensor.copies // ranks * tensor.count

    def _elements(self, name: str, rank: int, first: int, start: int, stop: int) -> np.ndarray:
        found = [values for _, values in self._blocks(name, rank, first + start, first + stop)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _blocks(self, name: str, rank: int, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(position in a rank's piece, values) of elements [start, stop) of it, by the blocks that share a hash."""
        tensor = self.index.tensors[name]
        if start < stop and rank not in self._files:
            raise CheckpointError(f"{self.folder}: rank {rank}'s file, which has a part of {name}, is not on this host")
        length = index_module.HASHED // tensor.itemsize
        while start < stop:
            number = start // length
            end = min(stop, (number + 1) * length)
            yield start, self._block(name, tensor, rank, number)[start - number * length : end - number * length]
            start = end

    def _block(self, name: str, tensor: IndexedTensor, rank: int, number: int) -> np.ndarray:
        key = name, rank, number
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        file, infos = self._files[rank]
        position = number * index_module.HASHED
        size = min(index_module.HASHED, tensor.size_in(rank) * tensor.itemsize - position)
        while len(self._kept) >= (1 if tensor.grid is None else _KEPT):  # before there is one more
            self._kept.popitem(last=False)
        block = file.read(infos[name].start + position, size)
        if xxhash.xxh3_64_hexdigest(block) != tensor.hashes_in(rank)[number]:
            raise CheckpointError(
                f"{file.path}: tensor {name} is damaged (bytes {position} to {position + size} of its piece do not have the hash "
                "that the index says)"
            )
        self._kept[key] = np.frombuffer(block, np.uint8).view(numpy_dtype(tensor.dtype))
        return self._kept[key]

    def _open(self, rank: int) -> tuple[RegularFile, dict[str, TensorInfo]]:
        file = RegularFile(self.folder / file_name(rank, self.index.ranks))
        try:
            infos, _ = read_header(file)
            for name, tensor in self.index.tensors.items():
                size, info = tensor.size_in(rank), infos.get(name)
                if size == 0 or (info is None and tensor.is_whole and rank != self._whole):
                    continue
                if info is None or info.dtype != tensor.dtype or info.shape != (size,):
                    found = "is missing" if info is None else f"is {info.shape} {info.dtype}"
                    raise CheckpointError(
                        f"{file.path}: tensor {name} {found}, the index says ({size},) {tensor.dtype}; files of different "
                        "checkpoints are mixed"
                    )
        except BaseException:
            file.close()
            raise
        return file, infos


def write_rank_file(path: Path, pieces: Mapping[str, tuple[Any, np.ndarray]], metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """Write a rank's pieces, bring them to the disk, and read them back to check.

    Args:
        pieces: name -> (MindSpore dtype, flat array); empty ones are left out.

    Returns:
        Name -> hashes.

    Raises:
        OSError: it cannot be written.
        CheckpointError: what is on the disk is not what was written.
    """
    there = {name: piece for name, piece in pieces.items() if piece[1].size}
    header, infos, size = plan_file({name: (dtype, array.shape) for name, (dtype, array) in there.items()}, metadata)
    blocks = [
        (name, infos[name].start + start, array.view(np.uint8)[start : start + index_module.HASHED])
        for name, (_, array) in there.items()
        for start in range(0, array.nbytes, index_module.HASHED)
    ]
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.truncate(file, size)
        _write_at(file, header, 0)
        with ThreadPoolExecutor(useful_threads()) as pool:
            written, flushes, unflushed = [], [], 0
            for _, position, block in blocks:  # one thread: a second one would wait for the file's lock
                written.append(_write_block(file, block, position))
                unflushed += block.size
                if unflushed >= FLUSHED and (not flushes or flushes[-1].done()):
                    flushes.append(pool.submit(os.fsync, file))  # the disk works while more is written
                    unflushed = 0
            for flush in flushes:
                flush.result()  # an error is told once: the last fsync would not repeat it
            os.fsync(file)
            if os.fstat(file).st_size != size:
                raise CheckpointError(f"{path} has {os.fstat(file).st_size} bytes on the disk, {size} were written")
            read = pool.map(lambda block: xxhash.xxh3_64_hexdigest(os.pread(file, block[2].size, block[1])), blocks)
            for (name, _, _), expected, found in zip(blocks, written, read):
                if expected != found:
                    raise CheckpointError(f"{path}: tensor {name} is not on the disk as it was written")
    finally:
        os.close(file)
    by_name: dict[str, list[str]] = {name: [] for name in pieces}
    for (name, _, _), value in zip(blocks, written):
        by_name[name].append(value)
    return by_name


def useful_threads() -> int:
    """How many threads to hash and copy with: one for each core of this process, and not more than help."""
    return min(4, len(system.cores()))


def _write_block(file: int, block: np.ndarray, position: int) -> str:
    """Write it; its hash, of each piece while the processor still has it."""
    found = xxhash.xxh3_64()
    for start in range(0, block.size, WRITTEN):
        piece = block[start : start + WRITTEN].data
        _write_at(file, piece, position + start)
        found.update(piece)
    return found.hexdigest()


def _write_at(file: int, data: Any, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count
