"""Text, and tokenizers trained on it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Sequence

import numpy as np

END_OF_TEXT = "<|endoftext|>"


def python_documentation() -> list[str]:
    """About half a megabyte of English: the help topics that every Python ships."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def read_text(path: str | Path) -> list[str]:
    """A UTF-8 text file as documents, which are separated by blank lines.

    Raises:
        ValueError: not UTF-8, or nothing in it; the message names file and position.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    documents = [part for part in text.split("\n\n") if part.strip()]
    if not documents:
        raise ValueError(f"{path} contains no text")
    return documents


def split_held_out(documents: Sequence[str], fraction: float = 0.1) -> tuple[list[str], list[str]]:
    """(training, held-out) documents, each in the order given; about `fraction` of the characters are held out.

    Which ones depends on their text only. A document larger than what is wanted is not held out; where that leaves none, the end
    of the last document is.
    """
    wanted = fraction * sum(map(len, documents))
    chosen: set[int] = set()
    size = 0
    for i in sorted(range(len(documents)), key=lambda i: hashlib.blake2b(documents[i].encode()).digest()):
        if size + len(documents[i]) <= wanted:
            chosen.add(i)
            size += len(documents[i])
    if not chosen:
        last = documents[-1]
        cut = len(last) - max(1, min(int(wanted), len(last) - 1))
        return [*documents[:-1], last[:cut]], [last[cut:]]
    training = [document for i, document in enumerate(documents) if i not in chosen]
    return training, [document for i, document in enumerate(documents) if i in chosen]


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer (`tokenizers.Tokenizer`) with `<|endoftext|>` as token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Any, documents: Sequence[str]) -> np.ndarray:
    """All documents as one int32 array, `<|endoftext|>` behind each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.array([*encoding.ids, end], np.int32) for encoding in tokenizer.encode_batch(list(documents))]
    return np.concatenate(pieces)
