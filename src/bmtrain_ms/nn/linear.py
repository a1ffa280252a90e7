"""The linear layer."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor

from ..zero import DistributedModule, DistributedParameter, ParameterInitializer, empty, init
from . import functional


def weight_initializer(std: float | None) -> ParameterInitializer:
    """Normal with this standard deviation; None: xavier normal."""
    return ParameterInitializer(init.xavier_normal_) if std is None else ParameterInitializer(init.normal_, std=std)


class Linear(DistributedModule):
    """y = x Wᵀ + b (BMTrain: `nn.Linear`).

    Args:
        in_features, out_features: sizes of the last dim of x and y.
        bias: whether there is one; starts at zero.
        dtype: of the parameters; x must have the same. None: float32.
        init_std: of the normal distribution that W starts with; None: xavier normal.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: Any = ms.float32,
        init_std: float | None = None,
    ):
        super().__init__()
        dtype = ms.float32 if dtype is None else dtype
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.weight = DistributedParameter(empty(out_features, in_features, dtype=dtype), init_method=weight_initializer(init_std))
        self.bias = None
        if bias:
            zeros = ParameterInitializer(init.zeros_)
            self.bias = DistributedParameter(empty(out_features, dtype=dtype), init_method=zeros)

    def construct(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return functional.linear(x, self.weight, self.bias)

    def cross_entropy(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The loss of the logits that the layer gives for x (rows, in_features), see `functional.linear_cross_entropy`."""
        if self.bias is not None:
            return functional.cross_entropy(self(x), targets, **options)
        return functional.linear_cross_entropy(x, self.weight, targets, **options)
