"""What the ZeRO engine keeps per world: buffers, gathers and reduces in flight, numbered random draws."""

from __future__ import annotations

import weakref
from typing import Any

from ..comm import World
from ..compat import autograd
from .buffers import BufferPool
from .pipeline import GatherPipeline
from .random import Draws
from .reducer import Reducer


class ZeroContext:
    """Shared by all parameters and Blocks of one world."""

    def __init__(self, world: World):
        self.pool = BufferPool(spare=world.prefetch + 2)
        self.pipeline = GatherPipeline(self.pool, world.prefetch)
        self.reducer = Reducer()
        self.draws = Draws(world.seed, world.mesh.rank)
        self.managers: weakref.WeakSet[Any] = weakref.WeakSet()  # those with gradients of this world's parameters, for `inspect`

    def end_of_backward(self, error: BaseException | None) -> None:
        """All gradients are there before the caller of `value_and_grad` sees them."""
        self.reducer.end_of_backward(failed=error is not None)
        self.pipeline.end_sequence()


_contexts: weakref.WeakKeyDictionary[World, ZeroContext] = weakref.WeakKeyDictionary()


def context_of(world: World) -> ZeroContext:
    """The context of a world, made at first use."""
    if world not in _contexts:
        _contexts[world] = ZeroContext(world)
    return _contexts[world]


def _end_of_backward(error: BaseException | None) -> None:
    for context in tuple(_contexts.values()):
        context.end_of_backward(error)


autograd.backward_hooks.append(_end_of_backward)
