"""Saving and resuming a training run: every rank writes what it owns, any number of ranks reads it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import numpy as np
from mindspore import nn

from ..comm import World, world
from ..compat.runtime import from_host, host_array
from ..optim import OptimManager
from .errors import CheckpointError
from .folder import (
    FolderLock,
    checkpoint_name,
    discard,
    exchange,
    latest_in,
    point_to,
    prune,
    step_of,
    steps_in,
    sweep,
    sync_folder,
    write_text,
)
from .run_state import checked, collected
from .sharded import INDEX, Index, IndexedTensor, ShardedReader, file_name, read_index, useful_threads, write_rank_file
from .store import Entry, LoadResult, _agree, apply_entries, compare, gather_json
from .training import GRADIENT, entries_to_load, entries_to_save, load_file, shapes_as_named_here


@dataclass(frozen=True)
class Resumed:
    """What `Checkpointer.load` restored.

    Attributes:
        step: of the checkpoint.
        extra: what was passed to `save`.
        path: of the checkpoint.
        result: names that did not match, with `strict=False`.
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
    ranks.

    A checkpoint appears under its name complete, checked, and on the disk, or not at all; `latest` moves after that.

    Args:
        folder: shared by all ranks, or, without shared storage, of that name on every host. Made if it is not there.
        model, manager: what is saved and restored.
        keep_last: delete all but so many of the newest checkpoints after a save; None: keep all.
        keep_every: keep those whose step is a multiple of it, too.
        shared_storage: False: every host keeps what its ranks wrote, with the index; only the same layout of ranks can resume.
        on_busy: when `save` comes while one is in the background: `wait` for it, or `refuse`.

    Raises:
        CheckpointError: another job saves to the folder, or it cannot be made.
        ValueError: an option out of range.
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
        self.folder, self._model, self._manager = Path(folder), model, manager
        self._keep_last, self._keep_every, self._on_busy = keep_last, keep_every, on_busy
        self._world: World = world()
        self._shared = shared_storage
        mesh = self._world.mesh
        self._is_chief = mesh.rank == 0 if shared_storage else self._world.launch.local_rank == 0
        place = mesh.rank if shared_storage else self._world.launch.local_rank
        self._writes = place < self._world.shards.size  # replicas of a shard: the first of them that a folder sees
        self._running: _Saving | None = None
        self._snapshots: dict[str, np.ndarray] = {}
        self._lock: FolderLock | None = None  # the chief's
        self._locked = False  # the same on every rank
        _all.add(self)

    def save(self, step: int, extra: dict[str, Any] | None = None, wait: bool = True) -> None:
        """Write a checkpoint.

        Args:
            step: steps done; names the checkpoint.
            extra: JSON-serialisable; comes back from `load`, e.g. the position in the data.
            wait: False: return as soon as this rank's values are copied; a thread writes them. Call `poll` in every step from then
                on, or `finish`: that is where the checkpoint gets its name, and where an error is raised.

        Raises:
            CheckpointError: it cannot be written, or one is in the background and `on_busy` is `refuse`; on every rank.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more, not {step}")
        try:
            copied: dict[str, Any] = json.loads(json.dumps(extra or {}))  # a copy: what is changed later is not saved
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra must be what JSON can hold: {error}") from error
        if not self.poll():
            if self._on_busy == "refuse":
                raise CheckpointError(f"step {self._running.step} is still being saved; wait for it, or use on_busy='wait'")
            self.finish()
        self._take_lock()
        entries = entries_to_save(self._model, self._manager)
        state = collected(self._manager, self._world, step, copied, self._shared)
        target = self._begin(step)
        self._running = saving = _Saving(step, target, entries, state, self._path_in(target), self._pieces(entries, copy=not wait))
        if wait:
            saving.run()
            self.finish()
        else:
            saving.start()

    def poll(self) -> bool:
        """Finish the save in the background if all ranks have written; True if none is left. All ranks call it, e.g. every step.

        Raises:
            CheckpointError: it failed on a rank; on every rank.
        """
        if self._running is None:
            return True
        done = from_host(np.array([self._running.done()], np.int32))
        if not host_array(self._world.engine.all_reduce([done], "min", "checkpoint poll").wait()[0])[0]:
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Wait for the save in the background and give it its name; does nothing if there is none. All ranks call it.

        Raises:
            CheckpointError: it failed on a rank, and is not there; or it is, and an older one cannot be deleted; on every rank.
        """
        saving, self._running = self._running, None
        if saving is None:
            return
        engine, final = self._world.engine, self.folder / checkpoint_name(saving.step)
        what, error = f"{final} cannot be written", None
        hashes: dict[str, list[str]] = {}
        try:
            hashes = saving.result()
        except Exception as caught:  # also what no one thought of: the other ranks must hear of it
            error = caught
        try:
            _agree(engine, error, what)
            everybody = gather_json(hashes, engine, "checkpoint hashes")
            _agree(engine, self._as_chief(self._publish, saving, everybody), what)
        except CheckpointError:
            self._as_chief(shutil.rmtree, saving.folder, ignore_errors=True)
            engine.barrier("checkpoint removed").wait()  # no rank goes on with half of it there
            raise
        failed = self._as_chief(prune, self.folder, self._keep_last, self._keep_every)
        _agree(engine, failed, f"{final} was saved, but an older checkpoint cannot be deleted")

    def _as_chief(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception | None:
        """What went wrong, whatever it is, where a chief did it: the other ranks wait to hear of it."""
        if self._is_chief:
            try:
                action(*args, **kwargs)
            except Exception as error:
                return error
        return None

    def load(self, path: str | Path | None = None, strict: bool = True) -> Resumed | None:
        """Restore a checkpoint, written by any number of ranks, or by an older bmtrain_ms.

        Nothing is changed unless all ranks can open it and it fits. Bytes that were damaged on the disk are noticed when they are
        read: then some tensors have been changed already, and another checkpoint must be loaded.

        Args:
            path: a checkpoint, a folder of checkpoints, or a file of `save_training`; default: the latest of this folder.
            strict: raise where names differ, and if the run that saved had another seed, with which dropout would be another;
                otherwise the names are returned, what has none keeps its values (a parameter that is new to an optimizer begins
                at step 0), and the seed stays this run's.

        Returns:
            None if there is no checkpoint.

        Raises:
            CheckpointError: damaged, of another model, or (no shared storage) of another layout; on every rank.
        """
        self.finish()
        source = self.folder if path is None else Path(path)
        error: BaseException | None = None
        is_file, found = False, None
        try:
            is_file = source.is_file()
            found = source if (source / INDEX).exists() else latest_in(source)
        except OSError as caught:
            error = caught
        _agree(self._world.engine, error, f"{source} cannot be read")
        if is_file:
            state, result = load_file(source, self._model, self._manager, strict)
            return Resumed(state.step, state.extra, source, result)
        names = gather_json(None if found is None else found.name, self._world.engine, "checkpoint to load")
        if len(set(names)) > 1:
            raise CheckpointError(
                f"ranks see different latest checkpoints in {source}: "
                + ", ".join(f"{name or 'none'} on rank {rank}" for rank, name in enumerate(names))
                + ". Is the folder shared? If it is not, name one that every host has"
            )
        if found is None:
            if path is not None:
                raise CheckpointError(f"{path} is no checkpoint, and there is none in it")
            return None
        return self._load(found, strict, _older(found) if found != source else "")

    def close(self) -> None:
        """Finish, and let another job save here."""
        try:
            self.finish()
        finally:
            self._unlock()

    # Saving #

    def _take_lock(self) -> None:
        if self._locked:
            return
        try:
            _agree(self._world.engine, self._as_chief(self._lock_folder), f"{self.folder} cannot be used")
        except CheckpointError:
            self._unlock()  # on a host where it went well
            raise
        self._locked = True

    def _lock_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.folder)
        sweep(self.folder)

    def _unlock(self) -> None:
        self._locked = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _begin(self, step: int) -> Path:
        """The folder to write into, made by the chief."""
        token = gather_json(secrets.token_hex(8) if self._world.mesh.rank == 0 else None, self._world.engine, "checkpoint")[0]
        target = self.folder / f".{checkpoint_name(step)}.{token}"
        _agree(self._world.engine, self._as_chief(target.mkdir), f"{target} cannot be made")
        return target

    def _path_in(self, folder: Path) -> Path | None:
        """Of this rank's file; None: it writes none."""
        shards = self._world.shards
        return folder / file_name(shards.rank, shards.size) if self._writes else None

    def _pieces(self, entries: Mapping[str, Entry], copy: bool) -> dict[str, tuple[Any, np.ndarray]]:
        """What this rank owns, flat; copied into memory that is kept for the next time."""
        pieces, copies = {}, []
        rank, engine = self._world.shards.rank, self._world.engine
        for name, entry in entries.items():
            array = host_array(entry.get()).reshape(-1)
            if entry.shard_length is None and not self._shared:  # in every rank's file, and the same there
                array = host_array(engine.broadcast([from_host(array)], 0, f"save {name}").wait()[0]).reshape(-1)
            elif not self._writes or (self._shared and entry.shard_length is None and rank):
                array = array[:0]  # somebody else writes it
            elif entry.shard_length is not None:
                start = min(rank * entry.shard_length, entry.count)
                array = array[: min(start + entry.shard_length, entry.count) - start]
            if copy and array.size:
                kept = self._snapshots.get(name)
                if kept is None or kept.shape != array.shape or kept.dtype != array.dtype:
                    kept = self._snapshots[name] = np.empty_like(array)
                copies.append((kept, array))
                array = kept
            pieces[name] = entry.dtype, np.ascontiguousarray(array)
        with ThreadPoolExecutor(useful_threads()) as pool:  # training waits for it
            list(pool.map(lambda pair: np.copyto(*pair), copies))
        return pieces

    def _publish(self, saving: _Saving, hashes: list[dict[str, list[str]]]) -> None:
        """Index, name, pointer, in this order."""
        ranks = self._world.shards.size
        tensors = {
            name: IndexedTensor(
                e.dtype, e.shape, e.shard_length, [hashes[r][name] for r in range(1 if e.shard_length is None else ranks)]
            )
            for name, e in saving.entries.items()
        }
        index = Index(ranks, saving.folder.name.rsplit(".", 1)[1], saving.state, tensors)
        write_text(saving.folder / INDEX, index.to_json())
        sync_folder(saving.folder)
        final = self.folder / checkpoint_name(saving.step)
        if final.exists():  # saved before, by this run or by one that went back
            replaced = saving.folder
            if not exchange(replaced, final):  # not Linux, or an old file system: for a moment there is none of this step
                replaced = self.folder / f".{final.name}.old"  # which `sweep` would put back
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(final, replaced)
                os.replace(saving.folder, final)
            sync_folder(self.folder)
            discard(replaced)
        else:
            os.replace(saving.folder, final)
        sync_folder(self.folder)
        point_to(self.folder, final.name)

    # Loading #

    def _load(self, folder: Path, strict: bool, advice: str) -> Resumed:
        """`advice`: what else there is, if this one is damaged."""
        here, what = self._world, f"{folder} cannot be loaded"
        layout = None if self._shared else gather_json(here.launch.local_size, here.engine, "checkpoint layout")
        error: BaseException | None = None
        with contextlib.ExitStack() as stack:
            try:
                if layout is not None:
                    self._check_layout(folder, layout)
                with _advising(advice):
                    reader = stack.enter_context(ShardedReader(folder, None if self._shared else [here.shards.rank]))
                entries, sources = entries_to_load(self._model, self._manager, reader.shapes)
                result = compare(shapes_as_named_here(reader.shapes, sources), entries, strict, str(folder))
                state = checked(reader.index.state, self._manager, here, strict, str(folder))
            except Exception as caught:  # whatever it is: the other ranks wait
                error = caught
            _agree(here.engine, error, what)
            identities = gather_json(reader.index.identity, here.engine, "checkpoint identity")
            if len(set(identities)) > 1:
                raise CheckpointError(
                    f"{folder} holds different checkpoints on different hosts (rank 0: {identities[0]}, others: "
                    f"{sorted(set(identities) - {identities[0]})}): they cannot be mixed"
                )
            try:
                with _advising(advice):
                    apply_entries({n: e for n, e in entries.items() if n in sources}, _renamed(reader.read, sources), here)
            except Exception as caught:
                error = caught
            _agree(here.engine, error, what)
        self._manager.restore_gradients({n[len(GRADIENT) :]: e.get() for n, e in entries.items() if n.startswith(GRADIENT)})
        state.restore(self._manager, here)
        return Resumed(state.step, state.extra, folder, result)

    def _check_layout(self, folder: Path, layout: list[int]) -> None:
        """Before files are opened, which would be said to be missing."""
        saved, size = read_index(folder).state, self._world.shards.size
        if saved.get("shared_storage") is True and size > 1:  # only the first file has what is the same on all ranks
            raise CheckpointError(
                "it was saved with shared storage; resume with it, or write one that hosts may divide: bmtrain-ms ckpt reshard "
                f"{folder} OUT --ranks {size}"
            )
        theirs = {"mesh": saved.get("mesh"), "ranks per host": saved.get("layout")}
        ours = {"mesh": {"ranks": self._world.engine.size, "shard_size": size}, "ranks per host": layout}
        for name, mine in ours.items():
            if theirs[name] != mine and not (name == "ranks per host" and theirs[name] is None):  # of `reshard`
                raise CheckpointError(
                    f"without shared storage a checkpoint is resumed by the layout that wrote it: {name} {theirs[name]}, not "
                    f"{mine}; bring its files to one folder and resume with shared storage"
                )


