"""Text to batches, without MindSpore."""

from .batch import Batch, Batches
from .sampling import TokenSampler, unigram_entropy
from .text import encode, python_documentation, read_text, split_held_out, train_tokenizer

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
