"""A layer of experts against the formula in float64 NumPy, with all gradients, on one rank."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import Engine, Mesh, SimulatedEngine, Work, World, use_world
from bmtrain_ms.comm.wrappers import Around
from bmtrain_ms.compat.autograd import custom_vjp
from bmtrain_ms.model_center.layer import FeedForward
from bmtrain_ms.nn import ROUTERS, Halves, Linear, MoE, RouterConfig, Routing
from bmtrain_ms_base.routing import capacity_of, kept_choices
from tests.unit.test_router import differences, softmax

DIM, FF = 3, 2


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def oracle(
    p: dict[str, np.ndarray], x: np.ndarray, choices: np.ndarray, kept: np.ndarray, config: RouterConfig, shared: str = ""
) -> np.ndarray:
    """What the layer returns, of float64 numbers, where each token's experts are known."""
    logits = x @ p["gate.weight"].T
    scores = softmax(logits) if config.score == "softmax" else 1 / (1 + np.exp(-logits))
    weights = np.take_along_axis(scores, choices, 1)
    weights = (weights / weights.sum(1, keepdims=True) if config.renormalise else weights) * config.scale
    out = np.zeros(x.shape)
    for t, j in np.argwhere(kept):
        gate, up, down = (p[f"experts.{name}_proj.weight"][choices[t, j]] for name in ("gate", "up", "down"))
        out[t] += weights[t, j] * (down @ (silu(gate @ x[t]) * (up @ x[t])))
    if shared == "experts":
        out += x @ p["shared_experts.weight"].T
    if shared == "gated":
        out += x @ p["shared_expert.weight"].T / (1 + np.exp(-x @ p["shared_expert_gate.weight"].T))
    return out


def layer(experts: int, top_k: int, config: RouterConfig = ROUTERS["mixtral"], **options: Any) -> MoE:
    made = MoE(DIM, FF, experts, top_k, config, init_std=1.0, **options)
    bms.init_parameters(made)
    return made


def check(made: MoE, x: np.ndarray, tokens: np.ndarray | None = None, shared: str = "", block: str = "") -> dict[str, np.ndarray]:
    """Compare the result and all gradients of sum(result * numbers); returns the gradients."""
    names, params = zip(*((p.name, p) for p in made.trainable_params()))
    p = {name: param.gather().asnumpy().astype(np.float64) for name, param in zip(names, params)}
    choice = made.gate(Tensor(x))
    kept = kept_choices(choice.experts, tokens)
    if made.capacity is not None:
        rows = len(x) if tokens is None else int(tokens.sum())
        limit = capacity_of(rows, made.gate.experts, made.gate.top_k, made.capacity)
        kept = kept_choices(choice.experts, tokens, limit, choice.weights.asnumpy() if made.drop == "probs" else None)
    pulled = np.random.default_rng(9).normal(size=x.shape)
    hidden = Parameter(Tensor(x), name="x")
    run: Any = bms.Block(made, use_checkpoint=block == "again") if block else made

    def loss() -> Tensor:
        return (run(hidden * 1.0, Routing(tokens)) * Tensor(pulled.astype(np.float32))).sum()

    value, found = ms.value_and_grad(loss, None, [hidden, *params])()

    def right(**changed: np.ndarray) -> float:
        out = oracle({**p, **changed}, changed.get("x", wide), choice.experts, kept, made.gate.config, shared)
        return float((out * pulled).sum())

    wide = x.astype(np.float64)
    assert value.asnumpy() == pytest.approx(right(), rel=2e-5, abs=2e-5)
    grads = {name: g.asnumpy() for name, g in zip(["x", *names], found)}
    for name, grad in grads.items():
        expected = differences(lambda moved, name=name: right(**{name: moved}), {"x": wide, **p}[name])
        scale = max(1e-2, np.abs(expected).max())
        np.testing.assert_allclose(grad.reshape(expected.shape), expected, rtol=0, atol=3e-5 * scale, err_msg=name)
    return {name: grad.reshape({"x": wide, **p}[name].shape) for name, grad in grads.items()}


def hidden(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)


@pytest.mark.parametrize("block", ["", "kept", "again"])
@pytest.mark.parametrize("shared", ["", "experts", "gated"])
def test_the_layer_and_all_its_gradients(implementation: str, shared: str, block: str):
    options = {"shared": Linear(DIM, DIM, bias=False), "shared_gate": shared == "gated"} if shared else {}
    check(layer(4, 2, **options), hidden(6), shared=shared, block=block)


class NotedWork(Work):
    def __init__(self, inner: Work, noted: list[str], label: str):
        self.inner, self.noted, self.label, self.outputs = inner, noted, label, inner.outputs

    def done(self) -> bool:
        return self.inner.done()

    def wait(self) -> list[Tensor]:
        self.noted.append(f"waits: {self.label}")
        return self.inner.wait()


