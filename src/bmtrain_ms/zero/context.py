"""What the ZeRO engine keeps per world: buffers, gathers and reduces in flight, numbered random draws."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, ContextManager, Iterator

from mindspore import Parameter, Tensor

from bmtrain_ms_base.random import Draws

from ..comm import World, is_initialized
from ..comm import world as current_world
from ..compat import autograd
from ..compat.autograd import Deliver
from ..compat.executor import inside_pass
from .buffers import BufferPool
from .passes import Pass
from .pipeline import GatherPipeline
from .reducer import Reducer


class ZeroContext:
    """Shared by all parameters and Blocks of one world."""

    def __init__(self, world: World):
        self.pool = BufferPool(spare=world.prefetch + 2)
        self.pipeline = GatherPipeline(self.pool, world.prefetch)
        self.reducer = Reducer()
        self.draws = Draws(world.seed)
        self.pulled = False  # a backward pass has ended since the last step
        self._mesh = world.mesh
        self._divided: bool | None = None  # whether models divided over stages have other rows on each; None: there is none yet
        self.anchor: Parameter | None = None  # what every backward pass has to ask for, so that it comes to all stages
        self._passes = [Pass()]  # the last is the one that calls belong to; the first that of who opens none
        self._gathers: list[list[Any]] = []
        self.in_stage: list[bool] = []  # of each Block whose module runs now, the innermost last: whether it is of one stage only
        self.managers: weakref.WeakSet[Any] = weakref.WeakSet()  # those with gradients of this world's parameters, for `inspect`

    @property
    def rows_differ(self) -> bool:
        """Whether ranks of a pipeline read rows of their own, and what is in no stage is on all of them, see [Note: rows]."""
        return bool(self._divided)

    @property
    def data_ranks(self) -> int:
        """Into how many parts the batch is divided: ranks with rows of their own, over which gradients are averaged."""
        return self._mesh.dp * (self._mesh.pp if self.rows_differ else 1)

    @property
    def data_rank(self) -> int:
        """Which of them this rank reads."""
        return self._mesh.dp_rank + (self._mesh.pp_rank * self._mesh.dp if self.rows_differ else 0)

    def divide(self, rows_differ: bool) -> None:
        """A model is divided over the stages of a pipeline.

        Raises:
            ValueError: another one is, in the other way: a parameter that both have would have two meanings.
        """
        if self._divided is not None and self._divided is not rows_differ:
            raise ValueError(
                "a PipelineTransformerBlockList, where ranks of a pipeline read rows of their own, and a model that is spread over "
                "stages, where they read the same ones, do not go together: use one of them for all models"
            )
        self._divided = rows_differ

    @property
    def current(self) -> Pass:
        """The pass that a call which comes now belongs to."""
        return self._passes[-1]

    @contextlib.contextmanager
    def within(self, one: Pass) -> Iterator[None]:
        """Inside the `with` statement forward calls, and a backward pass, belong to `one`, see [Note: passes]. An error ends it."""
        self._passes.append(one)
        try:
            yield
        except BaseException:
            one.end()
            raise
        finally:
            self._passes.pop()

    def drawing(self) -> ContextManager[None]:
        """Around what may draw random numbers: where nobody takes a gradient they are numbered apart, see `Draws`.

        What a differentiated pass runs under `no_grad` is of that pass: computed again, or recorded, it is to draw the same.
        """
        return contextlib.nullcontext() if inside_pass() or self.draws.replaying else self.draws.apart()

    @contextlib.contextmanager
    def gathers(self, noted: list[Any]) -> Iterator[None]:
        """Inside the `with` statement `noted` gets each parameter that gathers itself (`DistributedParameter.gather`)."""
        self._gathers.append(noted)
        try:
            yield
        finally:
            self._gathers.pop()
            for p in noted:
                self.note_gather(p)  # whoever is around sees it, too

    def note_gather(self, p: Parameter) -> None:
        """A parameter gathers itself, or a Block inside of a Block does."""
        for noted in self._gathers[-1:]:
            noted.append(p)

    def end_of_backward(self, error: BaseException | None) -> Deliver:
        """All gradients are there, and whole, before the caller of `value_and_grad` sees them."""
        try:
            if error is None:
                self.pool.look()
        finally:
            deliver = self.reducer.end_of_backward(failed=error is not None)
            self.pipeline.end_sequence()
            self.current.end()
        self.pulled = self.pulled or error is None
        return deliver


_contexts: weakref.WeakKeyDictionary[World, ZeroContext] = weakref.WeakKeyDictionary()


def context_of(world: World) -> ZeroContext:
    """The context of a world, made at first use."""
    found = _contexts.get(world)
    if found is None:
        found = _contexts[world] = ZeroContext(world)
    return found


def undisturbed() -> ContextManager[None]:
    """Inside the `with` statement nobody but modules writes parameters, so what was gathered ahead is used without asking all ranks
    whether it still holds; a write is an error all the same. For the `construct` of a whole model."""
    return context_of(current_world()).pipeline.undisturbed() if is_initialized() else contextlib.nullcontext()


def refuse_written() -> None:
    """Raise RuntimeError where somebody was found to have written a copy of a parameter, which the parameter does not see."""
    if is_initialized():
        context_of(current_world()).pool.look()


def _end_of_backward(error: BaseException | None) -> Deliver:
    delivers = [context.end_of_backward(error) for context in tuple(_contexts.values())]

    def deliver_all(p: Parameter, found: Tensor) -> Tensor:
        for deliver in delivers:
            found = deliver(p, found)
        return found

    return deliver_all


autograd.backward_hooks.append(_end_of_backward)
