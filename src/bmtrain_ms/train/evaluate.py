"""The loss on text that is not trained on."""

from __future__ import annotations

from typing import Callable

import numpy as np
from mindspore import Tensor

from bmtrain_ms_base.data import Batch, Batches

from ..comm import Engine, reduce_numbers
from ..compat.autograd import no_grad
from ..compat.runtime import host_array


def mean_loss(
    loss: Callable[[Batch], Tensor],
    tokens: np.ndarray,
    length: int,
    rows: int,
    engine: Engine,
    each_round: Callable[[], None],
) -> float:
    """The mean loss over all whole windows of `tokens`, in nats per token; the same on every rank, for any number of ranks.

    Args:
        loss: of a batch, the mean; all ranks call it equally often.
        rows: windows per call.
        each_round: called after every round, by all ranks; may raise to end.

    Raises:
        ValueError: there is not one whole window.
    """
    windows = (len(tokens) - 1) // length
    if windows < 1:
        raise ValueError(f"{len(tokens)} held-out tokens do not fill one window of {length}")
    inputs = tokens[: windows * length].reshape(windows, length).astype(np.int32)
    targets = tokens[1 : windows * length + 1].reshape(windows, length).astype(np.int32)
    starts = range(0, windows, rows)
    total = 0.0
    with no_grad():
        for i in range(0, len(starts), engine.size):  # every rank runs every round: the gathers are collective
            mine = i + engine.rank
            part = slice(starts[min(mine, len(starts) - 1)], starts[min(mine, len(starts) - 1)] + rows)
            value = loss(Batch(inputs[part], targets[part]))
            if mine < len(starts):
                total += host_array(value).item() * len(inputs[part])
            each_round()
    return reduce_numbers(engine, [total], "evaluate").item() / windows


def mean_loss_of(
    loss: Callable[[Batch], Tensor], batches: Batches, count: int, rows: int, place: tuple[int, int], engine: Engine
) -> float:
    """The mean loss of the first batches of some, in nats per target that counts; the same on every rank, for any number of ranks.
    0.0 where none counts.

    Args:
        loss: of a batch, the mean over its targets, weighted where they have weights; all ranks call it equally often.
        batches: what is evaluated on.
        count: how many of them.
        rows: of a call.
        place: which part of a batch is this rank's, of how many.
        engine: the data-parallel ranks.
    """
    total, counted = 0.0, 0.0
    with no_grad():
        for step in range(count):
            for piece in batches.batch(step, *place).pieces(rows):
                targets = piece.counted
                value = host_array(loss(piece)).item()  # also where nothing counts: the gathers are collective
                total += value * targets if targets else 0.0
                counted += targets
    total, counted = reduce_numbers(engine, [total, counted], "evaluate", np.float64)
    return float(total / counted) if counted else 0.0
