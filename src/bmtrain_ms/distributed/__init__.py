"""Collectives that gradients flow through (BMTrain: `bmt.distributed`)."""

from .ops import all_gather, all_reduce, broadcast, recv, recv_activations, reduce_scatter, send, send_activations

__all__ = [
    "all_gather",
    "all_reduce",
    "broadcast",
    "recv",
    "recv_activations",
    "reduce_scatter",
    "send",
    "send_activations",
]
