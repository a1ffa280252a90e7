"""The note beside a pair of `.bin` and `.idx`, `NAME.json`: what `prepare` has made it of.

Megatron's usual layout has the text itself under that name. So a file is a note only if it begins as notes do: no other one, which
may be large, is read or replaced, and whoever has one is never told to delete it.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, Mapping

from .extras import DataError

ENDS = (".bin", ".idx", ".json")  # of what `prepare` makes
_BEGIN = re.compile(rb'\s*\{\s*("hash":\s*"[0-9a-f]{32}",\s*)?"documents":\s*\d+,\s*"tokens":\s*\d+,\s*"(vocab_size|key)":')
_KINDS: dict[str, type | tuple[type, ...]] = {
    "documents": int,
    "tokens": int,
    "vocab_size": (int, type(None)),
    "tokenizer": dict,
    "append_eod": bool,
    "key": str,
    "sources": list,
}
_OF_TOKENIZER: dict[str, type | tuple[type, ...]] = {"arguments": dict, "digest": str, "end": (int, type(None))}


def is_note(path: str) -> bool:
    """Whether a file begins as notes do; also if it is damaged behind that."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return _BEGIN.match(file.read(256)) is not None


def is_foreign(path: str) -> bool:
    """Whether there is something that is no note, and would be lost if one was written there."""
    return os.path.lexists(path) and not is_note(path) and not (os.path.isfile(path) and os.path.getsize(path) == 0)


def note_beside(name: str) -> dict[str, Any]:
    """What the note of a pair says: `vocab_size`, `tokenizer` ...; empty where there is none, as another program made the pair.

    Raises:
        DataError: it is damaged, or cannot be read.
    """
    path = f"{name}.json"
    try:
        if not is_note(path):
            return {}
        with open(path, encoding="utf-8") as file:
            note = json.load(file)
        _check(note, _KINDS)
        _check(note["tokenizer"], _OF_TOKENIZER)
        _check(note["tokenizer"]["arguments"], {"path": str})
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(
            f"{path}, the note of what {name} was made of, is damaged ({error}): make the pair anew, or rename the note to do "
            "without it"
        ) from error
    return note


def _check(found: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    for name, kind in kinds.items():
        if name not in found or not isinstance(found[name], kind):
            raise ValueError(f"{name} is {json.dumps(found.get(name))[:40]}")


def write_note(path: str, note: Mapping[str, Any]) -> None:
    """Write a note, and to disk; it gets its name together with the pair, see `indexed.put`."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(note, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
