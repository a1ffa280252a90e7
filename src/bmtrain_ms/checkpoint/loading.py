"""Which checkpoint to go on from, where there are several, hosts that do not see the same, or a damaged one; and restoring it."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from mindspore import nn

from ..comm import World, gather_json
from ..files.entries import GRADIENT, LoadResult, apply_entries, compare, state_named_now
from ..files.errors import CheckpointError, agree_or_fail
from ..optim import OptimManager
from .folder import checkpoint_name, find_latest, state_of, step_of, steps_in
from .index import INDEX, read_index
from .places import Place
from .run_state import checked_state, mesh_of
from .sharded import ShardedReader
from .stages import names_elsewhere, without
from .training import as_named_here, entries_to_load, load_file, of_master, training_entries

_ATTEMPTS = 20  # to load the latest before another takes its place


@dataclass(frozen=True)
class Resumed:
    """What `Checkpointer.load` restored.

    Attributes:
        step: of the checkpoint.
        extra: what was passed to `save`.
        path: of the checkpoint.
        result: names that did not match, with `strict=False`, and types that were converted.
    """

    step: int
    extra: dict[str, Any]
    path: Path
    result: LoadResult


@dataclass(frozen=True)
class Loader:
    """Restores a model and its manager; every rank has one, and all call it.

    Attributes:
        model, manager: are restored.
        world: the ranks that load.
        shared: whether all of them see the same files.
    """

    model: nn.Cell
    manager: OptimManager
    world: World
    shared: bool

    def load(self, source: Path, strict: bool, keep: str) -> Resumed | None:
        """See `Checkpointer.load`; None: there is no checkpoint in the source."""
        attempts = 0
        while True:
            attempts += 1
            found, is_file = self._found(source)
            if is_file:
                state, result = load_file(source, self.model, self.manager, strict, keep)
                return Resumed(state.step, state.extra, source, result)
            if found is None:
                return None
            before = state_of(found)
            try:
                return self._load(found, strict, keep, older_ones(found) if found != source else "")
            except CheckpointError:  # maybe another job, which saves there, has replaced or deleted it
                moved = gather_json(before is None or state_of(found) != before, self.world.everyone, "checkpoint moved")
                if attempts == _ATTEMPTS or not any(moved):
                    raise

    def _found(self, source: Path) -> tuple[Path | None, bool]:
        """(the checkpoint, the same on all ranks, or None; whether the source is a file)."""
        error: BaseException | None = None
        is_file, found, wrong = False, None, ""
        try:
            is_file = source.is_file()
            found, wrong = (source, "") if (source / INDEX).exists() else find_latest(source)
        except OSError as caught:
            error = caught
        agree_or_fail(self.world.everyone, error, f"{source} cannot be read")
        if is_file:
            return None, True
        found = same_everywhere(source, found, self.world, self.shared)
        if wrong and self.world.everyone.rank == 0:
            sys.stderr.write(f"WARNING: {wrong}\n")
        return found, False

    def _names(self) -> list[str]:
        """What this rank has; nothing where its names cannot be told apart, which loading says."""
        try:
            return list(training_entries(self.model, self.manager))
        except CheckpointError:
            return []

    def _load(self, folder: Path, strict: bool, keep: str, advice: str) -> Resumed:
        """`advice`: what else there is, if this one is damaged."""
        world, what = self.world, f"{folder} cannot be loaded"
        layout = None if self.shared else gather_json(world.launch.local_size, world.everyone, "checkpoint layout")
        place = world.everyone.rank, world.everyone.size
        elsewhere = names_elsewhere(self._names(), world)
        files = None if self.shared else Place.of(world, False, self.model).on_host
        error: BaseException | None = None
        with contextlib.ExitStack() as stack:
            try:
                if layout is not None:
                    check_layout(folder, layout, world)
                with advising(advice):
                    reader = stack.enter_context(ShardedReader(folder, files, place))
                entries, sources = entries_to_load(self.model, self.manager, reader.described)
                named = without(as_named_here(reader.described, sources), elsewhere, GRADIENT, of_master)
                result = compare(named, entries, strict, str(folder))
                raw = state_named_now(self.model, reader.index.state)
                state = checked_state(raw, self.model, self.manager, world, strict, str(folder))
            except Exception as caught:  # whatever it is: the other ranks wait
                error = caught
            agree_or_fail(world.everyone, error, what)
            identities = gather_json(reader.index.identity, world.everyone, "checkpoint identity")
            if len(set(identities)) > 1:
                raise CheckpointError(
                    f"{folder} holds different checkpoints on different hosts (rank 0: {identities[0]}, others: "
                    f"{sorted(set(identities) - {identities[0]})}): they cannot be mixed"
                )
            try:
                with advising(advice):
                    apply_entries({n: e for n, e in entries.items() if n in sources}, reader, sources)
            except Exception as caught:
                error = caught
            agree_or_fail(world.everyone, error, what)
        gradients = {n[len(GRADIENT) :]: e.get() for n, e in entries.items() if n.startswith(GRADIENT) and not e.of_model}
        self.manager.restore_gradients(gradients)
        state.restore(self.manager, world, keep)
        return Resumed(state.step, state.extra, folder, result)


def same_everywhere(source: Path, found: Path | None, world: World, shared: bool) -> Path | None:
    """The checkpoint to load, on which all hosts agree: one that was getting its name may have it on some of them only.

    All ranks call it.
    """
    # Older checkpoints are compared only where hosts looked for one in folders of their own: one that was named is taken as it is,
    # and of a shared folder all ranks have the same ones.
    mine: dict[str, str | None] = {}
    if found is not None and found != source and not shared:
        mine = {checkpoint_name(step): _identity(source / checkpoint_name(step)) for step in steps_in(source)}
    everybody = gather_json([None if found is None else found.name, mine], world.everyone, "checkpoint to load")
    names, common = [name for name, _ in everybody], []
    for name, identity in mine.items():
        if identity is not None and all(other.get(name) == identity for _, other in everybody):
            common.append(source / name)
    # Something is common only if every rank has found a checkpoint, so each name has a step. Of the common ones none is taken that
    # is newer than what a rank has found by itself.
    last = min(step_of(source / name) for name in names) if common else 0
    older = [path for path in common if step_of(path) <= last]
    if len(set(names)) == 1:
        identities = {other.get(names[0]) for _, other in everybody}
        if len(identities) == 1 or None in identities or not older:  # None: damaged, which loading says
            return found
    if older:
        if world.everyone.rank == 0:
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


def check_layout(folder: Path, layout: list[int], world: World) -> None:
    """Refuse another layout of ranks where storage is not shared, before files are opened, which would be said to be missing.

    Raises:
        CheckpointError: other ranks, or ranks on other hosts, have written it.
    """
    saved, size = read_index(folder).state, world.shards.size
    if saved.get("shared_storage") is True and size > 1:  # only the first file has what is the same on all ranks
        raise CheckpointError(
            "it was saved with shared storage; resume with it, or write one that hosts may divide: bmtrain-ms ckpt reshard "
            f"{folder} OUT --ranks {size}"
        )
    theirs = {"mesh": saved.get("mesh"), "ranks per host": saved.get("layout")}
    ours = {"mesh": mesh_of(world), "ranks per host": layout}
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
    """Have each error of a checkpoint in the `with` block end with `advice`."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}{advice}") from error


def _identity(checkpoint: Path) -> str | None:
    try:
        return read_index(checkpoint).identity
    except CheckpointError:
        return None
