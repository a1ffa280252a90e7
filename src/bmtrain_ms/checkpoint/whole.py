"""Saving and loading whole tensors in safetensors files; no rank ever holds the model.

Saving walks over all tensors in pieces of a few MiB: every rank contributes its piece, rank 0 writes them where they belong.
Loading needs no communication: each rank reads its own boxes.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, Mapping

import numpy as np
from mindspore import Tensor, nn

from bmtrain_ms_base.layout import Box

from ..comm import World
from ..comm import world as current_world
from ..compat.runtime import host_array, numpy_dtype
from ..files.consolidated import ConsolidatedReader, Replacement, file_names, size_in_bytes, split_by_size, tensor_bytes
from ..files.entries import Described, Entry, LoadResult, apply_entries, compare, model_entries, named_now
from ..files.errors import CheckpointError, agree_or_fail
from ..files.format import TYPE_NAMES, AtomicFile, plan_file
from ..files.gathering import Whole
from .stages import everybodys, names_elsewhere
from .writer import DeferredFile, Writer

_DTYPES = {numpy_dtype(dtype): dtype for dtype in TYPE_NAMES}

# One for each save in the background that nobody has waited for: who writes on rank 0, None on the others.
pending: list[Writer | None] = []


def save(model: nn.Cell, file_name: str | Path, non_blocking: bool = False, max_shard_size: int | str | None = None) -> None:
    """Write the model as one safetensors file (BMTrain: `save`), or several. All ranks call it; rank 0 writes.

    A file appears complete or not at all; the index of several comes last. No rank ever holds the model.

    Args:
        file_name: of the file; with `max_shard_size`, of a folder.
        max_shard_size: bytes, or like `5GB`: write files of at most so much, named and indexed as Hugging Face's.
        non_blocking: return when rank 0 has the values; a thread writes them, from up to the model's size of host memory there. An
            error is raised by the next `save`, `load` or `wait_for_saves`, on every rank, and told at exit at the latest.

    Raises:
        CheckpointError: it cannot be written, or an earlier file could not; on every rank.
    """
    world, entries = current_world(), model_entries(model)
    if max_shard_size is None:
        save_entries(file_name, entries, {"format": "pt"}, world, non_blocking)
        return
    if non_blocking:
        raise ValueError("non_blocking and max_shard_size do not go together; a Checkpointer saves in the background")
    sizes = {name: tensor_bytes(x.dtype, x.shape) for name, x in everybodys(entries, world)[1].items()}
    groups = split_by_size(sizes, size_in_bytes(max_shard_size))
    folder, error = Path(file_name).expanduser(), None
    new = Replacement(folder)
    with contextlib.ExitStack() as stack:
        try:
            if world.everyone.rank == 0:
                stack.enter_context(new)
        except OSError as caught:
            error = caught
        agree_or_fail(world.everyone, error, f"{folder} cannot be made")
        for name, group in zip(file_names(len(groups)), groups):
            save_entries(new.folder / name, {x: entries[x] for x in group if x in entries}, {"format": "pt"}, world)
        try:
            if world.everyone.rank == 0:
                new.commit(groups, sum(sizes.values()))
        except OSError as caught:
            error = caught
        agree_or_fail(world.everyone, error, f"{folder} cannot be written")


def wait_for_saves() -> None:
    """Wait until what `save(non_blocking=True)` has begun is on the disk. All ranks call it.

    Raises:
        CheckpointError: a file could not be written; on every rank.
    """
    if not pending:
        return
    error: BaseException | None = None
    for writer in pending:
        try:
            if writer is not None:
                writer.result()
        except Exception as caught:
            error = CheckpointError(f"{writer.path} was not written in the background: {caught}")
    pending.clear()
    agree_or_fail(current_world().everyone, error, "a file saved with non_blocking=True was not written")


def load(model: nn.Cell, file_name: str | Path, strict: bool = True) -> LoadResult:
    """Read what `save` wrote, at any number of ranks (BMTrain: `load`). All ranks call it; each reads what it owns.

    `file_name`: a safetensors file, or a folder, or an index, of several. Values are converted to the parameter's dtype.

    Args:
        strict: raise where names differ, or types that hold other values (an integer is no float); otherwise they are returned.

    Raises:
        CheckpointError: unreadable, another shape, or (strict) other names or types; on every rank.
    """
    wait_for_saves()
    return load_entries(file_name, model_entries(model), current_world(), strict, model)


def state_dict(model: nn.Cell) -> dict[str, np.ndarray]:
    """Name -> full values on rank 0, which needs memory for all of them; empty on the others (BMTrain: `_save_to_rank0`).

    All ranks call it.
    """
    world = current_world()
    state: dict[str, np.ndarray] = {}
    tensors = Whole(model_entries(model), world)
    for name, (dtype, shape) in tensors.described.items():
        full = np.empty(math.prod(shape), numpy_dtype(dtype))
        for first, piece in tensors.pieces(name):
            full[first : first + piece.size] = piece
        if world.everyone.rank == 0:
            state[name] = full.reshape(shape)
    return state


def load_state_dict(model: nn.Cell, state: Mapping[str, Any], strict: bool = True) -> LoadResult:
    """Take values from a dictionary of full arrays or tensors, which every rank has; converted to the parameters' types.

    Raises:
        CheckpointError: another shape, or (strict) other names.
    """
    entries = model_entries(model)
    arrays = {name: host_array(x) if isinstance(x, Tensor) else np.asarray(x) for name, x in state.items()}
    renamed = named_now(model, arrays)
    arrays = {renamed.get(name, name): x for name, x in arrays.items()}
    there = {name: (tuple(x.shape), _DTYPES.get(x.dtype)) for name, x in arrays.items()}
    result = compare(there, entries, strict, "the state", "it")
    apply_entries({name: entry for name, entry in entries.items() if name in arrays}, _Arrays(arrays))
    return result


class _Arrays:
    """Arrays in memory, `Readable`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        out[...] = self._arrays[name][box]

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        if start < stop:  # MindSpore's bfloat16 ends the process where nothing is copied to nothing
            out[...] = self._arrays[name].reshape(-1)[start:stop]


