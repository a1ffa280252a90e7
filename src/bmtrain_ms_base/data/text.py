"""Text, and tokenizers trained on it."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

END_OF_TEXT = "<|endoftext|>"
LONGEST_TOKEN = 32  # characters: no word that the tokenizer sees is longer, so training takes a time in proportion to the text

# Runs of one kind, of which GPT-2's pattern, behind this one, makes words: Chinese, a genome or a line of dashes would be one word,
# and to count pairs in it takes the square of its length.
_LONG_RUN = "|".join(rf"{kind}{{{LONGEST_TOKEN}}}" for kind in (r"\p{L}", r"\p{N}", r"\s", r"[^\s\p{L}\p{N}]"))

_OTHER_MARKS = {  # the longer first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def python_documentation() -> list[str]:
    """About half a megabyte of English: the help topics that every Python ships."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def read_text(path: str | Path) -> list[str]:
    """A UTF-8 text file as documents, which are separated by blank lines. A byte-order mark in front is no part of the text.

    Raises:
        ValueError: not UTF-8, not text, or nothing in it; the message names file and position.
        OSError: it cannot be read.
    """
    path = Path(os.path.expanduser(path))
    data = path.read_bytes()
    other = next((name for mark, name in _OTHER_MARKS.items() if data.startswith(mark)), None)
    if other:
        raise ValueError(f"{path} is {other}, by its byte-order mark; convert it first: iconv -f {other} -t UTF-8")
    skipped = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + skipped
        raise ValueError(f"{path} is not UTF-8 text: byte {place} is {data[place]:#04x}; convert it first") from error
    if "\0" in text:
        raise ValueError(f"{path} is not text: byte {data.index(0)} is 0; it is a binary file, or UTF-16 (then convert it first)")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    documents = [part for part in text.split("\n\n") if part.strip()]
    if not documents:
        raise ValueError(f"{path} contains no text")
    return documents


def split_held_out(documents: Sequence[str], fraction: float = 0.1) -> tuple[list[str], list[str]]:
    """(training, held-out) documents, each in the order given; about `fraction` of the characters are held out.

    Which ones depends on their text only. A document larger than what is wanted is not held out; where that leaves none, the end
    of the last document is, and where it leaves less than half of what is wanted, the end of the longest.
    """
    wanted = fraction * sum(map(len, documents))
    chosen: set[int] = set()
    size = 0
    for i in sorted(range(len(documents)), key=lambda i: hashlib.blake2b(documents[i].encode()).digest()):
        if size + len(documents[i]) <= wanted:
            chosen.add(i)
            size += len(documents[i])
    if size < wanted / 2:
        place = documents.index(max(documents, key=len)) if chosen else len(documents) - 1
        cut_off = documents[place]
        cut = len(cut_off) - max(1, min(int(wanted), len(cut_off) - 1))
        return [*documents[:place], cut_off[:cut], *documents[place + 1 :]], [cut_off[cut:]]
    training = [document for i, document in enumerate(documents) if i not in chosen]
    return training, [document for i, document in enumerate(documents) if i in chosen]


def train_tokenizer(documents: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> Any:
    """A byte-level BPE tokenizer, `tokenizers.Tokenizer`, with `<|endoftext|>` as token 0 and no token above 32 characters.

    `special`: more special tokens, from 1 on.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    runs = pre_tokenizers.Split(Regex(_LONG_RUN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([runs, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Any, documents: Sequence[str]) -> np.ndarray:
    """All documents as one int32 array, `<|endoftext|>` behind each. Where a text spells a special token, it is text.

    Raises:
        ValueError: the tokenizer has no `<|endoftext|>`.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"the tokenizer has no token {END_OF_TEXT}, which ends a document; add it: tokenizer.add_special_tokens")
    with _literally(tokenizer):
        encodings = tokenizer.encode_batch(list(documents))
    return np.concatenate([np.array([*encoding.ids, end], np.int32) for encoding in encodings])


@contextlib.contextmanager
def _literally(tokenizer: Any) -> Iterator[None]:
    """Special tokens are made by us, never by what somebody wrote."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before
