"""Saving and loading sharded tensors as one file; no rank ever holds the model.

Saving walks over all tensors in pieces of a few MiB: every rank contributes its piece, rank 0 writes them where they belong.
Loading needs no communication: each rank reads its own byte ranges.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from ..comm import Engine, World, world
from ..compat.runtime import from_host, host_array, numpy_dtype, overwrite
from ..zero import DistributedParameter
from .background import DeferredFile, pending
from .consolidated import ConsolidatedReader, Replacement, file_names, size_in_bytes, split, tensor_bytes
from .errors import CheckpointError, agree_or_fail
from .format import TYPE_NAMES, AtomicFile, plan

# What is there: name -> (shape, MindSpore dtype)
Described = Mapping[str, tuple[tuple[int, ...], Any]]

_DTYPES = {numpy_dtype(dtype): dtype for dtype in TYPE_NAMES}
PIECE = 4 << 20  # bytes of each rank that travel at once


@dataclass(frozen=True)
class Entry:
    """A tensor to save or load.

    Attributes:
        shape, dtype: of the full tensor.
        get: this rank's flat shard (sharded), or the full tensor (replicated).
        set: takes what `get` gives.
        shard_length: elements per rank, the last padded; None: replicated on every rank.
        of_model: False: of an optimizer, or a gradient.
    """

    shape: tuple[int, ...]
    dtype: Any
    get: Callable[[], Tensor]
    set: Callable[[Tensor], None]
    shard_length: int | None
    of_model: bool = True

    @property
    def count(self) -> int:
        """Elements of the full tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LoadResult:
    """What did not match: names `missing` in the file, `unexpected` ones in it, and which were `converted` from what to what."""

    missing: list[str]
    unexpected: list[str]
    converted: list[str] = field(default_factory=list)


def model_entries(model: nn.Cell) -> dict[str, Entry]:
    """Every parameter of a model, tied ones once, and its persistent buffers."""
    if not isinstance(model, nn.Cell):
        raise TypeError(f"the model comes first, then the path: {type(model).__name__} is no Cell")
    entries = {}
    for p in model.get_parameters():
        if p.name in entries:
            raise CheckpointError(f"two parameters are called {p.name}; call model.check_names_and_refresh_name()")
        entries[p.name] = sharded_entry(p) if isinstance(p, DistributedParameter) else _replicated_entry(p)
    for name, tensor in _persistent_buffers(model):
        if name in entries:
            raise CheckpointError(f"a parameter is called {name}, as a buffer of the model is; rename it")
        entries[name] = replace(companion_entry(None, tensor), of_model=True)
    return entries


def _persistent_buffers(model: nn.Cell) -> list[tuple[str, Tensor]]:
    """Of `register_buffer`, which MindSpore has since 2.7; what older ones call buffers are Parameters."""
    if not hasattr(model, "named_buffers"):
        return []
    persistent = set(model.state_dict())
    return [(name, tensor) for name, tensor in model.named_buffers() if name in persistent]


def sharded_entry(p: DistributedParameter) -> Entry:
    """A parameter's entry."""
    return Entry(p.full_shape, p.dtype, lambda: p, p.set_shard, p.shard_length)


def companion_entry(p: DistributedParameter | None, tensor: Tensor) -> Entry:
    """The entry of a tensor that is sharded as `p` is (a moment, a master), or the same on every rank; written in place."""
    shape, length = (tuple(tensor.shape), None) if p is None else (p.full_shape, p.shard_length)
    return Entry(shape, tensor.dtype, lambda: tensor, lambda values: overwrite(tensor, values), length, of_model=False)


def _replicated_entry(p: Parameter) -> Entry:
    return Entry(tuple(p.shape), p.dtype, lambda: p, lambda full: p.set_data(full), None)


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
    here, entries = world(), model_entries(model)
    if max_shard_size is None:
        save_entries(file_name, entries, {"format": "pt"}, here, non_blocking)
        return
    if non_blocking:
        raise ValueError("non_blocking and max_shard_size do not go together; a Checkpointer saves in the background")
    sizes = {name: tensor_bytes(entry.dtype, entry.shape) for name, entry in entries.items()}
    groups = split(sizes, size_in_bytes(max_shard_size))
    folder, error = Path(file_name).expanduser(), None
    new = Replacement(folder)
    with contextlib.ExitStack() as stack:
        try:
            if here.engine.rank == 0:
                stack.enter_context(new)
        except OSError as caught:
            error = caught
        agree_or_fail(here.engine, error, f"{folder} cannot be made")
        for name, group in zip(file_names(len(groups)), groups):
            save_entries(new.folder / name, {x: entries[x] for x in group}, {"format": "pt"}, here)
        try:
            if here.engine.rank == 0:
                new.commit(groups, sum(sizes.values()))
        except OSError as caught:
            error = caught
        agree_or_fail(here.engine, error, f"{folder} cannot be written")


