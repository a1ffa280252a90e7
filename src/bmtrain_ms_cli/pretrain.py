"""`bmtrain-ms pretrain` and `finetune`: a run as its settings say, from text to a model in Hugging Face's files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Iterator

from bmtrain_ms_base.shortening import shortened

from .launch import LaunchError, launch
from .options import FOLDERS_HELP, REHEARSE_HELP, Commands, folders, positive
from .places import wrong_places

_RANK = "BMTRAIN_MS_RUN"  # what the launcher tells its ranks: settings and tokenizer, as JSON


def add(commands: Commands, name: str = "pretrain") -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms pretrain` understands."""
    what = "a model from random values" if name == "pretrain" else "a model of Hugging Face's on, or adapters of it"
    parser = commands.add_parser(
        name,
        help=f"train {what}, as a file of settings says",
        description=f"Train {what}. The same command goes on where a run in the same folder ended. Settings are in sections; what "
        "is said here counts more than the file. docs/training.md lists them.",
        allow_unknown=True,
    )
    parser.add_argument("config", nargs="?", help="a TOML or YAML file")
    parser.add_argument("--ranks", type=positive, help="as --layout.ranks: processes on this host (under a launcher: its own)")
    parser.add_argument("--hosts", type=lambda text: text.split(","), default=[], help="run on these, as bmtrain-ms launch does")
    parser.add_argument("--folders", type=folders, default=[], help=FOLDERS_HELP)
    parser.add_argument("--other-data", action="store_true", help="go on although the data are others than before")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from this one: a step, or a folder (default: the latest)")
    parser.add_argument("--rehearse", action="store_true", help=REHEARSE_HELP)
    parser.add_argument("--print", dest="shown", action="store_true", help="only check the settings, and print all of them")
    parser.add_argument("--schema", action="store_true", help="only print a JSON Schema of the file, for editors")
    parser.add_argument("--section.key=value", dest="none", nargs="?", metavar="", help="any setting, as --train.steps=1000")
    return parser


