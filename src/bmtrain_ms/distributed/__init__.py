"""Collectives that gradients flow through (BMTrain: `bmt.distributed`)."""

from .experts import Exchange
from .linear import gathered_linears, parallel_linear
from .ops import all_gather, all_reduce, broadcast, recv, recv_activations, reduce_scatter, send, send_activations
from .vocabulary import parallel_cross_entropy, parallel_embedding, parallel_linear_cross_entropy

__all__ = [
    "Exchange",
    "all_gather",
    "all_reduce",
    "broadcast",
    "gathered_linears",
    "parallel_cross_entropy",
    "parallel_embedding",
    "parallel_linear",
    "parallel_linear_cross_entropy",
    "recv",
    "recv_activations",
    "reduce_scatter",
    "send",
    "send_activations",
]
