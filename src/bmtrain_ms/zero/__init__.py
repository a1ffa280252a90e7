"""Sharded parameters: ZeRO-2 and ZeRO-3 (Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
models", 2020)."""

from . import init
from .block import Block, CheckpointBlock
from .block_list import TransformerBlockList
from .context import ZeroContext, context_of, refuse_written, undisturbed
from .group import ParamGroup, ShardState
from .init import ParameterInitializer, init_parameters
from .module import DistributedModule
from .param import DistributedParameter, empty
from .passes import Pass
from .replay import Replay
from .unwritten import unwritten

__all__ = [
    "Block",
    "CheckpointBlock",
    "DistributedModule",
    "DistributedParameter",
    "ParamGroup",
    "ParameterInitializer",
    "Pass",
    "Replay",
    "ShardState",
    "TransformerBlockList",
    "ZeroContext",
    "context_of",
    "empty",
    "init",
    "init_parameters",
    "refuse_written",
    "undisturbed",
    "unwritten",
]
