"""What `bmtrain-ms ckpt` does: looking at checkpoints and rewriting them, a few MiB at a time, in one process, without a model."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Union

import numpy as np
import xxhash
from tqdm import tqdm

from bmtrain_ms_base.checks import whole

from ..files import consolidated
from ..files.errors import CheckpointError, printable
from ..files.format import AtomicFile, plan_file
from ..files.locking import let_go, lock_temporary, sweep_temporaries
from ..files.replacing import sync_folder, write_text
from . import index as index_module
from .folder import LATEST, checkpoint_name, find_latest, state_of, steps_in
from .index import INDEX, MOST_RANKS, STATE_PREFIXES, Index, IndexedTensor, check_name, file_name
from .sharded import ShardedReader

STEP = 4 << 20  # bytes at a time
_OF_RUN = "checkpoints"  # a folder in that of a run
_ATTEMPTS = 20  # to open a checkpoint before another takes its place
_COMPARED = 1 << 16  # elements at a time, of which there are wider copies

AnyReader = Union[ShardedReader, consolidated.ConsolidatedReader]


def open_checkpoint(path: str | Path) -> AnyReader:
    """A sharded checkpoint, a folder of them or of a run (the latest), or whole tensors in safetensors files.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    path = Path(path).expanduser()
    for _ in range(_ATTEMPTS):
        found, wrong = _found_in(path)
        if found is None:
            return _whole_files(path)
        before = state_of(found)
        try:
            reader = ShardedReader(found)
        except CheckpointError:
            if before is not None and state_of(found) == before:
                raise
            continue  # a job that saves there has replaced or deleted it meanwhile
        if state_of(found) == before:
            if wrong:
                sys.stderr.write(f"WARNING: {wrong}\n")
            return reader
        reader.close()
    raise CheckpointError(f"{path} is replaced as fast as it can be opened; try again when the job that saves there has ended")


def _found_in(path: Path) -> tuple[Path | None, str]:
    if path.name == LATEST and path.is_file() and steps_in(path.parent):
        path = path.parent  # the file says which is the latest there
    if not path.is_dir():
        return None, ""
    if (path / INDEX).exists():
        return path, ""
    whole_files = any((path / name).exists() for name in (consolidated.SINGLE, consolidated.INDEX))
    return find_latest(path / _OF_RUN if steps_in(path / _OF_RUN) and not whole_files else path)


def _whole_files(path: Path) -> consolidated.ConsolidatedReader:
    reader = consolidated.ConsolidatedReader(path)
    if reader.foreign:
        reader.close()
        kinds = sorted(set(reader.foreign.values()))
        raise CheckpointError(f"{path} has tensors of types {kinds}, which MindSpore does not have")
    return reader


def inspect(path: str | Path) -> str:
    """What is in a checkpoint, as text."""
    with open_checkpoint(path) as reader:
        tensors = _tensors(reader)
        lines = []
        if isinstance(reader, ShardedReader):
            state = reader.index.state
            versions = ", ".join(f"{name} {version}" for name, version in dict(_object(state.get("versions"))).items())
            lines += [
                f"{reader.folder}: sharded checkpoint of step {state.get('step')}, written by {reader.index.ranks} rank(s)",
                f"versions: {versions}",
                f"extra: {state.get('extra')}",
            ]
        else:
            lines.append(f"{reader.path}: safetensors, whole tensors")
        width = max((len(printable(name)) for name in tensors), default=4)
        for name, t in tensors.items():
            of_each = f"  on each of {t.copies} ranks" if t.copies > 1 else ""
            lines.append(f"{printable(name):<{width}}  {t.dtype!s:<9} {t.shape!s:<20} {_size(t.nbytes):>11}{of_each}")
        for what, chosen in (("model", _model_only(tensors)), ("in all", tensors)):
            lines.append(f"{what}: {len(chosen)} tensors, {_size(sum(t.nbytes * t.copies for t in chosen.values()))}")
    return "\n".join(map(printable, lines))


def verify(path: str | Path) -> str:
    """Read all of it and check what can be checked: every hash of a sharded checkpoint, the structure of other files.

    Raises:
        CheckpointError: it is damaged.
    """
    with open_checkpoint(path) as reader:
        if isinstance(reader, ShardedReader):
            with _bar("verify", reader.stored) as bar:
                for size in reader.verify():
                    bar.update(size)
            return f"{reader.folder} is sound: {_size(reader.stored)} in {reader.index.ranks} file(s), every hash is right"
        total = sum(t.nbytes for t in _tensors(reader).values())
        return f"{reader.path} is a complete file; {_size(total)}. It has no hashes: a changed value cannot be seen"


def newest_sound(folder: Path, before: int) -> Path | None:
    """The newest checkpoint in a folder, of a step below `before`, whose hashes are all right; None: there is none."""
    for step in reversed([step for step in steps_in(folder) if step < before]):
        with contextlib.suppress(CheckpointError):
            verify(folder / checkpoint_name(step))
            return folder / checkpoint_name(step)
    return None


