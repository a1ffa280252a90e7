"""The pieces that files of text are read in.

They depend on the files alone, never on how many workers there are, so neither does what is made of them.
"""

from __future__ import annotations

from typing import Iterator, Sequence

from . import tables
from .sources import Piece, Source, SourceError

_LEAST, _MOST, _PIECES = 8 << 20, 256 << 20, 2048  # bytes of a piece, and about how many there are to be


def cut(sources: Sequence[Source], columns: Sequence[str]) -> list[Piece]:
    """The pieces of all files, in order.

    Args:
        sources: the files.
        columns: that are wanted; files that say which they have must have them.

    Raises:
        SourceError: a file does not have them, or cannot be read.
    """
    size = min(max(sum(source.size for source in sources) // _PIECES, _LEAST), _MOST)
    return [piece for source in sources for piece in _pieces(source, columns, size)]


def _pieces(source: Source, columns: Sequence[str], size: int) -> Iterator[Piece]:
    if source.kind == "txt" and list(columns) != ["text"]:
        raise SourceError(f"{source.path}: lines of text have one column, text, not {', '.join(columns)}")
    if source.kind in ("parquet", "arrow"):
        yield from tables.pieces(source, columns, size)
    elif source.packed or source.kind in ("csv", "tsv") or _is_array(source):
        yield Piece(source, 0, -1, source.size)
    else:
        for start in range(0, source.size, size):
            yield Piece(source, start, min(start + size, source.size), min(size, source.size - start))


def _is_array(source: Source) -> bool:
    """Whether a file that is not compressed is one array of JSON, which cannot be cut at lines."""
    if source.kind != "json":
        return False
    with open(source.path, "rb") as file:
        return file.read(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