_all: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


def _report_at_exit() -> None:
    """Of what nobody waited for: it has no name, and is not a checkpoint."""
    for checkpointer in _all:
        saving = checkpointer._running
        if saving is not None:
            where = checkpointer.folder / checkpoint_name(saving.step)
            sys.stderr.write(f"ERROR: {where} was not saved: the process ends before Checkpointer.finish() or close()\n")


atexit.register(_report_at_exit)


class _Saving:
    """One save on this rank."""

    def __init__(
        self,
        step: int,
        folder: Path,
        entries: Mapping[str, Entry],
        state: dict[str, Any],
        path: Path | None,
        pieces: dict[str, tuple[Any, np.ndarray]],
    ):
        self.step, self.folder, self.entries, self.state = step, folder, entries, state
        self._path = path
        self._pieces = pieces
        self._hashes: dict[str, list[str]] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Write in this thread; an error is kept for `result`."""
        try:
            if self._path is not None:
                self._hashes = write_rank_file(self._path, self._pieces, {"format": "pt"})
        except Exception as caught:
            self._error = caught
        self._pieces = {}

    def start(self) -> None:
        """Write in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="bmtrain_ms-checkpoint", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> dict[str, list[str]]:
        """Name -> hashes of this rank's pieces; raises what writing raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hashes


def _renamed(read: Callable[[str, int, int], np.ndarray], sources: Mapping[str, str]) -> Callable[[str, int, int], np.ndarray]:
    return lambda name, start, stop: read(sources[name], start, stop)


def _older(checkpoint: Path) -> str:
    """How to load another one; empty: there is none."""
    folder, current = checkpoint.parent, step_of(checkpoint)
    names = [checkpoint_name(step) for step in reversed(steps_in(folder)) if step < current]
    if not names:
        return ""
    return f"; older ones are there: {', '.join(names[:5])}; load({str(folder / names[0])!r}) goes on from one"


@contextlib.contextmanager
def _advising(advice: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}{advice}") from error
