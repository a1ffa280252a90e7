"""Routers: golden numbers of their choices, weights and losses, and what is refused."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from bmtrain_ms.compat.autograd import no_grad
from bmtrain_ms.compat.cells import parameter_table
from bmtrain_ms.nn import ROUTERS, Router, RouterConfig, Routing, update_router_bias

pytestmark = pytest.mark.usefixtures("implementation")  # every test twice: on the host, and as on a device

LOGITS = np.array([[1, 0.5, -0.5, 0], [0.2, 0.1, 0.9, -1], [2, -1, 0.3, 0.3001], [-0.4, 1.2, 0.8, 0]], np.float32)


def router(config: RouterConfig, experts: int = 4, top_k: int = 2) -> Router:
    """One whose logits are what it is given."""
    made = Router(experts, experts, top_k, config)
    made.parameter("weight").copy_full(np.eye(experts, dtype=np.float32))
    return made


def gradient(config: RouterConfig, logits: np.ndarray, routing: dict[str, Any], top_k: int = 2, weight: float = 1.0) -> tuple:
    """Losses that a router adds, and their gradient of the logits, divided by the weight."""
    made, x = router(config, logits.shape[1], top_k), Parameter(Tensor(logits), name="x")

    def loss() -> Tensor:
        told = Routing(**routing)
        return told.add_losses((made(x * 1.0, told).weights * 0.0).sum(), weight) * 3.0

    value, grads = ms.value_and_grad(loss, None, [x])()
    return value.asnumpy().item() / 3.0 / weight, grads[0].asnumpy() / 3.0 / weight


def recorded(call: Any, logits: np.ndarray = LOGITS) -> Any:
    """What a call of a router returns in a pass whose gradient is taken."""
    found, x = [], Parameter(Tensor(logits), name="x")

    def loss() -> Tensor:
        found.append(call(x * 1.0))
        return found[0].weights.sum()

    ms.value_and_grad(loss, None, [x])()
    return found[0]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def differences(function: Any, x: np.ndarray) -> np.ndarray:
    """The gradient of a function of float64 numbers."""
    x, grad = x.astype(np.float64), np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        ends = []
        for step in (1e-6, -1e-6):
            moved = x.copy()
            moved[i] += step
            ends.append(function(moved))
        grad[i] = (ends[0] - ends[1]) / 2e-6
    return grad


def test_golden_choices_and_weights():
    choice = router(ROUTERS["mixtral"])(Tensor(LOGITS))
    assert choice.experts.tolist() == [[0, 1], [2, 0], [0, 3], [1, 2]]
    assert np.bincount(choice.experts.reshape(-1)).tolist() == [3, 2, 2, 1]
    right = [[0.622459, 0.377541], [0.668188, 0.331812], [0.845522, 0.154478], [0.598688, 0.401312]]
    np.testing.assert_allclose(choice.weights.asnumpy(), right, atol=1e-6)
    plain = router(ROUTERS["grok-1"])(Tensor(LOGITS)).weights.asnumpy()
    np.testing.assert_allclose(plain, np.take_along_axis(softmax(LOGITS), choice.experts, 1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["micro_batch", "global_batch"])
def test_golden_balance(kind: str):
    """Megatron-LM's number; that of Hugging Face is k times as large."""
    value, grad = gradient(RouterConfig(balance=kind, balance_coef=0.5), LOGITS, {})
    assert value / 0.5 == pytest.approx(1.12313618, rel=1e-6)
    load = np.array([3, 2, 2, 1]) * 4 / 2 / 4
    np.testing.assert_allclose(grad, differences(lambda x: 0.5 * (softmax(x) * load).sum() / 4, LOGITS), atol=1e-6)


