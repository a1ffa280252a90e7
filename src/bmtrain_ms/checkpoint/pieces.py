"""What each rank writes of a sharded checkpoint."""

from __future__ import annotations

from typing import Any, Collection, Mapping

import numpy as np
import xxhash

from ..comm import World, gather_json
from ..compat.runtime import from_host, host_array
from .store import Entry


def differing(entries: Mapping[str, Entry], here: World) -> list[str]:
    """Names of whole tensors that are not the same on every rank, by their bits. All ranks call it."""
    whole = {name: entry for name, entry in entries.items() if entry.shard_length is None}
    if here.engine.size == 1 or not whole:
        return []
    mine = [xxhash.xxh3_64_hexdigest(host_array(entry.get()).reshape(-1).view(np.uint8).data) for entry in whole.values()]
    everybody = gather_json(mine, here.engine, "checkpoint copies")
    return [name for name, hashes in zip(whole, zip(*everybody)) if len(set(hashes)) > 1]


def owned(
    entries: Mapping[str, Entry], apart: Collection[str], here: World, shared: bool, writes: bool
) -> dict[str, tuple[Any, np.ndarray]]:
    """What this rank writes, flat: name -> (dtype, array). All ranks call it.

    Args:
        apart: what `differing` found: every rank's copy is written, one behind the other, in place of the one of all.
        shared: whether there is shared storage; otherwise whole tensors are in every rank's file.
        writes: False: another rank writes this shard.
    """
    pieces = {}
    rank = here.shards.rank
    for name, entry in entries.items():
        array = host_array(entry.get()).reshape(-1)
        if name in apart:
            array = host_array(here.engine.all_gather([from_host(array)], label=f"save {name}").wait()[0]).reshape(-1)
        if not writes or (shared and entry.shard_length is None and rank):
            array = array[:0].copy()  # somebody else writes it
        elif entry.shard_length is not None:
            start = min(rank * entry.shard_length, entry.count)
            array = array[: min(start + entry.shard_length, entry.count) - start]
        pieces[name] = entry.dtype, np.ascontiguousarray(array)
    return pieces
