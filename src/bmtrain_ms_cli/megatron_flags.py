"""`bmtrain-ms megatron-flags`: a Megatron-LM or ModelLink script as a file of settings for `bmtrain-ms pretrain`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .launch import LaunchError
from .options import Commands, path


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms megatron-flags` understands."""
    parser = commands.add_parser(
        "megatron-flags",
        help="make a file of settings of the flags of a Megatron-LM or ModelLink script",
        description="Make a TOML file for bmtrain-ms pretrain of a script's flags, or of flags after --. Nothing of the script "
        "is run. "
        "What has no meaning here, and what is not quite the same, is told on stderr; what is not computed here is an error.",
    )
    parser.add_argument("words", nargs="*", metavar="script | -- flags", help="a shell script; or -- and the flags themselves")
    parser.add_argument("--output", type=path, help="the file to write (default: stdout); one that is there is not overwritten")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the script; may be repeated"
    )
    parser.add_argument("--family", help="of the model, where flags do not tell it: llama, qwen2, mixtral ...")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        LaunchError: the script cannot be read, or its flags cannot be taken over.
    """
    try:
        import tomli_w

        from bmtrain_ms_base.config.megatron import MegatronError, settings_of_flags, settings_of_script
    except ImportError as error:
        raise LaunchError(f"settings need {error.name}: pip install 'bmtrain-ms[train]'") from error
    words, values = arguments.words, _values(arguments.set)
    if not words:
        raise LaunchError("megatron-flags: give a script, or flags after --")
    try:
        if any(word.startswith("--") for word in words):
            if values:
                raise LaunchError("--set: is of variables of a script, and flags are given themselves: leave it out")
            made = settings_of_flags(words, arguments.family)
        elif len(words) > 1:
            raise LaunchError(f"{' '.join(words)}: give one script, or flags after --")
        else:
            made = settings_of_script(_script(words[0]), values, arguments.family)
    except MegatronError as error:
        lines = str(error).splitlines()
        raise LaunchError("\n  ".join(lines if len(lines) == 1 else [f"{len(lines)} flags are wrong:", *lines])) from error
    text = f"# Run it with bmtrain-ms {'finetune' if made.tuning else 'pretrain'}.\n" + tomli_w.dumps(made.settings)
    for note in made.notes:
        sys.stderr.write(f"{note}\n")
    if arguments.output is None:
        sys.stdout.write(text)
        return 0
    try:
        with arguments.output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise LaunchError(f"--output {arguments.output}: is there already; name another, or remove it") from error
    except OSError as error:
        raise LaunchError(f"--output {arguments.output}: cannot be written: {error}") from error
    return 0


def _script(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{name} cannot be read: {error}") from error


def _values(given: list[str]) -> dict[str, str]:
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not (name.isidentifier() or name.isdigit()):
            raise LaunchError(f"--set {text}: write NAME=VALUE, as --set TP=4")
        values[name] = value
    return values
