"""Megatron's indexed files of tokens, `NAME.bin` and `NAME.idx`: the same bytes, checked when they are opened.

`.bin`: token ids, one sequence behind the other.  `.idx`, little-endian and not aligned: magic (9 bytes), version 1 (u64), code of
the ids' type (u8), number of sequences S (u64), number of documents and one (u64), lengths (int32[S]), offsets in `.bin` in bytes
(int64[S]), ends of documents in sequences, from 0 (int64). A document is mostly one sequence; Megatron samples sequences.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import xxhash

from .extras import DataError
from .notes import note_beside

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_CHUNK = 1 << 20  # entries of an index that are looked at, or written, at a time
_BLOCKS, _BLOCK = 256, 1024  # of tokens, which a digest is made of

Chunks = Callable[[], Iterable[np.ndarray]]  # the same arrays each time it is called


class IndexedError(DataError):
    """A pair of `.bin` and `.idx` that is none, is damaged, or cannot hold what it is given."""


def token_type(vocab_size: int) -> np.dtype:
    """The type of token ids that Megatron writes for a vocabulary: uint16 below 65,500 tokens, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def stem(path: str | Path) -> str:
    """A pair's name, as others' tools want it: without `.bin` or `.idx`."""
    name = os.path.expanduser(os.fspath(path))
    return name[:-4] if name.endswith((".bin", ".idx")) else name


