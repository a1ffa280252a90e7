"""Rows of files, and the texts in them; what is wrong with a row is found here, with its place."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, Iterator, Sequence, cast

from .extras import needed
from .sources import Piece, SourceError

PROBLEMS = {
    "broken": "it is no row of its kind of file",
    "missing": "it lacks a key",
    "not-text": "what it has is no text",
    "invalid": "its text is not UTF-8",
    "empty": "there is nothing in it",
    "long": "it does not fit into a row",
}
_READ = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")  # elements of an array; matches nothing too


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used.

    `kind`: one of `PROBLEMS`.  `why`: what it is, in words.
    """

    kind: str
    why: str


Texts = list[list[str]]  # for each key the texts of a document: one, or one for each sentence


def documents(piece: Piece, keys: Sequence[str]) -> Iterator[tuple[str, Texts | Problem]]:
    """(where it is, its texts or what is wrong with it) of each row of a piece, in order.

    Raises:
        SourceError: the file is not what its name says, or damaged.
    """
    for place, row in values(piece, keys):
        yield place, row if isinstance(row, Problem) else _texts(row, keys)


def values(piece: Piece, keys: Sequence[str], absent_ok: bool = False) -> Iterator[tuple[str, list[Any] | Problem]]:
    """(where it is, its values or what is wrong with it) of each row of a piece; what it lacks is `MISSING`.

    Args:
        piece: of a file.
        keys: which columns.
        absent_ok: a table may lack some of them.

    Raises:
        SourceError: the file is not what its name says, or damaged.
    """
    kind = piece.source.kind
    if kind in ("parquet", "arrow"):
        from . import tables

        yield from tables.rows(piece, keys, MISSING if absent_ok else None)
        return
    with _opened(piece) as file:
        try:
            if kind in ("csv", "tsv"):
                yield from _table(piece, file, keys, absent_ok)
            elif kind == "json" and piece.stop < 0 and _begins_array(file):
                yield from _array(piece, file, keys)
            else:
                for place, line in _lines(piece, file):
                    yield place, [line] if kind == "txt" else _parsed(line, keys)
        except (EOFError, OSError, _zstd_error()) as error:
            raise SourceError(f"{piece.source.path} is damaged, or not all of it is there: {error}") from error


MISSING = object()


def _texts(row: list[Any], keys: Sequence[str]) -> Texts | Problem:
    found: Texts = []
    for key, value in zip(keys, row):
        if value is MISSING or value is None:
            return Problem("missing", f"no {key}" if value is MISSING else f"{key} is null")
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return Problem("not-text", f"{key} is {json.dumps(value, default=str, ensure_ascii=True)[:60]}")
        for text in texts:
            if not text.isascii() and not _is_utf8(text):
                return Problem("invalid", f"{key} is not UTF-8")
        if not any(texts):
            return Problem("empty", f"{key} is empty")
        found.append(texts)
    return found


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:  # halves of pairs of UTF-16, and bytes that were none
        return False


def _parsed(line: str | bytes, keys: Sequence[str]) -> list[Any] | Problem:
    if not line.strip():
        return Problem("empty", "the line is blank")
    try:
        return _picked(json.loads(line), keys)
    except UnicodeDecodeError as error:
        return Problem("invalid", f"byte {error.start} of the line is {error.object[error.start]:#04x}")
    except (ValueError, RecursionError) as error:
        return Problem("broken", f"no JSON: {error}")


def _picked(row: Any, keys: Sequence[str]) -> list[Any] | Problem:
    if not isinstance(row, dict):
        return Problem("broken", f"a row is an object of JSON, not {json.dumps(row)[:60]}")
    return [row.get(key, MISSING) for key in keys]


