"""Saving and resuming a training run: every rank writes what it owns, any number of ranks reads it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import random
import secrets
import shutil
import sys
import threading
import weakref
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Mapping

import mindspore as ms
import numpy as np
from mindspore import nn

from ..comm import World, world
from ..compat import versions
from ..compat.runtime import from_host, host_array
from ..optim import OptimManager
from ..zero import context_of
from .errors import CheckpointError
from .folder import FolderLock, checkpoint_name, exchange, latest_in, point_to, prune, sweep, sync_folder
from .sharded import INDEX, Index, IndexedTensor, ShardedReader, file_name, read_index, write_rank_file
from .store import Entry, LoadResult, _agree, apply_entries, companion_entry, compare, gather_json
from .training import load_training, training_entries

_GRADIENT = "gradient."


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
    accumulated, the run's seed and the counters of stateless randomness, Python's and NumPy's generators, and `extra`. The same
    number of ranks goes on bit by bit as if it had never stopped; another one to the rounding of sums over ranks.

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
        entries = self._entries()
        state = self._state(step, copied)
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
            CheckpointError: it failed on a rank; on every rank.
        """
        saving, self._running = self._running, None
        if saving is None:
            return
        engine, what = self._world.engine, f"{self.folder / checkpoint_name(saving.step)} cannot be written"
        error: BaseException | None = None
        hashes: dict[str, list[str]] = {}
        try:
            hashes = saving.result()
        except Exception as caught:  # also what no one thought of: the other ranks must hear of it
            error = caught
        try:
            _agree(engine, error, what)
            everybody = gather_json(hashes, engine, "checkpoint hashes")
            error = None
            if self._is_chief:
                try:
                    self._publish(saving, everybody)
                except (OSError, CheckpointError) as caught:
                    error = caught
            _agree(engine, error, what)
        except CheckpointError:
            if self._is_chief:
                shutil.rmtree(saving.folder, ignore_errors=True)
            raise

    def load(self, path: str | Path | None = None, strict: bool = True) -> Resumed | None:
        """Restore a checkpoint, written by any number of ranks, or by an older bmtrain_ms.

        Args:
            path: a checkpoint, a folder of checkpoints, or a file of `save_training`; default: the latest of this folder.
            strict: raise where names differ; otherwise they are returned.

        Returns:
            None if there is no checkpoint.

        Raises:
            CheckpointError: damaged, of another model, or (no shared storage) of another layout; on every rank.
        """
        self.finish()
        source = self.folder if path is None else Path(path)
        if source.is_file():
            extra = load_training(source, self._model, self._manager)
            return Resumed(int(extra.get("step", self._world.engine.clock.step)), extra, source, LoadResult([], []))
        found = source if (source / INDEX).exists() else latest_in(source)
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
        return self._load(found, strict)

    def close(self) -> None:
        """Finish, and let another job save here."""
        try:
            self.finish()
        finally:
            self._locked = False
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    # Saving #

    def _take_lock(self) -> None:
        if self._locked:
            return
        error: BaseException | None = None
        if self._is_chief:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = FolderLock(self.folder)
                sweep(self.folder)
            except (OSError, CheckpointError) as caught:
                error = caught
        _agree(self._world.engine, error, f"{self.folder} cannot be used")
        self._locked = True

    def _begin(self, step: int) -> Path:
        """The folder to write into, made by the chief."""
        token = gather_json(secrets.token_hex(8) if self._world.mesh.rank == 0 else None, self._world.engine, "checkpoint")[0]
        target, error = self.folder / f".{checkpoint_name(step)}.{token}", None
        if self._is_chief:
            try:
                target.mkdir()
            except OSError as caught:
                error = caught
        _agree(self._world.engine, error, f"{target} cannot be made")
        return target

    def _path_in(self, folder: Path) -> Path | None:
        """Of this rank's file; None: it writes none."""
        shards = self._world.shards
        return folder / file_name(shards.rank, shards.size) if self._writes else None

    def _pieces(self, entries: Mapping[str, Entry], copy: bool) -> dict[str, tuple[Any, np.ndarray]]:
        """What this rank owns, flat; copied into memory that is kept for the next time."""
        pieces = {}
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
                np.copyto(kept, array)
                array = kept
            pieces[name] = entry.dtype, np.ascontiguousarray(array)
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
        with open(saving.folder / INDEX, "x", encoding="utf-8") as file:
            file.write(index.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(saving.folder)
        final = self.folder / checkpoint_name(saving.step)
        if final.exists():  # saved before, by this run or by one that went back
            replaced = saving.folder
            if not exchange(replaced, final):  # not Linux, or an old file system: for a moment there is none of this step
                replaced = self.folder / f".{final.name}.old"
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(final, replaced)
                os.replace(saving.folder, final)
            sync_folder(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(saving.folder, final)
        sync_folder(self.folder)
        point_to(self.folder, final.name)
        prune(self.folder, self._keep_last, self._keep_every)

    def _entries(self) -> dict[str, Entry]:
        entries = training_entries(self._model, self._manager)
        for name, (like, tensor) in self._manager.gradients().items():
            entries[f"{_GRADIENT}{name}"] = companion_entry(like, tensor)
        return entries

    def _state(self, step: int, extra: dict[str, Any]) -> dict[str, Any]:
        here = self._world
        kind, keys, position, has_gauss, cached = np.random.get_state()
        mine = {"python": random.getstate(), "numpy": [kind, keys.tolist(), position, has_gauss, cached]}
        return {
            "step": step,
            "extra": extra,
            "manager": self._manager.state_dict(tensors=False),
            "seed": here.seed,
            "clock": here.engine.clock.step,
            "draws": context_of(here).draws.count,
            "draw_step": context_of(here).draws.step,
            "generators": gather_json(mine, here.engine, "checkpoint generators"),
            "mesh": {"ranks": here.engine.size, "shard_size": here.shards.size},
            "layout": gather_json(here.launch.local_size, here.engine, "checkpoint layout"),
            "shared_storage": self._shared,
            "versions": _versions(),
        }

    # Loading #

    def _load(self, folder: Path, strict: bool) -> Resumed:
        engine, what = self._world.engine, f"{folder} cannot be loaded"
        error: BaseException | None = None
        with contextlib.ExitStack() as stack:
            only = None if self._shared else [self._world.shards.rank]
            try:
                self._check_layout(folder)
                reader = stack.enter_context(ShardedReader(folder, only))
                state = reader.index.state
                entries, sources = self._matched(reader)
                theirs = {target: reader.index.tensors[source].shape for target, source in sources.items()}
                used = set(sources.values())
                theirs.update({n: t.shape for n, t in reader.index.tensors.items() if n not in used and not _is_spare(n, sources)})
                result = compare(theirs, entries, strict, str(folder))
            except (OSError, CheckpointError) as caught:
                error = caught
            _agree(engine, error, what)
            identities = gather_json(reader.index.identity, engine, "checkpoint identity")
            if len(set(identities)) > 1:
                raise CheckpointError(
                    f"{folder} holds different checkpoints on different hosts (rank 0: {identities[0]}, others: "
                    f"{sorted(set(identities) - {identities[0]})}): they cannot be mixed"
                )
            try:
                gradients = {name: entry for name, entry in entries.items() if name.startswith(_GRADIENT)}
                apply_entries({n: e for n, e in entries.items() if n in sources}, _renamed(reader.read, sources), self._world)
            except (OSError, CheckpointError) as caught:
                error = caught
            _agree(engine, error, what)
        self._manager.restore_gradients({n[len(_GRADIENT) :]: e.get() for n, e in gradients.items()})
        self._restore(state, what)
        return Resumed(state["step"], state["extra"], folder, result)

    def _restore(self, state: dict[str, Any], what: str) -> None:
        try:
            self._manager.load_state_dict(state["manager"])
            here = self._world
            here.engine.clock.step = int(state["clock"])
            draws = context_of(here).draws
            draws.count, draws.step = int(state["draws"]), int(state["draw_step"])
            generators = state["generators"]
            mine = generators[here.engine.rank if len(generators) == here.engine.size else 0]
            version, words, gauss = mine["python"]
            random.setstate((version, tuple(words), gauss))
            kind, keys, position, has_gauss, cached = mine["numpy"]
            np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            raise CheckpointError(f"{what}: {error}") from error

    def _matched(self, reader: ShardedReader) -> tuple[dict[str, Entry], dict[str, str]]:
        """Entries to fill, and what each is read from: masters and 16-bit parameters stand for each other."""
        entries = training_entries(self._model, self._manager)
        there = reader.index.tensors
        likes = self._manager.parameters_by_name()
        for name in there:
            p = likes.get(name[len(_GRADIENT) :]) if name.startswith(_GRADIENT) else None
            if p is not None:
                entries[name] = companion_entry(*self._manager.empty_gradient(p))
        sources = {name: name for name in entries if name in there}
        for name in entries:
            marker = name.find(".master.")
            if name not in there and name.startswith("optimizer.") and marker > 0 and name[marker + 8 :] in there:
                sources[name] = name[marker + 8 :]  # saved in float32: the parameter was its own master
        for name in there:
            marker = name.find(".master.")
            own = name[marker + 8 :]
            is_master = name.startswith("optimizer.") and marker > 0 and name not in entries
            if is_master and own in entries and entries[own].dtype == ms.float32:
                sources[own] = name  # saved in 16 bits: the master is the better parameter
        return entries, sources

    def _check_layout(self, folder: Path) -> None:
        """Before files are opened, which would be said to be missing."""
        if self._shared:
            return
        mesh, here = read_index(folder).state.get("mesh"), {"ranks": self._world.engine.size, "shard_size": self._world.shards.size}
        if mesh != here:
            raise CheckpointError(
                f"without shared storage a checkpoint is resumed by the layout that wrote it: {mesh}, not {here}; bring its files "
                "to one folder and resume with shared storage"
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


def _is_spare(name: str, sources: Mapping[str, str]) -> bool:
    """A 16-bit parameter whose master was read in its place."""
    return name in sources


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("bmtrain-ms")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    python = platform.python_version()
    return {"bmtrain_ms": own, "mindspore": versions.version(), "numpy": np.__version__, "python": python}
