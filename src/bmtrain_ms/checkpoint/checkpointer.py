"""Saving and resuming a training run: every rank writes what it owns, any number of ranks reads it."""

from __future__ import annotations

import atexit
import contextlib
import secrets
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Collection, Mapping

import numpy as np
from mindspore import nn

from ..comm import World, all_ranks, gather_json, world
from ..optim import OptimManager
from .errors import CheckpointError, agree_or_fail
from .folder import (
    LATEST,
    FolderLock,
    Naming,
    checkpoint_name,
    delete,
    doomed,
    find_latest,
    point_to,
    prune,
    state_of,
    sweep,
    sync_folder,
    write_text,
)
from .pieces import differing, owned
from .resuming import advising, check_layout, older_ones, same_everywhere
from .run_state import checked, checked_extra, checked_keep, checked_step, collected
from .saving import Saving
from .sharded import INDEX, Index, IndexedTensor, ShardedReader, file_name, useful_threads
from .store import Entry, LoadResult, apply_entries, compare
from .training import GRADIENT, as_named_here, check_complete, entries_to_load, entries_to_save, load_file

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


class Checkpointer:
    """Checkpoints of one training run in one folder. All ranks make one, and call its methods together.

    What is saved: the model, every optimizer's masters, moments and steps, schedules, loss scaler, gradients that have been
    accumulated, the counters of stateless randomness, Python's and NumPy's generators, and `extra`. The same number of ranks with
    the same seed, which is compared, goes on bit by bit as if it had never stopped; another number to the rounding of sums over
    ranks. What is whole on every rank and not the same there, e.g. running statistics of batches, is saved of every rank: each goes
    on with its own; of another number of ranks m, rank r goes on with that of rank r * n // m of the n that saved.

    A checkpoint appears under its name complete, checked, and on the disk, or not at all; `latest` moves after that. Without shared
    storage it gets its name on all hosts or on none, and what it replaces goes when all have it.

    Args:
        folder: shared by all ranks, or, without shared storage, of that name on every host. Made if it is not there.
        model, manager: what is saved and restored.
        keep_last: delete all but so many of the newest checkpoints after a save; None: keep all.
        keep_every: keep those whose step is a multiple of it, too.
        shared_storage: False: every host keeps what its ranks wrote, with the index; only the same layout of ranks can resume.
        on_busy: when `save` comes while one is in the background: `wait` for it, or `refuse`.

    Raises:
        ValueError: an option out of range; or the manager trains parameters that the model does not have, which would not be saved
            (this `save` and `load` raise too), or two of the model have one name.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Cell,
        manager: OptimManager,
        *,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        shared_storage: bool = True,
        on_busy: str = "wait",
    ):
        if (keep_last is not None and keep_last < 1) or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last and keep_every must be at least 1, or None, not {keep_last}, {keep_every}")
        if on_busy not in ("wait", "refuse"):
            raise ValueError(f"on_busy must be wait or refuse, not {on_busy!r}")
        check_complete(model, manager)
        self.folder, self._model, self._manager = Path(folder).expanduser(), model, manager
        self._keep_last, self._keep_every, self._on_busy = keep_last, keep_every, on_busy
        self._world: World = world()
        self._shared = shared_storage
        mesh = self._world.mesh
        self._is_chief = mesh.rank == 0 if shared_storage else self._world.launch.local_rank == 0
        place = mesh.rank if shared_storage else self._world.launch.local_rank
        self._writes = place < self._world.shards.size  # replicas of a shard: the first of them that a folder sees
        self._running: Saving | None = None
        self._snapshots: dict[str, np.ndarray] = {}
        self._lock: FolderLock | None = None  # the chief's
        self._locked = False  # the same on every rank
        self._deleting: threading.Thread | None = None

    def save(self, step: int, extra: dict[str, Any] | None = None, wait: bool = True) -> None:
        """Write a checkpoint.

        Args:
            step: steps done; names the checkpoint.
            extra: JSON-serialisable; comes back from `load` as rank 0 gave it, e.g. the position in the data.
            wait: False: return as soon as this rank's values are copied; a thread writes them. Call `poll` in every step from then
                on, or `finish`: that is where the checkpoint gets its name, and where an error is raised.

        Raises:
            CheckpointError: it cannot be written, another job saves to the folder, or a save is in the background and `on_busy` is
                `refuse`; on every rank.
            ValueError: `step` is not a number of steps, or `extra` not an object that JSON can hold; or what is trained is not the
                model's any more.
        """
        step, copied = checked_step(step), checked_extra(extra)
        check_complete(self._model, self._manager)
        if not self.poll():
            if self._on_busy == "refuse":
                raise CheckpointError(f"step {self._running.step} is still being saved; wait for it, or use on_busy='wait'")
            self.finish()
        self.lock()
        entries = entries_to_save(self._model, self._manager)
        state = collected(self._manager, self._world, step, copied, self._shared)
        apart = differing(entries, self._world)
        arrays = self._owned(entries, apart)
        target = self._begin(step)
        error, pieces = None, {}
        try:
            pieces = arrays if wait else self._copies(arrays)
        except Exception as caught:  # out of memory: the other ranks must hear of it
            error = caught
        try:
            agree_or_fail(self._world.engine, error, f"{target} cannot be written")
        except CheckpointError:
            self._as_chief(shutil.rmtree, target, ignore_errors=True)
            raise
        saving = Saving(step, target, entries, apart, state, self._path_in(target), pieces)
        if wait:
            try:
                saving.run()
            except BaseException:  # e.g. Ctrl-C: nothing is left of it
                self._as_chief(shutil.rmtree, target, ignore_errors=True)
                raise
            self._set_running(saving)
            self.finish()
        else:
            saving.start()
            self._set_running(saving)

    def poll(self) -> bool:
        """Finish the save in the background if all ranks have written; True if none is left. All ranks call it, e.g. every step.

        Raises:
            CheckpointError: it failed on a rank; on every rank.
        """
        if self._running is None:
            return True
        if not all_ranks(self._world.engine, self._running.done(), "checkpoint poll"):
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Wait for the save in the background and give it its name; does nothing if there is none. All ranks call it.

        Older checkpoints that are not kept lose their names; a thread deletes their files, if a thread wrote this one.

        Raises:
            CheckpointError: it failed on a rank, and is not there; or it is, and `latest` cannot be moved to it, or an older one
                cannot be deleted; on every rank.
        """
        saving = self._running
        self._set_running(None)
        if saving is None:
            return
        engine, final = self._world.engine, self.folder / checkpoint_name(saving.step)
        what, error = f"{final} cannot be written", None
        hashes: dict[str, list[str]] = {}
        try:
            hashes = saving.result()
        except Exception as caught:  # also what no one thought of: the other ranks must hear of it
            error = caught
        naming = Naming(saving.folder, final)
        try:
            agree_or_fail(engine, error, what)
            everybody = gather_json(hashes, engine, "checkpoint hashes")
            agree_or_fail(engine, self._as_chief(self._write_index, saving, everybody), what)
            agree_or_fail(engine, self._as_chief(naming.do), what)
        except CheckpointError:
            self._as_chief(naming.undo)
            engine.barrier("checkpoint removed").wait()  # no rank goes on with half of it there
            raise
        failed = self._as_chief(point_to, self.folder, final.name)
        agree_or_fail(engine, failed, f"{final} was saved, but {self.folder / LATEST} cannot be moved to it")
        failed = self._as_chief(self._prune, naming, saving.in_background)
        agree_or_fail(engine, failed, f"{final} was saved, but an older checkpoint cannot be deleted")

    def _as_chief(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception | None:
        """What went wrong, whatever it is, where a chief did it: the other ranks wait to hear of it."""
        if self._is_chief:
            try:
                action(*args, **kwargs)
            except Exception as error:
                return error
        return None

    def load(self, path: str | Path | None = None, strict: bool = True, keep: str = "own") -> Resumed | None:
        """Restore a checkpoint, written by any number of ranks, or by an older bmtrain_ms.

        Nothing is changed unless all ranks can open it and it fits. Bytes that were damaged on the disk are noticed when they are
        read: then some tensors have been changed already, and another checkpoint must be loaded.

        Args:
            path: a checkpoint, a folder of checkpoints, or a file of `save_training`; default: the latest of this folder.
            strict: raise where names differ, and if the run that saved had another seed, with which dropout would be another;
                otherwise the names are returned, what has none keeps its values (a parameter that is new to an optimizer begins
                at step 0), and the seed stays this run's.
            keep: which settings to use where this run was made with others than the one that saved (a schedule's length, a rate,
                betas): its `own`, which rank 0 tells with the saved ones, or the `saved`; as `OptimManager.load_state_dict` says.

        Returns:
            None if there is no checkpoint.

        Raises:
            CheckpointError: damaged, of another model, or (no shared storage) of another layout; on every rank.
        """
        check_complete(self._model, self._manager)
        checked_keep(keep)
        self.finish()
        source = self.folder if path is None else Path(path).expanduser()
        attempts = 0
        while True:
            attempts += 1
            found, is_file = self._found(source)
            if is_file:
                state, result = load_file(source, self._model, self._manager, strict, keep)
                return Resumed(state.step, state.extra, source, result)
            if found is None:
                if path is not None:
                    raise CheckpointError(f"{path} is no checkpoint, and there is none in it")
                return None
            before = state_of(found)
            try:
                return self._load(found, strict, keep, older_ones(found) if found != source else "")
            except CheckpointError:  # maybe another job, which saves there, has replaced or deleted it
                moved = gather_json(before is None or state_of(found) != before, self._world.engine, "checkpoint moved")
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
        agree_or_fail(self._world.engine, error, f"{source} cannot be read")
        if is_file:
            return None, True
        found = same_everywhere(source, found, self._world, self._shared)
        if wrong and self._world.mesh.rank == 0:
            sys.stderr.write(f"WARNING: {wrong}\n")
        return found, False

    def close(self) -> None:
        """Finish, let go of the memory for copies, and let another job save here."""
        try:
            self.finish()
        finally:
            self._snapshots.clear()
            self._join_deletion()
            self._unlock()

    def lock(self) -> None:
        """Keep other jobs from saving here, from now until `close`; the first `save` does it otherwise. All ranks call it.

        Raises:
            CheckpointError: another job saves here, or the folder cannot be made; on every rank.
        """
        if self._locked:
            return
        try:
            agree_or_fail(self._world.engine, self._as_chief(self._lock_folder), f"{self.folder} cannot be used")
        except CheckpointError:
            self._unlock()  # on a host where it went well
            raise
        self._locked = True

    # Saving #

    def _lock_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.folder)
        sweep(self.folder)

    def _unlock(self) -> None:
        self._locked = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _set_running(self, saving: Saving | None) -> None:
        self._running = saving
        if saving is None:
            _unfinished.pop(id(self), None)
        else:
            _unfinished[id(self)] = self

    def _join_deletion(self) -> None:
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None

    def _begin(self, step: int) -> Path:
        """The folder to write into, made by the chief."""
        self._join_deletion()  # there would not be room for all of them
        token = gather_json(secrets.token_hex(8) if self._world.mesh.rank == 0 else None, self._world.engine, "checkpoint")[0]
        target = self.folder / f".{checkpoint_name(step)}.{token}"
        agree_or_fail(self._world.engine, self._as_chief(target.mkdir), f"{target} cannot be made")
        return target

    def _path_in(self, folder: Path) -> Path | None:
        """Of this rank's file; None: it writes none."""
        shards = self._world.shards
        return folder / file_name(shards.rank, shards.size) if self._writes else None

    def _owned(self, entries: Mapping[str, Entry], apart: Collection[str] = ()) -> dict[str, tuple[Any, np.ndarray]]:
        """What this rank writes; see `owned`."""
        return owned(entries, apart, self._world, self._shared, self._writes)

    def _copies(self, pieces: Mapping[str, tuple[Any, np.ndarray]]) -> dict[str, tuple[Any, np.ndarray]]:
        """Of arrays, in memory that is kept for the next time."""
        for name, (_, array) in pieces.items():
            kept = self._snapshots.get(name)
            if kept is None or kept.shape != array.shape or kept.dtype != array.dtype:
                self._snapshots[name] = np.empty_like(array)
        with ThreadPoolExecutor(useful_threads()) as pool:  # training waits for it
            list(pool.map(lambda name: np.copyto(self._snapshots[name], pieces[name][1]), pieces))
        return {name: (dtype, self._snapshots[name]) for name, (dtype, _) in pieces.items()}

    def _write_index(self, saving: Saving, hashes: list[dict[str, list[str]]]) -> None:
        ranks = self._world.shards.size
        tensors = {
            name: IndexedTensor(
                e.dtype,
                e.shape,
                e.shard_length,
                [hashes[r][name] for r in range(1 if e.shard_length is None else ranks)],
                e.of_model,
                self._world.engine.size if name in saving.apart else 1,
            )
            for name, e in saving.entries.items()
        }
        index = Index(ranks, saving.folder.name.rsplit(".", 1)[1], saving.state, tensors)
        write_text(saving.folder / INDEX, index.to_json())
        sync_folder(saving.folder)

    def _prune(self, naming: Naming, in_background: bool) -> None:
        """Delete what was replaced, and what need not be kept."""
        going = [] if naming.replaced is None else [doomed(naming.replaced)]
        going += prune(self.folder, self._keep_last, self._keep_every)
        if in_background:
            self._deleting = threading.Thread(target=delete, args=(going,), name="bmtrain_ms-delete")
            self._deleting.start()
        else:
            delete(going)

    # Loading #

    def _load(self, folder: Path, strict: bool, keep: str, advice: str) -> Resumed:
        """`advice`: what else there is, if this one is damaged."""
        here, what = self._world, f"{folder} cannot be loaded"
        layout = None if self._shared else gather_json(here.launch.local_size, here.engine, "checkpoint layout")
        place = here.engine.rank, here.engine.size
        error: BaseException | None = None
        with contextlib.ExitStack() as stack:
            try:
                if layout is not None:
                    check_layout(folder, layout, here)
                with advising(advice):
                    reader = stack.enter_context(ShardedReader(folder, None if self._shared else [here.shards.rank], place))
                entries, sources = entries_to_load(self._model, self._manager, reader.described)
                result = compare(as_named_here(reader.described, sources), entries, strict, str(folder))
                state = checked(reader.index.state, self._manager, here, strict, str(folder))
            except Exception as caught:  # whatever it is: the other ranks wait
                error = caught
            agree_or_fail(here.engine, error, what)
            identities = gather_json(reader.index.identity, here.engine, "checkpoint identity")
            if len(set(identities)) > 1:
                raise CheckpointError(
                    f"{folder} holds different checkpoints on different hosts (rank 0: {identities[0]}, others: "
                    f"{sorted(set(identities) - {identities[0]})}): they cannot be mixed"
                )
            try:
                with advising(advice):
                    apply_entries({n: e for n, e in entries.items() if n in sources}, _renamed(reader.read, sources), here)
            except Exception as caught:
                error = caught
            agree_or_fail(here.engine, error, what)
        gradients = {n[len(GRADIENT) :]: e.get() for n, e in entries.items() if n.startswith(GRADIENT) and not e.of_model}
        self._manager.restore_gradients(gradients)
        state.restore(self._manager, here, keep)
        return Resumed(state.step, state.extra, folder, result)


