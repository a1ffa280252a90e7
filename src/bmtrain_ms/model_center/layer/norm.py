"""The normalisation layers."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor

from ...nn import functional
from ...zero import DistributedModule, DistributedParameter, ParameterInitializer, empty, init


class RMSNorm(DistributedModule):
    """Root-mean-square norm over the last dim, computed in float32 (ModelCenter: `LayerNorm(bias=False)`).

    Args:
        dim_norm: size of the last dim.
        eps: added to the mean square.
        dtype: of the gain and the result.
    """

    def __init__(self, dim_norm: int, eps: float = 1e-6, dtype: Any = ms.float32):
        super().__init__()
        self.eps = eps
        self.weight = DistributedParameter(empty(dim_norm, dtype=dtype), init_method=ParameterInitializer(init.ones_))

    def construct(self, x: Tensor) -> Tensor:
        """(..., dim_norm), same shape and dtype."""
        return functional.rms_norm(x, self.weight, self.eps)


class LayerNorm(DistributedModule):
    """Layer norm over the last dim, computed in float32 (ModelCenter: `LayerNorm(bias=True)`).

    Args:
        dim_norm: size of the last dim.
        eps: added to the variance.
        dtype: of gain, bias and result.
    """

    def __init__(self, dim_norm: int, eps: float = 1e-5, dtype: Any = ms.float32):
        super().__init__()
        self.eps = eps
        self.weight = DistributedParameter(empty(dim_norm, dtype=dtype), init_method=ParameterInitializer(init.ones_))
        self.bias = DistributedParameter(empty(dim_norm, dtype=dtype), init_method=ParameterInitializer(init.zeros_))

    def construct(self, x: Tensor) -> Tensor:
        """(..., dim_norm), same shape and dtype."""
        return functional.layer_norm(x, self.weight, self.bias, self.eps)
