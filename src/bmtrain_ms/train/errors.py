"""What ends training."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; raised on every rank alike."""


class Stopped(Exception):
    """A signal came; the step was finished and a checkpoint saved. End the process with `EXIT_STOPPED`."""