def wait_for_saves() -> None:
    """Wait until what `save(non_blocking=True)` has begun is on the disk. All ranks call it.

    Raises:
        CheckpointError: a file could not be written; on every rank.
    """
    if not pending:
        return
    error: BaseException | None = None
    for file in pending:
        try:
            if file is not None:
                file.join()
        except Exception as caught:
            error = CheckpointError(f"{file.path} was not written in the background: {caught}")
    pending.clear()
    agree_or_fail(world().engine, error, "a file saved with non_blocking=True was not written")


def load(model: nn.Cell, file_name: str | Path, strict: bool = True) -> LoadResult:
    """Read what `save` wrote, at any number of ranks (BMTrain: `load`). All ranks call it; each reads what it owns.

    `file_name`: a safetensors file, or a folder, or an index, of several. Values are converted to the parameter's dtype.

    Args:
        strict: raise where names differ, or types that hold other values (an integer is no float); otherwise they are returned.

    Raises:
        CheckpointError: unreadable, another shape, or (strict) other names or types; on every rank.
    """
    wait_for_saves()
    return load_entries(file_name, model_entries(model), world(), strict)


def state_dict(model: nn.Cell) -> dict[str, np.ndarray]:
    """Name -> full values on rank 0, which needs memory for all of them; empty on the others (BMTrain: `_save_to_rank0`).

    All ranks call it.
    """
    here = world()
    state: dict[str, np.ndarray] = {}
    for name, entry in model_entries(model).items():
        full = np.empty(entry.count, numpy_dtype(entry.dtype))
        for first, piece in _pieces(entry, here.shards, name):
            full[first : first + piece.size] = piece
        if here.engine.rank == 0:
            state[name] = full.reshape(entry.shape)
    return state


def load_state_dict(model: nn.Cell, state: Mapping[str, Any], strict: bool = True) -> LoadResult:
    """Take values from a dictionary of full arrays or tensors, which every rank has; converted to the parameters' types.

    Raises:
        CheckpointError: another shape, or (strict) other names.
    """
    entries = model_entries(model)
    arrays = {name: host_array(x) if isinstance(x, Tensor) else np.asarray(x) for name, x in state.items()}
    there = {name: (tuple(x.shape), _DTYPES.get(x.dtype)) for name, x in arrays.items()}
    result = compare(there, entries, strict, "the state", "it")
    for name, entry in entries.items():
        if name in arrays:
            entry.set(from_host(_shard(partial(_elements, arrays[name].reshape(-1)), entry, world().shards)))
    return result


def save_entries(
    path: str | Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], here: World, non_blocking: bool = False
) -> None:
    """See `save`; for any tensors."""
    wait_for_saves()
    path = Path(path).expanduser()
    engine = here.engine
    error: BaseException | None = None
    file: AtomicFile | DeferredFile | None = None
    try:
        header, infos, size = plan({name: (e.dtype, e.shape) for name, e in entries.items()}, metadata)
        if engine.rank == 0:
            file = AtomicFile(path, header, size)
            if non_blocking:
                file = DeferredFile(file)
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    try:
        agree_or_fail(engine, error, f"{path} cannot be written")
        for name, entry in entries.items():
            for position, piece in _pieces(entry, here.shards, name):
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
    agree_or_fail(engine, error, f"{path} cannot be written")
    if non_blocking:
        pending.append(file if isinstance(file, DeferredFile) else None)


def read_headers(path: str | Path, here: World) -> tuple[dict[str, str], Described]:
    """The strings in a file's header, and its tensors; on every rank alike."""
    error: BaseException | None = None
    metadata, there = {}, {}
    try:
        with ConsolidatedReader(path) as reader:
            metadata, there = reader.metadata, reader.described
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    agree_or_fail(here.engine, error, f"{path} cannot be loaded")
    return metadata, there


