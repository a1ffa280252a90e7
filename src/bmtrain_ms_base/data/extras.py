"""What goes wrong with data, and libraries that only the data side needs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Callable, TypeVar

from ..memory import available_memory

Taken = TypeVar("Taken")

_ROW, _MORE = 40, 24  # bytes for each token of the row that is made, and of those that are there already
_LOOKED = 1 << 28  # bytes; below, nobody asks the system at each step
_SHORTER = "ask for a smaller length, or fewer rows of a step on each rank"


class DataError(ValueError):
    """Something about data that whoever gave it can put right; commands say it in one line."""


class MissingLibraryError(DataError, ImportError):
    """A library of the extra `data` that is not installed."""


def read_note(note: Path, take: Callable[[Any], Taken]) -> Taken:
    """What `take` finds in a file of JSON that this library has written beside what it made.

    Raises:
        DataError: it is not there or no JSON, or `take` does not find what it looks for.
    """
    try:
        return take(json.loads(note.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DataError(f"{note} is missing: delete {note.parent}, it is made again") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(f"{note} is damaged: delete {note.parent}, it is made again") from error


def refuse_large(size: int, what: str, advice: str) -> None:
    """Refuse it before the system lends more than it has, and kills who uses it.

    Args:
        size: bytes that are held at the same time.
        what: takes them, for the message.
        advice: what to do, for the message.

    Raises:
        DataError: memory has no room for so many.
    """
    free = available_memory()
    if free is not None and size > free:
        takes = f"takes {size / 2**30:,.0f} GiB of memory to make, and {free / 2**30:,.0f} GiB are free"
        raise DataError(f"{what} {takes}: {advice}")


def refuse_long(length: int, rows: int = 1) -> None:
    """Refuse so many rows of a length, see `refuse_large`."""
    size = (_ROW + _MORE * (rows - 1)) * length
    if size > _LOOKED:
        refuse_large(
            size, f"a row of {length:,} tokens" if rows == 1 else f"a part of a step, {rows:,} rows of {length:,} tokens,", _SHORTER
        )


def needed(module: str, what: str, extra: str = "data") -> Any:
    """Import a library of an extra.

    Args:
        module: its name.
        what: that needs it, for the message.
        extra: the extra.

    Raises:
        MissingLibraryError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        text = f"{what} needs {package}, which cannot be imported ({error}): pip install 'bmtrain-ms[{extra}]'"
        raise MissingLibraryError(text) from error
