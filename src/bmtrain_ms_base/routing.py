"""Which token goes to which expert, and where its row lies on the way there and back.

[Note: experts]
*choice*: one of the k experts of a token; choice j of token t is *slot* t * k + j.  *kept*: a choice whose expert computes it: not
one of a row that is no token, and not one beyond the expert's capacity.  Experts are contiguous: of E over ep ranks, rank r has
[r * E / ep, (r + 1) * E / ep).  A rank sends, to each rank, the rows of the kept choices of that rank's experts, by expert, and
those of one expert in the order of the slots; behind them is padding, so that all send and get *width* rows, and one plain
all-to-all carries them.  What has arrived lies by [source][expert] and is computed by [expert][source].
All places are worked out here, of the counts of all ranks, which are what the host has to know; -1 stands for a row of zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DROP_POLICIES = ("probs", "position")


def capacity_of(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Choices that an expert takes of so many tokens: ceil(tokens * top_k / experts * factor) (Fedus et al., 2022)."""
    return math.ceil(tokens * top_k / experts * factor)


def kept_choices(
    choices: np.ndarray, tokens: np.ndarray | None = None, capacity: int | None = None, weights: np.ndarray | None = None
) -> np.ndarray:
    """Which choices an expert computes.

    Args:
        choices: (rows, k) of int, experts.
        tokens: (rows,) bool, False for rows that are no tokens; None: all are.
        capacity: choices that an expert takes at most; None: all.
        weights: (rows, k): the heaviest are kept, of equal ones the earliest; None: the earliest, by slot.

    Returns:
        (rows, k) bool.
    """
    kept = np.ones(choices.shape, bool) if tokens is None else np.repeat(np.asarray(tokens, bool)[:, None], choices.shape[1], 1)
    if capacity is None:
        return kept
    slots = np.flatnonzero(kept)
    experts = choices.reshape(-1)[slots]
    order = np.lexsort((slots, experts) if weights is None else (slots, -weights.reshape(-1)[slots], experts))
    slots, experts = slots[order], experts[order]
    first = np.searchsorted(experts, experts, "left")  # of the same expert
    kept.reshape(-1)[slots[np.arange(slots.size) - first >= capacity]] = False
    return kept


def counts_of(choices: np.ndarray, kept: np.ndarray, experts: int) -> np.ndarray:
    """(experts,) int64: how many kept choices each expert has."""
    return np.bincount(choices[kept], minlength=experts).astype(np.int64)


@dataclass(frozen=True)
class Plan:
    """Where rows lie; see [Note: experts]. Indices are int32.

    Attributes:
        top_k: choices of a token.
        slots: (ranks * width,), which slot each row that is sent is of.
        places: (tokens, top_k), where the row of each choice lies in what is sent, and in what comes back.
        arrived: (rows,), where in what has arrived each row lies that is computed, by [expert][source]; at least one row.
        back: (ranks * width,), where among the computed rows each one that goes back lies.
        counts: (this rank's experts,), how many of the computed rows are each one's.
    """

    top_k: int
    slots: np.ndarray
    places: np.ndarray
    arrived: np.ndarray
    back: np.ndarray
    counts: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """(ranks * width,), which token each row that is sent is of."""
        return np.where(self.slots < 0, -1, self.slots // self.top_k).astype(np.int32)


def plan_of(choices: np.ndarray, kept: np.ndarray, counts: np.ndarray, rank: int) -> Plan:
    """The plan of one rank.

    Args:
        choices, kept: (tokens, k), see `kept_choices`.
        counts: (ranks, experts), `counts_of` of every rank.
        rank: this one.

    Raises:
        ValueError: the ranks do not divide the experts.
    """
    ranks, experts = counts.shape
    if experts % ranks:
        raise ValueError(f"{experts} experts cannot be divided over {ranks} ranks")
    local = experts // ranks
    sent = counts.reshape(ranks, ranks, local)  # [source][destination][expert]
    width = max(1, int(sent.sum(2).max()))
    slots = np.full(ranks * width, -1, np.int32)
    places = np.full(choices.shape, -1, np.int32)
    mine = np.flatnonzero(kept)
    of_expert = choices.reshape(-1)[mine]
    order = np.argsort(of_expert, kind="stable")
    destinations = of_expert[order] // local
    starts = np.concatenate([[0], np.cumsum(sent[rank].sum(1))])
    where = destinations * width + np.arange(mine.size) - starts[destinations]
    slots[where] = mine[order]
    places.reshape(-1)[mine[order]] = where
    arriving = sent[:, rank]  # [source][expert]
    first = np.cumsum(arriving, 1) - arriving + width * np.arange(ranks)[:, None]
    sizes = arriving.T.reshape(-1)  # by [expert][source]
    total = int(sizes.sum())
    arrived = np.repeat(first.T.reshape(-1) - (np.cumsum(sizes) - sizes), sizes) + np.arange(total)
    back = np.full(ranks * width, -1, np.int32)
    back[arrived] = np.arange(total)
    arrived = arrived if total else np.array([-1])
    return Plan(choices.shape[1], slots, places, arrived.astype(np.int32), back, arriving.sum(0))
