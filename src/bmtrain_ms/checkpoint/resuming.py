"""Which checkpoint to go on from, where there are several, hosts that do not see the same, or a damaged one."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Iterator

from ..comm import World, gather_json
from .errors import CheckpointError
from .folder import checkpoint_name, step_of, steps_in
from .sharded import read_index


def same_everywhere(source: Path, found: Path | None, here: World, shared: bool) -> Path | None:
    """The checkpoint to load, on which all hosts agree: one that was getting its name may have it on some of them only.

    All ranks call it.
    """
    mine: dict[str, str | None] = {}
    if found is not None and found != source and not shared:
        mine = {checkpoint_name(step): _identity(source / checkpoint_name(step)) for step in steps_in(source)}
    everybody = gather_json([None if found is None else found.name, mine], here.engine, "checkpoint to load")
    names, common = [name for name, _ in everybody], []
    for name, identity in mine.items():
        if identity is not None and all(other.get(name) == identity for _, other in everybody):
            common.append(source / name)
    last = min(step_of(source / name) for name in names) if common else 0
    older = [path for path in common if step_of(path) <= last]
    if len(set(names)) == 1:
        identities = {other.get(names[0]) for _, other in everybody}
        if len(identities) == 1 or None in identities or not older:  # None: damaged, which loading says
            return found
    if older:
        if here.mesh.rank == 0:
            sys.stderr.write(
                f"WARNING: hosts have not the same latest checkpoint in {source} ({', '.join(sorted(set(names)))}); going on "
                f"from {older[-1].name}, the last that all have\n"
            )
        return older[-1]
    raise CheckpointError(
        f"ranks see different latest checkpoints in {source}: "
        + ", ".join(f"{name or 'none'} on rank {rank}" for rank, name in enumerate(names))
        + ". Is the folder shared? If it is not, name one that every host has"
    )


def check_layout(folder: Path, layout: list[int], here: World) -> None:
    """Without shared storage, before files are opened, which would be said to be missing.

    Raises:
        CheckpointError: other ranks, or ranks on other hosts, have written it.
    """
    saved, size = read_index(folder).state, here.shards.size
    if saved.get("shared_storage") is True and size > 1:  # only the first file has what is the same on all ranks
        raise CheckpointError(
            "it was saved with shared storage; resume with it, or write one that hosts may divide: bmtrain-ms ckpt reshard "
            f"{folder} OUT --ranks {size}"
        )
    theirs = {"mesh": saved.get("mesh"), "ranks per host": saved.get("layout")}
    ours = {"mesh": {"ranks": here.engine.size, "shard_size": size}, "ranks per host": layout}
    for name, mine in ours.items():
        if theirs[name] != mine and not (name == "ranks per host" and theirs[name] is None):  # of `reshard`
            raise CheckpointError(
                f"without shared storage a checkpoint is resumed by the layout that wrote it: {name} {theirs[name]}, not "
                f"{mine}; bring its files to one folder and resume with shared storage"
            )


def older_ones(checkpoint: Path) -> str:
    """How to load another one; empty: there is none."""
    folder, current = checkpoint.parent, step_of(checkpoint)
    names = [checkpoint_name(step) for step in reversed(steps_in(folder)) if step < current]
    if not names:
        return ""
    return f"; older ones are there: {', '.join(names[:5])}; load({str(folder / names[0])!r}) goes on from one"


@contextlib.contextmanager
def advising(advice: str) -> Iterator[None]:
    """Errors end with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}{advice}") from error


def _identity(checkpoint: Path) -> str | None:
    try:
        return read_index(checkpoint).identity
    except CheckpointError:
        return None