def test_golden_z_loss():
    value, grad = gradient(RouterConfig(z_coef=0.1), LOGITS, {})
    assert value / 0.1 == pytest.approx(3.82470320, rel=1e-6)
    right = differences(lambda x: 0.1 * (np.log(np.exp(x).sum(-1)) ** 2).mean(), LOGITS)
    np.testing.assert_allclose(grad, right, atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_of_sequences_and_rows_that_are_no_tokens(score: str):
    """Each sequence has a balance of its own, weighed by its tokens."""
    logits = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    tokens, sequences = np.array([1, 1, 1, 0, 1, 1, 0], bool), np.array([0, 0, 0, 0, 1, 1, 1])
    config = RouterConfig(score, balance="sequence", balance_coef=0.3, z_coef=0.2)

    def right(x: np.ndarray) -> float:
        probabilities = softmax(x)
        if score == "sigmoid":
            sigmoid = 1 / (1 + np.exp(-x))
            probabilities = sigmoid / sigmoid.sum(-1, keepdims=True)
        total = 0.2 * (np.log(np.exp(x[tokens]).sum(-1)) ** 2).sum()
        for s in (0, 1):
            rows = np.flatnonzero(tokens & (sequences == s))
            chosen = np.argsort(-logits[rows], 1, kind="stable")[:, :2]
            load = np.bincount(chosen.reshape(-1), minlength=6) * 6 / 2 / len(rows)
            total += 0.3 * (probabilities[rows] * load).sum()
        return total / tokens.sum()

    value, grad = gradient(config, logits, {"tokens": tokens, "sequences": sequences}, weight=5.0)
    assert value == pytest.approx(right(logits.astype(np.float64)), rel=1e-5)
    np.testing.assert_allclose(grad, differences(right, logits), atol=2e-6)


def test_trap_5_aux_loss_weight_changes_with_m():
    """A batch of four times the same sequence, in 1, 2 and 4 micro-batches whose mean losses are averaged."""
    part = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    for kind in ("micro_batch", "global_batch", "sequence"):
        config, found = RouterConfig(balance=kind, balance_coef=0.1, z_coef=0.1), []
        for m in (1, 2, 4):
            repeats = 4 // m
            sequences = np.arange(3 * repeats) // 3
            made, x = router(config), Parameter(Tensor(np.tile(part, (repeats, 1))), name="x")
            total = np.zeros((3, 4))
            for _ in range(m):
                told = Routing(sequences=sequences)
                _, grads = ms.value_and_grad(
                    lambda told=told, made=made, x=x: told.add_losses((made(x * 1.0, told).weights * 0.0).sum()), None, [x]
                )()
                total += grads[0].asnumpy().reshape(repeats, 3, 4).sum(0) / m
            found.append(total)
        np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=1e-7)


def test_gradients_of_the_weights():
    """Of all four ways to make them."""
    logits = np.random.default_rng(2).normal(size=(3, 8)).astype(np.float32)
    pulled = np.random.default_rng(3).normal(size=(3, 3)).astype(np.float32)
    for score in ("softmax", "sigmoid"):
        for renormalise in (False, True):
            made = router(RouterConfig(score, renormalise, scale=2.5), 8, 3)
            x = Parameter(Tensor(logits), name="x")
            chosen = np.argsort(-logits, 1, kind="stable")[:, :3]

            def right(x: np.ndarray, score=score, renormalise=renormalise, chosen=chosen) -> float:
                every = softmax(x) if score == "softmax" else 1 / (1 + np.exp(-x))
                weights = np.take_along_axis(every, chosen, 1)
                return ((weights / weights.sum(1, keepdims=True) if renormalise else weights) * 2.5 * pulled).sum()

            value, grads = ms.value_and_grad(lambda: (made(x * 1.0).weights * Tensor(pulled)).sum(), None, [x])()  # noqa: B023
            assert value.asnumpy() == pytest.approx(right(logits.astype(np.float64)), rel=1e-5)
            np.testing.assert_allclose(grads[0].asnumpy(), differences(right, logits), atol=2e-5)


def test_the_bias_is_for_the_choice_only_and_moves_towards_balance():
    config = RouterConfig("sigmoid", bias=True, bias_rate=0.5)
    made = router(config)
    assert [p.name for p in made.get_parameters()][1].endswith("e_score_correction_bias")
    told = Routing(tokens=np.array([True, True, True, False]))
    choice = recorded(lambda x: made(x, told))
    assert choice.experts.tolist()[:3] == [[0, 1], [2, 0], [0, 3]]
    assert made.seen().tolist() == [3, 1, 1, 1]
    update_router_bias(made)
    bias: Any = parameter_table(made)["e_score_correction_bias"]
    assert bias.asnumpy().tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert made.seen().tolist() == [0, 0, 0, 0]
    choice = made(Tensor(LOGITS))
    assert choice.experts.tolist()[0] == [1, 3]
    sigmoid = 1 / (1 + np.exp(-LOGITS[0, [1, 3]]))
    np.testing.assert_allclose(choice.weights.asnumpy()[0], sigmoid / sigmoid.sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["micro_batch", "global_batch"])
