"""A Llama in which some linear layers were exchanged before it was spread."""

from __future__ import annotations

from mindspore import Tensor, nn

from bmtrain_ms.model_center.layer import Linear
from bmtrain_ms.model_center.model import Llama, LlamaConfig


class Adapted(nn.Cell):
    """A linear layer, frozen, with a product of two thin ones beside it (Hu et al., 2021)."""

    def __init__(self, linear: Linear, rank: int = 2):
        super().__init__()
        self.linear = linear
        self.down = Linear(linear.in_features, rank, bias=False, init_std=0.3)
        self.up = Linear(rank, linear.out_features, bias=False, init_std=0.3)
        linear.parameter("weight").requires_grad = False

    def construct(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def adapted(config: LlamaConfig) -> Llama:
    """Plain, with two adapters in each layer."""
    model = Llama(config)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    return model