def run(arguments: argparse.Namespace, tuning: bool = False) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        LaunchError: settings are wrong, or ranks cannot be started.
        LauncherError: see `detect`.
        DataError: data cannot be made of text.
    """
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    if _RANK in os.environ:
        return _be_a_rank()
    try:
        from bmtrain_ms_base.config import ConfigError, read_settings, schema, to_toml
    except ImportError as error:
        raise LaunchError(f"settings need {error.name}: pip install 'bmtrain-ms[train]'") from error
    from bmtrain_ms_base.launchers import detect

    if arguments.schema:
        from bmtrain_ms.train.parts import size_schemas

        print(json.dumps(schema(size_schemas()), indent=2))
        return 0
    launched = detect()
    started = launched.size if launched.kind != "none" else 0
    try:
        config = None if arguments.config is None else os.path.abspath(arguments.config)
        with _in_folder(arguments.folders):
            settings = read_settings(config, _overrides(arguments), started, tuning)
            _check_out(settings)
            _check_model(settings)
            arguments.resume = _checked_beginning(settings, arguments.resume, bool(started))
    except ConfigError as error:
        lines = str(error).splitlines()
        if launched.rank:
            return 2  # rank 0 says it
        raise LaunchError("\n  ".join(lines if len(lines) == 1 else [f"{len(lines)} settings are wrong:", *lines])) from error
    if arguments.shown:
        print(to_toml(settings), end="")
        return 0
    if settings.data.text and (started > 1 or arguments.hosts or arguments.folders):
        if launched.rank:
            return 2
        raise LaunchError(
            "data.text is prepared by who starts the ranks, for one host: run bmtrain-ms prepare before, on each, and name the "
            "result in data.files"
        )
    with _alone(settings):
        return _start(arguments, *_with_data(settings), bool(started))


def _start(arguments: argparse.Namespace, settings: Any, tokenizer: str | None, started: bool) -> int:
    """Be a rank, or start ranks and wait for them."""
    told = {
        "settings": settings.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "other_data": arguments.other_data,
        "resume": arguments.resume,
    }
    if started:
        os.environ[_RANK] = json.dumps(told)
        return _be_a_rank()
    sys.stdout.flush()
    variables = {_RANK: json.dumps(told)}
    script = [str(Path(__file__).with_name("__main__.py")), "pretrain"]
    where = {"hosts": arguments.hosts, "folders": arguments.folders, "rehearse": arguments.rehearse}
    return launch(script, settings.layout.ranks or 1, variables=variables, **where)


@contextlib.contextmanager
def _in_folder(folders: list[str]) -> Iterator[None]:
    """Look for files where the first host does."""
    here = os.getcwd()
    try:
        if folders and os.path.isdir(folders[0]):
            os.chdir(folders[0])
        yield
    finally:
        os.chdir(here)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    found = [] if arguments.ranks is None else [f"layout.ranks={arguments.ranks}"]
    for word in arguments.unknown:
        if not word.startswith("--") or "=" not in word:
            raise LaunchError(f"{shortened(word)}: settings are written --section.key=value, as --train.steps=1000")
        found.append(word[2:])
    return found


@contextlib.contextmanager
def _alone(settings: Any) -> Iterator[None]:
    """Keep others from making data of text in the same folder until ranks, of which the first has another lock, have ended."""
    if not settings.data.text:
        yield
        return
    from bmtrain_ms.checkpoint.folder import FolderLock
    from bmtrain_ms_base.data.extras import DataError

    out = Path(settings.out).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(out, ".launcher.lock")
    except OSError as error:
        raise DataError(str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _check_out(settings: Any) -> None:
    """Refuse places that cannot be written."""
    from bmtrain_ms_base.config import ConfigError

    wrong = wrong_places(settings)
    if wrong:
        raise ConfigError(wrong)


def _checked_beginning(settings: Any, resume: str | None, started: bool) -> str | None:
    """Refuse the folder of a run that began otherwise; returns the path of the checkpoint to go on from, if one is named.

    `started`: by a launcher; then ranks look, when the first of them has the folder for itself.
    """
    from bmtrain_ms.train.begun import begun_otherwise, named_checkpoint
    from bmtrain_ms_base.config import ConfigError

    named = None if resume is None else str(named_checkpoint(settings, resume))
    otherwise = "" if started else begun_otherwise(settings, named)
    if otherwise:
        raise ConfigError(otherwise)
    return named


def _check_model(settings: Any) -> None:
    """Sizes of a family, which MindSpore's side knows."""
    from bmtrain_ms.train.parts import model_problems
    from bmtrain_ms_base.config import ConfigError

    found = model_problems(settings)
    if found:
        raise ConfigError("\n".join(found))


def _with_data(settings: Any) -> tuple[Any, str | None]:
    """Settings whose text has become files of tokens, and the tokenizer."""
    data, tokenizer = settings.data, settings.tokenizer.path or settings.model.pretrained
    if not data.text:
        return settings, tokenizer
    from bmtrain_ms_base.data.extras import DataError
    from bmtrain_ms_base.data.run_data import RunText, run_data

    from .prepare import Shown

    text = RunText(data.text, data.key, data.handler, data.template, tokenizer, settings.tokenizer.train, data.length, data.workers)
    try:
        with Shown(None) as shown:
            tokenizer, prefix = run_data(Path(settings.out).expanduser(), text, print, shown.show)
    except OSError as error:
        raise DataError(str(error)) from error
    ready = {"text": [], "handler": None, "template": None, **({"rows": prefix} if data.handler else {"files": [prefix]})}
    made = settings.tokenizer.model_copy(update={"path": tokenizer, "train": None})
    return settings.model_copy(update={"data": data.model_copy(update=ready), "tokenizer": made}), tokenizer


def _be_a_rank() -> int:
    from bmtrain_ms.train.job import run_job
    from bmtrain_ms_base.config import Settings

    told = json.loads(os.environ.pop(_RANK))
    return run_job(Settings.model_validate(told["settings"]), told["tokenizer"], told["other_data"], told["resume"])
