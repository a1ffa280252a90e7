"""Differentiable collectives against the same computation in one process: values, and gradients of the sum of all ranks' losses."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms import distributed
from bmtrain_ms.comm import World, use_world

pytestmark = pytest.mark.ranks

SHAPE = (6, 5)  # dim 0 divides by 2 and 3 ranks
OPS = ("sum", "avg", "max", "min", "prod")


def inputs(ranks: int, kind: str = "random") -> list[np.ndarray]:
    """x of every rank. `ties`: small integers, zeros among them, so that ranks are equal in places."""
    random = np.random.default_rng(ranks)
    if kind == "ties":
        return [random.integers(-1, 2, SHAPE).astype(np.float64) for _ in range(ranks)]
    return [random.standard_normal(SHAPE) for _ in range(ranks)]


def weights(ranks: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    """What each rank's loss multiplies its result with: different on every rank, so that no gradient can stand for another's."""
    random = np.random.default_rng(100 + ranks)
    return [random.standard_normal(shape) for _ in range(ranks)]


def call(name: str, x: Tensor, op: str, root: int) -> Tensor:
    if name == "all_gather":
        return distributed.all_gather(x)
    if name == "broadcast":
        return distributed.broadcast(x, root)
    return getattr(distributed, name)(x, op)


def run(world: World, name: str, op: str, kind: str, dtype: str, root: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's result and gradient of sum(result * weight)."""
    ranks, rank = world.engine.size, world.engine.rank
    x = Tensor(inputs(ranks, kind)[rank].astype(np.float32)).astype(getattr(ms, dtype))
    results = []

    def loss(x: Tensor) -> Tensor:
        y = call(name, x, op, root)
        results.append(y)
        weight = Tensor(weights(ranks, tuple(y.shape))[rank].astype(np.float32))
        return (y.astype(ms.float32) * weight).sum()

    with use_world(world):
        grad = ms.grad(loss)(x)
    assert results[0].dtype == grad.dtype == x.dtype and grad.shape == x.shape
    return results[0].astype(ms.float32).asnumpy(), grad.astype(ms.float32).asnumpy()


def forward(name: str, op: str, xs: list[np.ndarray], root: int) -> list[np.ndarray]:
    """The results of all ranks, in one process."""
    stacked = np.stack(xs)
    if name == "all_gather":
        return [stacked] * len(xs)
    if name == "broadcast":
        return [xs[root]] * len(xs)
    reduced = {"sum": stacked.sum, "avg": stacked.mean, "max": stacked.max, "min": stacked.min, "prod": stacked.prod}[op](0)
    return [reduced] * len(xs) if name == "all_reduce" else np.split(reduced, len(xs))


def gradients(name: str, op: str, xs: list[np.ndarray], root: int) -> list[np.ndarray]:
    """By central differences of the sum of all losses, in float64; of `max` and `min` only where nobody is equal."""
    results = forward(name, op, xs, root)
    factors = weights(len(xs), results[0].shape)

    def total(values: list[np.ndarray]) -> float:
        return sum(float((y * w).sum()) for y, w in zip(forward(name, op, values, root), factors))

    grads = []
    for rank, x in enumerate(xs):
        grad = np.empty_like(x)
        for i in np.ndindex(*x.shape):
            sides = []
            for shift in (1e-5, -1e-5):
                changed = [v.copy() for v in xs]
                changed[rank][i] += shift
                sides.append(total(changed))
            grad[i] = (sides[0] - sides[1]) / 2e-5
        grads.append(grad)
    return grads


CASES = [("all_gather", "sum"), ("broadcast", "sum"), *[(name, op) for name in ("all_reduce", "reduce_scatter") for op in OPS]]


