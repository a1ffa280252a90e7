"""What is divided over tensor-parallel ranks by the vocabulary: look-ups, and the loss of logits of which each has some columns.

A vocabulary that the ranks do not divide is no matter: their parts differ by one row at most, and nothing is padded.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from bmtrain_ms_base.layout import part_of

from ..comm import Engine
from ..compat.autograd import custom_vjp, no_grad
from ..compat.runtime import from_host, host_array
from ..ops import chosen, embedding, loss
from ..ops.loss import Part
from ..ops.rules import LossRule, Sums, refuse_fractions
from .ops import all_reduce, reduce_scatter


def parallel_embedding(ids: Tensor, table: Tensor, first: int, vocab_size: int, engine: Engine, scatter_output: bool) -> Tensor:
    """Rows of a table of which this rank has those from `first` on; all ranks of `engine` call it with the same ids.

    Args:
        ids: (rows, ...) of int, in [0, vocab_size); -1 stands for a row of zeros.
        table: (this rank's rows, dim).
        scatter_output: the result is this rank's part of dim 0.

    Returns:
        (rows, ..., dim), or (rows / ranks, ..., dim).

    Raises:
        TypeError: ids are no whole numbers.
        ValueError: an id is outside of the vocabulary, or the rows cannot be scattered.
    """
    refuse_fractions(ids)
    places = host_array(ids).reshape(ids.shape)
    if places.size and not -1 <= places.min() <= places.max() < vocab_size:
        raise ValueError(f"ids lie in [{places.min()}, {places.max()}], the vocabulary has {vocab_size}")
    if scatter_output and places.shape[0] % engine.size:
        raise ValueError(
            f"{places.shape[0]} rows cannot be scattered over {engine.size} tensor-parallel ranks: pad them to a multiple"
        )
    engine.compare("input ids", places)
    owned = (places >= first) & (places < first + table.shape[0])
    found = _masked(embedding(from_host(np.where(owned, places - first, 0)), table), owned)
    if engine.size == 1:
        return found
    return reduce_scatter(found, comm=engine) if scatter_output else all_reduce(found, comm=engine)


def _masked(x: Tensor, rows: np.ndarray) -> Tensor:
    """x with zeros where `rows` is False, and no gradient there."""
    if rows.all():
        return x
    with no_grad():
        mask = from_host(rows[..., None].astype(np.float32)).astype(x.dtype)
    return custom_vjp(lambda x: ((x * mask,), None), lambda _, __, grads: (grads[0] * mask,), x)[0]


def parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    engine: Engine,
    classes: int | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`ops.cross_entropy` of logits whose classes are divided over the ranks of `engine`, which all call it (Shoeybi et al., 2019).

    Args:
        logits: (rows, this rank's classes): parts of `layout.part_of`.
        targets: (rows,), counted over all classes.
        classes: of all ranks; default: equal parts.
        ignore_index, weight, reduction, label_smoothing: as in `ops.cross_entropy`, over all classes.

    Returns:
        As `ops.cross_entropy`; the same bits on every rank.

    Raises:
        TypeError, ValueError: as in `ops.cross_entropy`; the columns are not this rank's part of the classes.
    """
    classes = logits.shape[1] * engine.size if classes is None else classes
    rule = LossRule.of(logits.shape[0], classes, targets, ignore_index, weight, reduction, label_smoothing)
    return loss.cross_entropy(logits, rule, chosen(), _part(engine, rule, logits.shape[1]))


def parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    engine: Engine,
    classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    rows: int | None = None,
) -> Tensor:
    """`ops.linear_cross_entropy` with rows of W divided over the ranks of `engine`, which all call it.

    Args:
        hidden: (tokens, dim), the same on every rank.
        weight: (this rank's classes, dim): parts of `layout.part_of`.
        targets, ignore_index, reduction, label_smoothing, rows: as in `ops.linear_cross_entropy`.
        classes: of all ranks; default: equal parts.

    Returns:
        As `ops.linear_cross_entropy`; the same bits on every rank.
    """
    classes = weight.shape[0] * engine.size if classes is None else classes
    rule = LossRule.of(hidden.shape[0], classes, targets, ignore_index, None, reduction, label_smoothing)
    return loss.linear_cross_entropy(hidden, weight, rule, chosen(), rows, _part(engine, rule, weight.shape[0]))


def _part(engine: Engine, rule: LossRule, columns: int) -> Part:
    first, stop = part_of(rule.classes, engine.rank, engine.size)
    if columns != stop - first:
        raise ValueError(
            f"rank {engine.rank} of {engine.size} has {columns} columns of logits of {rule.classes} classes, and its part are "
            f"{stop - first}: give `classes`, and divide them as tensor-parallel layers do"
        )
    if engine.size == 1:
        return loss.WHOLE
    engine.compare("targets", np.stack([rule.labels, rule.counts]))
    owned = (rule.labels >= first) & (rule.labels < stop)
    wide = np.float64 if engine.lands_in_place else np.float32  # which HCCL does not sum

    def reduce(array: np.ndarray, op: str, what: str) -> np.ndarray:
        with no_grad():
            return host_array(engine.all_reduce([from_host(array)], op, f"cross entropy, {what}").wait()[0]).reshape(array.shape)

    def joined(found: Sums) -> Sums:
        largest = reduce(found.largest, "max", "largest")
        with np.errstate(all="ignore"):
            lower = found.largest - largest
            sums = np.where(np.isneginf(found.largest), 0.0, found.sums * np.exp(lower, dtype=np.float64))
            at_label = np.where(owned, found.at_label + lower, 0.0)
            smooth = found.smooth + lower * _sum(rule.spread(first, stop))
        return Sums(largest, *reduce(np.stack([sums, at_label, smooth]).astype(wide), "sum", "sums").astype(np.float64))

    return Part(first, joined, lambda grad: reduce(np.atleast_1d(grad), "sum", "gradient").reshape(grad.shape))


def _sum(spread: np.ndarray | None) -> float:
    return 0.0 if spread is None else float(spread.sum(dtype=np.float64))
