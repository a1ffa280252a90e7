"""Places that a run will write, looked at before it starts: some are needed only when all of the training is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator

_FOLDERS = ("model", "adapters", "checkpoints", "best", "tensorboard")  # that a run makes in its own
_OPENED = (".lock", "log.jsonl", "loss.png")  # written where they are
_REPLACED = ("config.toml",)  # by a rename
_FILES = (".json", ".jsonl", ".safetensors", ".model", ".txt", ".jinja", ".py")  # how names of a model's files end


def wrong_places(settings: Any) -> str:
    """What keeps a run from writing one of its places, in a line; empty: nothing does."""
    return next(_wrong(settings), "")


def _wrong(settings: Any) -> Iterator[str]:
    out = Path(settings.out).expanduser()
    if os.path.lexists(out) and not os.path.isdir(out):
        yield f"out: {settings.out} is not a folder: name one, it is made if it is not there"
    base = nearest(out)
    if not takes_files(base):
        yield f"out: {base} is not a folder that can be written to: name another place, or let it be written"
    for text in (text for text in settings.data.text if not text.startswith("hf:")):
        folder = os.path.expanduser(text)
        if os.path.isdir(folder) and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            yield f"out: {settings.out} is in the folder {text} of data.text, and would be read as text: choose another"
    for path in (out / name for name in _FOLDERS):
        if os.path.lexists(path) and not os.path.isdir(path):
            yield f"out: {path} is in the way: a run has a folder of that name; move it, or name another out"
    yield from _in_out(settings, out)
    if settings.log.trace is not None:
        yield from _of_trace(Path(settings.log.trace).expanduser().absolute())


def nearest(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))


def takes_files(folder: Path) -> bool:
    """Whether it is a folder, and files can be made in it."""
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _in_out(settings: Any, out: Path) -> Iterator[str]:
    """What is there already, of another run or an earlier part of this one."""
    lora, save = settings.lora is not None, settings.save
    written = {
        "checkpoints": True,
        "best": save.best,
        "adapters": lora,
        "model": save.export and not lora,
        "tensorboard": settings.log.tensorboard,
        "tokenizer": bool(settings.data.text and settings.tokenizer.train),
        "data": bool(settings.data.text),
    }
    for folder in (out / name for name, is_written in written.items() if is_written):
        if os.path.isdir(folder) and not takes_files(folder):
            yield f"out: {folder} cannot be written to: let it be written, or name another out"
    files = [out / name for name in (*_OPENED, *_REPLACED)]
    files += [out / name / file for name in ("checkpoints", "best") if written[name] for file in (".lock", "latest")]
    files += [path for name in ("model", "adapters") if written[name] for path in _named_as_files(out / name)]
    for path in (path for path in files if os.path.lexists(path)):
        if not os.path.isfile(path):
            yield f"out: {path} is in the way: a run writes a file of that name; move it, or name another out"
        elif path.name in _OPENED and not os.access(path, os.W_OK):
            yield f"out: {path} cannot be written to: let it be written, or name another out"


def _named_as_files(folder: Path) -> list[Path]:
    if not (os.path.isdir(folder) and os.access(folder, os.R_OK)):
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in _FILES)


def _of_trace(trace: Path) -> Iterator[str]:
    if not takes_files(trace.parent):
        yield f"log.trace: {trace.parent} is not a folder that can be written to: make it, or name another place"
    if os.path.lexists(trace) and not (os.path.isfile(trace) and os.access(trace, os.W_OK)):
        yield f"log.trace: {trace} is not a file that can be written: name another"
