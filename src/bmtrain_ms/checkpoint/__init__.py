"""Checkpoints: sharded ones of a training run, and whole models as safetensors files; read at any number of ranks."""

from bmtrain_ms_base.absent import absent

from ..files.entries import LoadResult
from ..files.errors import CheckpointError
from .checkpointer import Checkpointer, Resumed, lock_folder
from .training import load_training
from .whole import load, load_state_dict, save, state_dict, wait_for_saves

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
    "state_dict",
    "wait_for_saves",
]

__getattr__ = absent(
    __name__,
    {"save_training": "Checkpointer(...).save(step, extra) saves what it did; load_training reads its files still"},
)
