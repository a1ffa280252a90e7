"""One sharded checkpoint: a folder with one safetensors file for each rank that wrote it, and an index.

    index.json                       what there is: shapes, types, hashes, and everything that is not a tensor
    rank-00000-of-00004.safetensors  what rank 0 owned: of each tensor a flat piece, without padding

A tensor's pieces are, one behind the other, the flattened full tensor: so any number of ranks can read the ranges that they need.
A tensor that is whole on every rank, but not the same there (running statistics of a batch norm), is in rank 0's file once for each
rank, one behind the other.

Every piece has a hash (xxh3) for each 4 MiB of it, which reading checks. Nothing in a file is trusted: names are made here, and
not read; sizes are compared with those of the files before anything is allocated; links are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
import xxhash

from ..compat.runtime import numpy_dtype
from .errors import CheckpointError
from .format import DTYPES, LARGEST, TYPE_NAMES, RegularFile, TensorInfo, is_count, is_shape, parsed_json, plan, read_header

INDEX = "index.json"
STATE_PREFIXES = ("optimizer.", "gradient.")  # of names of tensors that are not the model's
VERSION = 2  # also with copies, which the first of version 2 does not take: it misses the rest of the tensor
_NAMED = re.compile(r"step-(\d{8,})", re.ASCII)
HASHED = 4 << 20  # bytes that share a hash
# Bytes of a `pwrite`: larger ones take larger pages of the page cache, which a virtual machine may have to ask its host for. 2 GB
# took 0.5 s in pieces of 64 or 128 KiB, and 0.5 to 5.5 s in larger ones.
MOST_RANKS = 99999
WRITTEN = 128 << 10
FLUSHED = 64 << 20  # bytes after which the system is asked to bring them to the disk
_LARGEST_INDEX = 1 << 28  # bytes; 15 TB have one of a third


@dataclass(frozen=True)
class IndexedTensor:
    """A tensor of a checkpoint.

    Attributes:
        dtype: of MindSpore.
        shape: of the full tensor.
        shard: elements of each rank's piece, the last shorter or empty; None: whole, in rank 0's file (in every rank's, without
            shared storage).
        hashes: of the pieces, by rank, or of the whole; for each 4 MiB a hexadecimal number.
        of_model: False: of an optimizer, or a gradient.
        copies: of a whole tensor, by rank, if ranks have other values; 1: all have the same.
    """

    dtype: Any
    shape: tuple[int, ...]
    shard: int | None
    hashes: Sequence[Sequence[str]]
    of_model: bool = True
    copies: int = 1

    @property
    def count(self) -> int:
        """Elements of the full tensor."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return numpy_dtype(self.dtype).itemsize

    def piece(self, rank: int) -> tuple[int, int]:
        """First element and the one behind the last of a rank's piece; all copies, where there are several."""
        if self.shard is None:
            return 0, self.count * self.copies
        start = min(rank * self.shard, self.count)
        return start, min(start + self.shard, self.count)


@dataclass(frozen=True)
class Index:
    """What `index.json` says.

    Attributes:
        ranks: how many wrote it.
        identity: of this save; equal on every node.
        state: everything that is not a tensor.
        tensors: by name.
    """

    ranks: int
    identity: str
    state: dict[str, Any]
    tensors: Mapping[str, IndexedTensor]

    def to_json(self) -> str:
        """The file's text."""
        tensors = {
            name: {
                "dtype": TYPE_NAMES[t.dtype],
                "shape": list(t.shape),
                "shard": t.shard,
                "hashes": [list(h) for h in t.hashes],
                "of_model": t.of_model,
                **({"copies": t.copies} if t.copies > 1 else {}),
            }
            for name, t in self.tensors.items()
        }
        known = {"format": "bmtrain_ms", "version": VERSION, "ranks": self.ranks, "identity": self.identity}
        state = json.loads(json.dumps(self.state))  # as it is read: keys that are numbers become strings, which sort otherwise
        body = {**known, "state": state, "tensors": tensors}
        return _dumped({**body, "checksum": _checksum(body)})


