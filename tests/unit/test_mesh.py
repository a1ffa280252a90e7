"""Rank arithmetic: BMTrain's layout, with nothing global."""

from __future__ import annotations

import itertools

import pytest

from bmtrain_ms.comm import Mesh

SHAPES = [
    (world, pp, tp)
    for world, pp, tp in itertools.product((1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 3, 4), (1, 2, 4))
    if world % (pp * tp) == 0
]


@pytest.mark.parametrize(("world", "pp", "tp"), SHAPES)
def test_bmtrain_topology(world: int, pp: int, tp: int):
    """As bmtrain.global_var.topology has it: pipe_idx = rank % (world / pp), stage_id = rank // (world / pp)."""
    for rank in range(world):
        mesh = Mesh(world, rank, tp=tp, pp=pp)
        assert mesh.pp_rank == rank // (world // pp)
        assert mesh.tp_rank == rank % tp
        assert mesh.dp == world // (pp * tp)
        assert mesh.dp_rank == rank % (world // pp) // tp


@pytest.mark.parametrize(("world", "pp", "tp"), SHAPES)
def test_coordinates_are_unique_and_peers_partition_the_world(world: int, pp: int, tp: int):
    meshes = [Mesh(world, rank, tp=tp, pp=pp) for rank in range(world)]
    assert len({(m.pp_rank, m.dp_rank, m.tp_rank) for m in meshes}) == world
    for axis, size in (("pp", pp), ("dp", world // (pp * tp)), ("tp", tp)):
        for mesh in meshes:
            peers = mesh.peers(axis)
            assert len(peers) == size and peers == sorted(peers)
            assert peers.index(mesh.rank) == getattr(mesh, f"{axis}_rank")
            for other in peers:
                assert meshes[other].peers(axis) == peers
                for fixed in {"pp", "dp", "tp"} - {axis}:
                    assert getattr(meshes[other], f"{fixed}_rank") == getattr(mesh, f"{fixed}_rank")


def test_worked_example():
    """8 ranks, 2 stages, 2-way tensor parallel: stage 0 is 0 1 2 3, tensor pairs are adjacent."""
    mesh = Mesh(8, 5, tp=2, pp=2)
    assert (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank, mesh.dp) == (1, 0, 1, 2)
    assert mesh.peers("tp") == [4, 5]
    assert mesh.peers("dp") == [5, 7]
    assert mesh.peers("pp") == [1, 5]


def test_plain_zero_mesh():
    mesh = Mesh(3, 2)
    assert (mesh.dp, mesh.dp_rank, mesh.tp_rank, mesh.pp_rank) == (3, 2, 0, 0)
    assert (mesh.peers("dp"), mesh.peers("tp"), mesh.peers("pp")) == ([0, 1, 2], [2], [2])


def test_two_meshes_side_by_side():
    wide, deep = Mesh(8, 3, tp=4), Mesh(8, 3, pp=4)
    assert (wide.peers("tp"), deep.peers("pp")) == ([0, 1, 2, 3], [1, 3, 5, 7])
    assert (wide.dp, deep.dp) == (2, 2)
    assert wide.peers("dp") == [3, 7] and deep.peers("dp") == [2, 3]
    assert wide == Mesh(8, 3, tp=4) != deep


def test_a_mesh_does_not_change():
    with pytest.raises(AttributeError):
        Mesh(2, 0).rank = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"world": 6, "rank": 0, "tp": 2, "pp": 2}, r"world size 6 is not divisible by pp \* tp = 2 \* 2 = 4; start a mul"),
        ({"world": 1, "rank": 0, "tp": 2}, r"world size 1 is not divisible by pp \* tp = 1 \* 2 = 2; start a multiple of 2 "),
        ({"world": 2, "rank": 2}, r"^rank 2 is outside the world of 2 \(0\.\.1\)$"),
        ({"world": 2, "rank": -1}, r"^rank -1 is outside the world of 2 \(0\.\.1\)$"),
        ({"world": 0, "rank": 0}, r"^world, tp and pp must be at least 1, not 0, 1, 1$"),
        ({"world": 2, "rank": 0, "tp": 0}, r"^world, tp and pp must be at least 1, not 2, 0, 1$"),
        ({"world": 2, "rank": 0, "pp": -1}, r"^world, tp and pp must be at least 1, not 2, 1, -1$"),
    ],
)
def test_errors(arguments: dict, text: str):
    with pytest.raises(ValueError, match=text):
        Mesh(**arguments)