class NotingEngine(Around):
    """Notes when tokens begin to travel, and when they are waited for."""

    def __init__(self, inner: Engine, noted: list[str]):
        super().__init__(inner)
        self.noted = noted

    def _around(self, op: str, label: str, tensors: Any, received: int, work: Work) -> Work:
        if op != "all_to_all":
            return work
        self.noted.append(f"starts: {label}")
        return NotedWork(work, self.noted, label)

    def _rewrap(self, inner: Engine) -> Engine:
        return NotingEngine(inner, self.noted)


def noting(noted: list[str], name: str, x: Tensor) -> Tensor:
    """x; notes when that is computed, and when its gradient is."""

    def forward(x: Tensor) -> tuple[tuple[Tensor, ...], None]:
        noted.append(name)
        return (x * 1.0,), None

    def backward(_: Any, __: None, grads: tuple[Tensor, ...]) -> list[Tensor]:
        noted.append(f"{name}, backward")
        return [grads[0] * 1.0]

    return custom_vjp(forward, backward, x)[0]


class NotedHalves(Halves):
    def __init__(self, noted: list[str]):
        super().__init__()
        self.noted, self.inner = noted, FeedForward(DIM, FF)

    def widen(self, hidden: Tensor) -> Tensor:
        return noting(self.noted, "widens", self.inner.widen(hidden))

    def narrow(self, inner: Tensor) -> Tensor:
        return noting(self.noted, "narrows", self.inner.narrow(inner))


def test_halves_of_a_shared_layer_are_computed_while_tokens_travel():
    """There and back, and their gradients likewise."""
    noted: list[str] = []
    with use_world(World(NotingEngine(SimulatedEngine(0, 2), noted), Mesh(2, 0, ep=2))):
        made = MoE(DIM, FF, 4, 2, shared=NotedHalves(noted))
        bms.init_parameters(made)
        x = Parameter(Tensor(hidden(6)), name="x")
        ms.value_and_grad(lambda: made(x * 1.0).sum(), None, [x, *made.trainable_params()])()
    there, back = "experts, there", "experts, back"
    forward = [f"starts: {there}", "widens", f"waits: {there}", f"starts: {back}", "narrows", f"waits: {back}"]
    assert noted[:6] == forward
    there, back = f"{there}, backward", f"{back}, backward"
    assert noted[6:] == [
        f"starts: {back}",
        "narrows, backward",
        f"waits: {back}",
        f"starts: {there}",
        "widens, backward",
        f"waits: {there}",
    ]


@pytest.mark.parametrize("gated", [False, True])
def test_halves_make_what_the_whole_makes(implementation: str, gated: bool):
    """To the last bit; what is put around the layer (a hook, a construct of a class's own) is not passed by."""

    class Twice(FeedForward):
        def construct(self, hidden: Tensor) -> Tensor:
            return 2.0 * super().construct(hidden)

    found = []
    for kind in (FeedForward, FeedForward, Twice):
        shared = kind(DIM, FF)
        made = layer(4, 2, shared=shared, shared_gate=gated)
        called: list[int] = []

        def note(cell: Any, inputs: Any, output: Any) -> None:
            called.append(1)  # noqa: B023  (of this round)

        if len(found) == 1:
            shared.register_forward_hook(note)
        params = made.trainable_params()
        value, grads = ms.value_and_grad(lambda made=made: made(Tensor(hidden(6))), None, params)()
        assert called == ([1] if len(found) == 1 else [])
        found.append([value.asnumpy(), *(g.asnumpy() for g in grads)])
    for halves, whole in zip(*found[:2]):
        np.testing.assert_array_equal(halves, whole)
    assert not np.array_equal(found[0][0], found[2][0])


@pytest.mark.parametrize("name", ["grok-1", "deepseek-v2", "deepseek-v3"])
def test_routers_of_known_models(implementation: str, name: str):
    check(layer(16, 6, ROUTERS[name]), hidden(3))


@pytest.mark.parametrize("drop", ["probs", "position"])
def test_capacity(implementation: str, drop: str):
    check(layer(4, 2, capacity=0.75, drop=drop), hidden(7))


def test_policies_drop_different_tokens(single_world: Any):
    config, x = ROUTERS["grok-1"], Tensor(hidden(9))
    results = [layer(4, 1, config, capacity=0.5, drop=drop)(x).asnumpy() for drop in ("probs", "position")]
    assert not np.array_equal(*results)
    for result in results:
        assert (result == 0).all(1).any()  # a token of which nothing was kept


def test_rows_that_are_no_tokens(implementation: str):
    x = hidden(5)
    tokens = np.array([True, True, False, True, False])
    grads = check(layer(4, 2), x, tokens)
    assert (grads["x"][~tokens] == 0).all()
    made = layer(4, 2)
    x[2], x[4] = 7.0, -7.0
    without = made(Tensor(x[tokens])).asnumpy()
    np.testing.assert_array_equal(made(Tensor(x), Routing(tokens)).asnumpy()[tokens], without)


