"""Gated feed-forward layer."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from ...nn import Linear, functional


class FeedForward(nn.Cell):
    """w_out(silu(w_gated x) * w_in x) (ModelCenter: `FeedForward` with `gated_silu`; Shazeer, 2020).

    Args:
        dim_in: of the hidden states.
        dim_ff: of the inner layer.
        bias: of the three projections.
        dtype: of the parameters.
        init_std: of the projections.
    """

    def __init__(self, dim_in: int, dim_ff: int, bias: bool = False, dtype: Any = ms.float32, init_std: float = 0.02):
        super().__init__()
        settings = {"bias": bias, "dtype": dtype, "init_std": init_std}
        self.w_gated = Linear(dim_in, dim_ff, **settings)
        self.w_in = Linear(dim_in, dim_ff, **settings)
        self.w_out = Linear(dim_ff, dim_in, **settings)

    def construct(self, hidden: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_in)."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self.w_out(functional.swiglu(self.w_gated(flat), self.w_in(flat))).reshape(hidden.shape)
