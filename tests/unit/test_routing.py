"""Where rows of tokens lie on their way to experts and back: see [Note: experts]."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms_base.routing import Plan, capacity_of, counts_of, kept_choices, plan_of


def rows_at(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.where(index[:, None] < 0, 0, x[index])


def exchanged(sent: list[np.ndarray], ranks: int) -> list[np.ndarray]:
    """An all-to-all."""
    parts = [x.reshape(ranks, -1, x.shape[1]) for x in sent]
    return [np.concatenate([parts[source][rank] for source in range(ranks)]) for rank in range(ranks)]


@st.composite
def routed(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Choices of every rank, which of them are kept, and the number of experts."""
    ranks, local, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = ranks * local
    random = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    choices, kept = [], []
    for _ in range(ranks):
        tokens = draw(st.integers(1, 7))
        few = draw(st.integers(1, experts))  # the others get nothing
        choices.append(random.integers(0, few, (tokens, top_k)).astype(np.int32))
        capacity = draw(st.one_of(st.none(), st.integers(0, 4)))
        weights = draw(st.sampled_from([None, random.random((tokens, top_k))]))
        kept.append(kept_choices(choices[-1], random.random(tokens) < draw(st.sampled_from([0.0, 0.5, 1.0])), capacity, weights))
    return choices, kept, experts


@settings(max_examples=200, deadline=None)
@given(routed())
def test_rows_reach_their_experts_and_come_back(case: tuple[list[np.ndarray], list[np.ndarray], int]):
    choices, kept, experts = case
    ranks, local = len(choices), experts // len(choices)
    counts = np.stack([counts_of(c, k, experts) for c, k in zip(choices, kept)])
    assert counts.sum() == sum(k.sum() for k in kept)
    plans = [plan_of(c, k, counts, rank) for rank, (c, k) in enumerate(zip(choices, kept))]
    # a row says of which rank, token and choice it is
    slots = [np.array([[rank, t, j] for t, j in np.ndindex(c.shape)]) + 1 for rank, c in enumerate(choices)]
    arrived = exchanged([rows_at(x, plan.slots) for x, plan in zip(slots, plans)], ranks)
    computed = [rows_at(x, plan.arrived) for x, plan in zip(arrived, plans)]
    for rank, (rows, plan) in enumerate(zip(computed, plans)):
        assert plan.counts.tolist() == counts[:, rank * local : (rank + 1) * local].sum(0).tolist()
        assert len(rows) == max(1, plan.counts.sum())
        for row, expert in zip(rows, np.repeat(np.arange(local), plan.counts)):
            source, t, j = row - 1
            assert choices[source][t, j] == rank * local + expert and kept[source][t, j]
        for expert in np.split(rows[: plan.counts.sum()], np.cumsum(plan.counts)[:-1]):
            assert expert.tolist() == sorted(expert.tolist())  # by source, and in the order of the tokens
    back = exchanged([rows_at(x, plan.back) for x, plan in zip(computed, plans)], ranks)
    for mine, rows, plan, there in zip(slots, back, plans, kept):
        found = rows_at(rows, plan.places.reshape(-1))
        assert found.tolist() == np.where(there.reshape(-1, 1), mine, 0).tolist()
        assert plan.tokens.tolist() == [-1 if s < 0 else s // plan.top_k for s in plan.slots]


def one_plan(choices: list[list[int]], experts: int) -> Plan:
    array = np.array(choices, np.int32)
    kept = kept_choices(array)
    return plan_of(array, kept, counts_of(array, kept, experts)[None], 0)


def test_a_rank_alone_sorts_its_rows_by_expert():
    plan = one_plan([[0, 1], [2, 0], [0, 3], [1, 2]], 4)
    assert plan.counts.tolist() == [3, 2, 2, 1]
    assert plan.tokens.tolist() == [0, 1, 2, 0, 3, 1, 3, 2]
    assert plan.arrived.tolist() == plan.back.tolist() == list(range(8))


CHOICES = np.array([[0, 1], [0, 1], [0, 2], [1, 0]])
WEIGHTS = np.array([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]])


def test_position_keeps_the_earliest():
    assert kept_choices(CHOICES, capacity=2).tolist() == [[True, True], [True, True], [False, True], [False, False]]


def test_probs_keeps_the_heaviest():
    assert kept_choices(CHOICES, None, 2, WEIGHTS).tolist() == [[False, True], [True, False], [True, True], [True, False]]
    assert kept_choices(CHOICES, None, 1, np.ones((4, 2))).tolist() == kept_choices(CHOICES, capacity=1).tolist()


def test_what_is_no_token_takes_no_capacity():
    tokens = np.array([False, True, True, True])
    assert kept_choices(CHOICES, tokens, 1).tolist() == [[False, False], [True, True], [False, True], [False, False]]


@pytest.mark.parametrize(("factor", "right"), [(1.0, 4), (1.25, 5), (0.1, 1), (8.0, 28)])
def test_capacity(factor: float, right: int):
    assert capacity_of(7, 4, 2, factor) == right


def test_experts_that_ranks_do_not_divide():
    with pytest.raises(ValueError, match="3 experts cannot be divided over 2 ranks"):
        plan_of(np.zeros((1, 1), int), np.ones((1, 1), bool), np.zeros((2, 3), int), 0)
