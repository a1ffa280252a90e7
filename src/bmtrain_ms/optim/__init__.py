"""Optimizers over shards, and the manager that drives them."""

from .adam import AdamOptimizer
from .manager import GradientOverflowError, OptimManager, StepResult
from .native import NativeOptimizer
from .norms import all_finite, clip_grad_norm
from .offload import AdamOffloadOptimizer

__all__ = [
    "AdamOffloadOptimizer",
    "AdamOptimizer",
    "GradientOverflowError",
    "NativeOptimizer",
    "OptimManager",
    "StepResult",
    "all_finite",
    "clip_grad_norm",
]
