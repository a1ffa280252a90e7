"""Which file of a checkpoint a rank writes, and what all ranks have together of tensors that are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mindspore import nn

from bmtrain_ms_base.mesh import Mesh

from ..comm import World, any_rank


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
    def of(cls, world: World, shared: bool, model: nn.Cell) -> Place:
        """Where all ranks see one folder (`shared`), or each host has one of its own. All ranks call it."""
        mesh, launch = world.mesh, world.launch
        number_of = _number if _replicas_are_alike(world, model) else _rank
        number, first = number_of(mesh), mesh.rank - launch.local_rank
        host = [number_of(replace(mesh, rank=rank)) for rank in range(first, min(first + launch.local_size, mesh.world))]
        others = range(mesh.rank) if shared else range(first, mesh.rank)
        writes = all(number_of(replace(mesh, rank=rank)) != number for rank in others)
        files = mesh.world if number_of is _rank else mesh.world // mesh.replica
        return cls(number, files, writes, (number, *dict.fromkeys(x for x in host if x != number)))


def _replicas_are_alike(world: World, model: nn.Cell) -> bool:
    """Whether ranks along `replica` have the same: experts are not repeated there, on whichever stage they are."""
    if world.mesh.replica == 1 or world.mesh.ep > 1:
        return False
    experts = any(getattr(p, "along", None) == "edp" for p in model.get_parameters())
    return not any_rank(world.everyone, experts, "experts in the checkpoint")


def _rank(mesh: Mesh) -> int:
    return mesh.rank


def _number(mesh: Mesh) -> int:
    """A rank's place among those that differ along other axes than `replica`."""
    return (mesh.pp_rank * mesh.shard + mesh.coordinate("shard")) * mesh.tp + mesh.tp_rank
