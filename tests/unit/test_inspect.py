"""Looking at parameters and tensors on one rank: values and gradients by formula, in every kind of Block, and what is printed."""

from __future__ import annotations

from typing import Any, Iterator

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.compat.autograd import custom_op, hookable, no_grad
from bmtrain_ms.compat.executor import under_way
from bmtrain_ms.inspect import format_summary, inspect_model, inspect_tensor, record_tensor
from bmtrain_ms.nn.functional import cross_entropy
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from bmtrain_ms.store import state_dict
from bmtrain_ms_base.random import Draws
from tests.helpers.inspected import LAYERS, NAMES, WAYS, batch, build, reference, train

pytestmark = pytest.mark.usefixtures("single_world")

NUMBERS = ("max", "min", "std", "mean")


def statistics(x: np.ndarray) -> dict[str, float]:
    wide = np.asarray(x, np.float64).reshape(-1)
    deviation = wide.std(ddof=1) if wide.size > 1 else 0.0
    return {"max": wide.max(), "min": wide.min(), "std": deviation, "mean": wide.mean()}


def check_row(row: dict[str, Any], value: np.ndarray, grad: np.ndarray) -> None:
    """A line of a summary against the whole tensors."""
    expected = {**statistics(value), **{f"grad_{name}": statistics(grad)[name] for name in ("std", "mean")}}
    assert row["shape"] == value.shape
    for name, number in expected.items():
        assert type(row[name]) is float and row[name] == pytest.approx(number, rel=1e-5, abs=1e-6), (row["name"], name)


# Recorded tensors #


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_in_every_kind_of_block(way: str):
    """Upstream's test_inspector_hidden; there plain, Block and list agree to 1e-4. Twice: the second pass records anew."""
    model, x = build(way), batch()
    values, grads = reference(state_dict(model), x)
    for _ in range(2):
        inspector, by_x, _ = train(model, x)
        assert [(record.name, record.group) for record in inspector.records] == NAMES
        for record, value, grad in zip(inspector.records, values, grads):
            assert record.grad is not None and record.grad.dtype == ms.float32
            np.testing.assert_allclose(record.tensor.asnumpy(), value, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(record.grad.asnumpy(), grad, rtol=1e-5, atol=2e-6)
        assert np.array_equal(inspector.records[0].grad.asnumpy(), by_x)


@pytest.mark.parametrize("way", WAYS)
def test_recording_changes_nothing(way: str):
    model, x = build(way), Tensor(batch())
    differentiated = ms.value_and_grad(lambda x: (model.layers(x) ** 2).sum(), 0, model.trainable_params())
    value, (by_x, by_weights) = differentiated(x)
    _, other, others = train(model, batch())
    assert np.array_equal(by_x.asnumpy(), other)
    assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(by_weights, others)) and float(value.asnumpy()) > 0


@pytest.mark.parametrize("way", WAYS)
def test_summary_of_tensors(way: str):
    model, x = build(way), batch()
    values, grads = reference(state_dict(model), x)
    rows = train(model, x)[0].get_summary()
    assert [row["name"] for row in rows] == ["inputs.x", "y", "z"] * LAYERS
    for row, value, grad in zip(rows, values, grads):
        check_row(row, value, grad)


@pytest.mark.parametrize("way", WAYS)
def test_recomputation_records_gradients_only(way: str):
    """The tensors stay those of the forward pass, in its order."""
    model, at_the_end = build(way), []
    with inspect_tensor() as inspector:

        def loss(x: Tensor) -> Tensor:
            value = (model.layers(x) ** 2).sum()
            at_the_end.extend(inspector.get_tensor("y", index=i) for i in range(LAYERS))
            return value

        ms.grad(loss)(Tensor(batch()))
    after = [record.tensor for record in inspector.records if record.name == "y"]
    assert len(after) == LAYERS and all(a is b for a, b in zip(at_the_end, after))


def test_summary_lists_what_was_recorded():
    inspector = train(build("plain"), batch())[0]
    assert [list(row) for row in inspector.summary] == [["name", "group", "tensor", "grad"]] * 3 * LAYERS
    assert inspector.summary[1]["tensor"] is inspector.records[1].tensor
    inspector.summary[0]["name"] = "changed"  # a copy
    assert inspector.summary[0]["name"] == "x"


