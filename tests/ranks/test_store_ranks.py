"""Objects, state dictionaries, background saves and initial values at several ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError, wait_for_saves
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.files.format import AtomicFile
from bmtrain_ms.store import allgather_objects, broadcast_object, load_state_dict, state_dict
from tests.helpers.objects import objects, same
from tests.ranks.test_checkpoint_ranks import Odd

pytestmark = pytest.mark.ranks

Run = Callable[..., list[Any]]
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


# Objects #


def exchange(world: World, given: list[Any], src: int) -> tuple[Any, list[Any]]:
    with use_world(world):
        mine = given[world.engine.rank]
        return broadcast_object(mine, src=src), allgather_objects(mine)


@pytest.mark.usefixtures("single_world")
@pytest.mark.parametrize("ranks", [2, 3])
def test_objects_arrive_on_every_rank(run_ranks: Run, ranks: int):
    """Of other kinds and sizes on each."""

    @QUICK
    @given(st.lists(objects, min_size=ranks, max_size=ranks), st.integers(0, ranks - 1))
    def check(given: list[Any], src: int) -> None:
        for one, every in run_ranks(ranks, exchange, given=given, src=src):
            assert same(one, given[src]) and same(every, given)

    check()


def exchange_large(world: World) -> bool:
    """A mebibyte on rank 1, nothing on the others; and tensors, which are made on the ranks."""
    with use_world(world):
        mine = np.random.default_rng(1).bytes(1 << 20) if world.engine.rank == 1 else b""
        every = allgather_objects(mine)
        tensors = allgather_objects({"t": Tensor(np.full((2, 0) if world.engine.rank else (2, 3), 7, np.int32))})
        shapes = [x["t"].shape for x in tensors]
        return (
            len(every[1]) == 1 << 20 and not every[0] and broadcast_object(mine, src=1) == every[1] and shapes == [(2, 3), (2, 0)]
        )


def test_large_and_empty(run_ranks: Run):
    assert run_ranks(2, exchange_large) == [True, True]


def in_group(world: World) -> tuple[Any, list[Any]]:
    """Ranks 2 and 0, in this order; rank 1 alone."""
    group = world.engine.subgroup([1] if world.engine.rank == 1 else [2, 0])
    return broadcast_object(world.engine.rank, group), allgather_objects(world.engine.rank, group)


def test_in_a_group(run_ranks: Run):
    assert run_ranks(3, in_group) == [(2, [2, 0]), (1, [1]), (2, [2, 0])]


def refused(world: World, what: str, call: str) -> tuple[str, list[int]]:
    """Rank 1 has something that cannot be sent. The error of each rank; and what they exchange afterwards."""
    itself: list[Any] = []
    itself.append(itself)
    bad = {"set": {1}, "function": [print], "objects": {"a": np.array([None])}, "itself": itself}[what]
    with use_world(world):
        mine = bad if world.engine.rank == 1 else "fine"
        with pytest.raises(TypeError) as info:
            broadcast_object(mine, src=1) if call == "broadcast" else allgather_objects(mine)
        return str(info.value), allgather_objects(world.engine.rank)


@pytest.mark.parametrize("call", ["broadcast", "allgather"])
@pytest.mark.parametrize(
    "what, text",
    [
        ("set", "the object is a set, which cannot be sent"),
        ("function", "the object[0] is a builtin_function_or_method, which cannot be sent"),
        ("objects", "the object['a'] is an array of object, which cannot be sent"),
        ("itself", "the object is nested too deeply to be sent to other ranks, or contains itself"),
    ],
    ids=lambda x: x if " " not in x else "",
)
def test_what_is_refused_is_an_error_on_every_rank(run_ranks: Run, what: str, text: str, call: str):
    """Nobody waits, and the ranks are still in step."""
    answers = run_ranks(2, refused, timeout=20, what=what, call=call)
    assert answers[0] == answers[1] and answers[0][0].startswith(text) and answers[0][1] == [0, 1]


def only_on_the_others(world: World) -> Any:
    """What the others pass to `broadcast_object` is not looked at."""
    with use_world(world):
        return broadcast_object("sent" if world.engine.rank == 0 else object())


def test_the_others_argument_does_not_matter(run_ranks: Run):
    assert run_ranks(2, only_on_the_others) == ["sent", "sent"]


# State dictionaries #


def carry(world: World) -> tuple[dict[str, bytes], dict[str, bytes], list[str], bool]:
    """From rank 0's dictionary into another model on all ranks."""
    with use_world(world):
        model, other = Odd(seed=1), Odd(seed=2)
        state = bms.store._save_to_rank0(model)
        names = sorted(state)
        load_state_dict(other, broadcast_object(state))
        return {name: x.tobytes() for name, x in state.items()}, other.raw(world), names, other.raw(world) == model.raw(world)


