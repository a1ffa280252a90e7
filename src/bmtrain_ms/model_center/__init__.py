"""Models: plain ones, and how they are spread over ranks."""

from . import generation, layer, model
from .auto import from_pretrained
from .counting import parameter_count
from .pretrained.adapters import load_adapters, save_adapters
from .pretrained.differences import PretrainedError
from .spread import Spread, spread
from .staged import Stages

__all__ = [
    "PretrainedError",
    "Spread",
    "Stages",
    "from_pretrained",
    "generation",
    "layer",
    "load_adapters",
    "model",
    "parameter_count",
    "save_adapters",
    "spread",
]
