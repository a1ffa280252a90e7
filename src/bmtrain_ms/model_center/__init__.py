"""Models: plain ones, and how they are spread over ranks."""

from . import generation, layer, model
from .spread import Spread, spread

__all__ = ["Spread", "generation", "layer", "model", "spread"]
