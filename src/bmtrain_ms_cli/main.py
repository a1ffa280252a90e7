"""Argument parsing; each command lives in its own module and is imported when it is used."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Sequence

from .options import Parser, number, path, positive, seed, whole

_EXIT_CODES = (
    "Exit code: 0 if every rank came to its end; 75 if they were told to stop, and saved; 128 + N if a rank was killed by signal "
    "N, or signal N ended the job without a save; 2 if the command line is wrong; otherwise that of the first rank that failed."
)

_REHEARSE = "run on CPU what Ascend devices would run, as far as that is possible without one: slower, for finding faults"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "launch":
            from .launch import launch

            module = ["-m"] if arguments.module else []
            script = [*module, arguments.script, *arguments.arguments]
            return launch(script, arguments.ranks, arguments.launcher, hosts=arguments.hosts, rehearse=arguments.rehearse)
        if arguments.command == "ckpt":
            from .ckpt import run

            return run(arguments)
        from .demo import DemoOptions, demo

        values = {name: value for name, value in vars(arguments).items() if name != "command"}
        return demo(DemoOptions(**values))
    except _user_errors() as error:
        sys.stderr.write(f"bmtrain-ms: {error}\n")
        return 2


def _user_errors() -> tuple[type[BaseException], ...]:
    from .launch import LaunchError

    checkpoint = sys.modules.get("bmtrain_ms.checkpoint")  # only what has been imported can have raised
    return (LaunchError, *([checkpoint.CheckpointError] if checkpoint is not None else []))


def _parser() -> Parser:
    parser = Parser(prog="bmtrain-ms", description="Train large language models with ZeRO on MindSpore.")
    commands = parser.add_subparsers(dest="command", required=True)

    _add_launch(commands)
    _add_demo(commands)
    _add_ckpt(commands.add_parser("ckpt", help="look at checkpoints, check and rewrite them"))
    return parser


def _add_launch(commands: Any) -> None:
    launch = commands.add_parser(
        "launch", help="start a script on N ranks", description="Start a script on N ranks.", epilog=_EXIT_CODES
    )
    launch.add_argument("-n", "--ranks", type=positive, required=True, help="how many processes")
    launch.add_argument(
        "--with",
        dest="launcher",
        choices=("auto", "mpi", "msrun"),
        default="auto",
        help="auto: msrun where there are Ascend devices; elsewhere ranks are started directly, without MPI",
    )
    launch.add_argument(
        "--hosts",
        type=lambda text: text.split(","),
        default=[],
        help="run on these, e.g. node1,node2, the same number of ranks on each: by mpiexec and ssh",
    )
    launch.add_argument("--rehearse", action="store_true", help=_REHEARSE)
    launch.add_argument("-m", "--module", action="store_true", help="the script is a module's name, as for python -m")
    launch.add_argument("script", help="a Python script")
    launch.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to it")


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small Llama on text",
        description="Train a BPE tokenizer and a small Llama on the help texts that every Python ships, with ZeRO-3 on CPU "
        "ranks; evaluate, save, resume, plot the loss and generate text.",
    )
    demo.add_argument("--ranks", type=positive, default=2, help="processes; results do not depend on it (default 2)")
    demo.add_argument("--steps", type=positive, default=360, help="training steps in all, resumed ones included (default 360)")
    demo.add_argument("--batch", type=positive, default=8, help="windows per step over all ranks (default 8)")
    demo.add_argument("--text", type=path, default=None, help="train on this UTF-8 file instead")
    demo.add_argument("--out", type=path, default=Path("runs/demo"), help="folder for results (default runs/demo)")
    demo.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from the latest checkpoint in --out, or from this one: a step, or a folder",
    )
    demo.add_argument("--fp16", action="store_true", help="float16 parameters with float32 masters; needs --loss-scale")
    demo.add_argument("--loss-scale", type=number, default=None, help="switch dynamic loss scaling on, from this scale")
    demo.add_argument("--zero", type=whole, choices=(2, 3), default=3, help="ZeRO level (default 3)")
    demo.add_argument("--prefetch", type=whole, default=1, help="blocks gathered ahead; 0 turns overlap off (default 1)")
    demo.add_argument(
        "--gather-dtype", choices=("float16", "bfloat16", "int8"), default=None, help="gather parameters in fewer bits"
    )
    demo.add_argument("--shard-size", type=positive, default=None, help="shard over so many ranks, replicate across the others")
    demo.add_argument("--trace", type=path, default=None, help="write what happens when to this file (chrome://tracing, Perfetto)")
    demo.add_argument("--seed", type=seed, default=0, help="of initialisation, data order and sampling (default 0)")
    demo.add_argument("--save-interval", type=positive, default=None, help="save every so many steps, in the background")
    demo.add_argument("--save-minutes", type=number, default=None, help="save every so many minutes, in the background")
    demo.add_argument("--keep-last", type=positive, default=3, help="checkpoints to keep (default 3)")
    demo.add_argument("--no-shared-storage", action="store_true", help="every host keeps what its ranks wrote")
    demo.add_argument("--rehearse", action="store_true", help=_REHEARSE)


def _add_ckpt(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.add_argument("path", type=path, help="a checkpoint, a folder of checkpoints (the latest), or safetensors files")
        return made

    action("inspect", "say what is in a checkpoint")
    action("verify", "read all of a checkpoint and check every hash")
    consolidate = action("consolidate", "write the model's tensors whole, as Hugging Face's libraries read them")
    consolidate.add_argument("out", type=path, help="folder")
    consolidate.add_argument("--max-shard-size", default="5GB", help="largest file, e.g. 200MiB (default 5GB)")
    consolidate.add_argument("--everything", action="store_true", help="optimizer states too")
    reshard = action("reshard", "write a checkpoint as another number of ranks would have")
    reshard.add_argument("out", type=path, help="the new checkpoint")
    reshard.add_argument("--ranks", type=positive, required=True, help="how many")
    diff = action("diff", "say how two checkpoints differ; ends with 1 if they do")
    diff.add_argument("other", type=path, help="the other one")