def lock_folder(folder: str | Path) -> FolderLock | None:
    """Keep other jobs out of a folder that is shared, which is made if need be, until what rank 0 gets is released or forgotten.

    All ranks call it.

    Raises:
        CheckpointError: another job has it, or it cannot be made; on every rank.
    """
    here, lock, error = world(), None, None
    try:
        if here.engine.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            lock = FolderLock(Path(folder))
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    agree_or_fail(here.engine, error, f"{folder} cannot be used")
    return lock


_unfinished: dict[int, Checkpointer] = {}  # those that save in the background, which nobody else may keep


def _report_at_exit() -> None:
    """Of what nobody waited for: it has no name, and is not a checkpoint."""
    for checkpointer in _unfinished.values():
        saving, why = checkpointer._running, "the process ends before Checkpointer.finish() or close()"
        if saving is not None:
            with contextlib.suppress(Exception):
                saving.result()
            if isinstance(saving.error, (OSError, MemoryError, CheckpointError)):  # nothing that a dying interpreter causes
                why = str(saving.error)
            sys.stderr.write(f"ERROR: {checkpointer.folder / checkpoint_name(saving.step)} was not saved: {why}\n")


atexit.register(_report_at_exit)


def _renamed(read: Callable[[str, int, int], np.ndarray], sources: Mapping[str, str]) -> Callable[[str, int, int], np.ndarray]:
    return lambda name, start, stop: read(sources[name], start, stop)
