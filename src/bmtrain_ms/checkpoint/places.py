"""Which file of a checkpoint a rank writes, and what all ranks have together of tensors that are cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Mapping

import numpy as np

from bmtrain_ms_base.layout import Layout
from bmtrain_ms_base.mesh import Mesh

from ..comm import World, gather_json
from ..compat.runtime import from_host, host_array, numpy_dtype
from .entries import Entry
from .errors import CheckpointError
from .format import DTYPES, PIECE, TYPE_NAMES


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


@dataclass(frozen=True)
class Scattered:
    """A tensor of which ranks have parts.

    Attributes:
        dtype: of MindSpore.
        shape: of the whole tensor.
        holders: rank -> its layout, each part once.
    """

    dtype: Any
    shape: tuple[int, ...]
    holders: Mapping[int, Layout]

    def collect(self, entry: Entry | None, world: World, name: str) -> np.ndarray:
        """The whole tensor, flat, on rank 0; on the others something of its size is not made. All ranks call it.

        Args:
            entry: what this rank has; None: nothing.
        """
        engine, dtype = world.everyone, numpy_dtype(self.dtype)
        length = max(layout.length for layout in self.holders.values())
        shard = np.zeros(length, dtype)
        if entry is not None:
            mine = host_array(entry.get()).reshape(-1)
            shard[: mine.size] = mine
        chief = engine.rank == 0
        parts = {rank: np.empty(length, dtype) for rank in self.holders} if chief else {}
        for begin in range(0, length, max(1, PIECE // dtype.itemsize)):
            piece = shard[begin : begin + max(1, PIECE // dtype.itemsize)]
            rows = host_array(engine.all_gather([from_host(piece)], label=f"save {name}").wait()[0]).reshape(engine.size, -1)
            for rank, part in parts.items():
                part[begin : begin + piece.size] = rows[rank]
        whole = np.empty(self.shape if chief else 0, dtype)
        for rank, part in parts.items():
            self.holders[rank].paste(part, whole)
        return whole.reshape(-1)


def scattered(entries: Mapping[str, Entry], world: World) -> dict[str, Scattered]:
    """What ranks have only together, by name: parts of tensors that are cut, and what only some ranks have. All ranks call it.

    Raises:
        CheckpointError: they do not have all of a tensor; on every rank.
    """
    mesh = world.mesh
    if mesh.tp == mesh.pp == mesh.ep == 1:
        return {}
    mine = {
        name: [TYPE_NAMES[e.dtype], list(e.shape), None if e.layout is None else e.layout.to_json()] for name, e in entries.items()
    }
    everybody = gather_json(mine, world.everyone, "checkpoint parts")
    found: dict[str, Scattered] = {}
    for name in dict.fromkeys(name for of_rank in everybody for name in of_rank):
        dtype, shape, _ = next(of_rank[name] for of_rank in everybody if name in of_rank)
        holders: dict[Any, tuple[int, Layout]] = {}
        for rank, of_rank in enumerate(everybody):
            if name in of_rank:
                saved = of_rank[name][2]
                layout = Layout(tuple(shape)) if saved is None else Layout.from_json(saved)
                holders.setdefault((tuple(split.index for split in layout.splits), layout.index), (rank, layout))
        if sum(layout.owned_size for _, layout in holders.values()) != math.prod(shape):
            raise CheckpointError(
                f"the ranks have {sum(x.owned_size for _, x in holders.values())} elements of {name}, of shape {shape}"
            )
        found[name] = Scattered(DTYPES[dtype], tuple(shape), dict(holders.values()))
    return found
