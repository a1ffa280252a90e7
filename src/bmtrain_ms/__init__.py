"""BMTrain for MindSpore: ZeRO-2/3 training of large language models as a plain `pip install`.

Importing the package patches MindSpore at run time (see `bmtrain_ms.compat`); MindSpore's files are never touched.
"""

from . import compat

compat.install()

from . import checkpoint, comm, data, loss, lr_scheduler, model_center, nn, optim, train, zero
from .checkpoint import load, save
from .comm import init_distributed, is_initialized, rank, shutdown, synchronize, world_size
from .zero import (
    Block,
    CheckpointBlock,
    DistributedModule,
    DistributedParameter,
    ParameterInitializer,
    TransformerBlockList,
    empty,
    init,
    init_parameters,
)

__version__ = "0.1.0"

__all__ = [
    "Block",
    "CheckpointBlock",
    "DistributedModule",
    "DistributedParameter",
    "ParameterInitializer",
    "TransformerBlockList",
    "checkpoint",
    "comm",
    "compat",
    "data",
    "empty",
    "init",
    "init_distributed",
    "init_parameters",
    "is_initialized",
    "load",
    "loss",
    "lr_scheduler",
    "model_center",
    "nn",
    "optim",
    "rank",
    "save",
    "shutdown",
    "synchronize",
    "train",
    "world_size",
    "zero",
]
