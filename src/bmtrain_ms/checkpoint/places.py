"""Which file of a checkpoint a rank writes, and what all ranks have together of tensors that are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bmtrain_ms_base.mesh import Mesh

from ..comm import World


@dataclass(frozen=True)
class Place:
    """The file that a rank writes.

    Attributes:
        number: of its file; ranks that store the same have one.
        files: how many there are.
        writes: whether it is this rank that writes it, the first of those whose files are in one folder.
        on_host: numbers of the files of this host's ranks, this rank's first.
    """

    number: int
    files: int
    writes: bool
    on_host: tuple[int, ...]

    @classmethod
    def of(cls, world: World, shared: bool) -> Place:
        """Where all ranks see one folder (`shared`), or each host has one of its own."""
        mesh, launch = world.mesh, world.launch
        number, first = _number(mesh), mesh.rank - launch.local_rank
        host = [_number(replace(mesh, rank=rank)) for rank in range(first, min(first + launch.local_size, mesh.world))]
        others = range(mesh.rank) if shared else range(first, mesh.rank)
        writes = all(_number(replace(mesh, rank=rank)) != number for rank in others)
        files = mesh.world if _all_differ(mesh) else mesh.world // mesh.replica
        return cls(number, files, writes, (number, *dict.fromkeys(x for x in host if x != number)))


def _all_differ(mesh: Mesh) -> bool:
    """Whether each rank has something that no other has: experts are not repeated along `replica`."""
    return mesh.replica == 1 or mesh.ep > 1


def _number(mesh: Mesh) -> int:
    """A rank's place among those that differ along other axes than `replica`."""
    if _all_differ(mesh):
        return mesh.rank
    return (mesh.pp_rank * mesh.shard + mesh.coordinate("shard")) * mesh.tp + mesh.tp_rank
