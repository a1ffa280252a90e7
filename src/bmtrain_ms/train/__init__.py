"""The training loop: steps, log, evaluation, checkpoints, and ending in good order."""

from .data import load_gpt_data, load_instructions
from .errors import Stopped, TrainingError
from .log import plot_log, read_log
from .loop import Trainer, TrainSettings, memory_mib
from .signals import EXIT_STOPPED, StopSignals
from .tasks import Pretrain, Task, share_step

__all__ = [
    "EXIT_STOPPED",
    "Pretrain",
    "StopSignals",
    "Stopped",
    "Task",
    "TrainSettings",
    "Trainer",
    "TrainingError",
    "load_gpt_data",
    "load_instructions",
    "memory_mib",
    "plot_log",
    "read_log",
    "share_step",
]
