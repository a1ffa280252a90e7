"""Plain parameters that are trained beside sharded ones: gradients are means over the ranks, and count once in norms."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, experimental, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from tests.helpers.models import recorded
from tests.helpers.wrapped import Stack, built, gradients, raw, square, whole, x_of

pytestmark = pytest.mark.ranks

WHOLE = ["head.weight", "head.bias"]
NORMS: dict[float, Callable[[np.ndarray], float]] = {
    1.0: lambda g: float(np.abs(g).sum()),
    2.0: lambda g: float(np.sqrt((g**2).sum())),
    3.0: lambda g: float((np.abs(g) ** 3).sum() ** (1 / 3)),
    np.inf: lambda g: float(np.abs(g).max()),
}
ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}


def batch(world: World, step: int) -> Tensor:
    return x_of(5, 4, seed=10 * step + world.engine.rank)


def mean_gradients(world: World, plain: nn.Cell, x: Tensor) -> tuple[float, dict[str, np.ndarray]]:
    """Of a model that knows nothing of ranks."""
    loss, grads, _ = gradients(plain, square, x)
    gathered = {name: world.engine.all_gather([g.reshape(-1)]).wait()[0].asnumpy() for name, g in grads.items()}
    return loss, {name: g.reshape(world.engine.size, *grads[name].shape).astype(np.float64).mean(0) for name, g in gathered.items()}


class Sharded:
    """`Stack` with a head that is whole on every rank, and what trains it."""

    def __init__(self, reverse: bool = False, **options: Any):
        self.model = bms.BMTrainModelWrapper(built(Stack), buffers=WHOLE, verbose=False)
        params = self.model.trainable_params()
        self.optimizer = bms.optim.AdamOptimizer(params[::-1] if reverse else params, **ADAM)
        self.manager = bms.optim.OptimManager(**options)
        self.manager.add_optimizer(self.optimizer)

    def backward(self, x: Tensor) -> float:
        return self.manager.backward(lambda: square(self.model, x)).asnumpy().item()

    def gradients(self, world: World) -> dict[str, np.ndarray]:
        return {p.name: whole(world, p, self.manager.grad(p)) / self.manager.loss_scale for p in self.by_name()}

    def by_name(self) -> list[Any]:
        return sorted(self.optimizer.parameters, key=lambda p: p.name)

    def values(self, world: World) -> dict[str, np.ndarray]:
        return {p.name: whole(world, p).copy() for p in self.by_name()}


def adamw(value: np.ndarray, grad: np.ndarray, moments: list[np.ndarray], step: int) -> np.ndarray:
    """In float64."""
    moments[0] += 0.1 * (grad - moments[0])
    moments[1] += 0.001 * (grad * grad - moments[1])
    update = moments[0] / (1 - 0.9**step) / (np.sqrt(moments[1] / (1 - 0.999**step)) + ADAM["eps"])
    return value - ADAM["lr"] * (update + ADAM["weight_decay"] * value)


def train(world: World, shard_size: int | None, loss_scale: float | None) -> dict[str, Any]:
    plain = built(Stack)
    master = {p.name: p.asnumpy().astype(np.float64) for p in plain.get_parameters()}
    moments = {name: [np.zeros_like(v), np.zeros_like(v)] for name, v in master.items()}
    with use_world(recorded(world, shard_size=shard_size)) as here:
        s = Sharded(reverse=world.engine.rank == 1, loss_scale=loss_scale)
        assert all(not isinstance(raw(s.model, name), bms.DistributedParameter) for name in WHOLE)
        for step in range(1, 5):
            for name, value in master.items():
                raw(plain, name).set_data(Tensor(value.astype(np.float32)))
            expected = {name: np.zeros_like(v) for name, v in master.items()}
            s.manager.zero_grad()
            here.engine.events.clear()
            for part in range(2):  # gradients add up
                x = batch(world, 2 * step + part)
                loss, grads = mean_gradients(world, plain, x)
                np.testing.assert_allclose(s.backward(x), loss, rtol=1e-5)
                expected = {name: expected[name] + grads[name] for name in expected}
            reduced = here.engine.calls().count(("all_reduce", "gradients of whole parameters"))
            assert reduced == (2 if world.engine.size > 1 else 0)
            for name, got in s.gradients(here).items():
                np.testing.assert_allclose(got, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
            s.manager.step()
            for name in master:
                master[name] = adamw(master[name], expected[name], moments[name], step)
        final = s.values(here)
    for name, value in master.items():
        np.testing.assert_allclose(final[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    return {name: final[name] for name in WHOLE}


@pytest.mark.parametrize(("ranks", "shard_size"), [(1, None), (2, None), (4, 2)])
@pytest.mark.parametrize("loss_scale", [None, 64.0])
def test_they_are_trained_as_the_twin_s_are(
    run_ranks: Callable[..., list[Any]], ranks: int, shard_size: int | None, loss_scale: Any
):
    """Rank 1 has its parameters in another order."""
    first, *others = run_ranks(ranks, train, shard_size=shard_size, loss_scale=loss_scale)
    for other in others:
        for name in WHOLE:
            np.testing.assert_array_equal(other[name], first[name], err_msg="copies drift apart")


def norms(world: World, shard_size: int | None) -> None:
    x = batch(world, 0)
    _, expected = mean_gradients(world, built(Stack), x)
    everything = np.concatenate([g.ravel() for g in expected.values()])
    head = np.concatenate([expected[name].ravel() for name in WHOLE])
    with use_world(recorded(world, shard_size=shard_size)) as here:
        for kind, norm in NORMS.items():
            s = Sharded(loss_scale=8.0)
            s.backward(x)
            limit = norm(everything) / 2
            assert s.manager.clip_grad_norm(s.optimizer.param_groups, limit, kind) == pytest.approx(norm(everything), rel=1e-5)
            for name, got in s.gradients(here).items():
                np.testing.assert_allclose(got, expected[name] / 2, rtol=1e-4, atol=1e-6, err_msg=f"{name} {kind}")
            only = [{"params": [raw(s.model, name) for name in WHOLE]}]
            assert s.manager.clip_grad_norm(only, 1e9, kind) == pytest.approx(norm(head) / 2, rel=1e-5)
        s = Sharded(loss_scale=8.0)
        s.backward(x)
        assert s.manager.step().grad_norm == pytest.approx(NORMS[2.0](everything), rel=1e-5)


@pytest.mark.parametrize(("ranks", "shard_size"), [(1, None), (2, None), (3, None), (4, 2)])
def test_they_count_once_in_every_norm(run_ranks: Callable[..., list[Any]], ranks: int, shard_size: int | None):
    run_ranks(ranks, norms, shard_size=shard_size)


def overflow(world: World) -> tuple[bool, float, float]:
    """Only the last rank's batch is too large, and only for the head's gradient, which is a whole parameter's."""
    with use_world(recorded(world)) as here:
        s = Sharded(loss_scale=16.0)
        head = raw(s.model, "head.bias")
        before = s.values(here)
        last = world.engine.rank == world.engine.size - 1

        def loss() -> Tensor:
            return square(s.model, batch(world, 0)) + (head * (np.inf if last else 1.0)).sum() * 1.0

        s.manager.backward(loss)
        norm = s.manager.clip_grad_norm(s.optimizer.param_groups, 1.0)
        result = s.manager.step()
        for name, value in s.values(here).items():
            np.testing.assert_array_equal(value, before[name])
        return bool(result), s.manager.loss_scale, norm


