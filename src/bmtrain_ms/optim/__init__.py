"""Optimizers over shards, and the manager that drives them."""

from .adam import AdamOptimizer
from .manager import GradientOverflowError, OptimManager, StepResult
from .native import NativeOptimizer
from .offload import AdamOffloadOptimizer

__all__ = ["AdamOffloadOptimizer", "AdamOptimizer", "GradientOverflowError", "NativeOptimizer", "OptimManager", "StepResult"]
