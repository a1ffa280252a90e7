"""What each rank writes of a sharded checkpoint."""

from __future__ import annotations

from typing import Any, Collection, Mapping

import numpy as np
import xxhash

from ..comm import World, gather_json
from ..compat.runtime import from_host, host_array
from .entries import Entry


def differing(entries: Mapping[str, Entry], world: World) -> list[str]:
    """Names of whole tensors that are not the same on every rank, by their bits. All ranks call it."""
    whole = {name: entry for name, entry in entries.items() if entry.layout is None}
    if world.engine.size == 1 or not whole:
        return []
    mine = [xxhash.xxh3_64_hexdigest(host_array(entry.get()).reshape(-1).view(np.uint8).data) for entry in whole.values()]
    everybody = gather_json(mine, world.engine, "checkpoint copies")
    return [name for name, hashes in zip(whole, zip(*everybody)) if len(set(hashes)) > 1]


def owned(
    entries: Mapping[str, Entry], apart: Collection[str], world: World, writes: bool, writes_whole: bool
) -> dict[str, tuple[Any, np.ndarray]]:
    """What this rank writes, flat: name -> (dtype, array). All ranks call it.

    Args:
        apart: what `differing` found: every rank's copy is written, one behind the other, in place of the one of all.
        writes: False: another rank writes this shard.
        writes_whole: whether tensors that are whole on every rank are in this rank's file too.
    """
    pieces = {}
    for name, entry in entries.items():
        array = host_array(entry.get()).reshape(-1)
        if name in apart:
            array = host_array(world.engine.all_gather([from_host(array)], label=f"save {name}").wait()[0]).reshape(-1)
        if not writes or (entry.layout is None and not writes_whole):
            array = array[:0].copy()  # somebody else writes it
        elif entry.layout is not None:
            array = array[: entry.layout.owned_size]
        pieces[name] = entry.dtype, np.ascontiguousarray(array)
    return pieces
