"""Checkpoints: sharded ones of a training run, and whole models as safetensors files; read at any number of ranks."""

from .checkpointer import Checkpointer, Resumed, lock_folder
from .errors import CheckpointError
from .store import LoadResult, load, load_state_dict, save, state_dict, wait_for_saves
from .training import load_training, save_training

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "LoadResult",
    "Resumed",
    "load",
    "load_state_dict",
    "load_training",
    "lock_folder",
    "save",
    "save_training",
    "state_dict",
    "wait_for_saves",
]
