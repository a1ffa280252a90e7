"""The operations that the layers are made of: `bmtrain_ms.ops` under BMTrain's name."""

from __future__ import annotations

from ..ops import (
    Angles,
    attention,
    causal_mask,
    check_cross_entropy_options,
    cross_entropy,
    embedding,
    layer_norm,
    linear,
    linear_cross_entropy,
    merge_heads,
    rms_norm,
    split_heads,
    swiglu,
)

__all__ = [
    "Angles",
    "attention",
    "causal_mask",
    "check_cross_entropy_options",
    "cross_entropy",
    "embedding",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_heads",
    "rms_norm",
    "split_heads",
    "swiglu",
]
