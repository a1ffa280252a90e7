"""Parameters of experts, which ranks along `ep` do not share: gradients, norms and statistics over real ranks."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, World, use_world
from bmtrain_ms.inspect import inspect_model
from bmtrain_ms.optim.norms import counts_here, total_norm

RANKS, EP = 4, 2


def start(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Layer(nn.Cell):
    """x W_shared W_expert + b of the expert that this rank has."""

    def __init__(self, expert: int) -> None:
        super().__init__()
        self.own = bms.DistributedParameter(start(10 + expert, 5, 3), along="edp", name=f"experts.{expert}.weight")
        self.shared = bms.DistributedParameter(start(1, 5, 5), name="shared")
        self.bias = bms.DistributedParameter(start(20 + expert, 3), along="edp", name=f"experts.{expert}.bias")

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(ops.matmul(x, self.shared), self.own) + self.bias


def trained(world: World, block: tuple[bool, int], replica: int) -> dict[str, Any]:
    """Gradients, whole; their norm; what `inspect_model` and the optimizer's deltas say."""
    with use_world(World(world.everyone, Mesh(RANKS, world.mesh.rank, ep=EP, replica=replica))) as here:
        layer = Layer(here.mesh.coordinate("ep"))
        model = bms.Block(layer, *block)
        params = model.trainable_params()
        optimizer = bms.optim.AdamOffloadOptimizer(params, lr=0.0, record_delta=True)
        manager = bms.optim.OptimManager(loss_scale=4.0)
        manager.add_optimizer(optimizer)
        for micro_batch in range(2):
            manager.backward(lambda x: (model(x) ** 2).sum(), Tensor(start(100 + 10 * micro_batch + here.mesh.rank, 4, 5)))
        grads, counted = {}, []
        for p in params:
            grad = manager.grad(p) * (1.0 / manager.grads_scale)
            whole = here.along(p.along).all_gather([grad]).wait()[0].asnumpy()
            grads[p.name] = whole[: p.full_size].reshape(p.full_shape)
            counted += [grad] if counts_here(p, here) else []
        rows = inspect_model(model, "shared")
        norm = total_norm(counted, here, 2.0)
        manager.step()
        return {
            "grads": grads,
            "norm": norm,
            "shared": rows[0],
            "delta": (optimizer.get_avg_delta(), optimizer.get_var_delta()),
        }


def expected() -> dict[str, np.ndarray]:
    """Mean over the ranks of the gradients of their losses, in float64; an expert's from the ranks that have it."""
    shared = start(1, 5, 5).astype(np.float64)
    total: dict[str, Any] = {"shared": np.zeros((5, 5))}
    for rank in range(RANKS):
        expert = rank % EP
        weight, bias = start(10 + expert, 5, 3).astype(np.float64), start(20 + expert, 3).astype(np.float64)
        for micro_batch in range(2):
            x = start(100 + 10 * micro_batch + rank, 4, 5).astype(np.float64)
            out = 2 * (x @ shared @ weight + bias)
            for name, grad in (
                (f"experts.{expert}.weight", (x @ shared).T @ out),
                (f"experts.{expert}.bias", out.sum(0)),
                ("shared", x.T @ out @ weight.T),
            ):
                total[name] = total.get(name, 0.0) + grad / RANKS
    return total


@pytest.mark.parametrize("replica", [1, 2])
@pytest.mark.parametrize("block", [(True, 3), (True, 2), (False, 3), (False, 2)])
def test_gradients_are_divided_by_the_data_parallel_ranks(run_ranks: Callable, block: tuple[bool, int], replica: int):
    answers, right = run_ranks(RANKS, trained, block=block, replica=replica), expected()
    norm = np.sqrt(sum((grad**2).sum() for grad in right.values()))
    everything = np.concatenate([np.sign(grad).reshape(-1) for grad in right.values()])  # what a first step of Adam subtracts
    for answer in answers:
        for name, grad in answer["grads"].items():
            np.testing.assert_allclose(grad, right[name], rtol=1e-4, atol=1e-4)
        assert answer["norm"] == pytest.approx(norm, rel=1e-4)
        assert answer["shared"]["shape"] == (5, 5)
        assert answer["shared"]["mean"] == pytest.approx(start(1, 5, 5).mean(), rel=1e-5)
        assert answer["delta"] == pytest.approx((everything.mean(), everything.var()), rel=1e-3, abs=1e-3)
    assert len({name for answer in answers for name in answer["grads"]}) == 5
