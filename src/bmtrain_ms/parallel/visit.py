"""Parts of a stage, each of which is differentiated alone.

[Note: segments]
A stage is a chain of *segments*: the embedding, each layer, the head with the loss. Between them gradients are handed on by hand:
for each micro-batch a segment runs once forward, as a recorded function of its input, and once backward. So several micro-batches
may be under way in any order, nothing is differentiated inside of anything else (which MindSpore 2.5 does not survive), and
recomputation is no special thing: the function runs unrecorded first, and is recorded when its backward pass comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

from mindspore import Parameter, Tensor, nn

from ..comm import World
from ..compat.autograd import Joined, Recorded, record, set_aside
from ..zero import Block, Pass, Replay, context_of


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a stage, see [Note: segments].

    Attributes:
        name: for messages.
        run: (hidden states, or None in front of the embedding; what is known of the micro-batch) -> hidden states, or the loss.
        cells: whose parameters it uses, and no others.
        number: its place in the whole model, whatever the stage: what it draws (dropout) depends on it.
        recompute: only its input is kept from forward to backward.
    """

    name: str
    run: Callable[[Tensor | None, Any], Tensor]
    cells: Sequence[nn.Cell]
    number: int
    recompute: bool

    def parameters(self) -> list[Parameter]:
        """The parameters of the segment's cells, each of them once."""
        return list({id(p): p for cell in self.cells for p in cell.get_parameters()}.values())

    def refuse_dropout(self) -> None:
        """Raise ValueError where a layer that is to be computed again has a dropout that draws another mask then."""
        for cell in self.cells if self.recompute else ():
            if isinstance(cell, Block):
                cell.refuse_dropout()


class Visit:
    """A segment and a micro-batch, from the forward pass to the end of the backward pass.

    Args:
        weights: what is trained of the segment's parameters.
        first_draw: the number of the first thing that it draws.
        part: of the rank's rows, that the micro-batch is, see `Draws`.
    """

    def __init__(
        self,
        segment: Segment,
        batch: Any,
        weights: Sequence[Parameter],
        world: World,
        first_draw: int,
        part: tuple[int, int, int] | None = None,
    ):
        self._part = part
        self._segment, self._batch, self._weights = segment, batch, list(weights)
        self._context, self._looks, self._first = context_of(world), world.everyone.lands_in_place, first_draw
        self._pass = Pass()
        self._inputs: list[Tensor] = []
        self._recorded: Recorded | None = None
        self._replay: Replay | None = None

    def forward(self, hidden: Tensor | None) -> Tensor:
        """Run the segment; what `hidden` is needed for later is kept."""
        self._inputs = [] if hidden is None else [hidden]
        with self._context.draws.numbered(self._first), self._context.draws.among(self._part):
            if not self._segment.recompute:
                return self._record()
            self._replay = Replay(self._context.draws, self._looks)
            with set_aside(), self._context.within(self._pass):
                out = self._segment.run(hidden, self._batch)
            self._replay.ended([out], [])
            return out

    def backward(self, cotangent: Tensor, into: Joined) -> Tensor | None:
        """Gradients for the one of the result: that of the input is returned, those of weights are added to `into`. Once."""
        if not (self._inputs or self._weights):
            self.end()
            return None
        if self._recorded is None:
            assert self._replay is not None
            with self._replay.again(), self._context.draws.among(self._part):
                again = self._record()
            if self._replay.differs([again]):
                raise RuntimeError(
                    f"computing {self._segment.name} again gave other values than its forward pass, so its gradients would be "
                    "wrong: something in it is random (a dropout that is a function, no bmtrain_ms.nn.Dropout) or changes state. "
                    "Use Spread(recompute=False)"
                )
        assert self._recorded is not None
        with self._context.within(self._pass):
            found = self._recorded.pull((cotangent,), self._weights)
        own = len(self._inputs)
        into.add(self._weights, found[own:])
        self.end()
        return found[0] if own else None

    def end(self) -> None:
        """Let go of all that was kept for backward, which is over or will not come."""
        self._recorded, self._inputs, self._batch = None, [], None
        self._pass.end()

    def _record(self) -> Tensor:
        segment, batch = self._segment, self._batch
        with self._context.within(self._pass):
            if self._inputs:
                self._recorded = record(lambda hidden: (segment.run(hidden, batch),), self._inputs)
            else:
                self._recorded = record(lambda: (segment.run(None, batch),), [])
        return self._recorded.outputs[0]