@pytest.mark.parametrize("way", ["plain", "kept", "zero 2"])
def test_recorded_tensors_are_differentiable(way: str):
    """Upstream's test uses `summary[i]["tensor"]` in a loss; where a Block is checkpointed its inside has no history."""
    model, x = build(way), batch()

    def loss(x: Tensor) -> Tensor:
        with inspect_tensor() as inspector:
            model.layers(x)
        return (inspector.summary[4]["tensor"] ** 2).sum()

    grad = ms.grad(loss)(Tensor(x)).asnumpy()
    state = state_dict(model)
    values, _ = reference(state, x)
    by_x = 2.0 * values[4] @ state["layers.1.linear.weight"]
    by_y = by_x * 0.2 * values[1]
    np.testing.assert_allclose(grad, by_x + by_y @ state["layers.0.linear.weight"], rtol=1e-4, atol=1e-5)


def test_gradients_have_the_loss_scale():
    model, x = build("list"), batch()
    manager = OptimManager(loss_scale=1024.0)
    manager.add_optimizer(AdamOptimizer(model.trainable_params()))
    with inspect_tensor() as inspector:
        manager.backward(lambda x: (model.layers(x) ** 2).sum(), Tensor(x))
    grads = reference(state_dict(model), x)[1]
    for record, grad in zip(inspector.records, grads):
        np.testing.assert_allclose(record.grad.asnumpy(), 1024.0 * grad, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("way", ["plain", "checkpointed", "kept"])
def test_two_passes_in_one_context(way: str):
    """Each pass has its own records and gradients."""
    model, x = build(way), batch()
    grad = ms.grad(lambda x: (model.layers(x) ** 2).sum())
    with inspect_tensor() as inspector:
        for factor in (1.0, 0.5):
            grad(Tensor(x * np.float32(factor)))
    halves = [reference(state_dict(model), x * np.float32(factor)) for factor in (1.0, 0.5)]
    assert len(inspector.records) == 2 * len(NAMES)
    for record, value, slope in zip(inspector.records, *map(lambda a, b: [*a, *b], *halves)):
        np.testing.assert_allclose(record.tensor.asnumpy(), value, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(record.grad.asnumpy(), slope, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("way", ["plain", "checkpointed", "kept"])
def test_without_differentiation_there_are_values_only(way: str):
    model, x = build(way), batch()
    with inspect_tensor() as inspector, no_grad():
        model.layers(Tensor(x))
    assert len(inspector.records) == len(NAMES) and all(record.grad is None for record in inspector.records)
    for row, value in zip(inspector.get_summary(), reference(state_dict(model), x)[0]):
        check_row(row, value, np.zeros(1))


def test_a_tensor_without_influence_has_no_gradient():
    def loss(x: Tensor) -> Tensor:
        record_tensor(x * 2.0, "unused")
        record_tensor(ops.stop_gradient(x), "stopped")
        return x.sum()

    with inspect_tensor() as inspector:
        ms.grad(loss)(Tensor([1.0, 2.0]))
    assert [record.grad for record in inspector.records] == [None, None]
    assert [(row["mean"], row["grad_mean"]) for row in inspector.get_summary()] == [(3.0, 0.0), (1.5, 0.0)]


def test_scalars_and_half_types():
    def loss(x: Tensor) -> Tensor:
        record_tensor(x, "half")
        total = x.astype(ms.float32).sum()
        record_tensor(total, "scalar")
        return total * 3.0

    with inspect_tensor() as inspector:
        ms.grad(loss)(Tensor(np.array([1.0, 2.0], np.float16)))
    half, scalar = inspector.get_summary()
    assert (half["shape"], half["mean"], half["grad_mean"]) == ((2,), 1.5, 3.0)
    assert (scalar["shape"], scalar["mean"], scalar["std"], scalar["grad_mean"]) == ((1,), 3.0, 0.0, 3.0)


# The context #


def test_outside_of_a_context_nothing_happens():
    x = Tensor([1.0])
    assert record_tensor(x, "x") is None
    with inspect_tensor() as inspector:
        pass
    record_tensor(x, "x")
    assert inspector.records == [] and inspector.get_summary() == []
    bms.shutdown()
    record_tensor(x, "x")  # nor before initialisation


def test_contexts_cannot_be_nested():
    with inspect_tensor() as inspector:
        with pytest.raises(RuntimeError, match="inspect_tensor is active already; it cannot be nested"), inspect_tensor():
            pass
        record_tensor(Tensor([1.0]), "x")
    assert len(inspector.records) == 1
    with pytest.raises(ZeroDivisionError), inspect_tensor():
        raise ZeroDivisionError
    with inspect_tensor() as again:
        record_tensor(Tensor([1.0]), "x")
    assert len(again.records) == 1 and len(inspector.records) == 1


@pytest.mark.parametrize("inside", [False, True])
def test_what_cannot_be_recorded(inside: bool):
    parameter = bms.DistributedParameter(np.ones(2, np.float32), name="p")
    for bad in (parameter, Parameter(Tensor([1.0]), name="q"), np.ones(2), None):
        text = f"record_tensor takes a tensor, not a {type(bad).__name__}; parameters are shown by inspect_model"
        with pytest.raises(TypeError) as info:
            if inside:
                with inspect_tensor():
                    record_tensor(bad, "x")
            else:
                record_tensor(bad, "x")
        assert str(info.value) == text


def test_get_tensor():
    """Upstream's never finds anything by group or index."""
    inspector = train(build("list"), batch())[0]
    every = inspector.records
    assert inspector.get_tensor("y") is every[1].tensor and inspector.get_tensor("y", index=1) is every[4].tensor
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"'y' was recorded 3 times, there is no index {index}"):
            inspector.get_tensor("y", index=index)
    assert inspector.get_tensor("x", group="inputs", index=2) is every[6].tensor
    assert inspector.get_tensor("z", index=0) is every[2].tensor and inspector.get_tensor("z", None, -1) is every[8].tensor
    for name, group in (("x", None), ("y", "inputs"), ("w", None)):
        with pytest.raises(KeyError) as info:
            inspector.get_tensor(name, group)
        assert info.value.args == (f"no tensor {name!r} was recorded in group {group!r}; recorded: x (group inputs), y, z",)
    with inspect_tensor() as empty:
        pass
    with pytest.raises(KeyError, match="recorded: nothing"):
        empty.get_tensor("x")


def test_a_record_without_its_gradient():
    def loss(x: Tensor) -> Tensor:
        record_tensor(x * 2.0, "with")
        y = x * 3.0
        record_tensor(y, "without", requires_grad=False)
        return (y * y).sum()

    with inspect_tensor() as inspector:
        ms.grad(loss)(Tensor(np.ones(2, np.float32)))
    assert [(r.name, r.grad is None) for r in inspector.records][1] == ("without", True)


# What it is made of #


def doubled(x: Tensor) -> Tensor:
    return custom_op(lambda x: (x + x,), lambda g: (g[0] + g[0],), x)[0]


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16], ids=str)
@pytest.mark.parametrize("function", [doubled, lambda x: x + x], ids=["ours", "MindSpore's"])
def test_hooks_on_results_of_our_own_functions(function: Any, dtype: Any):
    """2.5 ignores hooks on what a Cell with its own bprop returns. It has no product of bfloat16 on CPU either."""
    seen: list[list[float]] = []

    def loss(x: Tensor) -> Tensor:
        y = function(x.astype(dtype))
        y.register_hook(lambda grad: seen.append(grad.astype(ms.float32).asnumpy().tolist()))
        return (y.astype(ms.float32) ** 2).sum()

    with hookable():
        grad = ms.grad(loss)(Tensor([1.0, 2.0]))
    assert seen == [[4.0, 8.0]] and grad.asnumpy().tolist() == [8.0, 16.0]


