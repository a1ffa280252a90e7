"""What goes wrong with data, and libraries that only the data side needs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Callable, TypeVar

Taken = TypeVar("Taken")


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
