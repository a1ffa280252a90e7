"""What is wrong with a folder of Hugging Face's, and how it is said: a table, the same on every rank."""

from __future__ import annotations

from typing import NamedTuple, Sequence

from ...comm import SharedError
from ...files.errors import CheckpointError, printable

_MOST = 30  # rows that are shown


class PretrainedError(CheckpointError):
    """A pretrained model cannot be read or written; raised on every rank alike. Its lines are printable."""

    def __init__(self, message: str):
        SharedError.__init__(self, "\n".join(map(printable, message.split("\n"))))


class Difference(NamedTuple):
    """A tensor that is not as the model needs it: `what` is missing, unexpected, shape or type."""

    what: str
    name: str
    there: str
    here: str

    @property
    def _text(self) -> str:
        if self.what == "missing":
            return f"needed: {self.here}"
        return self.there if self.what == "unexpected" else f"{self.there} in the files, {self.here} here"


def table(path: str, differences: Sequence[Difference], advice: Sequence[str] = ()) -> str:
    """The text of an error: a line for each difference, in columns, and what to do."""
    shown = sorted(differences, key=lambda row: ("shape", "type", "missing", "unexpected").index(row.what))[:_MOST]
    widths = [max(len(printable(row[column])) for row in shown) for column in (0, 1)]
    lines = [f"  {row.what:{widths[0]}}  {printable(row.name):{widths[1]}}  {row._text}" for row in shown]
    if len(differences) > _MOST:
        lines.append(f"  ... and {len(differences) - _MOST} more")
    count = f"{len(differences)} difference{'s' * (len(differences) > 1)}"
    return "\n".join([f"{path} does not fit the model: {count}", *lines, *advice])