def test_a_pass_whose_gradient_nobody_takes_counts_for_itself_alone(kind: str):
    """Neither its choices in the step's, nor the step's in its loss; also inside of a function that is differentiated."""
    config = RouterConfig(balance=kind, balance_coef=0.5)
    made, other = router(config), np.flip(LOGITS, 1).copy()

    def looked() -> float:
        told, before = Routing(), made.seen().tolist()
        loss = told.add_losses((made(Tensor(other), told).weights * 0.0).sum())
        assert made.seen().tolist() == before
        return loss.asnumpy().item()

    def trained(look: bool) -> list[float]:
        found = []
        for logits in (LOGITS, LOGITS[::2].copy()):
            x = Parameter(Tensor(logits), name="x")

            def loss(x: Parameter = x) -> Tensor:
                if look:
                    with no_grad():
                        looked()
                told = Routing()
                return told.add_losses((made(x * 1.0, told).weights * 0.0).sum())

            value, grads = ms.value_and_grad(loss, None, [x])()
            found += [value.asnumpy().item(), *grads[0].asnumpy().reshape(-1).tolist()]
            assert not look or looked() == alone
        made.world.everyone.clock.step += 1
        return found

    alone = looked()
    assert trained(True) == trained(False)
    assert made.seen().tolist() == [0, 0, 0, 0]


def test_deepseek_v3_chooses_in_groups():
    made = router(ROUTERS["deepseek-v3"], 16, 8)
    logits = np.random.default_rng(4).normal(size=(5, 16)).astype(np.float32)
    choice = made(Tensor(logits))
    for row, chosen, weights in zip(logits, choice.experts, choice.weights.asnumpy()):
        scores = 1 / (1 + np.exp(-row.astype(np.float64)))
        groups = np.argsort(-scores.reshape(8, 2).sum(1), kind="stable")[:4]
        assert set(chosen // 2) == set(groups) and len(set(chosen)) == 8
        np.testing.assert_allclose(weights, 2.5 * scores[chosen] / scores[chosen].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"score": "tanh"}, "score must be one of softmax, sigmoid, not 'tanh'"),
        ({"balance": "batch"}, "balance must be one of None, micro_batch, global_batch, sequence, not 'batch'"),
        ({"balance": "sequence"}, "balance='sequence' and balance_coef=0.0 go together: give both or none"),
        ({"balance_coef": 0.1}, "go together"),
        ({"keep_groups": 2}, "keep_groups=2 of groups=1 cannot be kept: use at most 1"),
        ({"scale": -1.0}, "scale must be finite and not negative, not -1.0"),
        ({"groups": 0}, "groups must be at least 1, not 0"),
    ],
)
def test_refused_settings(settings: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        RouterConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "sizes", "text"),
    [
        ({}, (4, 5), "top_k=5 of 4 experts cannot be chosen: use 1 to 4"),
        ({"groups": 3}, (8, 1), "groups=3 does not divide 8 experts: use 2 or 4"),
        ({"groups": 4, "group_score": "two_best"}, (4, 1), "needs groups of two experts or more, and they have 1"),
        ({"groups": 4}, (8, 3), "keep_groups=1 groups have 2 experts, of which top_k=3 cannot be chosen: keep 2"),
    ],
)
def test_refused_sizes(settings: dict[str, Any], sizes: tuple[int, int], text: str):
    with pytest.raises(ValueError, match=text):
        Router(4, *sizes, RouterConfig(**settings))


def test_losses_that_nobody_adds_are_refused():
    made, x = router(RouterConfig(z_coef=0.1)), Parameter(Tensor(LOGITS), name="x")
    made(Tensor(LOGITS))  # no gradient, no loss
    with pytest.raises(RuntimeError, match="give each layer the Routing of the pass"):
        ms.value_and_grad(lambda: made(x * 1.0).weights.sum(), None, [x])()
    told = Routing()
    with pytest.raises(RuntimeError, match=r"return routing.add_losses\(loss\)"):
        ms.value_and_grad(lambda: made(x * 1.0, told).weights.sum(), None, [x])()
    with pytest.raises(ValueError, match=r"tokens of shape \(3,\), and a router has 4 rows"):
        made(Tensor(LOGITS), Routing(tokens=np.ones(3, bool)))
    with pytest.raises(ValueError, match=r"Routing\(sequences=...\)"):
        router(RouterConfig(balance="sequence", balance_coef=1.0))(Tensor(LOGITS), Routing())
