"""Data of all ranks, which are on hosts that share a disk or have one each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from bmtrain_ms_base.data import IndexedFile, InstructionBatches, gpt_data
from bmtrain_ms_base.data.gpt import open_files
from bmtrain_ms_base.data.gpt_cache import cache_home
from bmtrain_ms_base.data.storage import Place, Storage

from ..comm import World, gather_json
from ..comm import world as current_world


def place_of(in_world: World | None = None) -> Place:
    """Where this rank stands, for `Storage`.

    Args:
        in_world: the ranks; default: the current world.
    """
    world = in_world or current_world()
    launch, rank = world.launch, world.mesh.rank
    return Place(rank, rank - launch.local_rank, launch.local_rank, lambda value: gather_json(value, world.everyone, "data"))


def load_gpt_data(
    paths: Sequence[str],
    samples: Sequence[int],
    length: int,
    split: str = "969,30,1",
    seed: int = 1234,
    cache: str | Path | None = None,
    *,
    shared_storage: bool | None = None,
    every_byte: bool = False,
    in_world: World | None = None,
) -> list[Any]:
    """`bmtrain_ms.data.gpt_data` for all ranks: indices that are missing are made by one rank of each storage while the others
    wait, and all have to read the same data. All ranks call it together.

    Args:
        paths, samples, length, split, seed: as there, the same on all ranks; paths may lead elsewhere on each host.
        cache: folder for indices; default: `cache` beside the data, or the user's.
        shared_storage: True: all hosts see the same files; False: each has its own; None: find out.
        every_byte: compare all tokens among hosts and not only the lengths of all sequences and tokens from everywhere; each host
            then reads all of the data at its start.
        in_world: the ranks; default: the current world.

    Returns:
        Training, validation and test samples, None where there are none.

    Raises:
        StorageError: it has failed on some rank, or hosts have different data; every rank raises the same.
    """
    place, folder = place_of(in_world), None if cache is None else Path(cache)
    opening = Storage(place, shared=shared_storage)
    weights, files = opening.together("opening the data", lambda: open_files(paths))
    storage = Storage(place, [cache_home(folder, file.name) for file in files], shared_storage)
    storage.refuse_other_settings("settings of the data", [weights, list(samples), length, split, seed])
    _refuse_differing(storage, files, every_byte)
    path = [x for pair in zip(map(str, weights), files) for x in pair] if len(files) > 1 else files
    return storage.made("making indices", lambda build: gpt_data(path, samples, length, split, seed, folder, build))


def load_instructions(
    prefix: str | Path,
    length: int,
    global_batch: int,
    seed: int = 0,
    *,
    every_byte: bool = False,
    in_world: World | None = None,
) -> InstructionBatches:
    """`bmtrain_ms.data.InstructionBatches` for all ranks, which have to read the same data. All ranks call it together.

    Nothing is made on disk, so that it does not matter whether hosts share one.

    Args:
        prefix, length, global_batch, seed: as there, the same on all ranks; the prefix may lead elsewhere on each host.
        every_byte: see `load_gpt_data`.
        in_world: the ranks; default: the current world.

    Raises:
        StorageError: it has failed on some rank, or hosts have different data; every rank raises the same.
    """
    storage = Storage(place_of(in_world), shared=False)
    batches = storage.together("opening the data", lambda: InstructionBatches(prefix, length, global_batch, seed))
    storage.refuse_other_settings("settings of the data", [length, global_batch, seed])
    _refuse_differing(storage, batches.files, every_byte)
    return batches


def _refuse_differing(storage: Storage, files: Sequence[IndexedFile], every_byte: bool) -> None:
    storage.refuse_differing(storage.together("reading the data", lambda: {file.name: file.digest for file in files}))
    if every_byte:
        once = storage.place.local_rank == 0  # on each host
        hashes = storage.together("reading all of the data", lambda: {file.name: file.hash for file in files if once})
        storage.refuse_differing(hashes)
