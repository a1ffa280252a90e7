"""Pipelines: training in stages is that of one rank, whatever the schedule, the stages and what else ranks divide."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from tests.helpers.layouts import PIPELINES, Case, train
from tests.ranks.test_layouts import STEPS, compare, one_rank

Run = Callable[..., list[Any]]
SIZES = {"num_layers": 5, "num_heads_kv": 2}


@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_training_in_stages_is_that_of_one_rank(run_ranks: Run, case: Case):
    right = one_rank(tuple(SIZES.items()))
    compare(run_ranks(case.ranks, train, case=case, steps=STEPS, sizes=SIZES), right, 2e-5)
