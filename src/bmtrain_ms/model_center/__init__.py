"""Models: plain ones, and how they are spread over ranks."""

from . import generation, layer, model
from .counting import parameter_count
from .spread import Spread, spread
from .staged import Stages

__all__ = ["Spread", "Stages", "generation", "layer", "model", "parameter_count", "spread"]
