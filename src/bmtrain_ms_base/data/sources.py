"""Which files a text is in."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

from .extras import DataError, needed
from .notes import is_foreign

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".txt", ".text"), "txt"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKED = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
COLUMNS = ("csv", "tsv", "parquet", "arrow")  # kinds whose files say which columns they have
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of Hugging Face's datasets
_HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<pattern>.+))?")


class SourceError(DataError):
    """Files of text that are not there, or cannot be read as what they are."""


@dataclass(frozen=True)
class Source:
    """A file of rows.

    Attributes:
        path: where it is.
        kind: of file, one of `KINDS`' values.
        packed: how it is compressed, "gz", "zst", or "": not at all.
        size: in bytes.
    """

    path: str
    kind: str
    packed: str
    size: int


@dataclass(frozen=True)
class Piece:
    """A part of a file that is read by itself: bytes, row groups or batches from `start` to `stop`; `stop` of -1: all of it.

    `size`: about how many bytes of the file it is.
    """

    source: Source
    start: int
    stop: int
    size: int


def source_of(path: str | Path) -> Source | None:
    """The file as a source, by its ending; None if that is none that is known."""
    path = str(path)
    found = _kind_of(path)
    return None if found is None else Source(path, *found, os.path.getsize(path))


def _kind_of(path: str) -> tuple[str, str] | None:
    """The kind of a file, and how it is packed, by its ending."""
    base, end = os.path.splitext(path)
    packed = PACKED.get(end.lower(), "")
    kind = KINDS.get((os.path.splitext(base)[1] if packed else end).lower())
    return None if kind is None or (packed and kind in ("parquet", "arrow")) else (kind, packed)


def find_sources(inputs: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The files that are meant, and those of folders that are left out, because they are of no kind that can be read or lie beside
    files of tokens.

    Args:
        inputs: files, folders (all that is below them, by name) and names on a hub, `hf:owner/name`, `hf:owner/name@revision` or
            `hf:owner/name:pattern`.

    Raises:
        SourceError: one is not there or of no kind that can be read, or may not be read, or is given twice, or a folder has none
            that can.
    """
    found: list[Source] = []
    left: list[str] = []
    for given in inputs:
        path = download(given) if given.startswith("hf:") else os.path.expanduser(given)
        mode = found_mode(path, given)
        if mode is None:
            raise SourceError(f"{given} does not exist; a name on a hub is written hf:owner/name")
        if stat.S_ISDIR(mode):
            inside = [_file(file) for file in _walk(path)]
            sources = [source for source, _ in inside if source is not None]
            left += [file for source, file in inside if source is None]
            if not sources:
                raise SourceError(f"{given} has no file that can be read; kinds are {_kinds()}")
            found += sources
            continue
        if not stat.S_ISREG(mode):
            raise SourceError(f"{given} is neither a file nor a folder, but a pipe, a socket or a device: save its text to a file")
        source = source_of(path)
        if source is None:
            raise SourceError(f"{given} is of no kind that can be read, by its ending; kinds are {_kinds()}")
        _open_once(path)
        found.append(source)
    paths = [os.path.realpath(source.path) for source in found]
    twice = next((path for path in paths if paths.count(path) > 1), None) if len(set(paths)) < len(paths) else None
    if twice:
        raise SourceError(f"{twice} is given twice; its text would be there twice")
    return found, left


def found_mode(path: str, given: str) -> int | None:
    """What is at a path, as the system says it, links followed; None: nothing is.

    Raises:
        SourceError: the system does not say, as a folder in front of it may not be read.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise SourceError(f"{given} cannot be looked for: {error.strerror}") from error


def _open_once(path: str) -> None:
    """See now, and not after hours, that a file may be read."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error


def _file(path: str) -> tuple[Source | None, str]:
    """A file that a folder has, as a source; None: it is none."""
    if _kind_of(path) is None or os.path.basename(path) in _METADATA:
        return None, path
    mode = found_mode(path, path)
    if mode is None:
        raise SourceError(f"{path} is a link to what is not there")
    if not stat.S_ISREG(mode):
        return None, path
    _open_once(path)
    return (None if _of_tokens(path) else source_of(path)), path


def _of_tokens(path: str) -> bool:
    """Whether it is what `prepare` writes beside a pair; others have the pair's text there."""
    base, end = os.path.splitext(path)
    return end == ".json" and os.path.isfile(base + ".bin") and os.path.isfile(base + ".idx") and not is_foreign(path)


def _walk(folder: str) -> Iterator[str]:
    """All that is below a folder and no folder; links to folders, which may lead back, are not followed."""

    def unreadable(error: OSError) -> None:
        raise SourceError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    for base, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        for name in sorted([*files, *links]):
            yield os.path.join(base, name)


def _kinds() -> str:
    return f"{', '.join(KINDS)}; lines and tables also {', '.join(PACKED)}"


def download(given: str, repo_type: str = "dataset", patterns: Sequence[str] | None = None) -> str:
    """Fetch `hf:owner/name` from a hub, that of `HF_ENDPOINT` or Hugging Face's; returns its folder.

    Args:
        given: the name, with `@revision` and `:pattern` behind it if these are not to be the hub's main one and all files of rows.
        repo_type: "dataset" or "model".
        patterns: of files, instead of those of rows.

    Raises:
        SourceError: the name is none, or cannot be fetched.
        MissingLibraryError: `huggingface_hub` is not installed.
    """
    match = _HUB.fullmatch(given)
    if match is None:
        raise SourceError(f"{given} is no name on a hub; write hf:owner/name, hf:owner/name@revision or hf:owner/name:pattern")
    hub = needed("huggingface_hub", f"a name on a hub, {given},")
    if match["pattern"] is not None:
        patterns = [match["pattern"]]
    wanted = [f"*{end}{packed}" for end in KINDS for packed in ("", *PACKED)] if patterns is None else list(patterns)
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        return hub.snapshot_download(
            match["name"], repo_type=repo_type, revision=match["revision"], allow_patterns=wanted, endpoint=endpoint
        )
    except Exception as error:  # whatever its HTTP library raises; releases use different ones
        where = endpoint or "Hugging Face's hub"
        raise SourceError(f"{given} cannot be fetched from {where}: {str(error).strip().splitlines()[0]}") from error
