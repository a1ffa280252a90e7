"""Objects that travel as JSON, and state dictionaries, on one rank; tests/ranks/test_store_ranks.py has several."""

from __future__ import annotations

import enum
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError, LoadResult
from bmtrain_ms.store import _decoded, allgather_objects, broadcast_object, load_state_dict, state_dict
from tests.helpers.objects import MARK, objects, same

pytestmark = pytest.mark.usefixtures("single_world")


# Objects #


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(objects)
def test_round_trip(x: Any):
    assert same(broadcast_object(x), x)


SAMPLES: list[Any] = [
    [],
    {},
    (),
    "",
    b"",
    [[], [[]], ()],
    "ünïcödé \U0001f600 \x00 \ud800",
    [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324],
    [2**63, -(2**64), 10**5000, -(10**5000)],
    [True, 1, 1.0, False, 0],
    {1: "int", "1": "str", (1, "a"): "tuple", None: 0, 1.5: 1, b"x": 2},
    {(1, (2, ()), b"k"): [(3, [4])]},
    {MARK: "error", "text": "just data"},
    {MARK: {MARK: "array", "dtype": "object"}, 3: {MARK: "tuple", "items": []}},
    np.array(2.5),
    np.float32(2.5),
    np.bool_(True),
    np.zeros((0, 3), np.int16),
    np.arange(12).reshape(3, 4)[::2, ::-1],
    np.arange(3, dtype=">i4"),
]


@pytest.mark.parametrize("x", SAMPLES, ids=range(len(SAMPLES)))
def test_samples(x: Any):
    assert same(broadcast_object(x), x) and same(allgather_objects(x), [x])


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16, ms.float32, ms.float64, ms.int32, ms.uint8, ms.bool_], ids=str)
def test_tensors_arrive_as_tensors(dtype: Any):
    for shape in ((), (0, 2), (2, 3)):
        x = Tensor(np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(np.float32)).astype(dtype)
        assert same(broadcast_object({"x": [x]}), {"x": [x]})
    parameter = Parameter(Tensor([1.0, 2.0]), name="p")
    assert type(broadcast_object(parameter)) is Tensor


def test_what_arrives_is_a_copy():
    array, tensor = np.zeros(3), Tensor(np.zeros(3, np.float32))
    received, other = broadcast_object([array, tensor])
    array[0] = 1.0
    tensor[0] = 1.0
    assert not received.any() and not other.asnumpy().any()
    received[1] = 2.0  # it can be written to


class Color(enum.IntEnum):
    """An int that is more than one."""

    RED = 1


class Text(str):
    """A str that is more than one."""


class Bomb:
    """Its pickle writes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)


OTHERS = "which cannot be sent to other ranks; numbers, strings, bytes, lists, tuples, dicts, arrays and tensors can"
REFUSED = [
    ({1, 2}, "the object is a set, " + OTHERS),
    (object(), "the object is a object, " + OTHERS),
    ([1, (2, {"a": 3j})], "the object[1][1]['a'] is a complex, " + OTHERS),
    ({frozenset(): 1}, "a key of the object is a frozenset, " + OTHERS),
    (OrderedDict(a=1), "the object is a OrderedDict, " + OTHERS),
    (Color.RED, "the object is a Color, " + OTHERS),
    (Text("x"), "the object is a Text, " + OTHERS),
    ([print], "the object[0] is a builtin_function_or_method, " + OTHERS),
    ({"a": np.array([None])}, "the object['a'] is an array of object, which cannot be sent to other ranks"),
    (np.array("text"), "the object is an array of <U4, which cannot be sent to other ranks"),
    (np.datetime64("2025-01-01"), "the object is an array of datetime64[D], which cannot be sent to other ranks"),
    (np.zeros(1, [("a", "i4")]), "the object is an array of [('a', '<i4')], which cannot be sent to other ranks"),
]


@pytest.mark.parametrize("function", [broadcast_object, allgather_objects])
@pytest.mark.parametrize("x, text", REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_is_refused(function: Any, x: Any, text: str):
    with pytest.raises(TypeError) as info:
        function(x)
    assert str(info.value) == text


def test_what_contains_itself_or_is_too_deep():
    itself: list[Any] = []
    itself.append(itself)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for x in (itself, deep):
        with pytest.raises(TypeError, match="the object is nested too deeply to be sent to other ranks, or contains itself"):
            broadcast_object(x)
    while deep:  # one by one: the interpreter's stack would not hold it
        deep = deep.pop()


# What arrives can do nothing #


def test_pickles_are_bytes(tmp_path: Path):
    bomb = Bomb(str(tmp_path / "exploded"))
    data = pickle.dumps(bomb)
    assert broadcast_object(data) == data and broadcast_object({MARK: data}) == {MARK: data}
    with pytest.raises(TypeError):
        broadcast_object(bomb)
    with pytest.raises(TypeError):
        broadcast_object(np.array([bomb], object))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "message",
    [
        {MARK: "array", "dtype": "object", "shape": [1], "data": "AAAAAAAAAAA="},
        {MARK: "tensor", "dtype": "O,O", "shape": [1], "data": "AAAAAAAAAAAAAAAAAAAAAA=="},
        {MARK: "scalar", "dtype": "O", "shape": [], "data": "AAAAAAAAAAA="},
        {MARK: "error", "text": "boo"},
    ],
    ids=lambda message: f"{message[MARK]} {message.get('dtype')}",
)
def test_a_message_that_no_rank_would_write(message: dict[str, Any]):
    """Objects are never made out of addresses."""
    for text in (message, [message], {"a": message}, {MARK: "dict", "items": [["a", message]]}):
        with pytest.raises(TypeError):
            _decoded(json.dumps(text).encode())


# State dictionaries #


def dense(seed: int) -> nn.Cell:
    """MindSpore's own Linear, with values."""
    cell, random = nn.Dense(4, 3), np.random.default_rng(seed)
    for p in cell.get_parameters():
        p.set_data(Tensor(random.standard_normal(p.shape).astype(np.float32)))
    return cell


