"""The stand-in for HCCL among ranks that differ: order, groups, messages."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
from mindspore import Tensor

from bmtrain_ms.comm import World

pytestmark = pytest.mark.ranks

Run = Callable[..., list[Any]]


def mine(world: World, size: int = 2) -> Tensor:
    """10 r, 10 r + 1, ..."""
    return Tensor(np.arange(size, dtype=np.float32) + 10 * world.everyone.rank)


def collectives(world: World) -> dict[str, Any]:
    comm: Any = world.everyone.comm  # type: ignore[attr-defined]
    begun = {
        "all_gather": comm.all_gather_into_tensor(mine(world), async_op=True),
        "sum": comm.all_reduce(mine(world), async_op=True),
        "max": comm.all_reduce(mine(world), "max", async_op=True),
        "reduce_scatter": comm.reduce_scatter_tensor(mine(world, 4), async_op=True),
        "all_to_all": comm.all_to_all_single_with_output_shape((4,), mine(world, 4), async_op=True),
    }
    for _, handle in reversed(list(begun.values())):  # in any order
        handle.wait()
    found = {name: out.asnumpy().tolist() for name, (out, _) in begun.items()}
    return {**found, "broadcast": comm.broadcast(mine(world), src=1).asnumpy().tolist()}


def test_collectives(rehearsing_ranks: Run):
    both = {"all_gather": [0, 1, 10, 11], "sum": [10, 12], "max": [10, 11], "broadcast": [10, 11]}
    first, second = rehearsing_ranks(2, collectives)
    assert first == {**both, "reduce_scatter": [10, 12], "all_to_all": [0, 1, 10, 11]}
    assert second == {**both, "reduce_scatter": [14, 16], "all_to_all": [2, 3, 12, 13]}


def messages(world: World) -> list[list[float]]:
    """Both ways at once, two each way; they arrive in the order in which they were sent, whoever waits first."""
    comm: Any = world.everyone.comm  # type: ignore[attr-defined]
    other = 1 - world.everyone.rank
    sent = [comm.isend(mine(world) + i, dst=other) for i in (100, 200)]
    received = [comm.irecv(mine(world), src=other) for _ in range(2)]
    for _, handle in reversed(received):
        handle.wait()
    for handle in sent:
        handle.wait()
    return [out.asnumpy().tolist() for out, _ in received]


def test_messages(rehearsing_ranks: Run):
    assert rehearsing_ranks(2, messages) == [[[110, 111], [210, 211]], [[100, 101], [200, 201]]]


def groups(world: World) -> list[Any]:
    """Ranks 0 and 2, in which the second sends to the first; `src` and `dst` are ranks among everyone."""
    comm: Any = world.everyone.comm  # type: ignore[attr-defined]
    found: list[Any] = []
    if world.everyone.rank != 1:
        comm.create_group("even", [0, 2])
        found.append(comm.all_reduce(mine(world), group="even")[0].asnumpy().tolist())
        found.append(comm.broadcast(mine(world), src=2, group="even").asnumpy().tolist())
        if world.everyone.rank == 2:
            comm.isend(mine(world), dst=0, group="even").wait()
        else:
            out, handle = comm.irecv(mine(world), src=2, group="even")
            handle.wait()
            found.append(out.asnumpy().tolist())
    found.append(comm.all_reduce(mine(world))[0].asnumpy().tolist())
    pair = world.everyone.subgroup([1, 2]) if world.everyone.rank else None
    if pair is not None:
        found.append((pair.rank, pair.size, pair.all_gather([mine(world)]).wait()[0].asnumpy().tolist()))
        found.append(pair.broadcast([mine(world)], root=0).wait()[0].asnumpy().tolist())
    return found


def test_groups(rehearsing_ranks: Run):
    everyone = [30, 33]
    assert rehearsing_ranks(3, groups) == [
        [[20, 22], [20, 21], [20, 21], everyone],
        [everyone, (0, 2, [10, 11, 20, 21]), [10, 11]],
        [[20, 22], [20, 21], everyone, (1, 2, [10, 11, 20, 21]), [10, 11]],
    ]


def forgetful(world: World) -> None:
    world.everyone.all_reduce([mine(world)])


def test_what_nobody_waits_for_fails_a_test(rehearsing_ranks: Run):
    with pytest.raises(AssertionError, match=r"nobody waited for \['all_reduce in hccl_world_group'\]"):
        rehearsing_ranks(2, forgetful)
