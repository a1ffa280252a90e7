"""What a run is trained on, made of text before it begins: its tokenizer, and files of tokens."""

from __future__ import annotations

import functools
import json
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import xxhash

from .chat import TEMPLATES, load_template
from .extras import DataError, read_note
from .instructions import OUTPUTS
from .new_tokenizer import train_folder
from .prepare import Prepared, PrepareOptions, Progress, prepare
from .sources import find_sources
from .tokenizing import load_tokenizer, read_config


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

    Who calls it has OUT to itself.

    Returns:
        The tokenizer's folder, and the prefix of the files of tokens.

    Raises:
        DataError: it cannot be made, or what is there was made of other text, otherwise, or by another tokenizer.
    """
    asked = _asked(what)
    tokenizer = what.tokenizer or str(_trained(out / "tokenizer", what, asked, say))
    folder = out / "data"
    note, prefix = folder / "made_of.json", str(folder / "tokens")
    names = [f"{prefix}_{output}_document" for output in (OUTPUTS if what.handler else (what.key,))]
    there = all(os.path.exists(name + end) for name in names for end in (".idx", ".bin", ".json"))
    how = {"data.template": _template(what, tokenizer), "data.length": what.length if what.handler else None}
    wanted = {**asked, **how, "tokenizer": load_tokenizer(tokenizer).digest}
    if note.exists():
        _compare(note, wanted, say)
    elif there:  # of an earlier release, or of a run that was killed at this very moment
        _compare(Path(names[0] + ".json"), wanted, say)
    if there:
        for name in names:
            read_note(Path(name + ".json"), operator.itemgetter("vocab_size", "tokenizer"))  # which who opens it looks at
        return tokenizer, prefix if what.handler else names[0]
    folder.mkdir(parents=True, exist_ok=True)
    known = _with_digests(wanted)  # before it is read: what changes meanwhile is noticed the next time
    made = _prepared(prefix, what, tokenizer, report)
    note.write_text(json.dumps(known), encoding="utf-8")
    for path in made.left_out:
        say(f"left out, as it is of no kind that can be read: {path}")
    say(f"{made.documents:,} documents, {made.tokens[0]:,} tokens in {folder}")
    return tokenizer, prefix if what.handler else made.names[0]


def _prepared(prefix: str, what: RunText, tokenizer: str, report: Callable[[Progress], None]) -> Prepared:
    kind = {"kind": what.handler, "keys": {}, "template": what.template, "length": what.length, "pack": True}
    return prepare(
        PrepareOptions(
            inputs=what.text,
            prefix=prefix,
            tokenizer={"path": tokenizer},
            keys=[what.key],
            instructions=kind if what.handler else None,
            append_eod=what.handler is None,
            workers=what.workers,
            overwrite=True,  # a pair without its neighbours
        ),
        report,
    )


def _trained(folder: Path, what: RunText, asked: dict[str, Any], say: Callable[[str], None]) -> Path:
    """The run's own tokenizer."""
    wanted, note = {**asked, "tokenizer.train": what.vocab_size}, folder / "trained_on.json"
    if (folder / "tokenizer.json").exists():
        _compare(note, wanted, say)
        return folder
    say(f"training a tokenizer with {what.vocab_size} tokens")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(_with_digests(wanted)), encoding="utf-8")
    return train_folder(what.text, what.vocab_size or 0, folder, _columns(what))


def _columns(what: RunText) -> list[str]:
    if what.handler is None:
        return [what.key]
    return {"alpaca": ["instruction", "input", "output"], "sharegpt": ["conversations"], "openai": ["messages"]}[what.handler]


def _asked(what: RunText) -> dict[str, Any]:
    """What both tokenizer and tokens are made of, by the names of the settings; of each file its path, size and time of change."""
    files = [[os.path.abspath(source.path), source.size] for source in find_sources(what.text)[0]]
    key = None if what.handler else what.key
    return {"data.text": [[*file, os.stat(file[0]).st_mtime_ns] for file in files], "data.key": key, "data.handler": what.handler}


def _template(what: RunText, tokenizer: str) -> str | None:
    """What tells whether conversations would become the same text: a digest of their chat template, chosen or the tokenizer's."""
    if what.handler is None:
        return None
    folder = tokenizer if os.path.isdir(tokenizer) else os.path.dirname(tokenizer)
    advice = f"data.template takes {', '.join(TEMPLATES)}, or a file"
    return load_template(what.template, folder, read_config(folder), advice).digest


@functools.cache
def _digest(path: str, mtime: int) -> str:
    """A hash of what a file holds; `mtime` says which version of it is known already."""
    found = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def _with_digests(wanted: dict[str, Any]) -> dict[str, Any]:
    """As it is noted: each file of the text with a digest behind it."""
    return {**wanted, "data.text": [[*file, _digest(file[0], file[2])] for file in wanted["data.text"]]}


def _compare(note: Path, wanted: dict[str, Any], say: Callable[[str], None]) -> None:
    """Refuse what was made of something else than is wanted now.

    Raises:
        DataError: it was, or the note is damaged.
    """

    def others(noted: Any) -> list[str]:
        known = noted if "data.text" in noted else _of_earlier_release(noted)
        if known is not noted:
            say(
                f"{note} is of an earlier release, without digests: files of the same names and sizes are taken to be the same, "
                "and other settings of the data too"
            )
        same = {name: known[name] == value for name, value in wanted.items() if name in known or known is noted}
        before, now = known["data.text"], wanted["data.text"]
        same["data.text"] = len(before) == len(now) and all(map(_same_file, before, now))
        return [name for name in same if not same[name]]

    other = read_note(note, others)
    if other:
        raise DataError(
            f"{note.parent} was made with another {', '.join(other)} than now, or of files that have changed since: choose another "
            "`out`, or delete it"
        )


def _of_earlier_release(noted: Any) -> dict[str, Any]:
    """What a note of a tokenizer or of tokens says that has paths and sizes only."""
    if "sources" in noted:
        files = [[os.path.abspath(path), size] for path, _, _, size in noted["sources"]]
        return {"data.text": files, "tokenizer": noted["tokenizer"]["digest"]}
    return {"data.text": noted["text"], "tokenizer.train": noted["vocab_size"]}


def _same_file(noted: list[Any], now: list[Any]) -> bool:
    """Whether a file holds what it held, wherever it is; it is read only if it was moved or written since."""
    path, size, *more = noted
    if size != now[1]:
        return False
    if not more:  # of an earlier release
        return path == now[0]
    return [path, more[0]] == [now[0], now[2]] or more[1] == _digest(now[0], now[2])
