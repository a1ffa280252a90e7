"""Files of a model with other names, types or sizes; in one process, a few MiB at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from ..comm import Mesh, SingleEngine, World, use_world
from ..compat.runtime import numpy_dtype
from ..files.entries import model_entries
from ..files.errors import CheckpointError
from ..files.format import PIECE, TensorInfo
from .auto import family_of
from .model import CausalLM
from .pretrained.family import Piece, same
from .pretrained.folder import read_json, write_beside
from .pretrained.models import matched, model_of
from .pretrained.names import earlier_port, megatron
from .pretrained.reading import Files, Names, Source
from .pretrained.writing import Described, Target

READABLE, WRITABLE = ("hf", "ms", "bmtrain_mindspore", "megatron"), ("hf", "ms")
_DTYPES = ("float32", "float16", "bfloat16")
_EARLIER_FILE = "mindspore_model.safetensors"


def convert(
    source: str | Path,
    folder: str | Path,
    read: str,
    write: str,
    *,
    config: Path | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    pickles: bool = False,
) -> list[Path]:
    """Write a model's files anew.

    Args:
        source: a folder, an index or a file.
        folder: to write; it may be the one that is read.
        read, write: what tensors are called: `hf`, as by `transformers`; `ms`, as by `bmtrain_ms.save`; to read, as well
            `bmtrain_mindspore`, as by the earlier port, and `megatron`, as by Megatron's core.
        config: a folder with a `config.json` of Hugging Face's, and what else belongs beside the weights; default: `source`.
        dtype: float32, float16 or bfloat16; default: each tensor stays what it is.
        max_shard_size: of a file, bytes or like `5GB`.
        pickles: read `pytorch_model.bin` where there are no safetensors files: see `PickleReader`.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: files or config are missing or damaged, do not fit each other, or cannot be written.
        ValueError: no such names, or they are not known of this family; no such type or size.
    """
    if read not in READABLE or write not in WRITABLE:
        raise ValueError(f"read one of {', '.join(READABLE)}, and write {' or '.join(WRITABLE)}, not {read!r} and {write!r}")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    path, out = Path(source).expanduser(), Path(folder).expanduser()
    beside = Path(config).expanduser() if config is not None else path if path.is_dir() else path.parent
    if read == "bmtrain_mindspore" and path.is_dir():
        path = path / _EARLIER_FILE
    with use_world(World(SingleEngine(), Mesh(1, 0))) as one, Files(path, pickles) as files:
        kind: Any = family_of(beside)
        model = model_of(kind, beside, {})
        entries = model_entries(model)
        shapes = {name: entry.shape for name, entry in entries.items()}
        found = matched(model, files, _names(model, read, files), shapes, entries, one)
        type_of = None if dtype is None else getattr(ms, dtype)
        ours = {name: (type_of or _type_in(files, found.pieces(name)[0]), shape) for name, shape in shapes.items()}
        try:
            return _written(found, ours, Target(out, ours, _names(model, write, None), max_shard_size), out, beside, dtype)
        except OSError as error:
            raise CheckpointError(f"{out} cannot be written: {error}") from error


def _written(source: Source, ours: Described, target: Target, out: Path, beside: Path, dtype: str | None) -> list[Path]:
    try:
        for name, (made, shape) in ours.items():
            count, step = math.prod(shape), max(1, PIECE // numpy_dtype(made).itemsize)
            for start in range(0, count, step):
                values = np.empty(min(step, count - start), numpy_dtype(made))
                source.read_flat(name, start, start + values.size, values)
                target.write(name, start, values)
        paths = target.commit()
    except BaseException:
        target.discard()
        raise
    write_beside(out, _config(beside, dtype), beside)
    return paths


def _config(beside: Path, dtype: str | None) -> dict[str, Any]:
    given = read_json(beside)
    return given if dtype is None else {**given, "dtype" if "dtype" in given else "torch_dtype": dtype}


def _type_in(files: Files, piece: Piece) -> Any:
    info = files.info(piece.name)
    assert isinstance(info, TensorInfo)
    return info.dtype


def _names(model: CausalLM, layout: str, files: Files | None) -> Names:
    """What tensors of a model are called in a layout; `files`: that are read, None: they are written."""
    family = model.FAMILY.model_types[0]
    if layout == "hf":
        return model.FAMILY.pieces
    if layout == "ms":
        return lambda name, shape: [[same(name, shape)], [replace(same(name, shape), name=model.earlier_name(name))]]
    if layout == "bmtrain_mindspore":
        return earlier_port(family)
    info = files.info("embedding.word_embeddings.weight") if files and "embedding.word_embeddings.weight" in files.where else None
    rows = info.shape[0] if isinstance(info, TensorInfo) else model.config.vocab_size
    return megatron(family, model.config, max(rows, model.config.vocab_size))
