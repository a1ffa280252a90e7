"""World: everyone and the axes of the mesh, as engines."""

from __future__ import annotations

import numpy as np
import pytest

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, World, use_world
from bmtrain_ms.optim.norms import counts_here
from bmtrain_ms_base.mesh import AXES


def world_of(rank: int, size: int, **axes: int) -> World:
    return World(SimulatedEngine(rank, size), Mesh(size, rank, **axes))


@pytest.mark.parametrize("rank", range(8))
def test_each_axis_has_the_ranks_that_the_mesh_says(rank: int):
    world = world_of(rank, 8, tp=2, pp=2, ep=2)
    for axis in AXES:
        engine, peers = world.along(axis), world.mesh.peers(axis)
        assert (engine.size, engine.rank) == (len(peers), peers.index(rank))
        assert engine.clock is world.everyone.clock


@pytest.mark.one_engine
def test_an_axis_of_all_ranks_is_everyone_and_one_of_one_rank_is_the_identity():
    world = world_of(1, 4)
    assert world.along("dp") is world.along("shard") is world.everyone is world.engine
    assert world.along("tp").name == world.along("replica").name == "single"


def test_groups_are_made_in_one_order_on_every_rank():
    """Making a group is a collective: ranks that made them when they need them could wait for each other."""
    orders = []
    for rank in range(8):
        engine = RecordingEngine(SimulatedEngine(rank, 8))
        made = []
        engine.subgroup = lambda ranks, make=engine.subgroup, made=made: made.append(len(ranks)) or make(ranks)  # type: ignore[method-assign]
        World(engine, Mesh(8, rank, tp=2, replica=2, ep=4))
        orders.append(made)
    assert all(order == orders[0] for order in orders) and orders[0]


def test_parameters_are_sharded_along_their_axis_and_counted_once():
    whole = np.arange(7, dtype=np.float32)
    seen, counted = np.zeros(7, int), np.zeros(7, int)
    for rank in range(8):
        world = world_of(rank, 8, tp=2, replica=2)
        with use_world(world):
            p = bms.DistributedParameter(whole)
        assert p.layout.ranks == 2 and p.size == 4
        start, stop = p.owned
        np.testing.assert_array_equal(p.asnumpy()[: stop - start], whole[start:stop])
        seen[start:stop] += 1
        counted[start:stop] += counts_here(p, world)
    # stored once in each sharding group, of which there are two replicas for each of two tensor-parallel ranks
    assert (seen == 4).all() and (counted == 1).all()


def test_gradients_are_divided_by_the_data_parallel_ranks_only():
    world = world_of(0, 8, tp=2, pp=2)
    with use_world(world):
        assert bms.optim.OptimManager(grad_scale=2.0)._factor == 1.0
        assert bms.config["tp_size"] == 2 and bms.config["pipe_enabled"] and bms.config["zero_size"] == 2
