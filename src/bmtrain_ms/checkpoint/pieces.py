"""What each rank writes of a sharded checkpoint."""

from __future__ import annotations

from typing import Any, Collection, Mapping

import numpy as np
import xxhash

from ..comm import World, gather_json
from ..compat.runtime import from_host, host_array
from ..files.entries import Entry
from .places import Place


def names_that_differ(entries: Mapping[str, Entry], world: World) -> list[str]:
    """Names of whole tensors that are not the same on every rank, by their bits. All ranks call it."""
    whole = {name: entry for name, entry in entries.items() if entry.layout is None}
    if world.everyone.size == 1 or not whole:
        return []
    mine = [xxhash.xxh3_64_hexdigest(host_array(entry.get()).reshape(-1).view(np.uint8).data) for entry in whole.values()]
    everybody = gather_json(mine, world.everyone, "checkpoint copies")
    return [name for name, hashes in zip(whole, zip(*everybody)) if len(set(hashes)) > 1]


def pieces_to_write(
    entries: Mapping[str, Entry], apart: Collection[str], world: World, place: Place, shared: bool
) -> dict[str, tuple[Any, np.ndarray]]:
    """What this rank writes, flat: name -> (dtype, array). All ranks call it.

    Args:
        apart: what `names_that_differ` found: every rank's copy is written, one behind the other, in place of the one of all.
        place: the file that this rank writes; what it does not write has no elements.
        shared: whether all files are in one folder: then the first has what is whole on every rank, and what several ranks have
            is in the file of the first of them; otherwise each has all that its rank has.
    """
    pieces = {}
    for name, entry in entries.items():
        array = host_array(entry.get()).reshape(-1)
        if name in apart:
            array = host_array(world.everyone.all_gather([from_host(array)], label=f"save {name}").wait()[0]).reshape(-1)
        elsewhere = shared and (place.number > 0 if entry.layout is None else entry.layout.copy > 0)
        if not place.writes or elsewhere:
            array = array[:0].copy()
        elif entry.layout is not None:
            array = array[: entry.layout.owned_size]
        pieces[name] = entry.dtype, np.ascontiguousarray(array)
    return pieces
