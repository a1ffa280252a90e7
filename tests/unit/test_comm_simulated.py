"""One rank of a world that is not there."""

from __future__ import annotations

import numpy as np
import pytest

from bmtrain_ms.comm import Mesh, SimulatedEngine, World
from bmtrain_ms.compat.runtime import from_host, host_array

pytestmark = pytest.mark.usefixtures("single_world")


def test_as_if_all_ranks_gave_the_same():
    engine = SimulatedEngine(2, 4)
    x = from_host(np.arange(8, dtype=np.float32).reshape(4, 2))
    (gathered,) = engine.all_gather([x]).wait()
    np.testing.assert_array_equal(host_array(gathered), np.tile(host_array(x), (4, 1)))
    out = np.zeros((16, 2), np.float32)
    assert engine.all_gather([x], [out]).wait()[0] is out
    np.testing.assert_array_equal(out, host_array(gathered))
    np.testing.assert_array_equal(host_array(engine.reduce_scatter([x], "mean").wait()[0]), [[4, 5]])
    np.testing.assert_array_equal(host_array(engine.all_reduce([x]).wait()[0]), host_array(x))
    np.testing.assert_array_equal(host_array(engine.all_to_all([x]).wait()[0]), np.tile([[4, 5]], (4, 1)))
    assert engine.broadcast([x], 3).wait()[0] is x
    assert engine.recv([x], 0).wait()[0].shape == x.shape
    assert engine.send([x], 0).wait() == engine.barrier().wait() == []


@pytest.mark.one_engine
def test_groups_of_any_size():
    engine = SimulatedEngine(4100, 8192)
    world = World(engine, Mesh(8192, 4100, replica=1024))
    assert (world.along("shard").rank, world.along("shard").size) == (4, 8)
    assert (world.along("replica").rank, world.along("replica").size) == (512, 1024)
    assert world.along("dp") is world.everyone is engine
    assert (world.along("tp").size, world.along("pp").size) == (1, 1)


def test_errors():
    with pytest.raises(ValueError, match=r"^rank 4 is outside the world of 4 \(0\.\.3\)$"):
        SimulatedEngine(4, 4)
    with pytest.raises(ValueError, match=r"^rank 1 is not in the sub-group \[0, 2\]: only its members create it$"):
        SimulatedEngine(1, 4).subgroup([0, 2])
    with pytest.raises(ValueError, match=r"^root=4 is not a rank of this group of 4 \(0\.\.3\)$"):
        SimulatedEngine(1, 4).broadcast([], 4)
