"""Optimizers over shards, and the manager that drives them."""

from .adam import AdamOptimizer
from .base import end_step
from .driver import Driver
from .manager import OptimManager
from .native import NativeOptimizer
from .norms import all_finite, clip_grad_norm
from .offload import AdamOffloadOptimizer
from .overflow import GradientOverflowError
from .result import StepResult

__all__ = [
    "AdamOffloadOptimizer",
    "AdamOptimizer",
    "Driver",
    "GradientOverflowError",
    "NativeOptimizer",
    "OptimManager",
    "StepResult",
    "all_finite",
    "clip_grad_norm",
    "end_step",
]
