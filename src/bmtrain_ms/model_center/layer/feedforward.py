"""Gated feed-forward layer."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor

from ...nn import ColumnParallelLinear, Halves, Linear, RowParallelLinear, functional, projections


class FeedForward(Halves):
    """down_proj(silu(gate_proj x) * up_proj x) (ModelCenter: `FeedForward` with `gated_silu`; Shazeer, 2020).

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
        self.gate_proj = Linear(dim_in, dim_ff, **settings)
        self.up_proj = Linear(dim_in, dim_ff, **settings)
        self.down_proj = Linear(dim_ff, dim_in, **settings)

    def divide(self, ranks: int) -> None:
        """Have each of the tensor-parallel ranks compute a part of the inner layer, from its part of the hidden states' rows to its
        part of the result's."""
        self.gate_proj, self.up_proj = ColumnParallelLinear.of(self.gate_proj), ColumnParallelLinear.of(self.up_proj)
        self.down_proj = RowParallelLinear.of(self.down_proj)

    def widen(self, hidden: Tensor) -> Tensor:
        """hidden (tokens, dim_in) -> (tokens, dim_ff), what the inner layer has made of it."""
        return functional.swiglu(*projections(hidden, self.gate_proj, self.up_proj))

    def narrow(self, inner: Tensor) -> Tensor:
        """(tokens, dim_ff), from `widen` -> (tokens, dim_in)."""
        return self.down_proj(inner)
