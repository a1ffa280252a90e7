"""What goes wrong with data, and libraries that only the data side needs."""

from __future__ import annotations

import importlib
from typing import Any


class DataError(ValueError):
    """Something about data that whoever gave it can put right; commands say it in one line."""


class MissingLibraryError(DataError, ImportError):
    """A library of the extra `data` that is not installed."""


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