def test_an_overflow_in_one_is_everybody_s(run_ranks: Callable[..., list[Any]]):
    for updated, scale, norm in run_ranks(2, overflow):
        assert not updated and scale == 8.0 and not np.isfinite(norm)


def native(world: World) -> None:
    """MindSpore's own optimizer, on both kinds."""
    plain, x = built(Stack), batch(world, 0)
    twin = nn.SGD(plain.trainable_params(), 0.1)
    with use_world(recorded(world)) as here:
        model = bms.BMTrainModelWrapper(built(Stack), buffers=WHOLE, verbose=False)
        manager = bms.optim.OptimManager(loss_scale=4.0)
        manager.add_optimizer(nn.SGD(model.trainable_params(), 0.1))
        for _ in range(2):
            manager.zero_grad()
            manager.backward(lambda: square(model, x))
            manager.step()
            _, grads = mean_gradients(world, plain, x)
            twin(tuple(Tensor(grads[p.name].astype(np.float32)) for p in plain.trainable_params()))
        for p in plain.get_parameters():
            np.testing.assert_allclose(whole(here, raw(model, p.name)), p.asnumpy(), rtol=1e-4, atol=1e-6, err_msg=p.name)


def test_with_an_optimizer_of_mindspore(run_ranks: Callable[..., list[Any]]):
    run_ranks(2, native)


class Biased(bms.DistributedModule):
    """A sharded weight and a bias that is whole on every rank."""

    def __init__(self):
        super().__init__()
        self.weight = bms.DistributedParameter(np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32))
        self.bias = Parameter(Tensor(np.zeros(5, np.float32)), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(x, self.weight) + self.bias


def stepped(world: World, kind: str) -> np.ndarray:
    """The bias after steps of an optimizer of MindSpore's that somebody's own loop calls."""
    with use_world(recorded(world)) as here:
        model = Biased()
        params = list(model.trainable_params())
        optimizer = {"nn": nn.SGD, "experimental": experimental.optim.SGD}[kind](params, 0.1)
        step = ms.value_and_grad(lambda x: (model(x) ** 2).mean(), None, params)
        rows = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
        for _ in range(3):
            _, grads = step(Tensor(np.ascontiguousarray(np.split(rows, here.engine.size)[here.engine.rank])))
            optimizer(grads)
            bms.optim.end_step()
        whole = nn.AdaFactor(params, learning_rate=None)
        with pytest.raises(ValueError, match=r"^AdaFactor needs whole parameters, and .*weight is sharded; use an optimizer that"):
            whole(grads)
        return model.bias.asnumpy().copy()


@pytest.mark.parametrize("kind", ["nn", "experimental"])
def test_optimizers_of_mindspore_s_that_are_called_get_means_too(run_ranks: Callable[..., list[Any]], kind: str):
    (right,) = run_ranks(1, stepped, kind=kind)
    for found in run_ranks(2, stepped, kind=kind):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-7)