def test_hookable_ends_with_its_context():
    with pytest.raises(ZeroDivisionError), hookable(), hookable():
        assert under_way.hookable == 2
        raise ZeroDivisionError
    assert under_way.hookable == 0
    x = Tensor([1.0])
    with no_grad():
        assert custom_op(lambda x: (x,), lambda g: g, x)[0] is x


def test_the_loss_itself_is_recorded():
    logits, targets = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32), Tensor(np.array([1, 2, 0], np.int32))

    def loss(x: Tensor) -> Tensor:
        value = cross_entropy(x, targets)
        record_tensor(value, "loss")
        return value * 8.0

    with inspect_tensor() as inspector:
        ms.grad(loss)(Tensor(logits))
    assert float(inspector.records[0].grad.asnumpy()) == 8.0


def test_replay_numbers_as_the_first_pass_did():
    draws = Draws(seed=1)
    draws.next_key()
    start = draws.count, draws.records
    first = [draws.next_key().tolist() for _ in range(2)]
    draws.records += 3
    for _ in range(2):
        with draws.replay(start):
            assert draws.replaying and draws.records == 0
            assert [draws.next_key().tolist() for _ in range(2)] == first
            with draws.replay((1, 7)):  # recomputation inside of recomputation
                assert draws.records == 7 and draws.next_key().tolist() == first[0]
            assert (draws.count, draws.records, draws.replaying) == (3, 0, True)
        assert (draws.count, draws.records, draws.replaying) == (3, 3, False)
    with pytest.raises(ZeroDivisionError), draws.replay(start):
        raise ZeroDivisionError
    assert (draws.count, draws.records, draws.replaying) == (3, 3, False)


