"""Models on sharded layers."""

from . import generation, layer, model

__all__ = ["generation", "layer", "model"]
