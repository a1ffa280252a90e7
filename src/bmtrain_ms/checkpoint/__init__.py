"""Checkpoints: one safetensors file, written as a stream, read at any number of ranks."""

from .errors import CheckpointError
from .store import LoadResult, load, save
from .training import load_training, save_training

__all__ = ["CheckpointError", "LoadResult", "load", "load_training", "save", "save_training"]
