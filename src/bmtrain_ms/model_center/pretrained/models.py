"""A model's parameters, whatever their layout, in and out of a folder of Hugging Face's. All ranks call what is here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Mapping

import mindspore as ms
import numpy as np
from mindspore import nn

from ...comm import World, gather_json
from ...comm import world as current_world
from ...compat.autograd import no_grad
from ...compat.cells import evaluating
from ...compat.runtime import from_host, host_array
from ...files.entries import Entry, apply_entries, model_entries
from ...files.errors import CheckpointError, agree_or_fail
from ...files.gathering import Whole
from ...nn.lora import adapters_of
from .differences import Difference, PretrainedError, table
from .family import COMMON, Piece
from .folder import CONFIG, config_json, config_of, read_json, write_beside
from .kinds import with_their_names
from .reading import Files, Names, Source, choose, compare
from .writing import Target

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CLOSE = {"float32": 1e-5}  # logits, of the largest; of other types 2e-2
_PROMPT = 8  # tokens


def read_config(kind: Any, folder: str | Path, changes: Mapping[str, Any]) -> Any:
    """The config of a folder, for a class of models.

    Args:
        kind: a `CausalLM`.
        changes: fields of our config that are to be others.

    Raises:
        PretrainedError: it is missing, damaged, of another family, or says what is not computed here; on every rank.
    """
    path, error, config = Path(folder).expanduser(), None, None
    try:
        config = config_of(kind.FAMILY, kind.CONFIG, read_json(path), path, changes)
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    agree_or_fail(current_world().everyone, error, f"{path / CONFIG} cannot be used")
    return config


def model_of(kind: Any, folder: str | Path, changes: Mapping[str, Any]) -> Any:
    """A model as a folder's config says, with values that are not the files'. See `read_config`.

    Raises:
        PretrainedError: the config says what such a model cannot be.
        TypeError, ValueError: the changes do.
    """
    config = read_config(kind, folder, changes)
    try:
        return kind(config)
    except (TypeError, ValueError) as error:
        if any(name in str(error) for name in changes):
            raise
        names = {**COMMON, **kind.FAMILY.fields}
        raise PretrainedError(f"{Path(folder).expanduser() / CONFIG}: {with_their_names(str(error), names)}") from error


def load_pretrained(model: Any, folder: str | Path, pickles: bool = False) -> None:
    """Read the parameters of a model, plain or spread, each rank what it stores of them.

    Values are converted to the parameters' types. Nothing is changed before all names, shapes and types have been looked at.

    Args:
        model: a `CausalLM`.
        folder: with `model.safetensors`, or several and their index.
        pickles: read `pytorch_model.bin` where there are no safetensors files: see `PickleReader`.

    Raises:
        PretrainedError: tensors are missing, unexpected, or have another shape or type; its lines say which.
        CheckpointError: a file is missing, damaged or truncated. Both on every rank.
    """
    world, path, entries = current_world(), Path(folder).expanduser(), model_entries(model)
    shapes = _shapes_of_all(entries, world)
    with contextlib.ExitStack() as stack:
        error: BaseException | None = None
        try:
            files = stack.enter_context(Files(path, pickles))
        except Exception as caught:  # whatever it is: the other ranks wait
            error = caught
        agree_or_fail(world.everyone, error, f"{path} cannot be read")
        source = matched(model, files, model.FAMILY.pieces, shapes, entries, world)
        try:
            apply_entries(entries, source)
        except Exception as caught:
            error = caught
        agree_or_fail(world.everyone, error, f"{path} cannot be read; some parameters have been")


def matched(
    model: Any,
    files: Files,
    names: Names,
    shapes: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, Entry],
    world: World,
) -> Source:
    """The tensors of a model, in files that have been found to fit. All ranks call it.

    Args:
        model: a `CausalLM`.
        files: what is read.
        names: what tensors are called there.
        shapes: name -> whole shape of all parameters.
        entries: this rank's, of which shapes and types are looked at.
        current: the ranks.

    Raises:
        PretrainedError, CheckpointError: see `load_pretrained`.
    """
    error: BaseException | None = None
    differences: list[Difference] = []
    chosen: dict[str, list[Piece]] = {}
    wanted = {name: entry.dtype for name, entry in entries.items()}
    try:
        chosen, differences = choose(files, names, shapes)
        head = _head_of_tied(model, files, names, shapes)
        if head is not None:
            differences = [row for row in differences if row[:2] != ("unexpected", head[0].name)]
            chosen[_HEAD] = head
            wanted.update({_HEAD: wanted[_EMBEDDING]} if _EMBEDDING in wanted else {})
        differences += compare(files, chosen, wanted)
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    agree_or_fail(world.everyone, error, f"{files.path} cannot be read")
    _refuse(files.path, differences, world, model)
    source = Source(files, chosen, {**shapes, _HEAD: shapes[_EMBEDDING]})
    try:
        if _HEAD in chosen and model.config.tied and _EMBEDDING in entries:
            _check_tie(files.path, entries[_EMBEDDING], source)
    except Exception as caught:
        error = caught
    agree_or_fail(world.everyone, error, f"{files.path} cannot be read")
    return source


def _head_of_tied(model: Any, files: Files, names: Names, shapes: Mapping[str, tuple[int, ...]]) -> list[Piece] | None:
    """The projection to the vocabulary, where files have it although it is the embedding's table."""
    if not model.config.tied:
        return None
    pieces = names(_HEAD, shapes[_EMBEDDING])[0]
    return pieces if files.find(pieces[0].name) else None