def _lines(piece: Piece, file: BinaryIO) -> Iterator[tuple[str, str | bytes]]:
    """The lines whose first byte lies in the piece; text of a file of lines is decoded, whatever it is."""
    text = piece.source.kind == "txt"
    place = 0
    if piece.start:
        file.seek(piece.start - 1)
        place = piece.start - 1 + len(file.readline())
    for number, line in enumerate(iter(file.readline, b""), 1):
        if 0 <= piece.stop <= place:
            return
        where = f"line {number}" if piece.start == 0 else f"the line at byte {place}"
        if place == 0 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
            place += len(codecs.BOM_UTF8)
        yield where, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape") if text else line
        place += len(line)


def _table(piece: Piece, file: BinaryIO, keys: Sequence[str], absent_ok: bool) -> Iterator[tuple[str, list[Any] | Problem]]:
    csv.field_size_limit(1 << 30)
    with _decoded(file) as text:
        reader = csv.reader(text, "excel-tab" if piece.source.kind == "tsv" else "excel", strict=True)
        try:
            header = next(reader, [])
            absent = [key for key in keys if key not in header]
            if absent and not absent_ok:
                raise SourceError(f"{piece.source.path} has no column {', '.join(absent)}; it has {', '.join(header)[:200]}")
            columns = [header.index(key) if key in header else len(header) for key in keys]
            for row in reader:
                if len(row) > len(header):
                    yield f"line {reader.line_num}", Problem("broken", f"{len(row)} fields, where there are {len(header)} columns")
                else:
                    yield f"line {reader.line_num}", [row[i] if i < len(row) else MISSING for i in columns]
        except csv.Error as error:
            raise SourceError(f"{piece.source.path}, line {reader.line_num}, is no {piece.source.kind}: {error}") from error


def _decoded(file: BinaryIO) -> io.TextIOWrapper:
    """A file's text, to be closed; what is not UTF-8 in it are characters that no text has."""
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")


def _begins_array(file: BinaryIO) -> bool:
    peeked = cast(io.BufferedReader, file).peek(1 << 12)
    return peeked.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _array(piece: Piece, file: BinaryIO, keys: Sequence[str]) -> Iterator[tuple[str, list[Any] | Problem]]:
    """The elements of one array of JSON, without ever holding all of it."""
    with _decoded(file) as text:
        decoder, number, wanted, ended = json.JSONDecoder(), 0, _READ, False
        held, place = text.read(_READ).lstrip()[1:], 0
        while True:
            place = cast(Any, _BETWEEN.match(held, place)).end()
            if held.startswith("]", place):
                return
            try:
                row, end = decoder.raw_decode(held, place)
                if end == len(held) and not ended:  # a number may go on
                    raise ValueError
            except (ValueError, RecursionError) as error:
                if ended:
                    raise SourceError(f"{piece.source.path}, element {number + 1}, is no JSON: {error}") from error
                more = text.read(wanted)  # twice as much each time, or a long element would be parsed too often
                held, place, wanted, ended = held[place:] + more, 0, 2 * wanted, not more
                continue
            number, place, wanted = number + 1, end, _READ
            yield f"element {number}", _picked(row, keys)


def _opened(piece: Piece) -> BinaryIO:
    path = piece.source.path
    if piece.source.packed == "gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if piece.source.packed == "zst":
        return cast(BinaryIO, io.BufferedReader(_Zst(path), _READ))
    return open(path, "rb")


def _zstd_error() -> type[BaseException]:
    try:
        import zstandard

        return zstandard.ZstdError
    except ImportError:
        return EOFError


class _Zst(io.RawIOBase):
    """The content of a file in zstd; unlike the library's own reader it tells a file that was cut."""

    def __init__(self, path: str):
        self._zstd = needed("zstandard", path)
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close
        self._frame: Any = None
        self._left, self._ready = b"", b""

    def readable(self) -> bool:
        """Whether it can be read from: always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill some of a buffer; 0 at the end."""
        while not self._ready:
            data = self._left or self._file.read(1 << 15)
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ended before its end was reached")
                return 0
            self._frame = self._frame or self._zstd.ZstdDecompressor().decompressobj()
            self._ready, self._left = self._frame.decompress(data), b""
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        super().close()
