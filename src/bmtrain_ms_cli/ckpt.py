"""`bmtrain-ms ckpt`: looking at checkpoints and rewriting them."""

from __future__ import annotations

import argparse
import os

from .options import Commands, path, positive


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms ckpt` understands."""
    parser = commands.add_parser("ckpt", help="look at checkpoints, check and rewrite them")
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.add_argument("path", type=path, help="a checkpoint, a folder of them or a run's (the latest), or safetensors files")
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
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        CheckpointError: a checkpoint is damaged, or cannot be written.
    """
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    from bmtrain_ms.checkpoint import CheckpointError, tools

    try:
        if arguments.action == "inspect":
            print(tools.inspect(arguments.path))
        elif arguments.action == "verify":
            print(tools.verify(arguments.path))
        elif arguments.action == "consolidate":
            for path in tools.consolidate(arguments.path, arguments.out, arguments.max_shard_size, arguments.everything):
                print(path)
        elif arguments.action == "reshard":
            print(tools.reshard(arguments.path, arguments.out, arguments.ranks))
        else:
            lines = tools.diff(arguments.path, arguments.other)
            print("\n".join(lines) or "no difference")
            return 1 if lines else 0
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return 0
