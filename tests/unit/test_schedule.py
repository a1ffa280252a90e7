"""Pipeline schedules: who computes what when, what is sent in between, what it costs; all without ranks."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms_base.schedule import Action, Kind, Schedule, gpipe, interleaved, interleaved_rows, one_f_one_b, schedule
from bmtrain_ms_base.simulation import simulate, with_messages

F, B = Kind.FORWARD, Kind.BACKWARD
SENDS = {Kind.SEND_FORWARD: (1, F), Kind.SEND_BACKWARD: (-1, B)}
RECEIVES = {Kind.RECEIVE_FORWARD: (-1, F), Kind.RECEIVE_BACKWARD: (1, B)}


def actions(text: str) -> tuple[Action, ...]:
    """`F3 B1.0 SF2`, as they are printed."""
    found = [re.fullmatch(r"([A-Z]+)(\d+)(?:\.(\d+))?", word) for word in text.split()]
    return tuple(Action(Kind(x[1]), int(x[2]), int(x[3] or 0)) for x in found if x is not None)


def of(p: int, v: int, m: int, group: int) -> Schedule:
    return Schedule("interleaved", p, v, m, interleaved_rows(p, v, m, group)) if v > 1 else one_f_one_b(p, m)


@st.composite
def tables(draw) -> Schedule:
    p, v, m = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 10))
    kind = draw(st.sampled_from(["gpipe", "1f1b", "interleaved"]))
    if kind != "interleaved":
        return schedule(kind, p, m)
    groups = [g for g in range(p, m + 1) if m % g == 0 or m % g >= p]
    if not groups and v > 1:
        m, groups = p, [p]
    return interleaved(p, v, m, draw(st.sampled_from(groups)) if v > 1 else None)


# ---------------------------------------------------------------- orders


def test_1f1b_of_four_ranks():
    table = one_f_one_b(4, 8)
    assert str(table).splitlines() == [
        "rank 0: F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "rank 1: F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "rank 2: F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "rank 3: F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_interleaved_of_two_ranks():
    """What Megatron-LM's schedules.py does with these numbers."""
    assert str(interleaved(2, 2, 4)).splitlines() == [
        "rank 0: F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0",
        "rank 1: F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0",
    ]


def test_gpipe_goes_back_from_the_last_micro_batch():
    assert str(gpipe(2, 3)) == "rank 0: F0 F1 F2 B2 B1 B0\nrank 1: F0 F1 F2 B2 B1 B0"


def test_one_chunk_is_not_interleaved():
    assert interleaved(3, 1, 2).rows == one_f_one_b(3, 2).rows


def test_one_rank_with_chunks_passes_results_on_to_itself():
    table = interleaved(1, 2, 2)
    assert str(table) == "rank 0: F0.0 F0.1 B0.1 F1.0 B0.0 F1.1 B1.1 B1.0"
    assert with_messages(table) == table.rows and simulate(table).makespan == pytest.approx(6)


GOLDEN = [
    (2, 1, 4, 2, 15, "2 1"),
    (4, 1, 8, 4, 33, "4 3 2 1"),
    (4, 1, 2, 4, 15, "2 2 2 1"),
    (8, 1, 16, 8, 69, "8 7 6 5 4 3 2 1"),
    (2, 2, 4, 2, 13.5, "5 3"),
    (4, 2, 8, 4, 28.5, "11 9 7 5"),
    (4, 2, 8, 8, 28.5, "15 13 11 9"),
    (4, 2, 4, 4, 16.5, "8 8 7 5"),
    (4, 3, 8, 4, 27, "15 13 11 9"),
    (4, 2, 6, 4, 27.5, "11 9 7 5"),  # what `interleaved` refuses
    (4, 2, 6, 6, 22.5, "12 11 9 7"),  # and what it says instead
]


@pytest.mark.parametrize("messages", ["rendezvous", "buffered", "none"])
@pytest.mark.parametrize(("p", "v", "m", "group", "makespan", "peaks"), GOLDEN)
def test_time_and_memory(p: int, v: int, m: int, group: int, makespan: float, peaks: str, messages: str):
    """Messages that take no time cost none, even if a send waits for its receive."""
    found = simulate(of(p, v, m, group), messages=messages)
    assert found.makespan == pytest.approx(makespan)
    assert " ".join(map(str, found.peaks)) == peaks
    assert found.idle == pytest.approx([makespan - 3 * m] * p)
    assert found.bubble == pytest.approx(1 - 3 * m / makespan)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 10))
