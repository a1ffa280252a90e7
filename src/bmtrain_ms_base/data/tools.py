"""Looking at indexed files, checking them, and making new ones of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import xxhash

from .batch import IGNORED
from .indexed import IndexedError, IndexedFile, complete, put, remove, stem
from .instructions import OUTPUTS
from .notes import note_beside, write_note
from .pieces import PrepareError

_TOKENS = 1 << 22  # that are read at a time


def inspect(name: str, documents: int = 0) -> str:
    """What a pair of files holds, in words, and the ids of its first `documents` sequences.

    Raises:
        DataError: it is none, or it or its note is damaged.
    """
    with IndexedFile(name) as file:
        lengths = file.lengths
        lines = [
            f"{file.name}: {file.documents:,} documents, {len(file):,} sequences, {file.tokens:,} tokens of {file.dtype.name}",
            f"content {file.digest}",
        ]
        if len(lengths):
            middle = int(np.median(lengths))
            lines.append(f"tokens of a sequence: {lengths.min():,} to {lengths.max():,}, half have {middle:,} or more")
            lines.append(f"empty sequences: {int((lengths == 0).sum()):,}")
        known = file.prepared
        if known:
            ids = f"{known['vocab_size']:,} ids" if known["vocab_size"] else "no ids but masks or labels"
            lines.append(f"tokenizer {known['tokenizer']['arguments']['path']}, {ids}")
            lines.append(f"end of each document: {known['tokenizer']['end'] if known['append_eod'] else 'none'}")
        lines += [f"{i}: {' '.join(map(str, file.read(i).tolist()))}" for i in range(min(documents, len(file)))]
        return "\n".join(lines)


def verify(name: str, vocab_size: int | None = None) -> str:
    """Read all of a pair, and check that each id is one of the vocabulary, and all bytes those that were prepared.

    Returns what was found, in words.

    Args:
        name: of the pair.
        vocab_size: ids are below it; None: what the file beside it says, if there is one.

    Raises:
        DataError: it is none, or it or its note is damaged, or it has an id that is none.
    """
    known = note_beside(stem(name))
    limit = vocab_size if vocab_size is not None else known.get("vocab_size")
    with IndexedFile(name) as file:
        for kind, found in (("tokens", file.tokens), ("documents", file.documents)):
            if known.get(kind, found) != found:
                raise IndexedError(f"{file.name} has {found:,} {kind}, and was made with {known[kind]:,}: it is another one")
        largest, hashed = -1, xxhash.xxh3_128()
        ignored = file.name.endswith(f"_{OUTPUTS[2]}_document")
        for start in range(0, file.tokens, _TOKENS):
            ids = file.span(start, min(_TOKENS, file.tokens - start))
            hashed.update(ids.tobytes())
            if ignored:
                ids = np.where(ids == IGNORED, 0, ids)
            largest = max(largest, int(ids.max()))
            bad = np.flatnonzero((ids < 0) | (ids >= limit)) if limit is not None else np.flatnonzero(ids < 0)
            if len(bad):
                place = start + int(bad[0])
                sequence = int(np.searchsorted(file.offsets, place * file.dtype.itemsize, side="right")) - 1
                below = "no id" if limit is None else f"not below {limit:,}, the size of the vocabulary"
                raise IndexedError(f"{file.name} has {int(ids[bad[0]])} in sequence {sequence}, which is {below}")
        if known.get("hash", hashed.hexdigest()) != hashed.hexdigest():
            raise IndexedError(f"{file.name}.bin has other tokens than were prepared: it is damaged; prepare or copy it anew")
        checked = "its vocabulary is not known" if limit is None else f"all below {limit:,}"
        return f"{file.name} is whole: {file.documents:,} documents, {file.tokens:,} tokens, ids up to {largest:,}, {checked}"


def merge(names: Sequence[str], out: str) -> str:
    """Put pairs one behind the other, as Megatron's `merge_datasets.py` does; returns what was made, in words.

    Args:
        names: of pairs, in order; a folder stands for all pairs in it, by name.
        out: name of the new pair.

    Raises:
        IndexedError: pairs of different types, or of different tokenizers, or there is something of the new name.
    """
    _refuse_existing([out])
    names = [pair for name in names for pair in _pairs(name)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(IndexedFile(name)) for name in names]
        known = [file.prepared for file in files]
        for what, values in (
            ("types", [file.dtype.name for file in files]),
            ("tokenizers", [entry["tokenizer"]["digest"] for entry in known if entry]),
        ):
            if len(set(values)) > 1:
                raise IndexedError(f"pairs of different {what} cannot be merged: {', '.join(sorted(set(values)))}")
        same = {name: known[0][name] for name in ("key", "vocab_size", "tokenizer", "append_eod")} if all(known) else None
        if same is not None:
            same.update(sources=[source for entry in known for source in entry["sources"]], wrong={})
        made = _write(out, [(file, range(file.documents)) for file in files], same)
    return f"{stem(out)}: {made[0]:,} documents, {made[1]:,} tokens, of {len(names)} pairs"


def _pairs(name: str) -> list[str]:
    if not os.path.isdir(name):
        return [name]
    found = sorted(stem(path) for path in Path(name).glob("*.idx"))
    if not found:
        raise IndexedError(f"{name} has no pair of .bin and .idx in it")
    return [str(pair) for pair in found]


def split(name: str, out: str, parts: Sequence[float]) -> list[str]:
    """Divide a pair's documents, in order, in these proportions of tokens; returns what was made, in words.

    Args:
        name: of the pair.
        out: the new pairs are `OUT_0`, `OUT_1`, and so on.
        parts: their sizes, in any unit.

    Raises:
        IndexedError: a part gets no document, or there is something of that name.
    """
    if len(parts) < 2 or not all(part > 0 for part in parts):
        raise IndexedError(f"a pair is divided into two or more parts above 0, not {', '.join(f'{part:g}' for part in parts)}")
    with IndexedFile(name) as file:
        begins = np.append(file.offsets // file.dtype.itemsize, file.tokens)[file.ends]  # of documents, in tokens
        wanted = np.cumsum([0.0, *parts]) / sum(parts) * file.tokens
        cuts = np.searchsorted(begins, wanted).tolist()
        cuts[-1] = file.documents
        ranges = [range(start, stop) for start, stop in zip(cuts, cuts[1:])]
        if not all(ranges):
            raise IndexedError(f"{file.name} has {file.documents:,} documents, too few or too long to be divided like this")
        outs = [f"{out}_{i}" for i in range(len(parts))]
        _refuse_existing(outs)
        made = []
        for name, chosen in zip(outs, ranges):
            documents, tokens = _write(name, [(file, chosen)], file.prepared or None)
            made.append(f"{name}: {documents:,} documents, {tokens:,} tokens")
        return made


def _refuse_existing(outs: Sequence[str]) -> None:
    """Before anything is written: a result is a pair, and the note beside it."""
    for name in map(stem, outs):
        if any(os.path.lexists(name + end) for end in (".bin", ".idx")):
            raise IndexedError(f"there is a pair {name} already: delete it, or choose another name")
        if os.path.lexists(name + ".json"):  # which may be somebody's text
            raise IndexedError(f"there is a file {name}.json already, where the pair's note would be: choose another name")


def _write(out: str, chosen: Sequence[tuple[IndexedFile, range]], note: dict[str, Any] | None) -> tuple[int, int]:
    """Make a pair of documents of others; returns its documents and tokens. Memory does not grow with them.

    Args:
        out: its name.
        chosen: files, and which documents of each.
        note: what is said beside it, but for what is counted here; None: nothing.
    """
    name = stem(out)
    parts = [f"{name}.{part}.partial" for part in ("bin", "lengths", "documents", "idx", "json")]
    documents, tokens, hashed = 0, 0, xxhash.xxh3_128()
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(part, "wb")) for part in parts[:3]]
            for file, numbers in chosen:
                first, last = int(file.ends[numbers.start]), int(file.ends[numbers.stop])
                for piece in _spans(file, first, last):
                    files[0].write(piece.tobytes())
                    hashed.update(piece.tobytes())
                    tokens += len(piece)
                for start in range(first, last, _TOKENS):
                    files[1].write(file.lengths[start : min(start + _TOKENS, last)].tobytes())
                for start in range(numbers.start, numbers.stop, _TOKENS):
                    ends = file.ends[start : min(start + _TOKENS, numbers.stop) + 1]
                    files[2].write(np.diff(ends).astype("<i4").tobytes())
                documents += len(numbers)
            files[0].flush()
            os.fsync(files[0].fileno())
        complete(name, parts[1:2], parts[2:3], chosen[0][0].dtype)
        if note is not None:
            counted = {"hash": hashed.hexdigest(), "documents": documents, "tokens": tokens}
            write_note(parts[4], {**counted, **note, **counted})
        put(name, note is not None)
    except OSError as error:
        raise PrepareError(f"{name} cannot be written: {error}") from error
    finally:
        remove(*parts)
    return documents, tokens


def _spans(file: IndexedFile, first: int, last: int) -> Iterator[np.ndarray]:
    places = [int(file.offsets[i]) // file.dtype.itemsize if i < len(file) else file.tokens for i in (first, last)]
    for start in range(places[0], places[1], _TOKENS):
        yield file.span(start, min(_TOKENS, places[1] - start))
