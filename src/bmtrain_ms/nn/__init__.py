"""Layers with sharded parameters, and the operations that they are made of."""

from . import functional
from .dropout import Dropout
from .linear import Linear

__all__ = ["Dropout", "Linear", "functional"]