def _shapes_of_all(entries: Mapping[str, Entry], world: World) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of all parameters, in one order on every rank; stages of a pipeline have some each."""
    mine = {name: entry.shape for name, entry in entries.items()}
    if world.mesh.pp == 1:
        return mine
    everybody = gather_json({name: list(shape) for name, shape in mine.items()}, world.everyone, "pretrained names")
    return {name: tuple(shape) for of_rank in everybody for name, shape in of_rank.items()}


def _refuse(path: Path, mine: list[Difference], world: World, model: Any) -> None:
    everybody = gather_json([list(row) for row in mine], world.everyone, "pretrained differences")
    rows = list(dict.fromkeys(Difference(*row) for of_rank in everybody for row in of_rank))
    if not rows:
        return
    advice = []
    if any(row[:2] == ("missing", _HEAD) for row in rows):
        advice.append(
            "There is no lm_head.weight, so the output projection is the embedding's table: pass tied=True, or set "
            "tie_word_embeddings to true in config.json"
        )
    if sum(row.what == "missing" for row in rows) > len(rows) // 3:
        advice.append(f"Are these files of a {model.FAMILY.architecture}?")
    raise PretrainedError(table(str(path), rows, advice))


def _check_tie(path: Path, entry: Entry, source: Source) -> None:
    """Check that a projection which is said to be the embedding's table has its values; each rank looks at what it stores."""
    head, embedding = entry.read_from(source, _HEAD), entry.read_from(source, _EMBEDDING)
    if not np.array_equal(head.view(np.uint8), embedding.view(np.uint8)):
        raise PretrainedError(
            f"{path} has an lm_head.weight that is not the embedding's table, and config.json says tie_word_embeddings: pass "
            "tied=False to use it, or remove it"
        )


def write_pretrained(model: Any, folder: str | Path, source: Path | None, max_shard_size: int | str) -> list[Path]:
    """Write the parameters of a model, plain or spread, as Hugging Face has them; rank 0 writes, a piece of a tensor at a time.

    Args:
        model: a `CausalLM`.
        folder: made if it is not there; a model in it is replaced when the new one is complete.
        source: a folder to take what lies beside the weights from.
        max_shard_size: of a file, bytes or like `5GB`.

    Returns:
        The files with weights, on rank 0.

    Raises:
        CheckpointError: the model has adapters, or they cannot be written; on every rank.
    """
    world, path, entries = current_world(), Path(folder).expanduser(), model_entries(model)
    _refuse_adapters(model, world, path)
    tensors = Whole(entries, world)
    error: BaseException | None = None
    target: Target | None = None
    config: dict[str, Any] = {}
    files: list[Path] = []
    try:
        config = config_json(model.FAMILY, model.config, source)
        if world.everyone.rank == 0:
            target = Target(path, tensors.described, model.FAMILY.pieces, max_shard_size)
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    try:
        agree_or_fail(world.everyone, error, f"{path} cannot be written")
        for name in tensors.described:
            for start, values in tensors.pieces(name):
                if target is not None and error is None:  # the other ranks expect every gather, written or not
                    try:
                        target.write(name, start, values)
                    except Exception as caught:
                        error = caught
    except BaseException:  # e.g. another rank is gone
        if target is not None:
            target.discard()
        raise
    if target is not None:
        try:
            if error is None:
                files = target.commit()
                write_beside(path, config, source)
        except Exception as caught:
            error = caught
        if error is not None:
            target.discard()
    agree_or_fail(world.everyone, error, f"{path} cannot be written")
    return files


def _refuse_adapters(model: Any, world: World, path: Path) -> None:
    """Nobody would read the files of a plain model with adapters in them."""
    adapted = next(iter(adapters_of(model)), None)
    text = (
        f"{path} was not written: {adapted} has an adapter, which a model's files do not hold; call merge_lora first, or write the "
        "adapters alone with save_adapters"
    )
    agree_or_fail(world.everyone, None if adapted is None else CheckpointError(text), f"{path} was not written")


def prove(model: Any, again: Any, folder: str | Path) -> None:
    """Check that two models, on the same ranks, have the same logits for one prompt.

    Raises:
        PretrainedError: they have not, or one cannot be computed here; on every rank.
    """
    error: BaseException | None = None
    a = b = np.zeros(0)
    try:
        a, b = _logits(model), _logits(again)
    except Exception as caught:  # MindSpore's, of an operation that does not take the type, for example
        said = next((line.strip() for line in str(caught).splitlines() if any(map(str.isalpha, line))), type(caught).__name__)
        error = PretrainedError(
            f"{folder} was written, and not proven: the model cannot be computed here ({said}); proven=False leaves that out"
        )
    agree_or_fail(current_world().everyone, error, f"{folder} was written, and not proven")
    close = _CLOSE.get(model.config.dtype, 2e-2) * float(np.abs(a).max(initial=0.0))
    same_bits = np.array_equal(a, b, equal_nan=True)
    if not same_bits and not np.allclose(a, b, rtol=0.0, atol=close):
        raise PretrainedError(
            f"{folder} was written, but what it holds is another model: logits of a prompt differ by {np.abs(a - b).max()}. Do not "
            "use it, and report this"
        )


def _logits(model: nn.Cell) -> np.ndarray:
    config: Any = model.config
    length = min(_PROMPT, getattr(config, "max_positions", _PROMPT))
    ids = ((np.arange(length, dtype=np.int64) * 7919 + 1) % config.vocab_size).astype(np.int32)
    with evaluating(model), no_grad():
        return host_array(model(from_host(ids[None])).astype(ms.float32))
