"""What the index of a sharded checkpoint says: which tensors there are, and where in the files their elements lie.

Nothing in it is trusted: names of files are made here, and not read; numbers are compared before anything is allocated.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import reprlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

import numpy as np
import xxhash

from bmtrain_ms_base.layout import Box, Layout, Split, part_of

from ..compat.runtime import numpy_dtype
from ..files.boxes import Piece
from ..files.errors import CheckpointError
from ..files.format import DTYPES, LARGEST, TYPE_NAMES, RegularFile, is_count, is_shape, parsed_json

INDEX = "index.json"
STATE_PREFIXES = ("optimizer.", "gradient.")  # of names of tensors that are not the model's
VERSION = 3
_READ = (2, VERSION)  # 2 has no grids; its first writers did not say what is of the model
_NAMED = re.compile(r"step-(\d{8,})", re.ASCII)
HASHED = 4 << 20  # bytes that share a hash
MOST_RANKS = 99999
_LARGEST_INDEX = 1 << 28  # bytes; 15 TB have one of a third


@dataclass(frozen=True)
class Grid:
    """The files of a tensor that is cut along dims, or sharded over some of the ranks that wrote.

    Attributes:
        splits: (dim, number of parts) of each dim that is cut, see `bmtrain_ms_base.layout`; none: the tensor is one part.
        files: for each part, in row-major order of its indices in `splits`, the ranks in whose files its shards are, in order.
    """

    splits: tuple[tuple[int, int], ...]
    files: tuple[tuple[int, ...], ...]

    @cached_property
    def places(self) -> dict[int, tuple[int, int, int]]:
        """Rank -> (number of its piece, as hashes are counted; part; shard of the part)."""
        found = [(rank, part, shard) for part, ranks in enumerate(self.files) for shard, rank in enumerate(ranks)]
        return {rank: (number, part, shard) for number, (rank, part, shard) in enumerate(found)}

    def layout(self, shape: tuple[int, ...], rank: int) -> Layout:
        """Where the piece in a rank's file lies in the whole tensor."""
        _, part, shard = self.places[rank]
        indices = np.unravel_index(part, [parts for _, parts in self.splits]) if self.splits else ()
        return Layout(shape, self._cut(map(int, indices)), shard, len(self.files[part]))

    def holders(self, shape: tuple[int, ...], box: Box) -> Iterator[int]:
        """Ranks in whose files elements of a box can be."""
        places = []
        for dim, parts in self.splits:
            ends = [part_of(shape[dim], index, parts) for index in range(parts)]
            places.append([i for i, (start, stop) in enumerate(ends) if start < box[dim].stop and stop > box[dim].start])
        for indices in itertools.product(*places):
            part = 0
            for index, (_, parts) in zip(indices, self.splits):
                part = part * parts + index
            ranks, layout = self.files[part], Layout(shape, self._cut(indices), 0, len(self.files[part]))
            yield from _reached(ranks, layout.length, Piece(shape, layout.splits, last=layout.local_size), box)

    def _cut(self, indices: Iterable[int]) -> tuple[Split, ...]:
        return tuple(Split(dim, index, parts) for (dim, parts), index in zip(self.splits, indices))


