"""Optimizer and manager over shards: all ranks decide alike, norms count every element once, padding stays zero."""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.lr_scheduler import NoDecay
from bmtrain_ms.optim import AdamOptimizer, GradientOverflowError, OptimManager
from tests.helpers.models import full

pytestmark = pytest.mark.ranks

SHAPES = {"one": (1,), "two": (2,), "prime": (7,), "matrix": (3, 4)}  # at 3 ranks two ranks own nothing of "one"


def initial(name: str) -> np.ndarray:
    return np.random.default_rng(list(SHAPES).index(name)).integers(-8, 9, SHAPES[name]).astype(np.float32) / 8


def coefficients(name: str, step: int, rank: int) -> np.ndarray:
    """Gradient of a rank; multiples of 6, so that the mean over 2 or 3 ranks is exact."""
    seed = [1000, list(SHAPES).index(name), step, rank]
    return 6.0 * np.random.default_rng(seed).integers(-5, 6, SHAPES[name]).astype(np.float32)


def mean_gradient(name: str, step: int, ranks: int) -> np.ndarray:
    return np.mean([coefficients(name, step, rank) for rank in range(ranks)], axis=0)


class Sum(bms.DistributedModule):
    """sum(p * c) over its parameters: its gradient is c."""

    def __init__(self, dtype: Any):
        super().__init__()
        for name, shape in SHAPES.items():
            p = bms.DistributedParameter(bms.empty(*shape, dtype=dtype))
            setattr(self, name, p)
            p.copy_full(initial(name))

    def construct(self, *factors: Tensor) -> Tensor:
        terms = [(getattr(self, name) * c).sum().astype(ms.float32) for name, c in zip(SHAPES, factors)]
        return terms[0] + terms[1] + terms[2] + terms[3]


class Setting:
    """The model above, AdamW, a schedule and a manager, in a world of their own over the same ranks."""

    def __init__(self, world: World, dtype: Any = ms.float32, **manager: Any):
        self.world = World(world.engine, world.mesh, world.seed, world.launch)
        world.engine.clock.step = 0
        with use_world(self.world):
            self.model = Sum(dtype)
            self.model.check_names_and_refresh_name()
            self.optimizer = AdamOptimizer(self.model.trainable_params(), weight_decay=0.25, eps=1e-3)
            self.manager = OptimManager(**manager)
            self.manager.add_optimizer(self.optimizer, NoDecay(self.optimizer, 0.125, 0, 100))
        self.dtype = ms.dtype_to_nptype(dtype)

    def backward(self, step: int, changes: dict[str, tuple[int, float]] | None = None) -> None:
        """`changes`: parameter -> (element, value) in this rank's gradient."""
        factors = []
        for name in SHAPES:
            c = coefficients(name, step, self.world.engine.rank).astype(self.dtype)
            if changes and name in changes:
                c.flat[changes[name][0]] = changes[name][1]
            factors.append(Tensor(c))
        with use_world(self.world):
            self.manager.backward(self.model, *factors)

    def schedule_state(self) -> dict[str, Any]:
        return self.manager.lr_schedulers[0].state_dict()

    def params(self) -> dict[str, np.ndarray]:
        return {p.name: full(self.world, p) for p in self.optimizer.parameters}

    def grads(self) -> dict[str, np.ndarray]:
        return {p.name: full(self.world, p, self.manager.grad(p)) for p in self.optimizer.parameters}

    def states(self) -> dict[str, dict[str, np.ndarray]]:
        """kind -> parameter -> full values."""
        states = {p.name: self.optimizer.state_of(p) for p in self.optimizer.parameters}
        by_name = {p.name: p for p in self.optimizer.parameters}
        kinds = next(iter(states.values()))
        return {kind: {n: full(self.world, by_name[n], s[kind]) for n, s in states.items()} for kind in kinds}


def accumulate(world: World) -> dict[str, np.ndarray]:
    setting = Setting(world)
    setting.backward(0)
    setting.backward(1)
    return setting.grads()


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_means_over_ranks_and_sums_over_calls(run_ranks, ranks):
    for grads in run_ranks(ranks, accumulate):
        for name, grad in grads.items():
            expected = mean_gradient(name, 0, ranks) + mean_gradient(name, 1, ranks)
            assert np.array_equal(grad, expected), name


# Adam #


