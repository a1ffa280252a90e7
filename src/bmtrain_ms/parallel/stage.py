"""One rank of a pipeline: it does what its line of the table says, see [Note: schedules] and [Note: messages]."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor

from bmtrain_ms_base.schedule import Action, Kind, Row, Schedule
from bmtrain_ms_base.simulation import with_messages

from ..comm import Work, World
from ..compat.autograd import joined, no_grad
from ..ops.in_place import add_
from ..zero import ParamGroup, context_of
from .visit import Segment, Visit

_UNDER_WAY = 2  # sends that nobody has waited for
DRAWS = 1 << 20  # of a segment and micro-batch
SPAN = 1 << 50  # draws of a step
Place = tuple[int, int]  # micro-batch, chunk


class Stage:
    """The chunks of a model that a rank of a pipeline holds.

    Args:
        chunks: of each the segments, in order; those of the last chunk of the last rank end with the loss.
        segments: how many there are in the whole model.
        message: what is known of a micro-batch -> a tensor shaped and typed as the hidden states between its stages.
        world: the ranks; the pipeline's are those along `pp`.
        holds: groups of parameters that stay gathered throughout a step (ZeRO-2).
    """

    def __init__(
        self,
        chunks: Sequence[Sequence[Segment]],
        segments: int,
        message: Callable[[Any], Tensor],
        world: World,
        holds: Callable[[], Sequence[ParamGroup]] = tuple,
    ):
        self.chunks, self.world = [list(chunk) for chunk in chunks], world
        self._segments, self._message, self._holds = segments, message, holds
        self._engine, self._context = world.along("pp"), context_of(world)

    def train(
        self, table: Schedule, batches: Sequence[Any], params: Sequence[Parameter], cotangent: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Every micro-batch forward and backward.

        Args:
            table: the schedule, the same on every rank.
            batches: what is known of each micro-batch, as segments are given it. Where one has a `part` (see `Draws`), it draws its
                rows' part of what the whole batch would; otherwise something of its own.
            params: what to differentiate with respect to.
            cotangent: what the gradient of each micro-batch's loss is multiplied with, (1,) float32.

        Returns:
            The losses of the micro-batches, which only the last rank has, and the gradients of `params`: float32 and this rank's
            own, to be changed in place.
        """
        for chunk in self.chunks:
            for segment in chunk:
                segment.refuse_dropout()
        run = Run(self, table, batches, {id(p): p for p in params}, cotangent)
        backward = 3.0 if any(s.recompute for chunk in self.chunks for s in chunk) else 2.0
        with self._context.pipeline.hold(self._holds()):
            run.to_end(lines_of(table, backward)[self._engine.rank])
        grads = [run.sums.pop(id(p), None) for p in params]
        return run.losses(), [zeros_like(p) if g is None else g for p, g in zip(params, grads)]

    def evaluate(self, table: Schedule, batches: Sequence[Any]) -> list[Tensor]:
        """Every micro-batch forward; what the last segment returns, which only the last rank has."""
        run = Run(self, table, batches, None, None)
        line = lines_of(table, 2.0)[self._engine.rank]
        forward = (Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)
        with no_grad(), self._context.pipeline.hold(self._holds()):
            run.to_end([action for action in line if action.kind in forward])
        return run.losses()


