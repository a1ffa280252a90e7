"""The training loop of a language model: steps, log, evaluation, checkpoints, and ending in good order."""

from .log import plot_log, read_log
from .loop import Trainer, TrainingError, TrainSettings, memory_mib
from .signals import EXIT_STOPPED, Stopped, StopSignals

__all__ = [
    "EXIT_STOPPED",
    "StopSignals",
    "Stopped",
    "TrainSettings",
    "Trainer",
    "TrainingError",
    "memory_mib",
    "plot_log",
    "read_log",
]
