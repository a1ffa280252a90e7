"""Saving and resuming a training run: every rank writes what it owns, any number of ranks reads it."""

from __future__ import annotations

import secrets
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Collection, Mapping

import numpy as np
from mindspore import nn

from bmtrain_ms_base.checks import whole
from bmtrain_ms_base.layout import Layout

from ..comm import World, all_ranks, gather_json
from ..comm import world as current_world
from ..files.entries import Entry
from ..files.errors import CheckpointError, agree_or_fail
from ..files.replacing import sync_folder, write_text
from ..optim import OptimManager
from .folder import (
    LATEST,
    FolderLock,
    Naming,
    checkpoint_name,
    delete,
    doomed,
    point_to,
    prune,
    sweep,
)
from .index import INDEX, Index, Told, by_file, file_name, indexed, odd_layouts
from .loading import Loader, Resumed
from .pieces import names_that_differ, pieces_to_write
from .places import Place
from .run_state import checked_extra, checked_keep, checked_step, collected_state
from .sharded import useful_threads, write_rank_file
from .stages import Known, check_groups, everybodys
from .training import check_complete, entries_to_save
from .writer import Writer


@dataclass(frozen=True)
class _Saving:
    """A save that has no name yet: its step and folder, what this rank and all of them have, and who writes this rank's file."""

    step: int
    folder: Path
    entries: Mapping[str, Entry]
    known: Mapping[str, Known]
    apart: Collection[str]
    state: dict[str, Any]
    writer: Writer