class Run:
    """The state of a step, or of an evaluation: what each (micro-batch, chunk) has, from which it is taken when it is used.

    Attributes:
        arrived: hidden states that a chunk is to begin with.
        results: hidden states that are to be sent.
        visits: what is kept for the backward pass.
        cotangents: gradients of a chunk's results.
        gradients: gradients of a chunk's inputs that are to be sent.
        sums: by id of the parameter: gradients so far, float32.
    """

    def __init__(self, stage: Stage, table: Schedule, batches: Sequence[Any], params: dict[int, Parameter] | None, cotangent: Any):
        self._stage, self._table, self._batches, self._cotangent = stage, table, batches, cotangent
        self._parts = [getattr(batch, "part", None) for batch in batches]
        self._params, self._context, self._rank = params, stage._context, stage._engine.rank
        self.arrived: dict[Place, Tensor] = {}
        self.results: dict[Place, Tensor] = {}
        self.visits: dict[Place, list[Visit]] = {}
        self.cotangents: dict[Place, Tensor] = {}
        self.gradients: dict[Place, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self._ends: dict[int, Tensor] = {}  # what the last segment returned
        self._sending: list[Work] = []
        asked = params or {}
        self._weights = {s: [p for p in s.parameters() if id(p) in asked] for chunk in stage.chunks for s in chunk}
        draws = self._context.draws
        self._drawing = draws.apart if params is None else contextlib.nullcontext
        with self._drawing():
            self._first_draw = (draws.count // SPAN + 1) * SPAN

    def to_end(self, line: Sequence[Action]) -> None:
        """Do what the line says, in order."""
        try:
            for action in line:
                self.step(action)
            self._wait(0)
        finally:
            self.end()

    def end(self) -> None:
        """Let go of what is kept for backward passes, which is something after an error only; the line is over."""
        for visit in [visit for visits in self.visits.values() for visit in visits]:
            visit.end()
        self._context.pipeline.end_sequence()
        with self._drawing():
            self._context.draws.count = self._first_draw

    def step(self, action: Action) -> None:
        """Do one action of the line: compute, send or receive."""
        do = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.SEND_FORWARD: lambda action: self._send(action, self.results),
            Kind.SEND_BACKWARD: lambda action: self._send(action, self.gradients),
            Kind.RECEIVE_FORWARD: lambda action: self._receive(action, self.arrived),
            Kind.RECEIVE_BACKWARD: lambda action: self._receive(action, self.cotangents),
        }
        do[action.kind](action)

    def losses(self) -> list[Tensor]:
        """What the last segment returned, by micro-batch; nothing where that is another rank's."""
        return [self._ends[b] for b in sorted(self._ends)]

    def _forward(self, action: Action) -> None:
        place = action.micro_batch, action.chunk
        hidden, visits = self.arrived.pop(place, None), []
        if self._params is not None:
            self.visits[place] = visits
        with self._context.pipeline.undisturbed():
            for segment in self._stage.chunks[action.chunk]:
                hidden = self._through(segment, action, hidden, visits)
        assert hidden is not None
        after = self._table.next(self._rank, action)
        if after is None:
            self._ends[action.micro_batch] = hidden
        elif after[0] == self._rank:
            self.arrived[after[1].micro_batch, after[1].chunk] = hidden
        else:
            self.results[place] = hidden

    def _through(self, segment: Segment, action: Action, hidden: Tensor | None, visits: list[Visit]) -> Tensor:
        batch, part = self._batches[action.micro_batch], self._parts[action.micro_batch]
        number = (0 if part else action.micro_batch * self._stage._segments) + segment.number
        first = self._first_draw + number * DRAWS
        if self._params is None:
            with self._drawing(), self._context.draws.numbered(first), self._context.draws.among(part):
                return segment.run(hidden, batch)
        visit = Visit(segment, batch, self._weights[segment], self._stage.world, first, part)
        visits.append(visit)
        return visit.forward(hidden)

    def _backward(self, action: Action) -> None:
        place = action.micro_batch, action.chunk
        assert self._params is not None
        gradient = self.cotangents.pop(place, self._cotangent)  # nobody sends one for the loss
        with joined(list(self._params.values())) as found, self._context.pipeline.undisturbed():
            for visit in reversed(self.visits[place]):
                assert gradient is not None
                gradient = visit.backward(gradient, found)
        del self.visits[place]
        self._add(found.grads)
        after = self._table.next(self._rank, action)
        if after is None:
            return
        assert gradient is not None
        if after[0] == self._rank:
            self.cotangents[after[1].micro_batch, after[1].chunk] = gradient
        else:
            self.gradients[place] = gradient

    def _add(self, grads: dict[int, Tensor]) -> None:
        """Sums are float32 from the first micro-batch on: in bfloat16 256 + 1 is 256."""
        with no_grad():
            for i, grad in grads.items():
                before = self.sums.get(i)
                if grad.dtype != ms.float32:
                    grad = grad.astype(ms.float32)
                elif before is None:
                    grad = grad * 1.0  # which is added to, while others may have this one
                self.sums[i] = grad if before is None else add_(before, grad)

    def _send(self, action: Action, source: dict[Place, Tensor]) -> None:
        x = source.pop((action.micro_batch, action.chunk))
        peer = self._table.peer(self._rank, action)
        with no_grad():
            self._sending.append(self._stage._engine.send([x], peer, self._label(action)))
        self._wait(_UNDER_WAY)

    def _receive(self, action: Action, target: dict[Place, Tensor]) -> None:
        like = self._stage._message(self._batches[action.micro_batch])
        peer = self._table.peer(self._rank, action)
        with no_grad():
            received = self._stage._engine.recv([like], peer, self._label(action)).wait()[0]
        target[action.micro_batch, action.chunk] = received

    def _label(self, action: Action) -> str:
        what = "hidden states" if action.kind in (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD) else "their gradient"
        return f"micro-batch {action.micro_batch}, {what}"

    def _wait(self, left: int) -> None:
        while len(self._sending) > left:
            self._sending.pop(0).wait()


@functools.lru_cache(maxsize=32)
def lines_of(table: Schedule, backward: float) -> tuple[Row, ...]:
    """`with_messages`, which takes a while for many micro-batches; where a backward takes so many forwards."""
    return with_messages(table, 1.0, backward)


def zeros_like(p: Parameter) -> Tensor:
    """A gradient of zeros, float32, that may be written."""
    with no_grad():
        return ms.ops.zeros(tuple(p.shape), ms.float32)