def load_entries(path: str | Path, entries: Mapping[str, Entry], here: World, strict: bool = True) -> LoadResult:
    """See `load`; for any tensors. Nothing is changed unless all ranks can read the file and it fits."""
    error: BaseException | None = None
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(ConsolidatedReader(path))
            wanted = next((name for name in reader.foreign if name in entries), None)
            if wanted is not None:
                kinds = sorted(set(reader.foreign.values()))
                raise CheckpointError(
                    f"{reader.path} has tensors of types {kinds}, which MindSpore does not have, such as {wanted}: convert the "
                    "file, to BF16 say"
                )
            unread: Described = dict.fromkeys(reader.foreign, ((), None))
            result = compare({**reader.described, **unread}, entries, strict, str(reader.path))
        except Exception as caught:
            error = caught
        agree_or_fail(here.engine, error, f"{path} cannot be loaded")
        try:
            apply_entries({name: entry for name, entry in entries.items() if name in reader.tensors}, reader.read, here)
        except Exception as caught:
            error = caught
        agree_or_fail(here.engine, error, f"{path} cannot be loaded")
    return result


def apply_entries(entries: Mapping[str, Entry], read: Callable[[str, int, int], np.ndarray], here: World) -> None:
    """Fill every entry with what this rank stores of it; `read(name, start, stop)` gives elements of the flattened full tensor."""
    for name, entry in entries.items():
        entry.set(from_host(_shard(partial(read, name), entry, here.shards)))


def _pieces(entry: Entry, engine: Engine, name: str) -> Any:
    """(first element, values) of all pieces of a tensor; values are meaningful on rank 0."""
    if entry.shard_length is None:
        yield 0, host_array(entry.get()).reshape(-1)
        return
    shard = host_array(entry.get())
    step = max(1, PIECE // shard.itemsize)
    for begin in range(0, entry.shard_length, step):
        piece = from_host(np.ascontiguousarray(shard[begin : begin + step]))
        rows = host_array(engine.all_gather([piece], label=f"save {name}").wait()[0]).reshape(engine.size, -1)
        for rank, row in enumerate(rows):
            first = rank * entry.shard_length + begin
            if first < entry.count:
                yield first, row[: entry.count - first]


def _elements(flat: np.ndarray, start: int, stop: int) -> np.ndarray:
    return flat[start:stop]


def _shard(read: Callable[[int, int], np.ndarray], entry: Entry, engine: Engine) -> np.ndarray:
    """What this rank stores of an entry; `read(start, stop)` gives elements of the flattened full tensor."""
    dtype = numpy_dtype(entry.dtype)
    if entry.shard_length is None:
        return read(0, entry.count).astype(dtype).reshape(entry.shape)
    start = min(engine.rank * entry.shard_length, entry.count)
    stop = min(start + entry.shard_length, entry.count)
    shard = np.zeros(entry.shard_length, dtype)
    step = max(1, PIECE // dtype.itemsize)
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        shard[begin - start : end - start] = read(begin, end)
    return shard


def compare(there: Described, entries: Mapping[str, Entry], strict: bool, what: str, where: str = "the file") -> LoadResult:
    """What does not match; `there` is in the file, which messages call `where`.

    Raises:
        CheckpointError: shapes differ, or (strict) names, or types that hold other values: floats, integers, truth values.
    """
    result = LoadResult([name for name in entries if name not in there], [name for name in there if name not in entries])
    shapes, kinds = [], []
    for name, entry in entries.items():
        shape, dtype = there.get(name, (entry.shape, entry.dtype))
        if shape != entry.shape:
            shapes.append(f"{name}: {shape} in {where}, {entry.shape} here")
        if dtype != entry.dtype:
            result.converted.append(f"{name}: {dtype} in {where}, {entry.dtype} here")
            if _kind(dtype) != _kind(entry.dtype):
                kinds.append(result.converted[-1])
    problems = []
    if strict and kinds:
        problems.append(f"{len(kinds)} types differ: " + _first(kinds))
    if shapes:
        problems.append(f"{len(shapes)} shapes differ: " + _first(shapes))
    if strict and result.missing:
        problems.append(f"{len(result.missing)} missing in {where}: " + _first(_with_hints(result.missing, result.unexpected)))
    if strict and result.unexpected:
        problems.append(f"{len(result.unexpected)} unexpected in {where}: " + _first(result.unexpected))
    if problems:
        raise CheckpointError(f"{what} does not fit the model; " + "; ".join(problems))
    return result


def _kind(dtype: Any) -> str:
    """`f` for floats, `i` for integers, `b` for truth values."""
    kind = TYPE_NAMES.get(dtype, "?").lstrip("B")[:1]
    return {"F": "f", "I": "i", "U": "i"}.get(kind, "b")


def _with_hints(names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    hints = [difflib.get_close_matches(name, candidates, 1) for name in names[:10]]
    return [f"{name} (did you mean {hint[0]}?)" if hint else name for name, hint in zip(names, hints)] + list(names[10:])


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")
