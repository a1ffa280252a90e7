"""The operations that the layers are made of: `bmtrain_ms.ops` under BMTrain's name."""

from __future__ import annotations

from ..ops import (
    Angles,
    Seen,
    attention,
    causal_mask,
    check_cross_entropy_options,
    choose_experts,
    combine_rows,
    cross_entropy,
    embedding,
    gelu,
    grouped_linear,
    layer_norm,
    linear,
    linear_cross_entropy,
    merge_heads,
    pick_rows,
    reshape,
    rms_norm,
    split_heads,
    swiglu,
)

__all__ = [
    "Angles",
    "Seen",
    "attention",
    "causal_mask",
    "check_cross_entropy_options",
    "choose_experts",
    "combine_rows",
    "cross_entropy",
    "embedding",
    "gelu",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_heads",
    "pick_rows",
    "reshape",
    "rms_norm",
    "split_heads",
    "swiglu",
]
