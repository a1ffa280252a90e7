"""The training loop of a language model: steps, log, evaluation, checkpoints, and ending in good order."""

from .errors import Stopped, TrainingError
from .log import plot_log, read_log
from .loop import Trainer, TrainSettings, memory_mib
from .signals import EXIT_STOPPED, StopSignals

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
