"""Text to batches; the same as `bmtrain_ms_base.data`, which can be imported without MindSpore."""

from bmtrain_ms_base.data import (
    Batch,
    Batches,
    TokenSampler,
    encode,
    python_documentation,
    read_text,
    split_held_out,
    train_tokenizer,
    unigram_entropy,
)

__all__ = [
    "Batch",
    "Batches",
    "TokenSampler",
    "encode",
    "python_documentation",
    "read_text",
    "split_held_out",
    "train_tokenizer",
    "unigram_entropy",
]
