"""Tokens travel to the ranks that have their experts, and what those compute travels back; see [Note: experts] in `routing.py`.

All ranks of the engine make the same calls, also those whose tokens, or whose experts, have nothing to do. Per exchange there are
three collectives in forward (counts, there, back) and two in backward. The counts are what the host waits for on a device, and the
choices: twice for a layer, never for an expert.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from bmtrain_ms_base.routing import Plan, counts_of, plan_of

from ..comm import Engine, Work
from ..compat.autograd import custom_vjp, no_grad
from ..compat.runtime import from_host, host_array
from ..ops import chosen, combine_rows

Tensors = tuple[Tensor, ...]


class Exchange:
    """One way of tokens to their experts and back.

    `send`, `receive`, `give_back`, `returned` and `combine` are called once each, in this order. Whatever is computed between
    `send` and `receive`, or between `give_back` and `returned`, is computed while rows travel, and in backward while gradients do.

    Args:
        engine: the ranks over which experts are divided.
        choices: (tokens, k) of int, each token's experts.
        kept: (tokens, k) bool, which of them compute it.
        experts: how many there are on all ranks.

    Raises:
        ValueError: the ranks do not divide the experts.
    """

    def __init__(self, engine: Engine, choices: np.ndarray, kept: np.ndarray, experts: int):
        mine = counts_of(choices, kept, experts).astype(np.int32)
        with no_grad():
            everybody = host_array(engine.all_gather([from_host(mine)], label="experts, counts").wait()[0])
        self.plan: Plan = plan_of(choices, kept, everybody.reshape(engine.size, experts).astype(np.int64), engine.rank)
        self._engine = engine
        self._under_way: tuple[Tensor, Work] | None = None  # with what is sent, whose memory others read

    @property
    def counts(self) -> np.ndarray:
        """(this rank's experts,) int64: how many of the rows that `receive` returns are each one's."""
        return self.plan.counts

    def send(self, x: Tensor) -> Tensor:
        """Start to send x (tokens, dim).

        Returns:
            What `receive` is to be given: gradients flow through it, though not in its value.
        """
        plan = self.plan

        def forward(x: Tensor) -> tuple[Tensors, None]:
            self._start(chosen().take_rows(x, plan.tokens), "experts, there")
            return (from_host(np.zeros(1, np.float32)),), None

        def backward(_: Tensors, __: None, ___: Tensors) -> Tensors:
            return (chosen().sum_rows(self._arrived(), plan.places, None),)

        return custom_vjp(forward, backward, x)[0]

    def receive(self, ticket: Tensor) -> Tensor:
        """The rows that this rank's experts compute, (rows, dim), by expert; at least one, of zeros behind those of the experts."""
        plan = self.plan

        def forward(_: Tensor) -> tuple[Tensors, None]:
            return (chosen().take_rows(self._arrived(), plan.arrived),), None

        def backward(_: Tensors, __: None, grads: Tensors) -> list[None]:
            self._start(chosen().take_rows(grads[0], plan.back), "experts, there, backward")
            return [None]

        return custom_vjp(forward, backward, ticket)[0]

    def give_back(self, rows: Tensor) -> Tensor:
        """Start to send what the experts have made of the rows that `receive` returned to the ranks of the tokens.

        Returns:
            What `returned` is to be given, as of `send`.
        """
        plan = self.plan

        def forward(rows: Tensor) -> tuple[Tensors, None]:
            self._start(chosen().take_rows(rows, plan.back), "experts, back")
            return (from_host(np.zeros(1, np.float32)),), None

        def backward(_: Tensors, __: None, ___: Tensors) -> Tensors:
            return (chosen().take_rows(self._arrived(), plan.arrived),)

        return custom_vjp(forward, backward, rows)[0]

    def returned(self, ticket: Tensor) -> Tensor:
        """What the experts have made of this rank's tokens, for `combine`."""

        def forward(_: Tensor) -> tuple[Tensors, None]:
            return (self._arrived(),), None

        def backward(_: Tensors, __: None, grads: Tensors) -> list[None]:
            self._start(grads[0], "experts, back, backward")
            return [None]

        return custom_vjp(forward, backward, ticket)[0]

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """(tokens, dim): for each token the sum of what its experts made, times weights (tokens, k) float32; in float32."""
        return combine_rows(rows, weights, self.plan.places, self.plan.slots)

    def _start(self, rows: Tensor, label: str) -> None:
        self._under_way = rows, self._engine.all_to_all([rows], label)

    def _arrived(self) -> Tensor:
        if self._under_way is None:
            raise RuntimeError("nothing is under way: an Exchange is used once, send, receive, give_back, returned, combine")
        (_, work), self._under_way = self._under_way, None
        return work.wait()[0]
