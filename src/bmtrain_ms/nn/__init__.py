"""Layers with sharded parameters, and the operations that they are made of."""

from bmtrain_ms_base.absent import absent

from . import functional
from .dropout import Dropout
from .linear import Linear

_LATER = "tensor parallelism is not part of this release; use "
__getattr__ = absent(
    __name__,
    {
        "ColumnParallelLinear": _LATER + "Linear",
        "RowParallelLinear": _LATER + "Linear",
        "VPEmbedding": _LATER + "model_center.layer.Embedding",
        "OpLinear": "it is a Linear with a derivative of its own, which autograd has here; use Linear",
    },
)

__all__ = ["Dropout", "Linear", "functional"]