def consolidate(path: str | Path, out: str | Path, max_shard_size: int | str = "5GB", everything: bool = False) -> list[Path]:
    """Write the model's tensors whole, with Hugging Face's index if they need several files.

    Args:
        out: folder; made if it is not there. A model that is in it stays until all of this one is written.
        everything: optimizer states too.

    Of a tensor that is not the same on all ranks it is rank 0's, which is noted on stderr.

    Raises:
        CheckpointError: damaged, or it cannot be written, or `out` is where it is read from.
    """
    folder, largest = Path(out).expanduser(), consolidated.size_in_bytes(max_shard_size)
    with open_checkpoint(path) as reader:
        tensors = _tensors(reader) if everything else _model_only(_tensors(reader))
        source = reader.folder if isinstance(reader, ShardedReader) else reader.path
        if folder.resolve() in (source.resolve(), source.resolve().parent if source.is_file() else None):
            raise CheckpointError(f"{folder} is where {source} is read from; choose another folder")
        apart = [name for name, t in tensors.items() if t.copies > 1]
        if apart:
            others = f" and {len(apart) - 1} other tensors" if len(apart) > 1 else ""
            sys.stderr.write(f"NOTE: {printable(apart[0])}{others} had other values on other ranks; rank 0's are written\n")
        sizes = {name: t.nbytes for name, t in tensors.items()}
        groups = consolidated.split_by_size(sizes, largest)
        try:
            with consolidated.Replacement(folder) as new, _bar("consolidate", sum(sizes.values())) as bar:
                for name, group in zip(consolidated.file_names(len(groups)), groups):
                    _write(new.folder / name, reader, {x: tensors[x] for x in group}, bar)
                return new.commit(groups, sum(sizes.values()))
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error}") from error