def train(world: World, half: bool, scale: float | None) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Four steps; `full` checks that padding is zero."""
    setting = Setting(world, ms.float16 if half else ms.float32, loss_scale=scale)
    for step in range(4):
        setting.manager.zero_grad()
        setting.backward(step)
        assert setting.manager.step().updated
    return setting.params(), setting.states()


def adamw(name: str, ranks: int) -> np.ndarray:
    p = initial(name).astype(np.float64)
    m = v = np.zeros_like(p)
    for t in range(1, 5):
        g = mean_gradient(name, t - 1, ranks)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - 0.125 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-3) + 0.25 * p)
    return p


@pytest.mark.parametrize("half, scale", [(False, None), (False, 256.0), (True, 64.0)], ids=["fp32", "scaled", "fp16"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_adamw_over_shards(run_ranks, ranks, half, scale):
    for params, states in run_ranks(ranks, train, half=half, scale=scale):
        for name in SHAPES:
            value = states["master"][name] if half else params[name]
            np.testing.assert_allclose(value, adamw(name, ranks), rtol=1e-5, atol=1e-6, err_msg=name)
            assert np.array_equal(params[name], value.astype(np.float16 if half else np.float32))


# Overflow #


def overflow(world: World, half: bool, on: int, changes: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """One step, one in which rank `on` has a gradient that is not finite, one more."""
    s = Setting(world, ms.float16 if half else ms.float32, loss_scale=64.0)
    s.backward(0)
    updated = [s.manager.step().updated]
    before = s.params(), s.states(), s.optimizer.state_dict(tensors=False)
    s.manager.zero_grad()
    s.backward(1, changes if world.engine.rank == on else None)
    mine = any(not np.isfinite(s.manager.grad(p).asnumpy()).all() for p in s.optimizer.parameters)
    updated.append(s.manager.step().updated)
    after = s.params(), s.states(), s.optimizer.state_dict(tensors=False)
    left = [s.manager.grad(p) for p in s.optimizer.parameters]
    state = s.manager.state_dict(tensors=False)
    s.backward(2)
    updated.append(s.manager.step().updated)
    np.testing.assert_equal(after, before)
    return {"mine": mine, "updated": updated, "left": left, "state": state, "clock": world.engine.clock.step}


@pytest.mark.parametrize("half, bad", [(False, math.nan), (True, math.inf)], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "ranks, name, element, owner", [(2, "prime", 0, 0), (2, "prime", 6, 1), (3, "one", 0, 0), (3, "matrix", 7, 1)]
)
def test_all_ranks_skip_alike(run_ranks, ranks, name, element, owner, bad, half):
    """One element is not finite in the last rank's gradient: after reduction one rank alone sees it."""
    answers = run_ranks(ranks, overflow, half=half, on=ranks - 1, changes={name: (element, bad)})
    assert [a["mine"] for a in answers] == [rank == owner for rank in range(ranks)]
    assert all(a["updated"] == [True, False, True] for a in answers)
    assert all(a["left"] == [None] * len(SHAPES) and a["clock"] == 3 for a in answers)
    assert all(a["state"] == answers[0]["state"] for a in answers)
    state = answers[0]["state"]
    assert (state["loss_scale"], state["skipped_steps"], state["steps_since_last_scale"]) == (32.0, 1, 0)
    assert state["lr_schedulers"][0]["num_iter"] == 1


# Clipping #

KINDS = {
    1.0: lambda g: np.abs(g).sum(),
    2.0: np.linalg.norm,
    3.0: lambda g: (np.abs(g) ** 3).sum() ** (1 / 3),
    math.inf: lambda g: np.abs(g).max(),
}


def clip(world: World, kind: float, scale: float | None) -> dict[str, Any]:
    s = Setting(world, loss_scale=scale)
    s.backward(0)
    before = s.grads()
    norm = s.manager.clip_grad_norm(s.optimizer.param_groups, 2.0, kind)
    clipped = s.grads()
    again = s.manager.clip_grad_norm(s.optimizer.param_groups, 2.0, kind)
    owned = [p.owned[1] - p.owned[0] for p in s.optimizer.parameters]
    alone = s.manager.clip_grad_norm([{"params": s.optimizer.parameters[:1]}], 1e9, kind)
    return {"before": before, "norm": norm, "clipped": clipped, "again": again, "owned": owned, "alone": alone}


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_clip_grad_norm(run_ranks, ranks, kind, scale):
    """The norm of the whole gradient, the same on every rank; empty shards of 3 ranks included."""
    answers = run_ranks(ranks, clip, kind=kind, scale=scale)
    factor = np.float32(scale or 1.0)
    gradient = {name: mean_gradient(name, 0, ranks) for name in SHAPES}
    whole = KINDS[kind](np.concatenate([g.ravel() for g in gradient.values()]).astype(np.float64))
    assert (0 in answers[-1]["owned"]) and len({a["norm"] for a in answers}) == 1
    for a in answers:
        assert a["norm"] == pytest.approx(whole, rel=1e-6)
        assert a["again"] == pytest.approx(2.0, rel=1e-5)
        for name, g in gradient.items():
            assert np.array_equal(a["before"][name], g * factor)
            np.testing.assert_allclose(a["clipped"][name], g * factor * 2.0 / whole, rtol=1e-5)
        assert a["alone"] == pytest.approx(float(np.abs(gradient["one"]).sum() * 2.0 / whole), rel=1e-5)


def clip_overflow(world: World, kind: float) -> float:
    s = Setting(world)
    s.backward(0, {"two": (0, math.nan)} if world.engine.rank == 1 else None)
    before = s.grads()
    norm = s.manager.clip_grad_norm(s.optimizer.param_groups, 1e-3, kind)
    np.testing.assert_equal(s.grads(), before)
    return norm


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_that_is_not_finite_is_not_applied(run_ranks, kind):
    """Rank 0 alone holds the element."""
    assert all(math.isnan(norm) for norm in run_ranks(3, clip_overflow, kind=kind))


