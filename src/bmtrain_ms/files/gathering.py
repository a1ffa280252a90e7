"""Whole tensors on rank 0, of what all ranks have of them; no rank ever holds the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

import numpy as np

from bmtrain_ms_base.layout import Layout

from ..comm import Engine, World, gather_json
from ..compat.runtime import from_host, host_array, numpy_dtype
from .entries import Entry
from .errors import CheckpointError
from .format import DTYPES, PIECE, TYPE_NAMES


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
    mesh, shards = world.mesh, world.along("shard").size
    layouts = [e.layout for e in entries.values() if e.layout is not None]
    if mesh.tp == mesh.pp == mesh.ep == 1 and all(not x.splits and x.ranks == shards for x in layouts):
        return {}  # every rank has a shard of each, the same one along `replica`: experts have none there
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
                f"the ranks of this world have {sum(x.owned_size for _, x in holders.values())} elements of {name}, of shape "
                f"{tuple(shape)}: a whole file needs ranks that have all of it together"
            )
        found[name] = Scattered(DTYPES[dtype], tuple(shape), dict(holders.values()))
    return found


class Whole:
    """Whole tensors on rank 0, one after the other, of what all ranks have together.

    Attributes:
        described: name -> (MindSpore dtype, shape), in one order on every rank.
    """

    def __init__(self, entries: Mapping[str, Entry], world: World):
        self._entries, self._world = entries, world
        self._scattered = scattered(entries, world)
        self.described: dict[str, tuple[Any, tuple[int, ...]]] = {name: (e.dtype, e.shape) for name, e in entries.items()}
        if self._scattered:
            self.described = {name: (x.dtype, x.shape) for name, x in self._scattered.items()}

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first element, values) of all pieces of a tensor; values are meaningful on rank 0. All ranks go through them."""
        if name in self._scattered:
            yield 0, self._scattered[name].collect(self._entries.get(name), self._world, name)
        else:
            yield from pieces_of(self._entries[name], self._world.along("shard"), name)


def pieces_of(entry: Entry, engine: Engine, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """(first element, values) of all pieces of a tensor; values are meaningful on rank 0."""
    if entry.layout is None:
        yield 0, host_array(entry.get()).reshape(-1)
        return
    shard = host_array(entry.get())
    owned = [entry.layout.of_rank(rank).owned for rank in range(engine.size)]
    step = max(1, PIECE // shard.itemsize)
    for begin in range(0, entry.layout.length, step):
        piece = from_host(np.ascontiguousarray(shard[begin : begin + step]))
        rows = host_array(engine.all_gather([piece], label=f"save {name}").wait()[0]).reshape(engine.size, -1)
        for (start, stop), row in zip(owned, rows):
            if start + begin < stop:
                yield start + begin, row[: stop - start - begin]