def save_entries(
    path: str | Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], world: World, non_blocking: bool = False
) -> None:
    """See `save`; for any tensors."""
    wait_for_saves()
    path = Path(path).expanduser()
    error: BaseException | None = None
    file: AtomicFile | DeferredFile | None = None
    tensors: Whole | None = None
    try:
        tensors = Whole(entries, world)
        header, infos, size = plan_file(tensors.described, metadata)
        if world.everyone.rank == 0:
            file = AtomicFile(path, header, size)
            if non_blocking:
                file = DeferredFile(file)
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    try:
        agree_or_fail(world.everyone, error, f"{path} cannot be written")
        for name in tensors.described if tensors else ():  # without it all ranks have failed
            for position, piece in tensors.pieces(name):
                if file is None or error is not None:
                    continue  # the other ranks expect every gather, written or not
                try:
                    file.write(infos[name].start + position * piece.itemsize, piece)
                except Exception as caught:
                    error = caught
    except BaseException:  # e.g. another rank is gone
        if file is not None:
            file.discard()
        raise
    try:
        if file is not None:
            file.commit() if error is None else file.discard()
    except Exception as caught:
        error = caught
        file.discard()
    agree_or_fail(world.everyone, error, f"{path} cannot be written")
    if non_blocking:
        pending.append(file.writer if isinstance(file, DeferredFile) else None)


def read_headers(path: str | Path, world: World) -> tuple[dict[str, str], Described]:
    """The strings in a file's header, and its tensors; on every rank alike."""
    error: BaseException | None = None
    metadata, there = {}, {}
    try:
        with ConsolidatedReader(path) as reader:
            metadata, there = reader.metadata, reader.described
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    agree_or_fail(world.everyone, error, f"{path} cannot be loaded")
    return metadata, there


def load_entries(
    path: str | Path, entries: Mapping[str, Entry], world: World, strict: bool = True, model: nn.Cell | None = None
) -> LoadResult:
    """See `load`; for any tensors. Nothing is changed unless all ranks can read the file and it fits.

    `model`: may know what earlier releases called them.
    """
    elsewhere = names_elsewhere(entries, world)
    error: BaseException | None = None
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(ConsolidatedReader(path))
            unread: Described = dict.fromkeys(reader.foreign, ((), None))
            there = {**reader.described, **unread}
            renamed = {} if model is None else named_now(model, there)
            wanted = next((name for name in reader.foreign if renamed.get(name, name) in entries), None)
            if wanted is not None:
                kinds = sorted(set(reader.foreign.values()))
                raise CheckpointError(
                    f"{reader.path} has tensors of types {kinds}, which MindSpore does not have, such as {wanted}: convert the "
                    "file, to BF16 say"
                )
            named = {renamed.get(name, name): x for name, x in there.items() if renamed.get(name, name) not in elsewhere}
            result = compare(named, entries, strict, str(reader.path))
        except Exception as caught:
            error = caught
        agree_or_fail(world.everyone, error, f"{path} cannot be loaded")
        try:
            sources = {renamed.get(name, name): name for name in reader.tensors}
            apply_entries({name: entry for name, entry in entries.items() if name in sources}, reader, sources)
        except Exception as caught:
            error = caught
        agree_or_fail(world.everyone, error, f"{path} cannot be loaded")
    return result
