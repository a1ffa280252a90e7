"""Layers, under ModelCenter's names; their parameters have Hugging Face's."""

from ...nn import Linear
from .attention import Attention
from .cache import KeyValueCache, LayerCache
from .embedding import Embedding
from .feedforward import FeedForward
from .norm import LayerNorm, RMSNorm
from .positions import Positions
from .rotary import RopeScaling, RotaryEmbedding
from .transformer import DecoderLayer, Encoder, TransformerBlock

__all__ = [
    "Attention",
    "DecoderLayer",
    "Embedding",
    "Encoder",
    "FeedForward",
    "KeyValueCache",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "Positions",
    "RMSNorm",
    "RopeScaling",
    "RotaryEmbedding",
    "TransformerBlock",
]
