"""Parquet and Arrow files: their pieces and rows, by pyarrow."""

from __future__ import annotations

from typing import Any, Iterator, Sequence

from .extras import needed
from .sources import Piece, Source, SourceError

_ROWS = 64  # at a time: a row may be a book


def pieces(source: Source, columns: Sequence[str], size: int) -> Iterator[Piece]:
    """The pieces of a Parquet or Arrow file, of at least `size` bytes where its parts are smaller.

    Raises:
        SourceError: it has not all of the columns, or is damaged.
    """
    with _Table(source) as table:
        absent = [name for name in columns if name not in table.names]
        if absent:
            raise SourceError(f"{source.path} has no column {', '.join(absent)}; it has {', '.join(table.names)}")
        start = held = 0
        for part, part_size in enumerate(table.sizes):
            held += part_size
            if held >= size or part + 1 == len(table.sizes):
                yield Piece(source, start, part + 1, held)
                start, held = part + 1, 0


def rows(piece: Piece, columns: Sequence[str], absent: Any = None) -> Iterator[tuple[str, list[Any]]]:
    """(where it is, values of the columns) of each row of a piece; a column that the file lacks is `absent`.

    Raises:
        SourceError: the file is damaged.
    """
    with _Table(piece.source) as table:
        number = table.first_row(piece.start)
        there = [name for name in columns if name in table.names]
        for batch in table.batches(piece.start, piece.stop, there):
            found = {name: _values(batch.column(batch.schema.get_field_index(name))) for name in there}
            values = [found.get(name, [absent] * batch.num_rows) for name in columns]
            for row in zip(*values):
                number += 1
                yield f"row {number}", list(row)


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # one of them; the others are good
        return [_value(x) for x in column]


def _value(x: Any) -> Any:
    try:
        return x.as_py()
    except UnicodeDecodeError:
        return x.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


class _Table:
    """A file of either kind, as parts of batches."""

    def __init__(self, source: Source):
        self._source = source
        self._arrow = needed("pyarrow", f"{source.path} (a {source.kind} file)")

    def __enter__(self) -> _Table:
        try:
            if self._source.kind == "parquet":
                self._open_parquet()
            else:
                self._open_arrow()
        except (self._arrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        return self

    def _open_parquet(self) -> None:
        self._file = needed("pyarrow.parquet", "parquet").ParquetFile(self._source.path)
        self.names = self._file.schema_arrow.names
        groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        self.sizes, self._counts = [group.total_byte_size for group in groups], [group.num_rows for group in groups]

    def _open_arrow(self) -> None:
        ipc = needed("pyarrow.ipc", "arrow")
        self._file = self._arrow.memory_map(self._source.path)
        try:
            self._reader = ipc.open_file(self._file)
            count = self._reader.num_record_batches
            self.sizes, self._counts = [self._source.size // max(count, 1)] * count, None
        except self._arrow.ArrowInvalid:  # the format without a table of contents, as `datasets` writes it
            self._file.seek(0)
            self._reader = ipc.open_stream(self._file)
            self.sizes, self._counts = [self._source.size], None
        self.names = self._reader.schema.names

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def first_row(self, part: int) -> int:
        """How many rows are in front of a part."""
        if self._counts is not None:
            return sum(self._counts[:part])
        return 0 if part == 0 else sum(self._reader.get_batch(i).num_rows for i in range(part))

    def batches(self, start: int, stop: int, columns: list[str]) -> Iterator[Any]:
        """The batches of parts from `start` to `stop`."""
        try:
            if self._source.kind == "parquet":
                yield from self._file.iter_batches(_ROWS, list(range(start, stop)), columns)
                return
            seekable = hasattr(self._reader, "get_batch")
            whole = (self._reader.get_batch(i) for i in range(start, stop)) if seekable else self._reader
            for batch in whole:
                yield from (batch.slice(row, _ROWS) for row in range(0, batch.num_rows, _ROWS))
        except (self._arrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> SourceError:
        return SourceError(f"{self._source.path} cannot be read as {self._source.kind}: {str(error).splitlines()[0]}")
