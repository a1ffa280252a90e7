"""Trainers of small language models."""

from __future__ import annotations

from typing import Any, Sequence

from mindspore import nn

from bmtrain_ms.data import Batches
from bmtrain_ms.lr_scheduler import Cosine
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from bmtrain_ms.train import Pretrain, Trainer, TrainSettings


def managed(
    model: nn.Cell,
    steps: int,
    lr: float = 1e-3,
    warmup: int = 20,
    loss_scale: float | None = None,
    betas: Sequence[float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> OptimManager:
    """Adam, whose rate rises for `warmup` steps and falls to 0 like a cosine."""
    optimizer = AdamOptimizer(model.trainable_params(), lr, betas, weight_decay=weight_decay)
    manager = OptimManager(loss_scale=loss_scale)
    manager.add_optimizer(optimizer, Cosine(optimizer, lr, min(warmup, steps), steps))
    return manager


def pretrainer(model: nn.Cell, batches: Batches, steps: int, folder: Any = None, **options: Any) -> Trainer:
    """Of a causal language model; `options` of `managed`, and of `TrainSettings`."""
    own = {name: options.pop(name) for name in list(options) if name in managed.__annotations__}
    return Trainer(Pretrain(model), batches, managed(model, steps, **own), TrainSettings(steps, **options), folder)