def _dumped(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"), sort_keys=True)


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(_dumped(body).encode())


def file_name(rank: int, ranks: int) -> str:
    """Of a rank's tensors."""
    return f"rank-{rank:05}-of-{ranks:05}.safetensors"


def read_index(folder: Path) -> Index:
    """Parse and check `index.json`.

    Raises:
        CheckpointError: it is missing, not ours, of a later version, or says what cannot be.
    """
    path = folder / INDEX
    with RegularFile(path) as file:
        if file.size > _LARGEST_INDEX:
            raise CheckpointError(f"{path} is {file.size} bytes long, which no index is")
        text = file.read(0, file.size)
    try:
        raw = parsed_json(text)
        return _parsed(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _parsed(raw: Any) -> Index:
    if not isinstance(raw, dict) or raw.get("format") != "bmtrain_ms":
        raise CheckpointError("it is not the index of a bmtrain_ms checkpoint")
    version: Any = raw.get("version")
    if not is_count(version):
        raise CheckpointError("it has no version")
    _expect(version <= VERSION, f"it has format version {version}, this bmtrain_ms reads up to {VERSION}; upgrade")
    _expect(version == VERSION, f"it has format version {version}, which no bmtrain_ms wrote as a folder")
    checksum = raw.pop("checksum", None)
    _expect(checksum == _checksum(raw), "it is damaged: its checksum differs")
    ranks, identity, state, tensors = _fields(raw, "ranks", "identity", "state", "tensors")
    if not (is_count(ranks) and 1 <= ranks <= MOST_RANKS):
        raise CheckpointError(f"it says that {ranks!r} ranks wrote it")
    if not (isinstance(identity, str) and isinstance(state, dict) and isinstance(tensors, dict)):
        raise CheckpointError("parts of it are missing")
    return Index(ranks, identity, state, {name: _tensor(name, entry, ranks) for name, entry in tensors.items()})


def _tensor(name: str, entry: Any, ranks: int) -> IndexedTensor:
    if not isinstance(entry, dict):
        raise CheckpointError(f"tensor {name} has no description")
    dtype, shape, shard, hashes = _fields(entry, "dtype", "shape", "shard", "hashes")
    if not (isinstance(dtype, str) and dtype in DTYPES):
        raise CheckpointError(f"tensor {name} is of the unknown type {dtype!r}")
    _expect(is_shape(shape), f"tensor {name} has the impossible shape {reprlib.repr(shape)}")
    _expect(shard is None or (is_count(shard) and shard >= 1), f"tensor {name} has the impossible shard length {shard!r}")
    copies: Any = entry.get("copies", 1)
    if not (is_count(copies) and 1 <= copies <= MOST_RANKS and (copies == 1 or shard is None)):
        raise CheckpointError(f"tensor {name} has the impossible number of copies {copies!r}")
    made = IndexedTensor(DTYPES[dtype], tuple(shape), shard, (), copies=copies)
    _expect(made.count * copies * made.itemsize < LARGEST, f"tensor {name} of shape {shape} is too large to exist")
    _expect(shard is None or shard * ranks >= made.count, f"tensor {name} has pieces for fewer elements than its shape")
    pieces = 1 if shard is None else ranks
    texts = isinstance(hashes, list) and len(hashes) == pieces and all(isinstance(h, list) for h in hashes)
    _expect(texts and all(isinstance(x, str) for h in hashes for x in h), f"tensor {name} has no hashes for {pieces} pieces")
    for rank, h in enumerate(hashes):
        start, stop = made.piece(rank)
        wanted = -(-(stop - start) * made.itemsize // HASHED)
        _expect(len(h) == wanted, f"tensor {name} has {len(h)} hashes of rank {rank}'s piece, which needs {wanted}")
    of_model = entry.get("of_model", not name.startswith(STATE_PREFIXES))  # the first of version 2 did not say
    _expect(isinstance(of_model, bool), f"tensor {name} may be of the model or not: {of_model!r}")
    return replace(made, hashes=hashes, of_model=of_model)


def _fields(raw: dict[str, Any], *names: str) -> list[Any]:
    return [raw.get(name) for name in names]


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise CheckpointError(what)


def check_name(folder: Path, step: Any) -> None:
    """Whether a folder with this name may hold this step.

    Raises:
        CheckpointError: the name is that of another step.
    """
    named = _NAMED.fullmatch(folder.name)
    if named and is_count(step) and int(named[1]) != step:
        raise CheckpointError(f"{folder} holds step {step}, not the one of its name; give it the name step-{step:08}")


class ShardedReader:
    """The tensors of a checkpoint, read by ranges of elements; only what is asked for is read, and checked.

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
        self._last: tuple[tuple[str, int, int] | None, bytes] = None, b""  # the block read last: the next range may begin in it
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
        """Name -> (shape of the full tensor, MindSpore dtype)."""
        return {name: (t.shape, t.dtype) for name, t in self.index.tensors.items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flattened full tensor.

        Raises:
            CheckpointError: a hash differs, or the file ends too early.
        """
        tensor = self.index.tensors[name]
        rank, ranks = self._place
        first = rank * tensor.copies // ranks * tensor.count
        return self.read_stored(name, first + start, first + stop)

    def read_stored(self, name: str, start: int, stop: int) -> np.ndarray:
        """As `read`, of all copies, one behind the other."""
        tensor = self.index.tensors[name]
        out = np.empty(stop - start, numpy_dtype(tensor.dtype))
        target = out.view(np.uint8)
        for rank in self._ranks_of(tensor, start, stop):
            first, last = tensor.piece(rank)
            begin, end = max(start, first), min(stop, last)
            at, size = (begin - first) * tensor.itemsize, (end - begin) * tensor.itemsize
            goal = (begin - start) * tensor.itemsize
            for position, block in self._blocks(name, rank, at, at + size):
                low, high = max(position, at), min(position + len(block), at + size)
                target[goal + low - at : goal + high - at] = np.frombuffer(block, np.uint8)[low - position : high - position]
        return out

    def verify(self, ranks: Sequence[int] | None = None) -> Iterator[int]:
        """Check every hash of those ranks' files (default: all); yields numbers of bytes as it goes.

        Raises:
            CheckpointError: one differs.
        """
        for rank in range(self.index.ranks) if ranks is None else ranks:
            for name, tensor in self.index.tensors.items():
                if name not in self._files[rank][1]:
                    continue  # nothing of it in this file, which `_open` allowed
                first, last = tensor.piece(rank)
                for _, block in self._blocks(name, rank, 0, (last - first) * tensor.itemsize):
                    yield len(block)

    def close(self) -> None:
        """Let go of the files."""
        for file, _ in self._files.values():
            file.close()

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ranks_of(self, tensor: IndexedTensor, start: int, stop: int) -> Sequence[int]:
        if start >= stop:
            return ()
        if tensor.shard is None:
            return (self._whole,)
        return range(start // tensor.shard, (stop - 1) // tensor.shard + 1)

    def _blocks(self, name: str, rank: int, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        """(position in the piece, bytes) of the hashed blocks that cover bytes [begin, end) of a rank's piece."""
        tensor = self.index.tensors[name]
        first, last = tensor.piece(rank)
        size = (last - first) * tensor.itemsize
        if begin >= end:
            return
        if rank not in self._files:
            raise CheckpointError(f"{self.folder}: rank {rank}'s file, which has a part of {name}, is not on this host")
        file, infos = self._files[rank]
        for i in range(begin // HASHED, -(-end // HASHED)):
            position = i * HASHED
            if self._last[0] == (name, rank, i):
                yield position, self._last[1]
                continue
            block = file.read(infos[name].start + position, min(HASHED, size - position))
            if xxhash.xxh3_64_hexdigest(block) != tensor.hashes[0 if tensor.shard is None else rank][i]:
                raise CheckpointError(
                    f"{file.path}: tensor {name} is damaged (bytes {position} to {position + len(block)} of its piece do not have "
                    "the hash that the index says)"
                )
            self._last = (name, rank, i), block
            yield position, block

    def _open(self, rank: int) -> tuple[RegularFile, dict[str, TensorInfo]]:
        file = RegularFile(self.folder / file_name(rank, self.index.ranks))
        try:
            infos, _ = read_header(file)
            for name, tensor in self.index.tensors.items():
                first, last = tensor.piece(rank)
                info = infos.get(name)
                if first == last or (info is None and tensor.shard is None and rank != self._whole):
                    continue
                if info is None or info.dtype != tensor.dtype or info.shape != (last - first,):
                    found = "is missing" if info is None else f"is {info.shape} {info.dtype}"
                    raise CheckpointError(
                        f"{file.path}: tensor {name} {found}, the index says ({last - first},) {tensor.dtype}; files of different "
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
    header, infos, size = plan({name: (dtype, array.shape) for name, (dtype, array) in there.items()}, metadata)
    blocks = [
        (name, infos[name].start + start, array.view(np.uint8)[start : start + HASHED])
        for name, (_, array) in there.items()
        for start in range(0, array.nbytes, HASHED)
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
    """As many as this process has cores, and not more than help."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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
