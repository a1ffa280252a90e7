"""Generating text with a model."""

from .loop import generate, stop_strings
from .sampling import choose, penalised

__all__ = ["choose", "generate", "penalised", "stop_strings"]