def test_gpipe_and_1f1b_are_idle_for_p_minus_1_micro_batches(p: int, m: int):
    for table in (gpipe(p, m), one_f_one_b(p, m)):
        assert simulate(table).makespan == pytest.approx(3 * (m + p - 1))
    assert gpipe(p, m).peaks == (m,) * p
    assert one_f_one_b(p, m).peaks == tuple(min(m, p - r) for r in range(p))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 3), st.integers(1, 3))
def test_interleaving_divides_idle_time_by_the_chunks(p: int, v: int, groups: int):
    assert simulate(interleaved(p, v, p * groups), messages="none").idle == pytest.approx([3 * (p - 1) / v] * p)


# ---------------------------------------------------------------- messages


def test_messages_of_two_ranks():
    assert with_messages(one_f_one_b(2, 2)) == (
        actions("F0 SF0 F1 SF1 RB0 B0 RB1 B1"),
        actions("RF0 F0 RF1 B0 SB0 F1 B1 SB1"),
    )


@settings(deadline=None)
@given(tables())
def test_a_line_computes_its_row_and_moves_what_others_need_once(table: Schedule):
    lines = with_messages(table)
    assert with_messages(table) == lines
    stages = table.p * table.v
    for rank, line in enumerate(lines):
        assert tuple(a for a in line if a.kind in (F, B)) == table.rows[rank]
        place = {action: i for i, action in enumerate(line)}
        assert len(place) == len(line)
        for action in table.rows[rank]:
            stage = action.chunk * table.p + rank
            forward = action.kind is F
            needs, gives = (stage > 0, stage < stages - 1) if forward else (stage < stages - 1, stage > 0)
            receive = action._replace(kind=Kind.RECEIVE_FORWARD if forward else Kind.RECEIVE_BACKWARD)
            send = action._replace(kind=Kind.SEND_FORWARD if forward else Kind.SEND_BACKWARD)
            assert (receive in place) == (needs and table.p > 1) and place.get(receive, -1) < place[action]
            assert (send in place) == (gives and table.p > 1) and place.get(send, len(line)) > place[action]


@settings(deadline=None)
@given(tables())
def test_what_a_rank_sends_to_another_is_received_in_that_order(table: Schedule):
    """Without `simulate`: for every ordered pair of ranks both sides name the same results in the same order."""
    sent: dict[tuple[int, int], list] = {}
    received: dict[tuple[int, int], list] = {}
    for rank, line in enumerate(with_messages(table)):
        for kind, b, chunk in line:
            stage = chunk * table.p + rank
            if kind in SENDS:
                step, what = SENDS[kind]
                sent.setdefault((rank, (stage + step) % table.p), []).append((what, b, stage, stage + step))
                assert table.peer(rank, Action(kind, b, chunk)) == (stage + step) % table.p
            elif kind in RECEIVES:
                step, what = RECEIVES[kind]
                received.setdefault(((stage + step) % table.p, rank), []).append((what, b, stage + step, stage))
    assert sent == received


@settings(deadline=None, max_examples=40)
@given(tables(), st.integers(1, 3), st.integers(1, 3))
def test_no_deadlock_whatever_things_take(table: Schedule, forward: int, backward: int):
    times = [float(1 + s % 3) for s in range(table.p * table.v)]
    for lines in (with_messages(table), with_messages(table, forward, backward), with_messages(table, times, times[::-1])):
        for messages in ("rendezvous", "buffered"):
            for transfer in (0.0, 0.3):
                simulate(table, times, float(backward), transfer, messages, lines)
                simulate(table, 0.0, 0.0, transfer, messages, lines)


@settings(deadline=None)
@given(tables())
def test_lines_are_in_step_with_the_times_they_were_made_with(table: Schedule):
    """A send that waits costs nothing then, except where a receiver gets free in the middle of what its sender does."""
    ideal = simulate(table, messages="none").makespan
    assert ideal <= simulate(table, messages="rendezvous").makespan * (1 + 1e-9)
    if table.name != "interleaved":
        assert simulate(table, messages="rendezvous").makespan == pytest.approx(ideal)


