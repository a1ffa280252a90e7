"""Text generation."""

from .sampling import choose, generate

__all__ = ["choose", "generate"]