def _reached(ranks: Sequence[int], length: int, local: Piece, box: Box) -> Sequence[int]:
    """The ranks that have elements of a box, of those that have `length` elements of a local tensor each."""
    start, stop = local.reach(box)
    return ranks[start // length : (stop - 1) // length + 1] if start < stop else ()


@dataclass(frozen=True)
class IndexedTensor:
    """A tensor of a checkpoint.

    Attributes:
        dtype: of MindSpore.
        shape: of the whole tensor.
        shard: of a tensor whose pieces are, by rank and one behind the other, the flattened whole: elements of each, the last
            shorter or empty. None: there is a grid, or it is whole in rank 0's file (in every rank's, without shared storage).
        hashes: of the pieces, by rank, or as the grid counts them, or of the whole; for each 4 MiB a hexadecimal number.
        of_model: False: of an optimizer, or a gradient.
        copies: of a tensor that is whole, by rank, if ranks have other values; 1: all have the same.
        grid: where the pieces are, if not by rank and one behind the other.
    """

    dtype: Any
    shape: tuple[int, ...]
    shard: int | None
    hashes: Sequence[Sequence[str]]
    of_model: bool = True
    copies: int = 1
    grid: Grid | None = None

    @property
    def count(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, of one copy."""
        return self.count * self.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether a file has all of it."""
        return self.shard is None and self.grid is None

    def size_in(self, rank: int) -> int:
        """Elements in a rank's file; those of all copies, where it is whole."""
        if self.grid is not None:
            return self.grid.layout(self.shape, rank).owned_size if rank in self.grid.places else 0
        if self.shard is None:
            return self.count * self.copies
        return min(self.shard, max(0, self.count - rank * self.shard))

    def piece(self, rank: int) -> Piece:
        """What the file of a rank has, of one copy."""
        if self.grid is not None and rank in self.grid.places:
            layout = self.grid.layout(self.shape, rank)
            return Piece(self.shape, layout.splits, first=layout.owned[0], last=layout.owned[1])
        start = 0 if self.shard is None else min(rank * self.shard, self.count)
        return Piece(self.shape, first=start, last=start + self.size_in(rank) // self.copies)

    def holders(self, box: Box, ranks: int) -> Iterable[int]:
        """The ranks in whose files elements of a box can be, if there are `ranks`."""
        if self.grid is not None:
            return self.grid.holders(self.shape, box)
        shard = self.count if self.shard is None else self.shard
        return _reached(range(ranks), shard, Piece(self.shape, last=self.count), box)

    def hashes_in(self, rank: int) -> Sequence[str]:
        """The hashes of a rank's piece."""
        return self.hashes[self.grid.places[rank][0] if self.grid is not None else 0 if self.shard is None else rank]


@dataclass(frozen=True)
class Told:
    """What a rank says of what it wrote; JSON can hold what `vars` gives.

    Attributes:
        file: its number; None: none.
        hashes: name -> hashes of its piece.
        layouts: name -> `Layout.to_json`, of tensors whose shards are not, by number of the file, all that there is.
    """

    file: int | None
    hashes: Mapping[str, Sequence[str]]
    layouts: Mapping[str, Any]


def odd_layouts(layouts: Mapping[str, Layout | None], file: int, files: int) -> dict[str, Any]:
    """`Told.layouts` of file number `file` of so many."""
    return {
        name: layout.to_json()
        for name, layout in layouts.items()
        if layout is not None and (layout.splits or (layout.index, layout.ranks) != (file, files))
    }


def by_file(everybody: Iterable[Told]) -> dict[int, Told]:
    """Who tells of each file; where several hosts have one of a number, the first of them."""
    told = {x.file: x for x in reversed(list(everybody)) if x.file is not None}
    return dict(sorted(told.items()))


def indexed(
    name: str, layout: Layout | None, dtype: Any, shape: tuple[int, ...], told: Mapping[int, Told], of_model: bool, copies: int = 1
) -> IndexedTensor:
    """A tensor as the ranks say they have written it.

    Args:
        layout: of any rank; None: whole on every rank.
        told: see `by_file`.

    Raises:
        CheckpointError: nobody has written a part of it.
    """
    if layout is None:
        return IndexedTensor(dtype, shape, None, [told[0].hashes[name]], of_model, copies)
    if not any(name in x.layouts for x in told.values()):
        return IndexedTensor(dtype, shape, max(1, layout.length), [x.hashes[name] for x in told.values()], of_model)
    files: dict[tuple[tuple[int, ...], int], int] = {}
    cuts: set[tuple[Any, int]] = set()
    for file, x in told.items():
        if name not in x.hashes:  # of a rank that has nothing of it
            continue
        cut = Layout.from_json(x.layouts[name]) if name in x.layouts else Layout(shape, (), file, len(told))
        files.setdefault((tuple(split.index for split in cut.splits), cut.index), file)
        cuts.add((tuple((split.dim, split.parts) for split in cut.splits), cut.ranks))
    if len(cuts) > 1:
        raise CheckpointError(f"tensor {name} is not cut in the same way on all ranks: {sorted(cuts)}")
    splits, shards = cuts.pop()
    parts = list(np.ndindex(*(count for _, count in splits)))
    missing = next(((part, i) for part in parts for i in range(shards) if (part, i) not in files), None)
    if missing is not None:
        raise CheckpointError(f"no rank has written shard {missing[1]} of part {missing[0]} of tensor {name}, cut as {splits}")
    grid = Grid(splits, tuple(tuple(files[part, i] for i in range(shards)) for part in parts))
    return IndexedTensor(dtype, shape, None, [told[file].hashes[name] for file in grid.places], of_model, grid=grid)


@dataclass(frozen=True)
class Index:
    """A checkpoint's `index.json`: its tensors, and where they are.

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
                **({"shard": t.shard} if t.grid is None else {"splits": t.grid.splits, "files": t.grid.files}),
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
    """What the file with a rank's tensors is called."""
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
    _expect(version <= VERSION, f"it has format version {version}, this bmtrain_ms reads up to {VERSION}; upgrade bmtrain_ms")
    _expect(version in _READ, f"it has format version {version}, which no bmtrain_ms wrote as a folder")
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
    grid = _grid(name, entry, len(shape), ranks) if shard is None and "splits" in entry else None
    copies: Any = entry.get("copies", 1)
    if not (is_count(copies) and 1 <= copies <= MOST_RANKS and (copies == 1 or (shard is None and grid is None))):
        raise CheckpointError(f"tensor {name} has the impossible number of copies {copies!r}")
    made = IndexedTensor(DTYPES[dtype], tuple(shape), shard, (), copies=copies, grid=grid)
    _expect(made.count * copies * made.itemsize < LARGEST, f"tensor {name} of shape {shape} is too large to exist")
    _expect(shard is None or shard * ranks >= made.count, f"tensor {name} has pieces for fewer elements than its shape")
    owners = list(grid.places) if grid else [0] if shard is None else range(ranks)
    texts = isinstance(hashes, list) and len(hashes) == len(owners) and all(isinstance(h, list) for h in hashes)
    _expect(texts and all(isinstance(x, str) for h in hashes for x in h), f"tensor {name} has no hashes for {len(owners)} pieces")
    for rank, h in zip(owners, hashes):
        wanted = -(-made.size_in(rank) * made.itemsize // HASHED)
        _expect(len(h) == wanted, f"tensor {name} has {len(h)} hashes of rank {rank}'s piece, which needs {wanted}")
    of_model = entry.get("of_model", not name.startswith(STATE_PREFIXES))  # the first of version 2 did not say
    _expect(isinstance(of_model, bool), f"tensor {name} may be of the model or not: {of_model!r}")
    return replace(made, hashes=hashes, of_model=of_model)


def _grid(name: str, entry: dict[str, Any], dims: int, ranks: int) -> Grid:
    splits, files = _fields(entry, "splits", "files")
    pairs = isinstance(splits, list) and all(isinstance(x, list) and len(x) == 2 and all(map(is_count, x)) for x in splits)
    _expect(pairs and all(1 <= parts <= MOST_RANKS for _, parts in splits), f"tensor {name} has impossible splits")
    cut = [dim for dim, _ in splits]
    _expect(len(set(cut)) == len(cut) and all(dim < dims for dim in cut), f"tensor {name} is split along dims {cut} of {dims}")
    parts = math.prod(parts for _, parts in splits)
    lists = isinstance(files, list) and len(files) == parts and all(isinstance(x, list) and x for x in files)
    _expect(lists, f"tensor {name} does not say which files have its {parts} parts")
    owners = [rank for x in files for rank in x]
    possible = all(is_count(rank) and rank < ranks for rank in owners) and len(set(owners)) == len(owners)
    _expect(possible, f"tensor {name} is said to be in impossible files")
    return Grid(tuple((dim, parts) for dim, parts in splits), tuple(map(tuple, files)))


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
