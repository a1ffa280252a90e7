"""Optimizers over shards, and the manager that drives them."""

from .adam import AdamOptimizer
from .manager import OptimManager

__all__ = ["AdamOptimizer", "OptimManager"]