# Skipped steps leave no trace #


def with_a_bad_batch(world: World, half: bool, changes: dict[str, tuple[int, float]], on: int, at: int) -> dict[str, Any]:
    """Seven steps of two micro-batches, one of which is bad on one rank; and a run that is not shown that step."""
    ends = []
    for shown in (True, False):
        s = Setting(world, ms.float16 if half else ms.float32, loss_scale=64.0, loss_scale_steps=2)
        updated = []
        for step in range(7):
            if step == at and not shown:
                s.manager.loss_scale, s.manager.steps_since_last_scale = s.manager.loss_scale / 2, 0
                continue
            s.manager.zero_grad()
            s.backward(2 * step, changes if step == at and world.engine.rank == on else None)
            s.backward(2 * step + 1)
            s.manager.clip_grad_norm(s.optimizer.param_groups, 40.0)
            updated.append(s.manager.step().updated)
        ends.append((s.params(), s.states(), s.manager.loss_scale, s.schedule_state(), updated))
    return {"shown": ends[0], "not shown": ends[1]}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "name, element, on, at, bad",
    [("prime", 0, 1, 0, math.nan), ("prime", 6, 0, 3, math.inf), ("one", 0, 1, 6, -math.inf), ("matrix", 11, 1, 2, math.nan)],
)
def test_a_skipped_step_leaves_no_trace(run_ranks, name, element, on, at, half, bad):
    """The bits of a run that never saw the batch, on every rank."""
    answers = run_ranks(2, with_a_bad_batch, half=half, changes={name: (element, bad)}, on=on, at=at)
    for answer in answers:
        *shown, updated = answer["shown"]
        *twin, all_updated = answer["not shown"]
        assert updated == [step != at for step in range(7)] and all_updated == [True] * 6
        np.testing.assert_equal(shown, twin)
        assert all(np.isfinite(value).all() for value in shown[0].values())
    np.testing.assert_equal(answers[0], answers[1])


def give_up(world: World, scale: float) -> tuple[str, int]:
    """Rank 1's gradient of the last element of "prime", which it owns, is NaN, step after step."""
    s = Setting(world, loss_scale=scale, max_skipped_steps=3)
    skipped = 0
    with pytest.raises(GradientOverflowError) as info:
        for step in range(9):
            s.manager.zero_grad()
            s.backward(step, {"prime": (6, math.nan)} if world.engine.rank == 1 else None)
            skipped += not s.manager.step()
    return str(info.value), skipped


@pytest.mark.parametrize(
    "scale, last, advice",
    [
        (64.0, 16, "Start from a lower loss_scale, or raise max_skipped_steps"),
        (
            2.0,
            1,
            "The scale is at its least, so it is not the cause: look for NaN in the data and in the loss, lower the learning rate, "
            "or train in bfloat16 or float32",
        ),
    ],
    ids=["high", "least"],
)
def test_every_rank_gives_up_and_names_the_parameter(run_ranks, scale, last, advice):
    for text, skipped in run_ranks(2, give_up, scale=scale, timeout=30):
        assert skipped == 2
        assert text == (
            f"3 steps in a row were skipped, the last at loss scale {last} (least: 1), because gradients are not finite: those of "
            f"prime. {advice}"
        )


def huge(world: World) -> tuple[bool, float]:
    """The square of each rank's share fits into float32, their sum does not."""
    s = Setting(world, loss_scale=1.0, min_loss_scale=2.0**-10)
    s.backward(0, {"two": (0, 1.5e19)})
    one = s.manager.step()
    s.backward(0, {"two": (0, 1.5e19)})
    s.backward(0, {"two": (1, 1.5e19)})
    return one.updated, s.manager.step().updated


def test_a_norm_may_overflow_in_the_sum_over_ranks(run_ranks):
    assert run_ranks(2, huge) == [(True, False)] * 2


def scaled_gradients(world: World, grad_scale: float | None, loss_scale: float | None) -> tuple[dict[str, np.ndarray], float]:
    s = Setting(world, grad_scale=grad_scale, loss_scale=loss_scale)
    s.backward(0)
    return s.grads(), s.manager.clip_grad_norm(s.optimizer.param_groups, 1e9)


@pytest.mark.parametrize("loss_scale", [None, 32.0])
@pytest.mark.parametrize("grad_scale", [None, 1.0, 2.0])
@pytest.mark.parametrize("ranks", [2, 3])
def test_grad_scale_divides_the_sum_over_ranks(run_ranks, ranks, grad_scale, loss_scale):
    divisor = grad_scale or ranks
    expected = {name: mean_gradient(name, 0, ranks) * ranks / divisor for name in SHAPES}
    norm = np.linalg.norm(np.concatenate([g.ravel() for g in expected.values()]))
    for grads, seen in run_ranks(ranks, scaled_gradients, grad_scale=grad_scale, loss_scale=loss_scale):
        assert seen == pytest.approx(norm, rel=1e-6)
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, expected[name] * (loss_scale or 1.0), rtol=1e-6, err_msg=name)