# Parameters #


class Parts(nn.Cell):
    """Blocks, a tie, and a plain Parameter."""

    def __init__(self, dtype: Any = ms.float32):
        super().__init__()
        self.layers = bms.TransformerBlockList([bms.nn.Linear(3, 3, dtype=dtype) for _ in range(2)])
        self.head, self.twin = bms.nn.Linear(3, 2, bias=False, dtype=dtype), bms.nn.Linear(3, 2, bias=False, dtype=dtype)
        self.twin.weight = self.head.parameter("weight")
        self.scale = Parameter(Tensor(np.array([0.5, 2.0], np.float32)), name="scale")

    def construct(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)).astype(ms.float32) * self.scale


@pytest.fixture
def trained() -> Iterator[tuple[Parts, OptimManager, Any]]:
    """A model, its manager, and a function that runs a pass."""
    model = Parts()
    bms.init_parameters(model)
    manager = OptimManager(loss_scale=512.0)
    manager.add_optimizer(AdamOptimizer(model.trainable_params(), lr=0.1))
    x = Tensor(batch()[:, :3].copy())
    yield model, manager, lambda: manager.backward(lambda: (model(x) ** 2).sum())


ALL = ["scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "head.weight"]


def names(*args: Any, **kwargs: Any) -> list[str]:
    return [row["name"] for row in inspect_model(*args, **kwargs)]


def test_names_are_paths_each_parameter_once():
    """A Block is transparent, a tied parameter goes by its first place."""
    model = Parts()
    assert names(model, "*") == ALL
    assert names(model, "*.weight") == ["layers.0.weight", "layers.1.weight", "head.weight"]
    assert names(model, "layers.[1-9].b*") == ["layers.1.bias"] and names(model, "head.weight") == ["head.weight"]
    assert names(model, "*.WEIGHT") == names(model, "twin*") == inspect_model(model, "nothing") == []
    assert names(model, "a.head*", "a.") == ["a.head.weight"] and names(model, "head*", "a.") == []
    assert names(model.layers[0], "*") == ["weight", "bias"] and names(model.layers, "*", prefix="x.")[0] == "x.0.weight"


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16], ids=str)
def test_statistics_without_gradients(dtype: Any):
    model = Parts(dtype)
    bms.init_parameters(model)
    state = state_dict(model)
    rows = inspect_model(model, "*")
    assert [list(row) for row in rows[:1]] == [["name", "shape", "std", "mean", "max", "min", "grad_std", "grad_mean"]]
    for row in rows:
        check_row(row, state[row["name"]].astype(np.float64), np.zeros(1))


