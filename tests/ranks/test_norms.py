"""`optim.clip_grad_norm` and `all_finite`: norms of whole tensors where gradients are shards."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import World


def _values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def clipped(world: World, max_norm: float, norm_type: float, bad_rank: int | None = None) -> tuple:
    """A step of README's own spelling; the whole parameter's gradient differs by rank, and one of 1 element is on rank 0 only."""
    sharded = [bms.DistributedParameter(_values(i, *shape), name=f"p{i}") for i, shape in enumerate([(5, 3), (1,), (7,)])]
    whole = Parameter(Tensor(_values(9, 4)), name="whole")
    x = Tensor(np.array([np.nan if world.engine.rank == bad_rank else 1.0 + world.engine.rank], np.float32))
    params = [*sharded, whole]

    def loss(x: Tensor) -> Tensor:
        return sum((p.gather() ** 2).sum() for p in sharded) + (whole * x).sum()

    grads = ms.value_and_grad(loss, None, params)(x)[1]
    finite = bms.optim.all_finite(params, grads)
    clipped, norm = bms.optim.clip_grad_norm(params, grads, max_norm, norm_type)
    return norm, finite, [g.asnumpy()[: p.owned[1] - p.owned[0]] for p, g in zip(sharded, clipped)], clipped[-1].asnumpy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, np.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_that_of_whole_tensors(run_ranks, ranks, norm_type, max_norm):
    results = run_ranks(ranks, clipped, max_norm=max_norm, norm_type=norm_type)
    grads = [2 * _values(i, *shape).reshape(-1) for i, shape in enumerate([(5, 3), (1,), (7,)])]
    grads.append(np.full(4, np.mean([1.0 + rank for rank in range(ranks)])))
    norm = np.linalg.norm(np.concatenate(grads), norm_type)
    factor = min(1.0, max_norm / (norm + 1e-6))
    for mine, finite, _, whole in results:
        assert mine == pytest.approx(norm, rel=1e-5) and finite
        np.testing.assert_allclose(whole, grads[-1] * factor, rtol=1e-5)
    for i in range(3):
        found = np.concatenate([shards[i] for _, _, shards, _ in results])
        np.testing.assert_allclose(found, grads[i] * factor, rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_not_finite_on_one_rank_is_on_all(run_ranks, ranks):
    for norm, finite, _, _ in run_ranks(ranks, clipped, max_norm=1.0, norm_type=2.0, bad_rank=ranks - 1):
        assert not np.isfinite(norm) and not finite


def test_bad_arguments(single_world):
    p = bms.DistributedParameter(_values(0, 3), name="p")
    with pytest.raises(ValueError, match="0 gradients for 1 parameters: pass what value_and_grad returned"):
        bms.optim.clip_grad_norm([p], [], 1.0)
    for max_norm, norm_type in ((0.0, 2.0), (-1.0, 2.0), (1.0, 0.0), (float("nan"), 2.0)):
        with pytest.raises(ValueError, match="max_norm and norm_type must be positive"):
            bms.optim.clip_grad_norm([p], [p * 1], max_norm, norm_type)