def test_trap_10_empty_expert(implementation: str):
    """Its gradients are zeros: not absent, and not NaN. So where nobody has a token at all."""
    made = layer(4, 1)
    weight = np.zeros((4, DIM), np.float32)
    weight[0] = 1.0
    made.gate.parameter("weight").copy_full(weight)
    grads = check(made, np.abs(hidden(5)))
    for part in ("gate", "up", "down"):
        grad = grads[f"experts.{part}_proj.weight"]
        assert np.abs(grad[0]).max() > 0 and (grad[1:] == 0).all()
    grads = check(layer(4, 2), hidden(3), np.zeros(3, bool))
    assert all((grad == 0).all() for grad in grads.values())


def test_float16_sums_in_float32(implementation: str):
    """Weights are float32, and so is the sum over a token's experts: the result is rounded once."""
    x = hidden(6).astype(np.float16)
    made = layer(4, 4, dtype=ms.float16)
    assert made.gate.parameter("weight").dtype == ms.float32
    choice = made.gate(Tensor(x))
    p = {name: q.gather().asnumpy().astype(np.float64) for name, q in ((q.name, q) for q in made.trainable_params())}
    right = oracle(p, x.astype(np.float64), choice.experts, np.ones((6, 4), bool), ROUTERS["mixtral"])
    out = made(Tensor(x))
    assert out.dtype == ms.float16
    np.testing.assert_allclose(out.asnumpy(), right, rtol=0, atol=4e-3 * np.abs(right).max())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), experts=st.integers(1, 6), top_k=st.integers(1, 6), capacity=st.sampled_from([None, 0.3, 1.0]))
def test_any_sizes(single_world: Any, rows: int, experts: int, top_k: int, capacity: float | None):
    made = layer(experts, min(top_k, experts), capacity=capacity)
    x, choice = hidden(rows, rows), made.gate(Tensor(hidden(rows, rows)))
    limit = None if capacity is None else capacity_of(rows, experts, made.gate.top_k, capacity)
    kept = kept_choices(choice.experts, None, limit, choice.weights.asnumpy())
    p = {q.name: q.gather().asnumpy().astype(np.float64) for q in made.trainable_params()}
    right = oracle(p, x.astype(np.float64), choice.experts, kept, ROUTERS["mixtral"])
    np.testing.assert_allclose(made(Tensor(x)).asnumpy(), right, rtol=0, atol=2e-5 * max(1e-3, np.abs(right).max()))


def test_a_token_s_result_does_not_depend_on_the_others(single_world: Any):
    made, x = layer(4, 2), hidden(8)
    order = np.random.default_rng(1).permutation(8)
    together = made(Tensor(x)).asnumpy()
    np.testing.assert_allclose(made(Tensor(np.ascontiguousarray(x[order]))).asnumpy(), together[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made(Tensor(x[3:4])).asnumpy(), together[3:4], rtol=1e-5, atol=1e-6)


def test_losses_are_counted_once_when_a_block_computes_again(single_world: Any):
    config = RouterConfig(balance="global_batch", balance_coef=0.5, z_coef=0.1, bias=True)
    found = []
    for block in (None, False, True):
        made, x = layer(4, 2, config), Parameter(Tensor(hidden(6)), name="x")
        run: Any = made if block is None else bms.Block(made, use_checkpoint=block)
        params = made.trainable_params()
        for _ in range(2):  # micro-batches: the second one's counts are those of both

            def loss(run: Any = run, x: Parameter = x) -> Tensor:
                told = Routing()
                return told.add_losses((run(x * 1.0, told) ** 2).mean()) * 4.0

            value, grads = ms.value_and_grad(loss, None, [x, *params])()
        assert made.gate.seen().sum() == 2 * 6 * 2
        found.append([value.asnumpy(), *(g.asnumpy() for g in grads)])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_names_and_shapes(single_world: Any):
    made = layer(4, 2, RouterConfig(bias=True), shared=Linear(DIM, DIM, bias=False), shared_gate=True)
    shapes = {p.name: getattr(p, "full_shape", tuple(p.shape)) for p in made.get_parameters()}
    assert shapes == {
        "gate.weight": (4, DIM),
        "gate.e_score_correction_bias": (4,),
        "experts.gate_proj.weight": (4, FF, DIM),
        "experts.up_proj.weight": (4, FF, DIM),
        "experts.down_proj.weight": (4, DIM, FF),
        "shared_expert.weight": (DIM, DIM),
        "shared_expert_gate.weight": (1, DIM),
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"capacity": 0.0}, "capacity must be a positive number, or None for no limit, not 0.0"),
        ({"drop": "probs"}, "drop='probs' has no effect without a capacity"),
        ({"capacity": 1.0, "drop": "last"}, "drop must be one of probs, position, not 'last'"),
        ({"shared_gate": True}, "shared_gate=True needs a shared layer"),
        ({"top_k": 5}, "top_k=5 of 4 experts cannot be chosen"),
    ],
)
def test_refused_options(single_world: Any, options: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        MoE(DIM, FF, 4, **{"top_k": 2, **options})