@pytest.mark.parametrize("name, op", CASES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_results_and_gradients(run_ranks: Callable[..., list[Any]], ranks: int, name: str, op: str):
    root = ranks - 1
    xs = [x.astype(np.float32).astype(np.float64) for x in inputs(ranks)]
    answers = run_ranks(ranks, run, name=name, op=op, kind="random", dtype="float32", root=root)
    for (value, grad), expected, slope in zip(answers, forward(name, op, xs, root), gradients(name, op, xs, root)):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter"])
def test_product_is_differentiable_at_zero(run_ranks: Callable[..., list[Any]], name: str):
    xs = inputs(3, "ties")
    assert (np.stack(xs) == 0).sum(0).max() >= 2  # where two ranks are 0 all gradients are
    for (_, grad), slope in zip(
        run_ranks(3, run, name=name, op="prod", kind="ties", dtype="float32", root=0), gradients(name, "prod", xs, 0)
    ):
        np.testing.assert_allclose(grad, slope, atol=1e-5)


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter"])
def test_equal_ranks_share_the_gradient(run_ranks: Callable[..., list[Any]], name: str, op: str):
    """As torch.amax: in equal shares, so that the shares add up to the whole gradient."""
    xs = np.stack(inputs(3, "ties"))
    extreme = xs.max(0) if op == "max" else xs.min(0)
    winners = xs == extreme
    results = forward(name, op, list(xs), 0)
    factors = weights(3, results[0].shape)
    whole = np.sum(factors, 0) if name == "all_reduce" else np.concatenate(factors)
    answers = run_ranks(3, run, name=name, op=op, kind="ties", dtype="float32", root=0)
    for rank, (_, grad) in enumerate(answers):
        np.testing.assert_allclose(grad, whole * winners[rank] / winners.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("single_world")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["sum", "prod"])
def test_16_bit_types(run_ranks: Callable[..., list[Any]], op: str, dtype: str):
    xs = [Tensor(x.astype(np.float32)).astype(getattr(ms, dtype)).astype(ms.float32).asnumpy() for x in inputs(2)]
    for (value, grad), expected, slope in zip(
        run_ranks(2, run, name="all_reduce", op=op, kind="random", dtype=dtype, root=0),
        forward("all_reduce", op, xs, 0),
        gradients("all_reduce", op, [x.astype(np.float64) for x in xs], 0),
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(grad, slope, rtol=3e-2, atol=3e-2)


def slice_of(world: World) -> np.ndarray:
    """A view that is not contiguous goes in as what it shows (BMTrain #145)."""
    x = Tensor(np.arange(24, dtype=np.float32).reshape(4, 6) + 100 * world.engine.rank)
    with use_world(world):
        return distributed.all_gather(x[:, 1:4]).asnumpy()


def test_slices(run_ranks: Callable[..., list[Any]]):
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    for answer in run_ranks(2, slice_of):
        assert np.array_equal(answer, np.stack([whole[:, 1:4], whole[:, 1:4] + 100]))


SCALARS = [("all_gather", "sum"), ("broadcast", "sum"), *[("all_reduce", op) for op in OPS]]


def scalars(world: World) -> list[tuple[tuple[int, ...], tuple[int, ...], float, float]]:
    """Shapes and values of results and gradients for x = rank + 2."""
    seen = []
    with use_world(world):
        for name, op in SCALARS:
            results = []

            def loss(x: Tensor, name: str = name, op: str = op, results: list = results) -> Tensor:
                results.append(call(name, x, op, 0))
                return results[0].sum() if results[0].ndim else results[0] * 3.0

            grad = ms.grad(loss)(Tensor(np.float32(world.engine.rank + 2)))
            seen.append((results[0].shape, grad.shape, float(results[0].sum().asnumpy()), float(grad.asnumpy())))
    return seen


def test_scalars_stay_scalars(run_ranks: Callable[..., list[Any]], single_world: World):
    assert scalars(single_world) == [((1,), (), 2.0, 1.0), *[((), (), 2.0, 3.0)] * 6]
    expected = [(5.0, 2.0), (2.0, 6.0), (5.0, 6.0), (2.5, 3.0), (3.0, 0.0), (2.0, 6.0), (6.0, 18.0)]
    shapes = [((2,), ()), *[((), ())] * 6]
    assert run_ranks(2, scalars)[0] == [(*shape, *numbers) for shape, numbers in zip(shapes, expected)]


# Point to point #


def pipeline(world: World) -> tuple[float, np.ndarray]:
    """Rank r multiplies what it receives with its weight and hands it on; the last rank's loss is the sum of squares."""
    rank, last = world.engine.rank, world.engine.size - 1
    weight = ms.Parameter(Tensor(np.full((3,), rank + 2.0, np.float32)), name=f"weight{rank}")

    def loss() -> Tensor:
        x = Tensor(np.arange(1, 7, dtype=np.float32).reshape(2, 3)) if rank == 0 else distributed.recv(rank - 1, weight)
        y = x * weight
        return (y * y).sum() if rank == last else distributed.send(y, rank + 1)

    with use_world(world):
        value, grad = ms.value_and_grad(loss, None, [weight])()
    return float(value.asnumpy()), (grad[0] if isinstance(grad, tuple) else grad).asnumpy()


@pytest.mark.parametrize("ranks", [2, 3])
def test_send_and_recv_are_a_pipeline(run_ranks: Callable[..., list[Any]], ranks: int):
    x = np.arange(1, 7, dtype=np.float64).reshape(2, 3)
    factor = np.prod([r + 2.0 for r in range(ranks)])
    answers = run_ranks(ranks, pipeline)
    assert [value for value, _ in answers] == [0.0] * (ranks - 1) + [float((x * factor) ** 2 @ np.ones(3) @ np.ones(2))]
    for rank, (_, grad) in enumerate(answers):
        np.testing.assert_allclose(grad, 2 * factor**2 / (rank + 2.0) * (x**2).sum(0), rtol=1e-6)


SENT = [((2, 3), "float32"), ((), "float32"), ((0, 4), "float16"), ((1, 2, 1, 3), "bfloat16"), ((5,), "int32"), ((2,), "bool_")]


def activations(world: World) -> list[tuple[tuple[int, ...], str, list]] | None:
    """Upstream's test_send_recv: the receiver knows neither shape nor type."""
    with use_world(world):
        if world.engine.rank == 0:
            for shape, dtype in SENT:
                values = np.arange(int(np.prod(shape))).reshape(shape)
                distributed.send_activations(Tensor(values.astype(np.float32)).astype(getattr(ms, dtype)), 1)
            return None
        received = [distributed.recv_activations(0) for _ in SENT]
    return [(tuple(x.shape), str(x.dtype), x.astype(ms.float32).asnumpy().reshape(-1).tolist()) for x in received]


def test_activations_of_any_shape_and_type(run_ranks: Callable[..., list[Any]]):
    expected = []
    for shape, dtype in SENT:
        values = np.arange(int(np.prod(shape)))
        expected.append((shape, str(getattr(ms, dtype)), (values != 0 if dtype == "bool_" else values).astype(float).tolist()))
    assert run_ranks(2, activations)[1] == expected


# With parameters: the gradient of the mean loss #


def shared(world: World) -> np.ndarray:
    """Every rank's loss is of all ranks' activations; the parameter's gradient is that of the mean of the losses."""
    ranks, rank = world.engine.size, world.engine.rank
    own = World(world.engine, world.mesh, world.seed, world.launch)
    with use_world(own):
        p = bms.DistributedParameter(np.array([0.5, -1.0, 2.0], np.float32), name="p")
        x, weight = Tensor(np.full((3,), rank + 1.0, np.float32)), Tensor(weights(ranks, (ranks, 3))[rank].astype(np.float32))
        grad = ms.grad(lambda: (distributed.all_gather(p.gather() * x) * weight).sum(), None, [p])()
        shard = grad[0] if isinstance(grad, tuple) else grad
        return own.engine.all_gather([shard]).wait()[0].asnumpy()[:3]


@pytest.mark.parametrize("ranks", [2, 3])
def test_parameters_get_the_gradient_of_the_mean_loss(run_ranks: Callable[..., list[Any]], ranks: int):
    factors = np.arange(1, ranks + 1)[:, None]
    expected = sum((w * factors).sum(0) for w in weights(ranks, (ranks, 3))) / ranks
    for grad in run_ranks(ranks, shared):
        np.testing.assert_allclose(grad, expected, rtol=1e-5)


# Bad input #


@pytest.mark.usefixtures("single_world")
class TestErrors:
    def test_unknown_reduction(self):
        for function in (distributed.all_reduce, distributed.reduce_scatter):
            with pytest.raises(ValueError, match="unknown reduction 'mean'; choose one of sum, avg, max, min, prod"):
                function(Tensor([1.0]), "mean")

    def test_integers_are_not_differentiable(self):
        with pytest.raises(TypeError, match="all_gather is differentiable and takes a floating-point tensor, not Int32"):
            distributed.all_gather(Tensor(np.array([1], np.int32)))

    def test_too_many_dims(self):
        with pytest.raises(ValueError, match="cannot be sent; at most 14 dims"):
            distributed.send_activations(Tensor(np.zeros((1,) * 15, np.float32)), 0)

    def test_one_rank_is_the_identity(self):
        x = Tensor(np.array([[1.0, -2.0]], np.float32))
        for op in OPS:
            value, grad = ms.value_and_grad(lambda x, op=op: (distributed.all_reduce(x, op) * 3.0).sum())(x)
            assert value.asnumpy() == -3.0 and (grad.asnumpy() == 3.0).all()


def used_again(world: World) -> np.ndarray:
    """The root's result of a broadcast is its input; gradients of other uses are its own, and no sum over the ranks."""

    def loss(x: Tensor) -> Tensor:
        y = x * 1
        return (distributed.broadcast(y, 0) * 2).sum() + (y * 100).sum()

    return ms.grad(loss)(Tensor(np.ones(3, np.float32))).asnumpy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_other_uses_of_what_was_broadcast(run_ranks, ranks):
    grads = [grad.tolist() for grad in run_ranks(ranks, used_again)]
    assert grads == [[100.0 + (2.0 * ranks if rank == 0 else 0.0)] * 3 for rank in range(ranks)]
