"""Messages of a chain of Blocks over stages, whose ranks have rows of their own.

[Note: rows]
Every rank of a pipeline reads rows of its own, as data-parallel ranks do, and has all of the model but the layers of other stages.
The hidden states of all ranks' rows *enter* the first stage, where they are divided into micro-batches, go from stage to stage, and
*leave* the last one for the ranks whose rows they are. Gradients go back the same way, and are, as everywhere ([Note: gradients]),
those of the sum of all ranks' losses: so a stage's parameters get theirs from all rows, and what is outside of the list, which
every stage has, is averaged over the stages as well as over data-parallel ranks.

Messages are functions with derivatives of their own, and autograd calls these in an order of its own. So each is given a *token*, a
zero that the one before returned: what was sent first in forward is undone last in backward, on all ranks alike, and they meet.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import numpy as np
from mindspore import Parameter, Tensor, ops

from bmtrain_ms_base.layout import part_of

from ..comm import Engine, Work
from ..compat.autograd import custom_op, no_grad
from ..compat.runtime import from_host, is_float, numpy_dtype

_UNDER_WAY = 2  # sends that nobody has waited for
Tensors = tuple[Tensor, ...]
Shape = tuple[tuple[int, ...], Any]  # and the type


class Route:
    """The messages of one call.

    Args:
        pipe: the ranks of the pipeline.
        hidden: hidden states of this rank's rows; all ranks have as many.
        number: of micro-batches.
        reduced: waits for the reduces under way. Those of what every stage has need all of them, and have to be over before a
            backward pass comes here, where stages wait for each other in turn.

    Attributes:
        parts: of each micro-batch the first row, and one past the last, among those of the pipeline.
    """

    def __init__(self, pipe: Engine, hidden: Sequence[Tensor], number: int, reduced: Callable[[], None]):
        self._reduced = reduced
        self._pipe, self._like = pipe, [(tuple(x.shape), x.dtype) for x in hidden]
        self._rows = hidden[0].shape[0]
        total = self._rows * pipe.size
        if total < number:
            raise ValueError(
                f"the {total} row{'s' * (total > 1)} of a pipeline's ranks cannot be divided into {number} micro-batches: give "
                f"each rank at least {-(-number // pipe.size)}, or set num_micro_batches={total} or less"
            )
        self.parts = [part_of(total, b, number) for b in range(number)]
        self._sending: list[Work] = []

    def gather(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The rows of all ranks, and a token if gradients flow through; they are summed over the stages."""

        def forward(x: Tensor) -> Tensors:
            rows = self._pipe.all_gather([x], label="rows of a pipeline").wait()[0]
            return (rows, _zero())

        def backward(grads: Tensors) -> Tensors:
            return (self._pipe.reduce_scatter([grads[0]], label="rows of a pipeline, backward").wait()[0],)

        if is_float(x):
            rows, token = custom_op(forward, backward, x)
            return rows, [token]
        with no_grad():
            return forward(x)[0], []

    def enter(self, anchor: Parameter, tokens: Sequence[Tensor], hidden: Sequence[Tensor]) -> tuple[Tensor, list[Tensors]]:
        """A token, and, in the first stage, the hidden states of each micro-batch.

        `anchor`: is asked for in every backward pass, so that this one's is called on every rank.
        """
        n, before = len(hidden), 1 + len(tokens)

        def forward(*inputs: Tensor) -> Tensors:
            rows = self._collect(inputs[before:], 0, "hidden states")
            return (_zero(), *(_cut(x, *part) for part in self.parts for x in rows))

        def backward(grads: Tensors) -> Sequence[Any]:
            rows = [_joined(grads[1 + i :: n]) for i in range(n)] if self._pipe.rank == 0 else []
            found = self._scatter(rows, self._like, 0, "their gradient")
            self._settle()
            return [None] * before + found

        token, *entered = custom_op(forward, backward, anchor, *tokens, *hidden)
        return token, [tuple(entered[i : i + n]) for i in range(0, len(entered), n)]

    def receive(self, b: int, token: Tensor) -> tuple[Tensor, Tensors]:
        """A micro-batch from the stage before."""
        before = self._pipe.rank - 1

        def forward(_: Tensor) -> Tensors:
            return (_zero(), *self._pipe.recv(self._of(b), before, f"micro-batch {b}, hidden states").wait())

        def backward(grads: Tensors) -> Sequence[None]:
            self._send(grads[1:], before, f"micro-batch {b}, their gradient")
            return [None]

        token, *hidden = custom_op(forward, backward, token)
        return token, tuple(hidden)

    def send(self, b: int, token: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """A micro-batch to the next stage."""
        after = self._pipe.rank + 1

        def forward(_: Tensor, *hidden: Tensor) -> Tensors:
            self._send(hidden, after, f"micro-batch {b}, hidden states")
            return (_zero(),)

        def backward(_: Tensors) -> Sequence[Any]:
            return [None, *self._pipe.recv(self._of(b), after, f"micro-batch {b}, their gradient").wait()]

        return custom_op(forward, backward, token, *hidden)[0]

    def leave(self, token: Tensor, results: Sequence[Tensor], states: Sequence[Tensor], plan: Sequence[range]) -> Tensors:
        """This rank's rows of the last stage's results, and of all layers' inputs, if there are any.

        Args:
            results: in the last stage; of each micro-batch each hidden state.
            states: of each micro-batch and layer of this stage each hidden state.
            plan: layers of each stage.
        """
        n, last, m = len(self._like), self._pipe.size - 1, len(self.parts)
        own = len(plan[self._pipe.rank])
        likes = [[((len(layers), *shape), dtype) for shape, dtype in self._like] for layers in plan]

        def forward(_: Tensor, *inputs: Tensor) -> Tensors:
            results, states = inputs[: len(inputs) - m * own * n * bool(many)], inputs[len(inputs) - m * own * n * bool(many) :]
            rows = [_joined(results[i::n]) for i in range(n)] if results else []
            found = self._scatter(rows, self._like, last, "hidden states of the last stage")
            if many:
                mine = [ops.stack([_joined(states[layer * n + i :: own * n]) for layer in range(own)]) for i in range(n)]
                by_stage = [self._scatter(mine, like, stage, "hidden states of layers", 1) for stage, like in enumerate(likes)]
                found += [_joined([of_stage[i] for of_stage in by_stage]) for i in range(n)]
            self._settle()
            return tuple(found)

        def backward(grads: Tensors) -> Sequence[Any]:
            self._reduced()
            of_states: list[Tensor] = []
            for stage, layers in enumerate(plan if many else ()):
                rows = self._collect(
                    [_cut(x, layers[0], layers[-1] + 1) for x in grads[n:]], stage, "gradient of layers' hidden states", 1
                )
                if rows:
                    of_states = [_cut(x[layer], *part) for part in self.parts for layer in range(own) for x in rows]
            rows = self._collect(grads[:n], last, "gradient of hidden states")
            return [None, *(_cut(x, *part) for part in self.parts for x in rows), *of_states]

        many = bool(states)
        return custom_op(forward, backward, token, *results, *states)

    # Pieces #

    def _collect(self, own: Sequence[Tensor], root: int, what: str, dim: int = 0) -> list[Tensor]:
        """All ranks' rows on one rank, nothing on the others."""
        with no_grad():
            if self._pipe.rank != root:
                self._send(own, root, what)
                return []
            found = []
            for rank in range(self._pipe.size):
                like = [_empty(tuple(x.shape), x.dtype) for x in own]
                found.append(list(own) if rank == root else self._pipe.recv(like, rank, what).wait())
            return [_joined(rows, dim) for rows in zip(*found)]

    def _scatter(
        self, rows: Sequence[Tensor], like: Sequence[tuple[tuple[int, ...], Any]], root: int, what: str, dim: int = 0
    ) -> list[Tensor]:
        """Each rank's own rows of what one rank has of all."""
        with no_grad():
            if self._pipe.rank != root:
                return list(self._pipe.recv([_empty(*x) for x in like], root, what).wait())
            parts = [[_cut(x, r * self._rows, (r + 1) * self._rows, dim) for x in rows] for r in range(self._pipe.size)]
            for rank, part in enumerate(parts):
                if rank != root:
                    self._send(part, rank, what)
            return parts[root]

    def _of(self, b: int) -> list[Tensor]:
        first, last = self.parts[b]
        return [_empty((last - first, *shape[1:]), dtype) for shape, dtype in self._like]

    def _send(self, tensors: Sequence[Tensor], rank: int, what: str) -> None:
        with no_grad():
            self._sending.append(self._pipe.send(list(tensors), rank, what))
            self._settle(_UNDER_WAY)

    def _settle(self, left: int = 0) -> None:
        while len(self._sending) > left:
            self._sending.pop(0).wait()


def _zero() -> Tensor:
    """A new token, see [Note: rows]."""
    return from_host(np.zeros((), np.float32))


def _empty(shape: tuple[int, ...], dtype: Any) -> Tensor:
    return from_host(np.empty(shape, numpy_dtype(dtype)))


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    with no_grad():
        return tensors[0] if len(tensors) == 1 else ops.cat(tuple(tensors), dim)


def _cut(x: Tensor, first: int, last: int, dim: int = 0) -> Tensor:
    """A copy of a range of a dim."""
    with no_grad():
        return (x[first:last] if dim == 0 else x[:, first:last]).contiguous()
