"""Models: plain ones, and how they are spread over ranks."""

from . import generation, layer, model
from .spread import Spread, spread
from .staged import Stages

__all__ = ["Spread", "Stages", "generation", "layer", "model", "spread"]
