"""BMTrain's test_has_inf_nan and test_nccl_backward."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms import distributed
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.compat.autograd import custom_op
from bmtrain_ms.compat.runtime import from_host, numpy_dtype

# test_has_inf_nan #

SIZES = [*range(1, 100), 1_000, 10_000, 100_000, 1_000_000]


class Overflows:
    """A manager with one parameter, whose gradient is given."""

    def __init__(self, size: int, dtype: Any):
        self.parameter = bms.DistributedParameter(bms.empty(size, dtype=dtype), name="p")
        self.optimizer = bms.optim.AdamOptimizer([self.parameter], lr=0.0)

    def step(self, grad: np.ndarray) -> bool:
        """Whether the step updates the parameter: whether nothing has overflowed."""
        manager = bms.optim.OptimManager(loss_scale=1.0)
        manager.add_optimizer(self.optimizer)
        manager.backward(
            lambda: custom_op(lambda w: (w[:1].astype(ms.float32).sum(),), lambda _: [from_host(grad)], self.parameter.gather())[0]
        )
        return bool(manager.step())


def find(world: World, dtype: str, sizes: list[int]) -> int:
    """`inf`, `-inf` and NaN at random positions of rank `size % ranks`'s gradient; how many were found."""
    kind = numpy_dtype(getattr(ms, dtype))
    ranks, rank, found = world.engine.size, world.engine.rank, 0
    with use_world(World(world.engine, world.mesh, world.seed, world.launch)):
        for size in sizes:
            random = np.random.default_rng(size)
            here = Overflows(size, getattr(ms, dtype))
            grad = random.standard_normal(size).astype(np.float32).astype(kind)
            assert here.step(grad.copy()), f"{size} finite elements were called overflow"
            for bad in (np.inf, -np.inf, np.nan):
                place = int(random.integers(size))
                broken = grad.copy()
                if rank == size % ranks:
                    broken[place] = bad
                assert not here.step(broken), f"{bad} at {place} of {size} {dtype} was not found"
                found += 1
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_has_inf_nan(single_world: World, capsys: pytest.CaptureFixture, dtype: str):
    assert find(single_world, dtype, SIZES) == 3 * len(SIZES)
    assert capsys.readouterr().err.count("Gradient overflow") == 3 * len(SIZES)


@pytest.mark.ranks
def test_has_inf_nan_on_one_of_several_ranks(run_ranks: Callable[..., list[Any]]):
    """Not upstream: every rank finds what one of them has."""
    for dtype in ("float16", "float32"):
        assert run_ranks(3, find, dtype=dtype, sizes=[1, 2, 3, 17, 1000]) == [15] * 3


# test_nccl_backward #


def values(rank: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    x = np.random.RandomState(rank).uniform(0.5, 1.5, shape).astype(np.float32)
    return Tensor(x).astype(getattr(ms, dtype))


def backward(world: World, name: str, op: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Result, and gradient of sum(result * weight) with another weight on every rank; as float32."""
    rank, ranks = world.engine.rank, world.engine.size
    results: list[Tensor] = []
    with use_world(world):

        def loss(x: Tensor) -> Tensor:
            y = getattr(distributed, name)(x, op)
            results.append(y)
            weight = values(50 + rank, tuple(y.shape), "float32")
            return (y.astype(ms.float32) * weight).sum()

        grad = ms.grad(loss)(values(rank, (3 * ranks, 5), dtype))
    (y,) = results
    assert y.dtype == grad.dtype == getattr(ms, dtype)
    return y.astype(ms.float32).asnumpy(), grad.astype(ms.float32).asnumpy()


@pytest.mark.ranks
@pytest.mark.usefixtures("single_world")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("name", "op"), [("reduce_scatter", "sum"), ("all_reduce", "prod")])
def test_nccl_backward(run_ranks: Callable[..., list[Any]], name: str, op: str, dtype: str):
    """Every rank's whole result and gradient; upstream looks at the own part of the gradient only."""
    ranks, rtol = 4, {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}[dtype]
    xs = np.stack([values(rank, (12, 5), dtype).astype(ms.float32).asnumpy() for rank in range(ranks)]).astype(np.float64)
    answers = run_ranks(ranks, backward, name=name, op=op, dtype=dtype)
    shape = (3, 5) if name == "reduce_scatter" else (12, 5)
    weights = np.stack([values(50 + rank, shape, "float32").asnumpy() for rank in range(ranks)]).astype(np.float64)
    for rank, (result, grad) in enumerate(answers):
        if name == "reduce_scatter":
            np.testing.assert_allclose(result, xs.sum(0)[3 * rank : 3 * rank + 3], rtol=rtol)
            np.testing.assert_allclose(grad, weights.reshape(12, 5), rtol=rtol)
        else:
            np.testing.assert_allclose(result, xs.prod(0), rtol=rtol)
            np.testing.assert_allclose(grad, weights.sum(0) * xs.prod(0) / xs[rank], rtol=2 * rtol)