def test_pairs_exchange_side_by_side():
    """A message that takes 1 delays what comes after by 1 a hop; and a ring of ranks that all have something does not go around."""
    assert simulate(gpipe(6, 1), 1.0, 2.0, 1.0).makespan == 6 * 3 + 2 * 5
    assert simulate(interleaved(8, 2, 16), 1.0, 2.0, 0.1).makespan < 76  # 82.6 if rank 0 came first, then 1, and so on


# ---------------------------------------------------------------- what does not work


def test_ranks_that_wait_for_each_other_are_named():
    table = Schedule("mine", 2, 1, 2, (actions("F0 B0 F1 B1"), actions("F0 F1 B0 B1")))
    for run in (with_messages, simulate):
        with pytest.raises(
            ValueError, match=r"^deadlock in schedule mine: rank 0 at B0.0 waits for rank 1, rank 1 at F1.0 waits for r"
        ):
            run(table)


def test_two_sends_that_wait_for_each_other():
    """Right where sends are buffered, and a deadlock where they are not."""
    table = one_f_one_b(2, 2)
    lines = (actions("F0 SF0 F1 SF1 RB0 B0 RB1 B1"), actions("RF0 F0 B0 SB0 RF1 F1 B1 SB1"))
    assert simulate(table, messages="buffered", lines=lines).makespan == 9
    with pytest.raises(
        ValueError, match=r"deadlock in schedule 1f1b: rank 0 at SF1.0 waits for rank 1, rank 1 at SB0.0 waits for rank 0$"
    ):
        simulate(table, lines=lines)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ("F0 SF0 F1 SF1 B1 RB0 B0", "RF1 RF0 F0 F1 B1 B0 SB0", "rank 1 receives RF1.0, but what rank 0 sends first is RF0.0"),
        (
            "F0 F1 SF1 SF0 RB1 RB0 B1 B0",
            "RF0 F0 RF1 F1 B1 SB1 B0 SB0",
            "rank 1 receives RF0.0, but what rank 0 sends first is RF1.0",
        ),
        ("SF0 F0 F1 SF1 RB1 B1 RB0 B0", "RF0 F0 RF1 F1 B1 SB1 B0 SB0", "rank 0 is to send with SF0.0 what nobody needs, or"),
        (
            "F0 F1 B1 B0 SF0 SB0",
            "F0 F1 B1 B0",
            "deadlock in schedule gpipe: rank 0 at B1.0 waits for rank 1, rank 1 at F0.0 waits for",
        ),
        (
            "F0 SF0 F1 SF1 RB1 B1 RB0 B0",
            "RF0 F0 RF1 F1 B1 SB1 B0",
            "deadlock in schedule gpipe: rank 0 at RB0.0 waits for rank 1, which has",
        ),
        (
            "F0 SF0 F1 SF1 B1 B0",
            "RF0 F0 RF1 F1 B0 B1",
            "the lines of ranks do not compute what gpipe computes, or in another order",
        ),
    ],
)
@pytest.mark.parametrize("messages", ["rendezvous", "buffered"])
def test_lines_that_are_wrong(first: str, second: str, text: str, messages: str):
    with pytest.raises(ValueError, match=re.escape(text)):
        simulate(gpipe(2, 2), messages=messages, lines=(actions(first), actions(second)))


def test_a_message_that_nobody_receives():
    lines = (actions("F0 SF0 RB0 B0"), actions("RF0 F0 B0 SB0 SB0"))
    with pytest.raises(ValueError, match=r"^nobody receives RB0.0 from rank 1 to 0$"):
        simulate(gpipe(2, 1), messages="buffered", lines=lines)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (("F0 B0",), "a schedule for p=2 ranks has a row for each, not 1 rows"),
        (("F0 B0", "F0"), "rank 1 must compute everything once; wrong are B0.0"),
        (("F0 F0 B0", "F0 B0"), "rank 0 must compute everything once; wrong are F0.0"),
        (("F0 B0", "F0 SB0 B0"), "rank 1 must compute everything once; wrong are SB0.0"),
        (("F0 B0", "B0 F0"), "rank 1 computes F0.0 after it went backward through it"),
    ],
)
def test_what_is_no_schedule(rows: tuple[str, ...], text: str):
    with pytest.raises(ValueError, match=f"^{text}$"):
        Schedule("mine", 2, 1, 1, tuple(map(actions, rows)))