def test_unknown_axis():
    with pytest.raises(ValueError, match=r"^unknown mesh axis 'cp'; choose one of pp, dp, tp, replica, shard, edp, ep$"):
        Mesh(2, 0).peers("cp")
    with pytest.raises(ValueError, match="unknown mesh axis 'world'"):
        Mesh(2, 0).size("world")


@pytest.mark.parametrize("arguments", [{"replica": 3}, {"ep": 3}, {"ep": 0}, {"tp": 2, "replica": 4}], ids=str)
def test_factors_of_the_data_axis_must_divide_it(arguments: dict):
    with pytest.raises(ValueError, match=r"^(replica|ep)=\d does not divide the \d data-parallel ranks: use \d( or \d)?$"):
        Mesh(4, 0, **arguments)


GRIDS = [  # world, pp, tp, replica, ep
    shape
    for shape in itertools.product((1, 2, 4, 6, 8, 12, 16), (1, 2), (1, 2, 3), (1, 2, 3), (1, 2, 4))
    if shape[0] % (shape[1] * shape[2]) == 0 and all(shape[0] // (shape[1] * shape[2]) % n == 0 for n in shape[3:])
]


@pytest.mark.parametrize(("world", "pp", "tp", "replica", "ep"), GRIDS)
def test_both_readings_of_the_data_axis_partition_it(world: int, pp: int, tp: int, replica: int, ep: int):
    meshes = [Mesh(world, rank, tp, pp, replica, ep) for rank in range(world)]
    for axes in (("pp", "replica", "shard", "tp"), ("pp", "edp", "ep", "tp")):
        assert len({tuple(mesh.coordinate(axis) for axis in axes) for mesh in meshes}) == world
        for mesh in meshes:
            assert mesh.peers(*axes) == list(range(world)) and mesh.peers(axes[1], axes[2]) == mesh.peers("dp")
            for axis in axes:
                peers = mesh.peers(axis)
                assert len(peers) == mesh.size(axis) and peers.index(mesh.rank) == mesh.coordinate(axis)
    for mesh in meshes:
        assert mesh.shard * mesh.replica == mesh.dp == mesh.edp * mesh.ep


def test_sharding_ranks_and_expert_ranks_are_neighbours():
    mesh = Mesh(16, 9, tp=2, replica=2, ep=4)
    assert mesh.peers("shard") == [9, 11, 13, 15] and mesh.peers("replica") == [1, 9]
    assert mesh.peers("ep") == [9, 11, 13, 15] and mesh.peers("edp") == [1, 9]
    assert mesh.peers("dp", "tp") == list(range(16))
    assert mesh.peers() == [9]


@pytest.mark.parametrize("axes", [("shard", "ep"), ("dp", "ep"), ("replica", "dp")])
def test_readings_of_the_data_axis_are_not_mixed(axes: tuple[str, str]):
    with pytest.raises(ValueError, match=f"^axes {', '.join(axes)} are different readings of the data axis"):
        Mesh(4, 0).peers(*axes)


def test_experts_and_shards_are_two_readings_of_the_data_axis():
    mesh = Mesh.data_parallel(8, 5, shard_size=2, tp=2, ep=2)
    assert (mesh.dp, mesh.replica, mesh.shard, mesh.edp, mesh.ep) == (4, 2, 2, 2, 2)
    assert mesh.peers("ep") == [5, 7] and mesh.peers("edp") == [1, 5] and mesh.peers("tp") == [4, 5]


@pytest.mark.parametrize(("ep", "text"), [(3, "ep=3 does not divide the 8 data-parallel ranks: use 2 or 4"), (9, "use 8")])
def test_sizes_that_fit_are_named(ep: int, text: str):
    with pytest.raises(ValueError, match=f"{text}$"):
        Mesh.data_parallel(8, 0, ep=ep)
