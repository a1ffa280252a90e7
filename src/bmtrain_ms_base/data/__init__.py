"""Text to batches, without MindSpore."""

from .batch import Batch, Batches, changes
from .extras import DataError
from .gpt import Blend, GPTData, gpt_data
from .gpt_batches import EndOfDataError, GPTBatches, RampUp
from .indexed import IndexedFile, IndexedWriter
from .instruction_batches import InstructionBatches
from .sampling import TokenSampler, unigram_entropy
from .storage import StorageError
from .text import encode, python_documentation, read_text, split_held_out, train_tokenizer

__all__ = [
    "Batch",
    "Batches",
    "Blend",
    "DataError",
    "EndOfDataError",
    "GPTBatches",
    "GPTData",
    "IndexedFile",
    "IndexedWriter",
    "InstructionBatches",
    "RampUp",
    "StorageError",
    "TokenSampler",
    "changes",
    "encode",
    "gpt_data",
    "python_documentation",
    "read_text",
    "split_held_out",
    "train_tokenizer",
    "unigram_entropy",
]
