"""Any layout, one result: initial values, losses, gradients, norms and updates of every layout are those of one rank."""

from __future__ import annotations

import functools
from typing import Any, Callable

import numpy as np
import pytest

from tests.helpers.layouts import LAYOUTS, Case, alone, train, whole

Run = Callable[..., list[Any]]
STEPS = 20


@functools.cache
def one_rank(sizes: tuple[tuple[str, Any], ...] = (), uneven: bool = False) -> dict[str, Any]:
    found = alone(STEPS, dict(sizes), uneven)
    return {**found, **{name: whole([found[name]]) for name in ("first", "grads", "last")}}


def compare(answers: list[dict[str, Any]], right: dict[str, Any], close: float) -> None:
    first, grads, last = (whole([answer[name] for answer in answers]) for name in ("first", "grads", "last"))
    assert sorted(first) == sorted(right["first"])
    for name, values in first.items():
        np.testing.assert_array_equal(values, right["first"][name], err_msg=name)
    for name, grad in grads.items():
        scale = np.abs(right["grads"][name]).max()
        np.testing.assert_allclose(grad, right["grads"][name], rtol=0, atol=close * scale, err_msg=name)
    for answer in answers:
        assert answer["losses"] == answers[0]["losses"]  # all ranks say the same
        assert answer["norms"] == answers[0]["norms"]
    np.testing.assert_allclose(answers[0]["losses"], right["losses"], rtol=close)
    np.testing.assert_allclose(answers[0]["norms"], right["norms"], rtol=10 * close)
    for name, values in last.items():
        np.testing.assert_allclose(values, right["last"][name], rtol=0, atol=100 * close * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_training_is_that_of_one_rank(run_ranks: Run, case: Case):
    sizes = {"num_heads_kv": 3 if case.tp == 3 else 2}
    right = one_rank(tuple(sizes.items()))
    compare(run_ranks(case.ranks, train, case=case, steps=STEPS, sizes=sizes), right, 2e-5)


@pytest.mark.parametrize("case", [Case(tp=2), Case(tp=4), Case(tp=2, dp=2)], ids=str)
def test_tied_embeddings_and_the_loss_of_all_logits(run_ranks: Run, case: Case):
    right = one_rank((("tied", True),))
    for logits in (False, True):
        compare(run_ranks(case.ranks, train, case=case, steps=STEPS, sizes={"tied": True}, logits=logits), right, 2e-5)
