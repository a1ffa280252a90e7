"""Saving and loading sharded tensors as one file; no rank ever holds the model.

Saving walks over all tensors in pieces of a few MiB: every rank contributes its piece, rank 0 writes them where they belong.
Loading needs no communication: each rank reads its own byte ranges.
"""

from __future__ import annotations

import contextlib
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from ..comm import Engine, World, world
from ..compat.runtime import from_host, host_array, numpy_dtype
from ..zero import DistributedParameter
from .errors import CheckpointError
from .format import AtomicFile, Reader, plan

PIECE = 4 << 20  # bytes of each rank that travel at once


@dataclass(frozen=True)
class Entry:
    """A tensor to save or load.

    Attributes:
        shape, dtype: of the full tensor.
        get: this rank's flat shard (sharded), or the full tensor (replicated).
        set: takes what `get` gives.
        shard_length: elements per rank, the last padded; None: replicated on every rank.
    """

    shape: tuple[int, ...]
    dtype: Any
    get: Callable[[], Tensor]
    set: Callable[[Tensor], None]
    shard_length: int | None

    @property
    def count(self) -> int:
        """Elements of the full tensor."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class LoadResult:
    """What did not match: `missing` in the file, `unexpected` in the file."""

    missing: list[str]
    unexpected: list[str]


def model_entries(model: nn.Cell) -> dict[str, Entry]:
    """Every parameter of a model, tied ones once, buffers made of plain Parameters included."""
    entries = {}
    for p in model.get_parameters():
        if p.name in entries:
            raise CheckpointError(f"two parameters are called {p.name}; call model.check_names_and_refresh_name()")
        entries[p.name] = sharded_entry(p) if isinstance(p, DistributedParameter) else _replicated_entry(p)
    return entries


def sharded_entry(p: DistributedParameter) -> Entry:
    """A parameter's entry."""
    return Entry(p.full_shape, p.dtype, lambda: p, p.set_shard, p.shard_length)


def companion_entry(p: DistributedParameter, tensor: Tensor) -> Entry:
    """The entry of a tensor that is sharded as `p` is (a moment, a master); written in place."""

    def assign(shard: Tensor) -> None:
        tensor.assign_value(shard)

    return Entry(p.full_shape, tensor.dtype, lambda: tensor, assign, p.shard_length)


def _replicated_entry(p: Parameter) -> Entry:
    return Entry(tuple(p.shape), p.dtype, lambda: p, lambda full: p.set_data(full), None)


def save(model: nn.Cell, file_name: str | Path) -> None:
    """Write the model as one safetensors file (BMTrain: `save`). All ranks call it; rank 0 writes.

    The file appears complete or not at all.

    Raises:
        CheckpointError: it cannot be written; on every rank.
    """
    save_entries(file_name, model_entries(model), {"format": "pt"}, world())


def load(model: nn.Cell, file_name: str | Path, strict: bool = True) -> LoadResult:
    """Read a file written by `save`, at any number of ranks (BMTrain: `load`). All ranks call it; each reads what it owns.

    Values are converted to the parameter's dtype.

    Args:
        strict: raise where names differ; otherwise they are returned.

    Raises:
        CheckpointError: unreadable, another shape, or (strict) other names; on every rank.
    """
    return load_entries(file_name, model_entries(model), world(), strict)


def save_entries(path: str | Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], here: World) -> None:
    """See `save`; for any tensors."""
    path = Path(path)
    engine = here.engine
    error: BaseException | None = None
    file: AtomicFile | None = None
    try:
        header, infos, size = plan({name: (e.dtype, e.shape) for name, e in entries.items()}, metadata)
        if engine.rank == 0:
            file = AtomicFile(path, header, size)
    except (OSError, CheckpointError) as caught:
        error = caught
    _agree(engine, error, f"{path} cannot be written")
    for name, entry in entries.items():
        for position, piece in _pieces(entry, here.shards, name):
            if file is None or error is not None:
                continue  # the other ranks expect every gather, written or not
            try:
                file.write(infos[name].start + position * piece.itemsize, piece)
            except OSError as caught:
                error = caught
    try:
        if file is not None:
            file.commit() if error is None else file.discard()
    except OSError as caught:
        error = caught
        file.discard()
    _agree(engine, error, f"{path} cannot be written")


def read_metadata(path: str | Path, here: World) -> dict[str, str]:
    """The strings in a file's header; on every rank alike."""
    error: BaseException | None = None
    metadata: dict[str, str] = {}
    try:
        with Reader(path) as reader:
            metadata = reader.metadata
    except (OSError, CheckpointError) as caught:
        error = caught
    _agree(here.engine, error, f"{path} cannot be loaded")
    return metadata


def load_entries(path: str | Path, entries: Mapping[str, Entry], here: World, strict: bool = True) -> LoadResult:
    """See `load`; for any tensors. Nothing is changed unless all ranks can read the file and it fits."""
    error: BaseException | None = None
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(Reader(path))
            result = _compare(reader, entries, strict)
        except (OSError, CheckpointError) as caught:
            error = caught
        _agree(here.engine, error, f"{path} cannot be loaded")
        try:
            for name, entry in entries.items():
                if name in reader.tensors:
                    entry.set(from_host(_read(reader, name, entry, here.shards)))
        except (OSError, CheckpointError) as caught:
            error = caught
        _agree(here.engine, error, f"{path} cannot be loaded")
    return result


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


def _read(reader: Reader, name: str, entry: Entry, engine: Engine) -> np.ndarray:
    dtype = numpy_dtype(entry.dtype)
    if entry.shard_length is None:
        return reader.read(name).astype(dtype).reshape(entry.shape)
    start = min(engine.rank * entry.shard_length, entry.count)
    stop = min(start + entry.shard_length, entry.count)
    shard = np.zeros(entry.shard_length, dtype)
    step = max(1, PIECE // dtype.itemsize)
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        shard[begin - start : end - start] = reader.read(name, begin, end)
    return shard


def _compare(reader: Reader, entries: Mapping[str, Entry], strict: bool) -> LoadResult:
    result = LoadResult(
        [name for name in entries if name not in reader.tensors],
        [name for name in reader.tensors if name not in entries],
    )
    shapes = [
        f"{name}: {reader.tensors[name].shape} in the file, {entry.shape} here"
        for name, entry in entries.items()
        if name in reader.tensors and reader.tensors[name].shape != entry.shape
    ]
    problems = []
    if shapes:
        problems.append(f"{len(shapes)} shapes differ: " + _first(shapes))
    if strict and result.missing:
        problems.append(f"{len(result.missing)} missing in the file: " + _first(_with_hints(result.missing, result.unexpected)))
    if strict and result.unexpected:
        problems.append(f"{len(result.unexpected)} unexpected in the file: " + _first(result.unexpected))
    if problems:
        raise CheckpointError(f"{reader.path} does not fit the model; " + "; ".join(problems))
    return result


def _with_hints(names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    hints = [difflib.get_close_matches(name, candidates, 1) for name in names[:10]]
    return [f"{name} (did you mean {hint[0]}?)" if hint else name for name, hint in zip(names, hints)] + list(names[10:])


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def _agree(engine: Engine, error: BaseException | None, what: str) -> None:
    """Raise on all ranks if one has an error."""
    failed = from_host(np.array([float(error is not None)], np.float32))
    flags = host_array(engine.all_gather([failed], label="agree").wait()[0])
    if error is not None:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{what}: {error}") from error
    if flags.any():
        ranks = np.flatnonzero(flags).tolist()
        raise CheckpointError(f"{what}: rank(s) {ranks} failed; see their messages")