class IndexedFile:
    """A pair of `.bin` and `.idx`, opened and checked. Memory is mapped for the index only; tokens are read when asked for.

    Args:
        path: the pair's name, with or without `.bin` or `.idx`.

    Attributes:
        name: the pair's name, without an ending.
        dtype: of the token ids.
        lengths: tokens of each sequence, int32.
        offsets: where each begins in `.bin`, in bytes, int64.
        ends: document d is the sequences from `ends[d]` to `ends[d + 1]`, int64.

    Raises:
        IndexedError: it is not one, or its two files do not fit together.
        OSError: a file cannot be read.
    """

    def __init__(self, path: str | Path):
        self.name = stem(path)
        for end in (".idx", ".bin"):
            if not os.path.isfile(self.name + end):
                raise IndexedError(_missing(self.name, end))
        self._size = os.path.getsize(self.name + ".idx")
        with open(self.name + ".idx", "rb") as file:
            self.dtype, sequences, ends = self._read_header(file.read(_HEADER.size))
        index = np.memmap(self.name + ".idx", np.uint8, "r")

        def part(kind: str, start: int, count: int) -> np.ndarray:
            return np.frombuffer(index, kind, count, start) if count else np.zeros(0, kind)

        self.lengths = part("<i4", _HEADER.size, sequences)
        self.offsets = part("<i8", _HEADER.size + 4 * sequences, sequences)
        self.ends = part("<i8", _HEADER.size + 12 * sequences, ends)
        self._file = os.open(self.name + ".bin", os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _read_header(self, header: bytes) -> tuple[np.dtype, int, int]:
        if len(header) < _HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise self._wrong(
                "does not begin as Megatron's indexes do: it is another file, or an old format; prepare the text anew"
            )
        _, version, code, sequences, ends = _HEADER.unpack(header)
        if version != 1:
            raise self._wrong(f"is of version {version}; only 1 is known")
        if code in _FLOATS:
            raise self._wrong(f"says that tokens are {_FLOATS[code]}; token ids are whole numbers")
        if code not in _CODES:
            raise self._wrong(f"has the unknown type {code} of tokens")
        size = _HEADER.size + 12 * sequences + 8 * ends
        if self._size not in (size, size + sequences):  # what is behind are the modes of sequences in multimodal files
            raise self._wrong(
                f"has {self._size:,} bytes, where {sequences:,} sequences and {ends:,} ends of documents take {size:,}"
            )
        if ends == 0:
            raise self._wrong("has no ends of documents; there is one even for none")
        return np.dtype(_CODES[code]), sequences, ends

    def _check(self) -> None:
        """Everything that a reader relies on, so that nothing fails later; a second for some 100 M sequences."""
        place = 0
        for start in range(0, len(self.lengths), _CHUNK):
            lengths = self.lengths[start : start + _CHUNK].astype(np.int64)
            if len(lengths) and lengths.min() < 0:
                raise self._wrong(f"has a sequence of negative length, {start + int(lengths.argmin())}")
            expected = place + np.concatenate([[0], np.cumsum(lengths)]) * self.dtype.itemsize
            wrong = np.flatnonzero(self.offsets[start : start + _CHUNK] != expected[:-1])
            if len(wrong):
                raise self._wrong(f"has sequence {start + int(wrong[0])} at another offset than lengths say")
            place = int(expected[-1])
        size = os.fstat(self._file).st_size
        if size != place:
            less = "less" if size < place else "more"
            raise IndexedError(
                f"{self.name}.bin has {size:,} bytes, {less} than the {place:,} of its index: prepare or copy it anew"
            )
        if self.ends[0] != 0 or self.ends[-1] != len(self.lengths):
            raise self._wrong(f"has documents from {self.ends[0]} to {self.ends[-1]} of {len(self.lengths)} sequences")
        for start in range(0, len(self.ends), _CHUNK):
            if (np.diff(self.ends[start : start + _CHUNK + 1]) < 0).any():
                raise self._wrong("has a document that ends before it begins")

    def _wrong(self, what: str) -> IndexedError:
        return IndexedError(f"{self.name}.idx {what}")

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.ends) - 1

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return os.fstat(self._file).st_size // self.dtype.itemsize

    def read(self, sequence: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens of a sequence, or those from `start` to `stop` of them.

        Raises:
            IndexError: there is no such sequence, or it is shorter.
            IndexedError: the file has been cut since it was opened.
        """
        if not 0 <= sequence < len(self.lengths):
            raise IndexError(f"{self.name} has {len(self.lengths)} sequences; there is no {sequence}")
        length = int(self.lengths[sequence])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"sequence {sequence} of {self.name} has {length} tokens, not from {start} to {stop}")
        return self.span(int(self.offsets[sequence]) // self.dtype.itemsize + start, stop - start)

    def span(self, start: int, count: int) -> np.ndarray:
        """So many tokens from the `start`-th of the whole file, across sequences.

        Raises:
            IndexedError: the file has no such tokens, or has been cut since it was opened.
        """
        wanted = count * self.dtype.itemsize
        data = bytearray()
        while len(data) < wanted:  # a read may end early
            piece = os.pread(self._file, wanted - len(data), start * self.dtype.itemsize + len(data))
            if not piece:
                raise IndexedError(f"{self.name}.bin ends before token {start + count}: was it cut since it was opened?")
            data += piece
        return np.frombuffer(data, self.dtype)

    @functools.cached_property
    def prepared(self) -> dict[str, Any]:
        """What `bmtrain-ms prepare` has noted beside it: `vocab_size`, `tokenizer` ...; empty where another program made it.

        Raises:
            DataError: that is damaged.
        """
        return note_beside(self.name)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the content: all lengths and documents, the number of tokens, and blocks of them; a second for some GB.

        Files that differ in a few tokens only may have the same; `bmtrain-ms data verify` reads all tokens.
        """
        found = xxhash.xxh3_128(f"{self.dtype.str} {self.tokens} {len(self)} {self.documents}".encode())
        for array in (self.lengths, self.ends):
            for start in range(0, len(array), _CHUNK):
                found.update(array[start : start + _CHUNK].tobytes())
        block = min(self.tokens, _BLOCK)
        for i in range(_BLOCKS if self.tokens > block else 1):
            found.update(self.span((self.tokens - block) * i // max(_BLOCKS - 1, 1), block).tobytes())
        return found.hexdigest()

    @functools.cached_property
    def hash(self) -> str:
        """A hash of all tokens, as `prepare` notes it and `bmtrain-ms data verify` compares it: reads the whole file."""
        found = xxhash.xxh3_128()
        for start in range(0, self.tokens, _CHUNK):
            found.update(self.span(start, min(_CHUNK, self.tokens - start)).tobytes())
        return found.hexdigest()

    def close(self) -> None:
        """Let go of the file; nothing can be read any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()

    def __enter__(self) -> IndexedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _missing(name: str, end: str) -> str:
    near = sorted(p.name[:-4] for p in Path(name).parent.glob(Path(name).name.replace("[", "[[]") + "*.idx"))
    hint = f"; did you mean {' or '.join(near[:3])}?" if near and end == ".idx" else ""
    return f"there is no file {name}{end}{hint}"


def write_index(path: str | Path, dtype: np.dtype, lengths: Chunks, sequences: Chunks) -> None:
    """Write an `.idx` in several passes over what is given in pieces, so that memory does not grow with it.

    Args:
        path: of the file, which is written to disk before this returns.
        dtype: of the token ids.
        lengths: tokens of each sequence.
        sequences: how many of them each document has.
    """
    code = next(code for code, kind in _CODES.items() if np.dtype(kind) == np.dtype(dtype))
    total, documents = (sum(len(chunk) for chunk in chunks()) for chunks in (lengths, sequences))
    with open(path, "wb") as file:
        file.write(_HEADER.pack(MAGIC, 1, code, total, documents + 1))
        for chunk in lengths():
            file.write(np.asarray(chunk, "<i4").tobytes())
        for offsets in _running(lengths, np.dtype(dtype).itemsize):
            file.write(offsets[:-1].tobytes())
        file.write(np.zeros(1, "<i8").tobytes())
        for ends in _running(sequences, 1):
            file.write(ends[1:].tobytes())
        file.flush()
        os.fsync(file.fileno())


def _running(chunks: Chunks, factor: int) -> Iterator[np.ndarray]:
    """Sums of all that came before, and of all with each; int64, as sums of int32 would overflow."""
    place = 0
    for chunk in chunks():
        sums = place + np.concatenate([[0], np.cumsum(chunk, dtype=np.int64)]) * factor
        place = int(sums[-1])
        yield sums.astype("<i8")


def read_chunks(paths: Sequence[str | Path], dtype: str) -> Chunks:
    """The numbers in files, one behind the other, some at a time: what `write_index` takes."""

    def chunks() -> Iterator[np.ndarray]:
        for path in paths:
            with open(path, "rb") as file:
                while data := file.read(_CHUNK * np.dtype(dtype).itemsize):
                    yield np.frombuffer(data, dtype)

    return chunks


class IndexedWriter:
    """Writes a pair; under its name nothing is there before all of it is.

    Use as `with IndexedWriter(name, dtype) as out: out.add(ids)`; an exception in between leaves no file.

    Args:
        path: the pair's name, with or without an ending.
        dtype: of the token ids, see `token_type`.

    Raises:
        IndexedError: there is such a pair already, or ids cannot be of that type.
    """

    def __init__(self, path: str | Path, dtype: Any):
        self.name, self.dtype = stem(path), np.dtype(dtype).newbyteorder("<")
        if self.dtype not in [np.dtype(kind) for kind in _CODES.values()]:
            raise IndexedError(f"tokens cannot be kept as {self.dtype}: take uint16 or int32")
        for end in (".bin", ".idx"):
            if os.path.exists(self.name + end):
                raise IndexedError(f"{self.name}{end} is there already: delete it, or choose another name")
        self._parts = [f"{self.name}.{part}.partial" for part in ("bin", "lengths", "documents")]
        self._range = np.iinfo(self.dtype)
        self._files = [open(part, "wb") for part in self._parts]  # noqa: SIM115 - closed by __exit__
        self.sequences = 0

    def add(self, ids: Any, lengths: Sequence[int] | None = None) -> None:
        """Add a document of one sequence, or of several that have these lengths.

        Raises:
            IndexedError: an id that the type cannot hold, or lengths that are not those of the ids.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.dtype.kind not in "iu" or ids.min() < self._range.min or ids.max() > self._range.max):
            raise IndexedError(f"a document with ids of {ids.dtype} up to {ids.max()} does not fit into {self.dtype}: {self.name}")
        lengths = [len(ids)] if lengths is None else list(lengths)
        if sum(lengths) != len(ids):
            raise IndexedError(f"a document of {len(ids)} tokens cannot have sequences of {lengths}")
        for file, data in zip(self._files, (ids.astype(self.dtype), np.array(lengths, "<i4"), np.array([len(lengths)], "<i4"))):
            file.write(data.tobytes())
        self.sequences += len(lengths)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        try:
            if kind is None:
                finish(self.name, self._parts[1:2], self._parts[2:], self.dtype)
        finally:
            remove(*self._parts, f"{self.name}.idx.partial")


def remove(*paths: str) -> None:
    """Delete files, if they are there."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def finish(name: str, lengths: Sequence[str], documents: Sequence[str], dtype: np.dtype) -> None:
    """Make a pair of `NAME.bin.partial`, which is on disk, and what lies in files.

    Args:
        name: the pair's, without an ending; what is there already is replaced.
        lengths: files of int32, tokens of each sequence.
        documents: files of int32, sequences of each document.
        dtype: of the token ids.
    """
    complete(name, lengths, documents, dtype)
    put(name)


def complete(name: str, lengths: Sequence[str], documents: Sequence[str], dtype: np.dtype) -> None:
    """Write `NAME.idx.partial`, which belongs to `NAME.bin.partial`: all that may fail does so before `put`. See `finish`."""
    write_index(name + ".idx.partial", dtype, read_chunks(lengths, "<i4"), read_chunks(documents, "<i4"))


def put(name: str, note: bool = False) -> None:
    """Give what is complete, and on disk, its names: tokens first, and the index, without which they are no pair, last.

    Args:
        name: the pair's, without an ending; what is there already is replaced.
        note: there is a `NAME.json.partial`, too.
    """
    remove(name + ".idx")  # an old index must not stand beside new tokens
    for end in (".bin", *([".json"] if note else []), ".idx"):
        os.replace(f"{name}{end}.partial", name + end)
    sync_folder(Path(name).parent)


def join(paths: Sequence[str | Path], out: str | Path) -> str:
    """Write files one behind the other, and to disk; returns a hash of all bytes, as `verify` compares it."""
    found = xxhash.xxh3_128()
    with open(out, "wb") as file:
        for path in paths:
            with open(path, "rb") as piece:
                while data := piece.read(1 << 24):
                    file.write(data)
                    found.update(data)
        file.flush()
        os.fsync(file.fileno())
    return found.hexdigest()


def sync_folder(folder: Path) -> None:
    """Have the system write to disk which files a folder has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
