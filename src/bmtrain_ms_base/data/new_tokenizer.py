"""A tokenizer of one's own, trained on files of text."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any, Iterator, Sequence

from .chat import TEMPLATES
from .cutting import cut
from .extras import DataError, needed, refuse_large
from .rows import Problem, values
from .sources import find_sources
from .text import END_OF_TEXT, train_tokenizer

_CHAT = ("<|im_start|>", "<|im_end|>")  # what the template chatml writes
_LONGEST = 1 << 20  # characters of a text that are looked at
_ROOM = 100  # bytes that training takes for each token that is asked for, at most


def train_folder(inputs: Sequence[str], vocab_size: int, folder: str | Path, keys: Sequence[str] = ("text",)) -> Path:
    """Train a byte-level BPE tokenizer, and write it as a folder of Hugging Face's, with the chat template chatml.

    Texts end with `<|endoftext|>`, token 0. The same files give the same tokenizer. Memory grows with the words that are different,
    not with the text.

    Args:
        inputs: files, folders and names on a hub, see `find_sources`.
        vocab_size: how many tokens; a small text may give fewer.
        folder: made if it is not there.
        keys: the columns that hold text; those that a row lacks are left out.

    Raises:
        DataError: there is no text in the files, or the folder has a tokenizer, or gets one at this time; or memory has no room
            for so many tokens.
        SourceError: a file cannot be read.
    """
    needed("tokenizers", "training a tokenizer")
    # the library makes room for all tokens that are asked for, however few the text has, or ends the process
    refuse_large(_ROOM * vocab_size, f"a tokenizer with {vocab_size:,} tokens", "ask for fewer tokens")
    path = Path(folder).expanduser()
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(path):
            if (path / "tokenizer.json").exists():
                raise DataError(f"there is a tokenizer in {path} already: choose another folder, or delete it")
            texts = _Counted(inputs, keys)
            tokenizer = train_tokenizer(texts, vocab_size, _CHAT)
            if not texts.count:
                raise DataError(f"no row of {', '.join(inputs)} has text in {', '.join(keys)}")
            _write_folder(path, tokenizer)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # somebody has put something there
                path.rmdir()
        raise
    return path


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others from training a tokenizer in the same folder; the lock is that of the folder itself, and leaves no file."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise DataError(f"another process is training a tokenizer in {folder} at this time: choose another folder") from error
    except OSError:  # some clusters' disks have no locks
        sys.stderr.write(f"{folder} is on a disk without locks: nothing keeps a second run away from it\n")
    try:
        yield
    finally:
        os.close(handle)


def _write_folder(path: Path, tokenizer: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)  # whoever made it may have failed since, and taken it away
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(_CHAT),
        "chat_template": TEMPLATES["chatml"],
        "clean_up_tokenization_spaces": False,
    }
    _write(path / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    _write(path / "tokenizer.json", tokenizer.to_str(pretty=True))  # last: what has it is complete


class _Counted:
    """The texts of files, and how many there were."""

    def __init__(self, inputs: Sequence[str], keys: Sequence[str]):
        self._inputs, self._keys, self.count = inputs, list(keys), 0

    def __iter__(self) -> Iterator[str]:
        for source in find_sources(self._inputs)[0]:
            for piece in cut([source], ["text"] if source.kind == "txt" else []):
                for _, row in values(piece, self._keys, absent_ok=True):
                    for text in [] if isinstance(row, Problem) else _texts_in(row):
                        self.count += 1
                        yield text[:_LONGEST]


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in a row, however deep: a conversation is a list of dicts."""
    if isinstance(value, (str, bytes)):  # what is no UTF-8 is not learnt from
        text = value.decode("utf-8", "ignore") if isinstance(value, bytes) else value.encode("utf-8", "ignore").decode()
        if text.strip():
            yield text
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts_in(inner)


def _write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
