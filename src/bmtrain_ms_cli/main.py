"""`bmtrain-ms`: each command is a file with `add`, what its command line understands, and `run`, which does it."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, Sequence

from bmtrain_ms_base import board as boards
from bmtrain_ms_base import system
from bmtrain_ms_base.launchers import LauncherError
from bmtrain_ms_base.shortening import shortened

from . import ckpt, convert, data, demo, finetune, generate, launch, megatron_flags, prepare, pretrain, tokenizer
from .options import Parser
from .terminal import (
    EXIT_INTERRUPTED,
    EXIT_UNREAD,
    OutputError,
    own_output,
    say_interrupted,
    unbroken_imports,
    write_what_cannot_be_encoded,
)

_COMMANDS = {
    "launch": launch,
    "demo": demo,
    "ckpt": ckpt,
    "convert": convert,
    "pretrain": pretrain,
    "finetune": finetune,
    "megatron-flags": megatron_flags,
    "tokenizer": tokenizer,
    "prepare": prepare,
    "data": data,
    "generate": generate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit code."""
    system.open_streams()
    write_what_cannot_be_encoded()
    with unbroken_imports():
        try:
            with own_output():
                return _run(argv)
        except OutputError as error:
            if error.unread:
                return EXIT_UNREAD
            sys.stderr.write(f"bmtrain-ms: {error}\n")
            return 2
        except KeyboardInterrupt:
            say_interrupted()
            return EXIT_INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="bmtrain-ms", description="Train large language models with ZeRO on MindSpore.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in _COMMANDS.values():
        command.add(commands)
    arguments = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _say
        try:
            return _COMMANDS[arguments.command].run(arguments)
        except MemoryError as error:
            sys.stderr.write(f"bmtrain-ms: memory has no room for what was asked for. {error}\n")
            return 2
        except _user_errors() as error:
            sys.stderr.write(f"bmtrain-ms: {error}\n")
            return 2
        except (OSError, RuntimeError) as error:
            told = _of_the_system(error)
            if told is None or boards.ADDRESS in os.environ:  # of a rank, where it happened says more
                raise
            sys.stderr.write(f"bmtrain-ms: {told}\n")
            return 2


_show = warnings.showwarning


def _say(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
    """Write a warning that is for the user as errors are written, without a line of source."""
    if issubclass(category, UserWarning):
        sys.stderr.write(f"bmtrain-ms: {message}\n")
    else:
        _show(message, category, *where, **how)


def _of_the_system(error: OSError | RuntimeError) -> str | None:
    """What the system has against a path, wherever it was looked at; None: it is no such error."""
    if not isinstance(error, OSError):  # of pathlib
        return str(error) if str(error).startswith(("Could not determine home", "Symlink loop")) else None
    if error.filename is None:
        try:
            os.getcwd()
        except FileNotFoundError:
            return "the folder in which the command was started is not there any more: go to another"
        return str(error)
    return f"{shortened(os.fsdecode(error.filename))}: {error.strerror or error}"


def _user_errors() -> tuple[type[BaseException], ...]:
    homes = {"bmtrain_ms.checkpoint": "CheckpointError", "bmtrain_ms_base.data.extras": "DataError"}
    loaded = {name: sys.modules.get(name) for name in homes}  # only what has been imported can have raised
    kinds = [getattr(module, homes[name]) for name, module in loaded.items() if module is not None]
    return launch.LaunchError, LauncherError, *kinds