def test_gradients_are_without_the_loss_scale(trained):
    model, manager, run = trained
    x = Tensor(batch()[:, :3].copy())
    exact = ms.grad(lambda: (model(x) ** 2).sum(), None, model.trainable_params())()
    grads = {p.name: g.asnumpy() for p, g in zip(model.trainable_params(), exact)}
    state = state_dict(model)
    for times in (1, 2):
        run()
        for row in inspect_model(model, "*"):
            check_row(row, state[row["name"]], times * grads[row["name"]])
    manager.zero_grad()
    assert all(row["grad_std"] == row["grad_mean"] == 0.0 for row in inspect_model(model, "*"))


def test_frozen_parameters_between_passes(trained):
    """Upstream's test_requires_grad: a frozen line shows 0, and its values stay; the others are trained."""
    model, manager, run = trained
    for frozen in (["weight"], ["bias"], [], ["weight", "bias"]):
        for kind in ("weight", "bias"):
            model.layers[1].parameter(kind).requires_grad = kind not in frozen
        before = {row["name"]: row for row in inspect_model(model, "*")}
        manager.zero_grad()
        run()
        after = {row["name"]: row for row in inspect_model(model, "*")}
        manager.step()
        stepped = {row["name"]: row for row in inspect_model(model, "*")}
        for name in ALL:
            is_frozen = name in [f"layers.1.{kind}" for kind in frozen]
            (line,) = format_summary([after[name]]).splitlines()[1:]
            assert line.endswith("      0.0000      0.0000") == is_frozen, line
            assert {k: before[name][k] for k in NUMBERS} == {k: after[name][k] for k in NUMBERS}
            assert (stepped[name]["mean"] == after[name]["mean"]) == is_frozen, name


def test_frozen_after_the_pass(trained):
    """The gradient is still accumulated, but will not be used."""
    model, _, run = trained
    run()
    parameter = model.head.parameter("weight")
    before = inspect_model(model, "head.weight")[0]
    parameter.requires_grad = False
    frozen = inspect_model(model, "head.weight")[0]
    parameter.requires_grad = True
    assert before["grad_std"] > 0 and frozen == {**before, "grad_std": 0.0, "grad_mean": 0.0}
    assert inspect_model(model, "head.weight") == [before]


def test_what_is_not_finite_is_shown():
    cell = nn.Cell()
    cell.nan = bms.DistributedParameter(np.array([1.0, np.nan], np.float32))
    cell.inf = bms.DistributedParameter(np.array([1.0, np.inf], np.float32))
    nan, inf = inspect_model(cell, "*")
    assert all(np.isnan(nan[name]) for name in NUMBERS)
    assert inf["max"] == inf["mean"] == np.inf and inf["min"] == 1.0 and np.isnan(inf["std"])


def test_large_offsets_do_not_hide_the_deviation():
    """Two passes: the mean is subtracted before squaring."""
    cell = nn.Cell()
    cell.p = bms.DistributedParameter(np.array([12345677, 12345678, 12345680], np.float32))
    assert inspect_model(cell, "*")[0]["std"] == pytest.approx((7 / 3) ** 0.5, rel=1e-9)


# Text #


def row(name: str, shape: tuple[int, ...], *numbers: float) -> dict[str, Any]:
    return dict(zip(("name", "shape", "max", "min", "std", "mean", "grad_std", "grad_mean"), (name, shape, *numbers)))


def test_format_summary():
    rows = [row("a", (2, 3), 1, -1, 0.5, 0.00004, 0, 0), row("layers.0.weight", (), 12345.678, -np.inf, np.nan, 2, 3, -4.56789)]
    assert format_summary(rows).split("\n") == [
        "name            shape                        max         min         std        mean    grad_std   grad_mean",
        "a               (2, 3)                    1.0000     -1.0000      0.5000      0.0000      0.0000      0.0000",
        "layers.0.weight ()                    12345.6780        -inf         nan      2.0000      3.0000     -4.5679",
    ]
    assert format_summary([]) == "name shape                        max         min         std        mean    grad_std   grad_mean"
