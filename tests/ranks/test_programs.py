"""What users do with parameters, in every mode and on 1 to 3 ranks, against an unsharded twin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmtrain_ms.comm import World
from tests.helpers.programs import LAYERS, MODES, WAYS, run_program

TRAIN = [("block", 0), ("block", 1), ("block", 2)]
PROGRAMS = {
    "a penalty on shards": [("train", [*TRAIN, ("penalty", 0), ("penalty", 2)]), ("train", [("cell", 1), ("penalty", 1), *TRAIN])],
    "a penalty in a chain": [("train", [("chain", 0), ("penalty", 0), ("penalty", 1), ("penalty", 2)])] * 3,
    "a parameter used twice and outside": [("train", [("block", 0), ("outside", 0), ("block", 0), ("penalty", 0)])],
    "a Parameter straight into a Block": [
        ("train", [("prompt", 0), *TRAIN, ("cube", 0)]),
        ("train", [("cube", 0), ("block", 1), ("prompt", 1), ("prompt", 2)]),
        *(("freeze", i) for i in range(LAYERS)),
        ("train", [("prompt", 0), *TRAIN, ("cube", 0)]),
    ],
    "a Block that returns its input": [("train", [("both", 0), ("both", 1), ("block", 2)]), ("evaluate", [("both", 0)])],
    "what nobody gave to the Block": [("train", [("captured", 0), ("block", 1), ("shared", 2), ("shared", 2), ("cube", 0)])],
    "written between evaluations": [
        step for i, way in enumerate(WAYS) for step in (("evaluate", TRAIN), ("write", i % LAYERS, way))
    ]
    + [("evaluate", TRAIN)],
    "written between steps": [
        step for way in ("assign", "setitem") for step in (("train", TRAIN), ("write", 1, way), ("evaluate", TRAIN))
    ],
    "frozen and thawed": [
        ("train", TRAIN),
        ("freeze", 1),
        ("train", [*TRAIN, ("penalty", 0)]),
        ("freeze", 0),
        ("train", TRAIN, [("chain", 0)]),
        ("thaw", 1),
        ("train", [("chain", 0), ("outside", 1)], TRAIN),
    ],
}


def program(world: World, steps: list, modes: Any = MODES) -> int:
    return run_program(world, steps, modes)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_users_do_equals_the_twin(run_ranks, name, ranks):
    assert all(compared >= 3 * len(MODES) for compared in run_ranks(ranks, program, steps=PROGRAMS[name]))


layers = st.integers(0, LAYERS - 1)
uses = st.lists(
    st.tuples(
        st.sampled_from(["block", "both", "outside", "prompt", "captured", "shared", "penalty", "cell", "cube", "chain"]), layers
    ),
    min_size=1,
    max_size=6,
)
steps = st.one_of(
    st.tuples(st.just("write"), layers, st.sampled_from(WAYS)),
    st.tuples(st.sampled_from(["freeze", "thaw"]), layers),
    st.tuples(st.just("evaluate"), uses),
    st.tuples(st.just("train"), uses),
    st.tuples(st.just("train"), uses, uses),
)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_random_programs_equal_the_twin(run_ranks, ranks):
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(steps, min_size=2, max_size=8), st.sampled_from(MODES))
    def check(steps: list, mode: tuple) -> None:
        run_ranks(ranks, program, steps=steps, modes=[mode])

    check()