@pytest.mark.parametrize(
    ("name", "p", "m", "v", "group", "text"),
    [
        ("zb", 2, 2, 1, None, "unknown pipeline schedule 'zb'; choose one of gpipe, 1f1b, interleaved"),
        ("gpipe", 0, 2, 1, None, "p, the number of pipeline ranks, must be at least 1, not 0"),
        ("1F1B", 2, 0, 1, None, "m, the number of micro-batches, must be at least 1, not 0"),
        ("interleaved", 2, 2, 0, None, "v, the number of chunks of a rank, must be at least 1, not 0"),
        ("GPipe", 2, 2, 2, None, "gpipe has one chunk on each rank and no groups: v=2, group=None need the schedule 'interleaved'"),
        ("1f1b", 2, 2, 1, 2, "1f1b has one chunk on each rank and no groups: v=1, group=2 need the schedule 'interleaved'"),
        (
            *("interleaved", 4, 6, 2, None),
            "interleaved: m=6 micro-batches in groups of 4 leave a last group of 2, fewer than the p=4 ranks; "
            "take group=6, or m=4 or m=8, or the schedule 1f1b",
        ),
        (
            *("interleaved", 4, 3, 2, None),
            "interleaved: m=3 micro-batches in groups of 4 leave a last group of 3, fewer than the p=4 ranks; "
            "take m=4, or the schedule 1f1b",
        ),
        (
            *("interleaved", 4, 9, 2, 3),
            "interleaved: a group must have at least as many micro-batches as there are ranks, group >= p=4, not 3; "
            "take group=5 or 9, or the schedule 1f1b",
        ),
    ],
)
def test_refusals(name: str, p: int, m: int, v: int, group: int | None, text: str):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        schedule(name, p, m, v, group)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(2, 3), st.integers(1, 12), st.integers(1, 8))
def test_what_a_refusal_advises_is_taken(p: int, v: int, m: int, group: int):
    try:
        interleaved(p, v, m, group)
    except ValueError as error:
        advice = str(error).partition("; take ")[2]
        assert all(interleaved(p, v, int(n), group) for n in re.findall(r"m=(\d+)", advice))
        for groups in re.findall(r"group=([\d or]+)", advice):
            assert all(interleaved(p, v, m, int(g)) for g in re.findall(r"\d+", groups))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"forward": [1.0, 2.0, 3.0]},
            r"^forward has 3 times, but p \* v = 2 \* 1 = 2 stages need one each; or give the time of a",
        ),
        ({"backward": -1}, "^backward must be a time, finite and not below zero, not -1.0$"),
        ({"transfer": float("nan")}, "^transfer must be a time, finite and not below zero, not nan$"),
        ({"messages": "sync"}, "^unknown kind of messages 'sync'; choose one of rendezvous, buffered, none$"),
    ],
)
def test_arguments_of_a_simulation(arguments: dict, text: str):
    with pytest.raises(ValueError, match=text):
        simulate(gpipe(2, 2), **arguments)
    with pytest.raises(ValueError, match="above zero"):
        with_messages(gpipe(2, 2), forward=0)


# ---------------------------------------------------------------- uneven stages, pictures


def test_the_slowest_stage_sets_the_pace():
    """2 ranks, the second takes 3 and 6: it is never idle but for the first forward and the last backward of the first."""
    found = simulate(one_f_one_b(2, 4), [1, 3], [2, 6], messages="none")
    assert found.makespan == 1 + 4 * 9 + 2 and found.idle == (27, 3)
    assert found.bubble == pytest.approx(30 / 78)


def test_pictures():
    assert simulate(one_f_one_b(2, 3)).show().splitlines() == [
        "rank 0 keeps 2 F0 F1 ......B0--- F2 B1--- ...B2--- ",
        "rank 1 keeps 1 ...F0 B0--- F1 B1--- F2 B2--- ......",
        "1f1b, p=2 v=1 m=3: takes 12, 25.0% of it idle",
    ]
    assert simulate(interleaved(2, 2, 2)).show().splitlines()[0].startswith("rank 0 keeps 4 F0.0 F1.0 F0.1 F1.1 ")


@settings(deadline=None)
@given(tables(), st.integers(50, 120))
def test_pictures_fit_a_terminal(table: Schedule, width: int):
    lines = simulate(table, transfer=0.1).show(width).splitlines()
    assert len(lines) == table.p + 1 and max(map(len, lines)) <= max(width, 60)
    assert len({len(line) for line in lines[:-1]}) == 1