WAYS = {
    "module": lambda: bms.nn.Linear(4, 3),
    "block": lambda: bms.Block(bms.nn.Linear(4, 3)),
    "kept": lambda: bms.Block(bms.nn.Linear(4, 3), use_checkpoint=False),
    "list": lambda: bms.TransformerBlockList([bms.nn.Linear(4, 3)]),
    "wrapped": lambda: bms.BMTrainModelWrapper(nn.Dense(4, 3), verbose=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_a_plain_state_goes_into_any_module_and_back(way: str, kind: str):
    """Upstream's test_load_ckpt: the same keys, exactly equal values."""
    plain, model = dense(1), WAYS[way]()
    prefix = "0." if way == "list" else ""
    arrays = {prefix + p.name: p.asnumpy() for p in plain.get_parameters()}
    state: dict[str, Any] = arrays if kind == "arrays" else {name: Tensor(x) for name, x in arrays.items()}
    assert load_state_dict(model, state) == LoadResult([], [])
    back = state_dict(model)
    assert list(back) == list(state)
    assert all(np.array_equal(back[name], x) and back[name].dtype == np.float32 for name, x in arrays.items())
    other = dense(2)
    load_state_dict(other, {name.removeprefix(prefix): x for name, x in back.items()})
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    assert np.array_equal(other(Tensor(x)).asnumpy(), plain(Tensor(x)).asnumpy())
    np.testing.assert_allclose(model(Tensor(x)).asnumpy(), plain(Tensor(x)).asnumpy(), rtol=1e-5, atol=1e-6)


class Mixed(nn.Cell):
    """Sharded parameters of three types, and what is whole on every rank: a scalar among it."""

    def __init__(self, seed: int):
        super().__init__()
        random = np.random.default_rng(seed)
        for name, dtype in {"wide": ms.float32, "half": ms.float16, "brain": ms.bfloat16}.items():
            p = bms.DistributedParameter(bms.empty(3, 5, dtype=dtype))
            setattr(self, name, p)
            p.copy_full(Tensor(random.standard_normal((3, 5)).astype(np.float32)).astype(dtype))
        self.scale = Parameter(Tensor(np.float32(seed)), name="scale")
        self.count = Parameter(Tensor(np.array([seed, 7], np.int32)), name="count", requires_grad=False)


def test_types_and_shapes_are_those_of_the_parameters():
    state = state_dict(Mixed(3))
    shapes = {name: (str(x.dtype), x.shape) for name, x in state.items()}
    assert shapes == {
        "wide": ("float32", (3, 5)),
        "half": ("float16", (3, 5)),
        "brain": ("bfloat16", (3, 5)),
        "scale": ("float32", ()),
        "count": ("int32", (2,)),
    }
    for other in (state, {name: Tensor(x) for name, x in state.items()}, broadcast_object(state)):
        model = Mixed(4)
        load_state_dict(model, other)
        assert all(np.array_equal(x.view(np.uint8), state[name].view(np.uint8)) for name, x in state_dict(model).items() if x.ndim)
        assert state_dict(model)["scale"] == 3.0


def test_a_state_is_a_copy():
    model = Mixed(1)
    state = state_dict(model)
    before = {name: x.copy() for name, x in state.items()}
    for p in model.get_parameters():
        p.set_data(Tensor(np.zeros(p.shape, np.float32)).astype(p.dtype), slice_shape=True)
    assert all(np.array_equal(x, before[name]) for name, x in state.items())
    load_state_dict(model, state)
    for x in state.values():
        x[...] = 0
    assert model.wide.asnumpy().any() and model.count.asnumpy().any()


def test_values_are_converted():
    model = Mixed(1)
    load_state_dict(model, {**state_dict(model), "half": np.full((3, 5), 1.00001, np.float64), "brain": np.ones((3, 5))})
    state = state_dict(model)
    assert (state["half"] == 1.0).all() and (state["brain"].astype(np.float32) == 1.0).all()


def test_other_names_and_shapes():
    model = Mixed(1)
    before = {name: x.tobytes() for name, x in state_dict(model).items()}
    state = state_dict(Mixed(2))
    for changed, text in (
        ({"halt": state["half"]}, "1 missing in it: half (did you mean halt?); 1 unexpected in it: halt"),
        ({"half": state["half"][:2]}, "1 shapes differ: half: (2, 5) in it, (3, 5) here"),
    ):
        other = {**{name: x for name, x in state.items() if name != "half"}, **changed}
        with pytest.raises(CheckpointError) as info:
            load_state_dict(model, other)
        assert str(info.value) == "the state does not fit the model; " + text
        assert {name: x.tobytes() for name, x in state_dict(model).items()} == before
    result = load_state_dict(model, {"wide": state["wide"], "new": np.zeros(1)}, strict=False)
    assert result == LoadResult(["half", "brain", "scale", "count"], ["new"])
    assert np.array_equal(state_dict(model)["wide"], state["wide"])


@pytest.mark.parametrize("src", [1, -1, "a", None])
def test_a_rank_that_is_not_there_sends_nothing(src: Any):
    with pytest.raises(ValueError, match=r"^src must be one of the ranks 0 to 0, not (1|-1|'a'|None)$"):
        broadcast_object(5, src=src)
