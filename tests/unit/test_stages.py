"""Which layers a stage holds, and the language that says so."""

from __future__ import annotations

import re
from typing import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmtrain_ms_base.schedule import interleaved, one_f_one_b
from bmtrain_ms_base.simulation import simulate
from bmtrain_ms_base.stages import Stage, costs, divide


def counts(stages: list[Stage]) -> list[int]:
    return [len(stage.layers) for stage in stages]


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 30))
def test_the_first_stages_get_one_layer_more(p: int, v: int, more: int):
    """BMTrain: get_part_len_by_stage_id(i) = n // stages + (i < n % stages)."""
    stages, layers = p * v, p * v + more
    found = divide(layers, p, v)
    assert counts(found) == [layers // stages + (1 if s < layers % stages else 0) for s in range(stages)]
    assert [layer for stage in found for layer in stage.layers] == list(range(layers))
    assert [stage.embedding for stage in found] == [True] + [False] * (stages - 1)
    assert [stage.head for stage in found] == [False] * (stages - 1) + [True]


def test_a_list_says_how_many_layers():
    assert divide(5, 3, layout=[2, 0, 3]) == [Stage(True, 0, 2, False), Stage(False, 2, 2, False), Stage(False, 2, 5, True)]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("EtL", [1]),
        ("Et|tL", [1, 1]),
        ("E|t|L", [0, 1, 0]),
        ("Et*3|(tt|)*29,t|L", [3, *[2] * 29, 1, 0]),  # Megatron-LM's own example, with a layer where it has `m`
        ("E t*2, | t, , t |\nL", [2, 2, 0]),
        ("E(t|)*0tL", [1]),
        ("E((t|)*2t|)*2L", [1, 1, 1, 1, 1, 1, 0]),
        ("Et|*3L", [1, 0, 0, 0]),
        ("(E)(t)* 4(|)(L)", [4, 0]),
        ("(Et|tL)", [1, 1]),
    ],
)
def test_texts(layout: str, expected: list[int]):
    found = divide(sum(expected), len(expected), layout=layout)
    assert counts(found) == expected
    assert found == divide(sum(expected), len(expected), layout=expected)


def naive(text: str) -> str:
    """Megatron-LM's way: regular expressions write out the innermost repetition until there is none."""
    text = re.sub(r"[\s,]", "", text)
    while "*" in text or "(" in text:
        text, times = re.subn(
            r"\(([^()]*)\)\*(\d+)|([Et|L])\*(\d+)", lambda x: (x[1] or x[3] or "") * int(x[2] or x[4]), text, count=1
        )
        if not times:
            text = re.sub(r"\(([^()]*)\)", r"\1", text, count=1)
    return text


PIECES = st.recursive(
    st.sampled_from(["t", "|", "t,", "t|", "t*2", "|*2", "t*0", "tt|"]),
    lambda inner: (
        st.lists(inner, max_size=3).map("".join)
        | st.tuples(st.lists(inner, max_size=3).map("".join), st.integers(0, 3)).map(lambda x: f"({x[0]})*{x[1]}")
        | inner.map(lambda x: f"({x})")
    ),
    max_leaves=8,
)


@given(PIECES)
def test_texts_are_read_as_a_naive_expansion_does(piece: str):
    layout = f"E{piece}L"
    expected = [cell.count("t") for cell in naive(layout).split("|")]
    assert counts(divide(sum(expected), len(expected), layout=layout)) == expected


@pytest.mark.parametrize(
    ("layers", "p", "v", "layout", "text"),
    [
        (3, 2, 2, None, "3 layers do not fill p * v = 2 * 2 = 4 stages; take fewer, or say in a layout which are empty"),
        (3, 2, 2, [2, 1], "the layout has 2 stages, but p * v = 2 * 2 = 4"),
        (4, 2, 1, [2, 1], "the layout has 3 layers, but the model has 4"),
        (2, 2, 1, [3, -1], "layers of a stage must be at least 0, not -1"),
        (3, 0, 1, None, "p must be at least 1, not 0"),
        (3, 1, 0, None, "v must be at least 1, not 0"),
        (4, 2, 1, "Et|t|L", "the layout has 3 stages, but p * v = 2 * 1 = 2"),
        (3, 2, 1, "Et|tL", "the layout has 2 layers, but the model has 3"),
        (3, 2, 1, "tE|ttL", "the layout 'tE|ttL' has 1 of 'E'; it must have one, and that must come first, the embedding"),
        (3, 2, 1, "E|ttt", "the layout 'E|ttt' has 0 of 'L'; it must have one, and that must come last, the head and the loss"),
        (
            3,
            2,
            1,
            "E|tttL*2",
            "the layout 'E|tttL*2' has 2 of 'L'; it must have one, and that must come last, the head and the loss",
        ),
        (0, 1, 1, "", "the layout '' has 0 of 'E'; it must have one, and that must come first, the embedding"),
        (1, 1, 1, "E3tL", "the layout 'E3tL' has '3', which is none of E t L | ( ) * and numbers after a `*`, at position 2"),
        (1, 1, 1, "Et-L", "the layout 'Et-L' has '-', which is none of E t L | ( ) * and numbers after a `*`, at position 3"),
        (1, 1, 1, "E(tL", "the layout 'E(tL' does not close the `(` at position 2"),
        (1, 1, 1, "Et)L", "the layout 'Et)L' closes what is not open at position 3"),
        (1, 1, 1, "Et*L", "the layout 'Et*L' repeats nothing, or has no number of times after the `*` at position 3"),
        (1, 1, 1, "*3EtL", "the layout '*3EtL' repeats nothing, or has no number of times after the `*` at position 1"),
        (1, 1, 1, "E(*3)tL", "the layout 'E(*3)tL' repeats nothing, or has no number of times after the `*` at position 3"),
        (1, 1, 1, f"Et*{10**9}L", f"the layout 'Et*{10**9}L' has more than 100000 letters at position 3"),
        (1, 1, 1, "E(t*999)*999L", "the layout 'E(t*999)*999L' has more than 100000 letters at position 9"),
        (
            *(1, 2, 1, "Et|mL"),
            "the layout 'Et|mL' has `m`: multi-token prediction does not exist here yet, leave it out; it is at position 4",
        ),
    ],
)
def test_refusals(layers: int, p: int, v: int, layout: str | Sequence[int] | None, text: str):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        divide(layers, p, v, layout)


def test_a_list_of_what_is_no_number():
    with pytest.raises(TypeError, match=r"^layers of a stage must be a whole number, not 1\.5$"):
        divide(3, 2, layout=[1.5, 1.5])  # type: ignore[list-item]


def test_fewer_layers_beside_a_head_are_faster():
    """A head that takes as long as 6 layers: its rank must have 6 fewer, and the pipeline keeps its pace."""
    even, fair = divide(30, 4), divide(30, 4, layout=[9, 9, 9, 3])
    assert costs(even, head=6) == [8, 8, 7, 13] and costs(fair, layer=2, embedding=1, head=12) == [19, 18, 18, 18]
    slow, fast = (
        simulate(one_f_one_b(4, 16), costs(stages, head=6), costs(stages, layer=2, head=12)).makespan for stages in (even, fair)
    )
    assert fast == 3 * 9 * (16 + 3) < 0.8 * slow
    chunks = divide(30, 2, 2, "Et*9|t*9|t*9|t*3L")
    assert simulate(interleaved(2, 2, 4), costs(chunks, head=6), costs(chunks, layer=2, head=12), messages="none").idle == (27, 27)
