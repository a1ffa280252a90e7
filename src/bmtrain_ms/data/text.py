"""Text, and tokenizers trained on it."""

from __future__ import annotations

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
    """(training, held-out) documents: spread evenly over the text, about `fraction` of them held out."""
    period = max(2, round(1.0 / fraction))
    held_out = [doc for i, doc in enumerate(documents) if i % period == period - 1]
    if not held_out:  # fewer documents than the period: cut the last one
        last = documents[-1]
        cut = int(len(last) * (1 - fraction))
        return [*documents[:-1], last[:cut]], [last[cut:]]
    return [doc for i, doc in enumerate(documents) if i % period != period - 1], held_out


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
