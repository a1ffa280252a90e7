"""What a run is trained on, made of text before it begins: its tokenizer, and files of tokens."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

from .extras import DataError
from .instructions import OUTPUTS
from .new_tokenizer import train_folder
from .prepare import PrepareOptions, Progress, prepare
from .sources import find_sources
from .tokenizing import load_tokenizer


@dataclass(frozen=True)
class RunText:
    """Text of a run.

    `text`: files, folders and names on a hub.  `key`: the column of it, or, of conversations, their `handler`.  `tokenizer`: folder
    or file; None: one with `vocab_size` tokens is trained.  `length`: of a row of conversations.
    """

    text: Sequence[str]
    key: str
    handler: str | None
    template: str | None
    tokenizer: str | None
    vocab_size: int | None
    length: int
    workers: int


def run_data(out: Path, what: RunText, say: Callable[[str], None], report: Callable[[Progress], None]) -> tuple[str, str]:
    """Make of text what is not there yet, in OUT/tokenizer and OUT/data; what an interrupted run has done is not done again.

    Returns:
        The tokenizer's folder, and the prefix of the files of tokens.

    Raises:
        DataError: it cannot be made, or what is there was made of other text or by another tokenizer.
    """
    tokenizer = what.tokenizer or str(_trained(out / "tokenizer", what, say))
    prefix = out / "data" / "tokens"
    names = [f"{prefix}_{output}_document" for output in (OUTPUTS if what.handler else (what.key,))]
    if all(os.path.exists(name + end) for name in names for end in (".idx", ".bin", ".json")):
        _compare(Path(names[0] + ".json"), what, tokenizer)
        return tokenizer, str(prefix) if what.handler else names[0]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    kind = {"kind": what.handler, "keys": {}, "template": what.template, "length": what.length, "pack": True}
    made = prepare(
        PrepareOptions(
            inputs=what.text,
            prefix=str(prefix),
            tokenizer={"path": tokenizer},
            keys=[what.key],
            instructions=kind if what.handler else None,
            append_eod=what.handler is None,
            workers=what.workers,
            overwrite=True,  # a pair without its neighbours
        ),
        report,
    )
    for path in made.left_out:
        say(f"left out, as it is of no kind that can be read: {path}")
    say(f"{made.documents:,} documents, {made.tokens[0]:,} tokens in {prefix.parent}")
    return tokenizer, str(prefix) if what.handler else made.names[0]


def _trained(folder: Path, what: RunText, say: Callable[[str], None]) -> Path:
    """The run's own tokenizer."""
    wanted = {"text": _described(what.text), "vocab_size": what.vocab_size}
    note = folder / "trained_on.json"
    if (folder / "tokenizer.json").exists():
        if not note.exists() or json.loads(note.read_text()) != wanted:
            raise DataError(f"{folder} was trained on other text, or with another number of tokens: choose another `out`")
        return folder
    say(f"training a tokenizer with {what.vocab_size} tokens")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(wanted))
    return train_folder(what.text, what.vocab_size or 0, folder, _columns(what))


def _columns(what: RunText) -> list[str]:
    if what.handler is None:
        return [what.key]
    return {"alpaca": ["instruction", "input", "output"], "sharegpt": ["conversations"], "openai": ["messages"]}[what.handler]


def _described(inputs: Sequence[str]) -> list[Any]:
    return [[os.path.abspath(source.path), source.size] for source in find_sources(inputs)[0]]


def _compare(known: Path, what: RunText, tokenizer: str) -> None:
    made = json.loads(known.read_text())
    sources = [[os.path.abspath(path), size] for path, _, _, size in made["sources"]]
    if sources != _described(what.text):
        raise DataError(f"{known.parent} was made of other text, or that has changed since: choose another `out`, or delete it")
    if made["tokenizer"]["digest"] != load_tokenizer(tokenizer).digest:
        raise DataError(f"{known.parent} was made by another tokenizer than {tokenizer}: choose another `out`, or delete it")