def reshard(path: str | Path, out: str | Path, ranks: int) -> Path:
    """Write a sharded checkpoint as so many ranks would have without shared storage; loading with it does not need that.

    Args:
        out: folder of the new checkpoint; must not exist.

    Raises:
        CheckpointError: not a sharded checkpoint, damaged, or it cannot be written.
        ValueError: `ranks` is not possible.
    """
    if not 1 <= whole("ranks", ranks) <= MOST_RANKS:
        raise ValueError(f"ranks must be from 1 to {MOST_RANKS}, not {ranks}")
    target = Path(out).expanduser()
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another name")
    with open_checkpoint(path) as reader:
        if not isinstance(reader, ShardedReader):
            raise CheckpointError(f"{path} is not a sharded checkpoint; it can be loaded at any number of ranks as it is")
        check_name(target, reader.index.state.get("step"))
        old = reader.index.tensors
        new = {n: t if t.is_whole else replace(t, shard=max(1, -(-t.count // ranks)), grid=None) for n, t in old.items()}
        sweep_temporaries(target.parent, f".{target.name}.", ".new")
        temporary, lock = target.with_name(f".{target.name}.{os.getpid()}.new"), -1
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            lock = lock_temporary(temporary)
            stored = sum(t.nbytes * (ranks * t.copies if t.is_whole else 1) for t in new.values())
            with _bar("reshard", stored) as bar:
                hashes = [_write_rank(temporary, reader, new, rank, ranks, bar) for rank in range(ranks)]
            tensors = {n: replace(t, hashes=[h[n] for h in hashes[: 1 if t.is_whole else ranks]]) for n, t in new.items()}
            # no job has written it: any placing of so many ranks on hosts may resume it, with shared storage or without
            state = {**reader.index.state, "mesh": {"ranks": ranks, "shard_size": ranks}, "layout": None, "shared_storage": False}
            index = Index(ranks, secrets.token_hex(8), state, tensors)
            write_text(temporary / INDEX, index.to_json())
            sync_folder(temporary)
            os.replace(temporary, target)
            sync_folder(target.parent)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            let_go(lock)
    return target


def diff(first: str | Path, second: str | Path) -> list[str]:
    """Lines that say how two checkpoints differ, in names, shapes, types and values; none: they do not, in any bit.

    Raises:
        CheckpointError: one is damaged.
    """
    lines = []
    with open_checkpoint(first) as a, open_checkpoint(second) as b:
        ours, theirs = _tensors(a), _tensors(b)
        lines += [f"- {printable(name)}: only in {first}" for name in ours if name not in theirs]
        lines += [f"+ {printable(name)}: only in {second}" for name in theirs if name not in ours]
        common = [name for name in ours if name in theirs]
        with _bar("diff", sum(ours[name].nbytes * ours[name].copies for name in common)) as bar:
            for name in common:
                x, y = ours[name], theirs[name]
                if (x.dtype, x.shape, x.copies) != (y.dtype, y.shape, y.copies):
                    lines.append(f"! {printable(name)}: {_kind(x)} against {_kind(y)}")
                    continue
                changed, largest = _difference(a, b, name, x, bar)
                if changed:
                    count = x.count * x.copies
                    lines.append(f"! {printable(name)}: {changed} of {count} elements differ, by at most {largest:g}")
    return lines


def _kind(tensor: IndexedTensor) -> str:
    of_each = f" on each of {tensor.copies} ranks" if tensor.copies > 1 else ""
    return f"{tensor.dtype} {tensor.shape}{of_each}"


def _difference(a: AnyReader, b: AnyReader, name: str, tensor: IndexedTensor, bar: tqdm) -> tuple[int, float]:
    """(elements whose bits differ, the largest difference of numbers: 0 for two zeros, or two that are not numbers)."""
    changed, largest = 0, 0.0
    for start, stop in _ranges(tensor, tensor.copies):
        x, y = _stored(a, name, start, stop), _stored(b, name, start, stop)
        bar.update(x.nbytes)
        for begin in range(0, x.size, _COMPARED):
            u, v = x[begin : begin + _COMPARED], y[begin : begin + _COMPARED]
            bits = (u.view(np.uint8) != v.view(np.uint8)).reshape(-1, u.itemsize).any(1)
            if bits.any():
                changed += int(bits.sum())
                largest = max(largest, _largest_difference(u[bits], v[bits]))
    return changed, largest


def _stored(reader: AnyReader, name: str, start: int, stop: int) -> np.ndarray:
    return reader.read_stored(name, start, stop) if isinstance(reader, ShardedReader) else reader.read_flat(name, start, stop)


def _largest_difference(x: np.ndarray, y: np.ndarray) -> float:
    if x.dtype.kind in "iu":  # float64 does not hold all of 64 bits; modulo 2^64 the difference is right
        x, y = x.astype(np.int64), y.astype(np.int64)
        return float((np.maximum(x, y).astype(np.uint64) - np.minimum(x, y).astype(np.uint64)).max())
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(x.astype(np.float64) - y.astype(np.float64))
    return float(np.nanmax(apart, initial=0.0))


def _tensors(reader: AnyReader) -> Mapping[str, IndexedTensor]:
    if isinstance(reader, ShardedReader):
        return reader.index.tensors
    training = "bmtrain_ms" in reader.metadata  # of a training state in one file, whose tensors are told apart by their names alone
    of_model = {name: not (training and name.startswith(STATE_PREFIXES)) for name in reader.tensors}
    return {name: IndexedTensor(t.dtype, t.shape, None, (), of_model[name]) for name, t in reader.tensors.items()}


def _model_only(tensors: Mapping[str, IndexedTensor]) -> dict[str, IndexedTensor]:
    return {name: t for name, t in tensors.items() if t.of_model}


def _ranges(tensor: IndexedTensor, copies: int = 1) -> Iterator[tuple[int, int]]:
    step = max(1, STEP // tensor.itemsize)
    for start in range(0, tensor.count * copies, step):
        yield start, min(start + step, tensor.count * copies)


def _write(path: Path, reader: AnyReader, tensors: Mapping[str, IndexedTensor], bar: tqdm) -> None:
    header, infos, size = plan_file({name: (t.dtype, t.shape) for name, t in tensors.items()}, {"format": "pt"})
    file = AtomicFile(path, header, size)
    try:
        for name, tensor in tensors.items():
            for start, stop in _ranges(tensor):
                piece = reader.read_flat(name, start, stop)
                file.write(infos[name].start + start * piece.itemsize, piece)
                bar.update(piece.nbytes)
        file.commit()
    except BaseException:
        file.discard()
        raise


def _write_rank(
    folder: Path, reader: ShardedReader, tensors: Mapping[str, IndexedTensor], rank: int, ranks: int, bar: tqdm
) -> dict[str, list[str]]:
    """One rank's file, which a host may have to itself: with the whole tensors; name -> hashes."""
    pieces = {n: (t.piece(rank).first, t.size_in(rank)) for n, t in tensors.items()}
    mine = {n: (start, start + size) for n, (start, size) in pieces.items() if size}
    header, infos, size = plan_file({n: (tensors[n].dtype, (stop - start,)) for n, (start, stop) in mine.items()}, {"format": "pt"})
    file = AtomicFile(folder / file_name(rank, ranks), header, size)
    hashes: dict[str, list[str]] = {name: [] for name in tensors}
    try:
        for name, (first, last) in mine.items():
            step = index_module.HASHED // tensors[name].itemsize
            for start in range(first, last, step):
                piece = reader.read_stored(name, start, min(start + step, last))
                hashes[name].append(xxhash.xxh3_64_hexdigest(piece.view(np.uint8).data))
                file.write(infos[name].start + (start - first) * piece.itemsize, piece)
                bar.update(piece.nbytes)
        file.commit()
    except BaseException:
        file.discard()
        raise
    return hashes


def _object(x: Any) -> dict[str, Any]:
    return x if isinstance(x, dict) else {}


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5, disable=None)


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return ""