@pytest.mark.parametrize("ranks", [2, 3])
def test_state_dicts(run_ranks: Run, ranks: int):
    """Whole on rank 0, empty on the others."""
    answers = run_ranks(ranks, carry)
    (state, raw, names, _), *others = answers
    assert state == raw and len(names) == 13 and all(equal for *_, equal in answers)
    assert all(not state and not names for state, _, names, _ in others)


def load_nothing(world: World) -> str:
    """Where the dictionary is empty, as on other ranks than 0."""
    with use_world(world), pytest.raises(CheckpointError) as info:
        load_state_dict(Odd(), {})
    return str(info.value)


def test_an_empty_state_is_an_error(run_ranks: Run):
    for text in run_ranks(2, load_nothing):
        assert text.startswith("the state does not fit the model; 13 missing in it: count, one_fp32")


# Background saves #


def save_in_background(world: World, folder: str) -> bool:
    """The parameters change before the file is there."""
    with use_world(world):
        model, other = Odd(seed=4), Odd(seed=5)
        bms.save(model, f"{folder}/now")
        expected = model.raw(world)
        bms.save(model, f"{folder}/later", non_blocking=True)
        for p in model.get_parameters():
            p.asnumpy()[...] = 0
        bms.load(other, f"{folder}/later")
        return other.raw(world) == expected


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_file_is_that_of_a_blocking_save(run_ranks: Run, tmp_path: Path, ranks: int):
    assert run_ranks(ranks, save_in_background, folder=str(tmp_path)) == [True] * ranks
    assert (tmp_path / "now").read_bytes() == (tmp_path / "later").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["later", "now"]


def fail_in_background(world: World, folder: str, step: str) -> tuple[str, list[int]]:
    """The disk is full while rank 0 writes; every rank's error in the next step, and what they exchange then."""
    patch = pytest.MonkeyPatch()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(AtomicFile, "write", full)
    try:
        with use_world(world):
            bms.save(Odd(), f"{folder}/file", non_blocking=True)
            with pytest.raises(CheckpointError) as info:
                if step == "wait":
                    wait_for_saves()
                elif step == "load":
                    bms.load(Odd(), f"{folder}/other")
                else:
                    bms.save(Odd(), f"{folder}/other", non_blocking=step == "background")
            wait_for_saves()
            return str(info.value), allgather_objects(world.engine.rank)
    finally:
        patch.undo()


@pytest.mark.parametrize("step", ["wait", "load", "save", "background"])
def test_an_error_reaches_every_rank(run_ranks: Run, tmp_path: Path, step: str):
    (first, _), (second, exchanged) = run_ranks(2, fail_in_background, timeout=30, folder=str(tmp_path), step=step)
    assert first == f"{tmp_path}/file was not written in the background: [Errno 28] No space left on device"
    assert second == "a file saved with non_blocking=True was not written: rank(s) [0] failed; see their messages"
    assert exchanged == [0, 1] and not os.listdir(tmp_path)


# Initial values #


def holder(layers: Any) -> nn.Cell:
    """So that names are the same in every way to build it: layers.0.weight."""
    cell = nn.Cell()
    cell.layers = layers
    return cell


def build(way: str) -> nn.Cell:
    linear = bms.nn.Linear(5, 3)
    if way == "module":
        return holder(nn.CellList([linear]))
    if way == "block":
        return holder(nn.CellList([bms.Block(linear)]))
    if way == "kept":
        return holder(bms.TransformerBlockList([bms.Block(linear, use_checkpoint=False)]))
    return holder(bms.TransformerBlockList([linear]))


def initial(world: World) -> list[dict[str, np.ndarray]]:
    with use_world(world):
        states = []
        for way in ("module", "block", "kept", "list"):
            model = build(way)
            bms.init_parameters(model)
            states.append(state_dict(model))
        return states


def test_initial_values_depend_neither_on_the_way_nor_on_the_ranks(run_ranks: Run, single_world: World):
    """Upstream's test_init_parameters, and its multi_gpu."""
    first, *others = [*initial(single_world), *run_ranks(2, initial)[0], *run_ranks(3, initial)[0]]
    assert list(first) == ["layers.0.weight", "layers.0.bias"] and len(np.unique(first["layers.0.weight"])) == 15
    for other in others:
        assert list(other) == list(first) and all(np.array_equal(x, first[name]) for name, x in other.items())
    assert len(others) == 11
