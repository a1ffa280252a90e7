"""What was given, in messages: one line, however long it was."""

from __future__ import annotations

from typing import Any

_END = 40  # characters of the end that are shown


def shown(value: Any, most: int = 200) -> str:
    """What was given, as Python writes it; of a long one the beginning and the end."""
    return shortened(repr(value), most)


def shortened(text: str, most: int = 200) -> str:
    """A text; of a long one the beginning and the end, with how many characters were left out."""
    left_out = len(text) - most
    return text if left_out <= 0 else f"{text[: most - _END]} ... {left_out:,} characters ... {text[-_END:]}"
