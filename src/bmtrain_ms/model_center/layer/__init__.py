"""Layers, under ModelCenter's names."""

from ...nn import Linear
from .attention import Attention
from .embedding import Embedding
from .feedforward import FeedForward
from .norm import LayerNorm, RMSNorm
from .rotary import RotaryEmbedding
from .transformer import Encoder, TransformerBlock

__all__ = [
    "Attention",
    "Embedding",
    "Encoder",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "RotaryEmbedding",
    "TransformerBlock",
]
