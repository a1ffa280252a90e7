"""Layers with sharded parameters, and the operations that they are made of."""

from bmtrain_ms_base.absent import absent

from . import functional
from .dropout import Dropout
from .linear import Linear
from .lora import LoRALinear, add_lora, freeze, merge_lora, thaw, weight_of
from .moe import ExpertLinear, Experts, Halves, MoE
from .router import ROUTERS, Choice, Router, RouterConfig, Routing, update_router_bias
from .tensor_parallel import (
    ColumnParallelLinear,
    OpParallelLinear,
    Projection,
    ReduceType,
    RowParallelLinear,
    VPEmbedding,
    VPProjection,
    projections,
)

__getattr__ = absent(
    __name__,
    {
        "OpLinear": "it is a Linear with a derivative of its own, which autograd has here; use Linear",
    },
)

__all__ = [
    "ROUTERS",
    "Choice",
    "ColumnParallelLinear",
    "Dropout",
    "ExpertLinear",
    "Experts",
    "Halves",
    "Linear",
    "LoRALinear",
    "MoE",
    "OpParallelLinear",
    "Projection",
    "ReduceType",
    "Router",
    "RouterConfig",
    "Routing",
    "RowParallelLinear",
    "VPEmbedding",
    "VPProjection",
    "add_lora",
    "freeze",
    "functional",
    "merge_lora",
    "projections",
    "thaw",
    "update_router_bias",
    "weight_of",
]