class Checkpointer:
    """Checkpoints of one training run in one folder. All ranks make one, and call its methods together.

    What is saved: the model, every optimizer's masters, moments and steps, schedules, loss scaler, gradients that have been
    accumulated, the counters of stateless randomness, Python's and NumPy's generators, what routers have counted, and `extra`. The
    same number of ranks with the same seed, which is compared, goes on bit by bit as if it had never stopped; another number to the
    rounding of sums over ranks. What is whole on every rank and not the same there, e.g. running statistics of batches, is saved of
    every rank: each goes on with its own; of another number of ranks m, rank r goes on with that of rank r * n // m of the n that
    saved.

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
        CheckpointError: stages whose optimizers have other numbers of groups.
        TypeError: a model, a manager or an option of another type.
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
        if on_busy not in ("wait", "refuse"):
            raise ValueError(f"on_busy must be wait or refuse, not {on_busy!r}")
        if not (isinstance(model, nn.Cell) and isinstance(manager, OptimManager)):
            kinds = f"a {type(model).__name__} and a {type(manager).__name__}"
            raise TypeError(f"a Checkpointer takes a folder, the model and its OptimManager, in this order, not {kinds}")
        if not str(folder):
            raise ValueError("a Checkpointer needs a folder, and its name is empty: for the working folder write '.'")
        check_complete(model, manager)
        self.folder, self._model, self._manager = Path(folder).expanduser(), model, manager
        self._keep_last = None if keep_last is None else whole("keep_last", keep_last, 1)
        self._keep_every = None if keep_every is None else whole("keep_every", keep_every, 1)
        self._on_busy = on_busy
        self._world: World = current_world()
        self._shared = _truth("shared_storage", shared_storage)
        self._is_chief = (self._world.everyone.rank if shared_storage else self._world.launch.local_rank) == 0
        self._place = Place.of(self._world, shared_storage, model)
        check_groups(manager, self._world)
        self._running: _Saving | None = None
        self._snapshots: dict[str, np.ndarray] = {}
        self._lock: FolderLock | None = None  # the chief's
        self._locked = False  # the same on every rank
        self._deleting: threading.Thread | None = None

    def save(self, step: int, extra: dict[str, Any] | None = None, wait: bool = True) -> None:
        """Write a checkpoint.

        Args:
            step: steps done; names the checkpoint.
            extra: what JSON can hold, e.g. the position in the data; comes back from `load` as rank 0 gave it, tuples as lists.
            wait: False: return as soon as this rank's values are copied; a thread writes them. Call `poll` in every step from then
                on, or `finish`: that is where the checkpoint gets its name, and where an error is raised.

        Raises:
            CheckpointError: it cannot be written, another job saves to the folder, or a save is in the background and `on_busy` is
                `refuse`; on every rank.
            ValueError: `step` is not a number of steps, or `extra` not an object that JSON can hold; or what is trained is not the
                model's any more.
        """
        step, copied, wait = checked_step(step), checked_extra(extra), _truth("wait", wait)
        check_complete(self._model, self._manager)
        if not self.poll():
            if self._on_busy == "refuse":
                raise CheckpointError(f"step {self._running.step} is still being saved; wait for it, or use on_busy='wait'")
            self.finish()
        self.lock()
        entries, known = everybodys(entries_to_save(self._model, self._manager), self._world)
        state = collected_state(self._model, self._manager, self._world, step, copied, self._shared)
        apart = names_that_differ(entries, self._world)
        arrays = self._owned(entries, apart)
        target = self._begin(step)
        error, pieces = None, {}
        try:
            pieces = arrays if wait else self._copies(arrays)
        except Exception as caught:  # out of memory: the other ranks must hear of it
            error = caught
        try:
            agree_or_fail(self._world.everyone, error, f"{target} cannot be written")
        except CheckpointError:
            self._as_chief(shutil.rmtree, target, ignore_errors=True)
            raise
        left = "the process ends before Checkpointer.finish() or close()"
        writer = Writer(self.folder / checkpoint_name(step), partial(self._write, target, pieces), left)
        saving = _Saving(step, target, entries, known, apart, state, writer)
        if wait:
            try:
                writer.run()
            except BaseException:  # e.g. Ctrl-C: nothing is left of it
                self._as_chief(shutil.rmtree, target, ignore_errors=True)
                raise
            self._running = saving
            self.finish()
        else:
            writer.start()
            self._running = saving

    def poll(self) -> bool:
        """Finish the save in the background if all ranks have written; True if none is left. All ranks call it, e.g. every step.

        Raises:
            CheckpointError: it failed on a rank; on every rank.
        """
        if self._running is None:
            return True
        if not all_ranks(self._world.everyone, self._running.writer.done(), "checkpoint poll"):
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
        saving, self._running = self._running, None
        if saving is None:
            return
        engine, final = self._world.everyone, self.folder / checkpoint_name(saving.step)
        what, error = f"{final} cannot be written", None
        hashes: dict[str, list[str]] = {}
        try:
            hashes = saving.writer.result()
        except Exception as caught:  # also what no one thought of: the other ranks must hear of it
            error = caught
        naming = Naming(saving.folder, final)
        try:
            agree_or_fail(engine, error, what)
            told = gather_json(vars(self._told(saving, hashes)), engine, "checkpoint hashes")
            agree_or_fail(engine, self._as_chief(self._write_index, saving, [Told(**x) for x in told]), what)
            agree_or_fail(engine, self._as_chief(naming.do), what)
        except CheckpointError:
            self._as_chief(naming.undo)
            engine.barrier("checkpoint removed").wait()  # no rank goes on with half of it there
            raise
        failed = self._as_chief(point_to, self.folder, final.name)
        agree_or_fail(engine, failed, f"{final} was saved, but {self.folder / LATEST} cannot be moved to it")
        failed = self._as_chief(self._prune, naming, saving.writer.in_background)
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
            path: a checkpoint, a folder of checkpoints, or a file as `load_training` reads; default: the latest of this folder.
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
        strict = _truth("strict", strict)
        self.finish()
        loader = Loader(self._model, self._manager, self._world, self._shared)
        resumed = loader.load(self.folder if path is None else Path(path).expanduser(), strict, keep)
        if resumed is None and path is not None:
            raise CheckpointError(f"{path} is no checkpoint, and there is none in it")
        return resumed

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
            agree_or_fail(self._world.everyone, self._as_chief(self._lock_folder), f"{self.folder} cannot be used")
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

    def _join_deletion(self) -> None:
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None

    def _begin(self, step: int) -> Path:
        """The folder to write into, made by the chief."""
        self._join_deletion()  # there would not be room for all of them
        token = gather_json(secrets.token_hex(8) if self._world.everyone.rank == 0 else None, self._world.everyone, "checkpoint")[0]
        target = self.folder / f".{checkpoint_name(step)}.{token}"
        agree_or_fail(self._world.everyone, self._as_chief(target.mkdir), f"{target} cannot be made")
        return target

    def _owned(self, entries: Mapping[str, Entry], apart: Collection[str] = ()) -> dict[str, tuple[Any, np.ndarray]]:
        """What this rank writes; see `pieces_to_write`."""
        return pieces_to_write(entries, apart, self._world, self._place, self._shared)

    def _write(self, folder: Path, pieces: Mapping[str, tuple[Any, np.ndarray]]) -> dict[str, list[str]]:
        """This rank's file, if it writes one; name -> hashes."""
        if not self._place.writes:
            return {}
        return write_rank_file(folder / file_name(self._place.number, self._place.files), pieces, {"format": "pt"})

    def _copies(self, pieces: Mapping[str, tuple[Any, np.ndarray]]) -> dict[str, tuple[Any, np.ndarray]]:
        """Copies of the arrays, in memory that is kept for the next time."""
        for name, (_, array) in pieces.items():
            kept = self._snapshots.get(name)
            if kept is None or kept.shape != array.shape or kept.dtype != array.dtype:
                self._snapshots[name] = np.empty_like(array)
        with ThreadPoolExecutor(useful_threads()) as pool:  # training waits for it
            list(pool.map(lambda name: np.copyto(self._snapshots[name], pieces[name][1]), pieces))
        return {name: (dtype, self._snapshots[name]) for name, (dtype, _) in pieces.items()}

    def _told(self, saving: _Saving, hashes: dict[str, list[str]]) -> Told:
        if not self._place.writes:
            return Told(None, {}, {})
        layouts = {name: entry.layout for name, entry in saving.entries.items()}
        return Told(self._place.number, hashes, odd_layouts(layouts, self._place.number, self._place.files))

    def _write_index(self, saving: _Saving, everybody: list[Told]) -> None:
        told, ranks = by_file(everybody), self._world.everyone.size
        tensors = {
            name: indexed(
                name, self._layout(name, saving), x.dtype, x.shape, told, x.of_model, ranks if name in saving.apart else 1
            )
            for name, x in saving.known.items()
        }
        index = Index(len(told), saving.folder.name.rsplit(".", 1)[1], saving.state, tensors)
        write_text(saving.folder / INDEX, index.to_json())
        sync_folder(saving.folder)

    @staticmethod
    def _layout(name: str, saving: _Saving) -> Layout | None:
        """The layout of the tensor for the index: this rank's, or the whole tensor's where this rank has nothing of it."""
        return saving.entries[name].layout if name in saving.entries else Layout(saving.known[name].shape)

    def _prune(self, naming: Naming, in_background: bool) -> None:
        """Delete what was replaced, and what need not be kept."""
        going = [] if naming.replaced is None else [doomed(naming.replaced)]
        going += prune(self.folder, self._keep_last, self._keep_every)
        if in_background:
            self._deleting = threading.Thread(target=delete, args=(going,), name="bmtrain_ms-delete")
            self._deleting.start()
        else:
            delete(going)


def _truth(name: str, value: Any) -> bool:
    """`value`, if it is True or False: the text "no" would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def lock_folder(folder: str | Path) -> FolderLock | None:
    """Keep other jobs out of a folder that is shared, which is made if need be, until what rank 0 gets is released or forgotten.

    All ranks call it.

    Raises:
        CheckpointError: another job has it, or it cannot be made; on every rank.
    """
    world, lock, error = current_world(), None, None
    try:
        if world.everyone.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            lock = FolderLock(Path(folder))
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    agree_or_fail(world.everyone, error, f"{folder} cannot be used")
    return lock
