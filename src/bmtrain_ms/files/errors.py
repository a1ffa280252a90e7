"""What can go wrong with a checkpoint, and how it is said."""

from __future__ import annotations

from ..comm import Engine, SharedError, agree


def printable(text: str) -> str:
    """A text with escapes for what would act on a terminal (control characters, direction marks, line ends) instead of being shown.

    Names in a file are somebody else's text: everything that shows one goes through this.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class CheckpointError(SharedError):
    """A checkpoint cannot be written or read; raised on every rank alike. Its text is one printable line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def agree_or_fail(engine: Engine, error: BaseException | None, what: str) -> None:
    """Raise CheckpointError on all ranks if one has an error."""
    agree(engine, error, what, CheckpointError)
