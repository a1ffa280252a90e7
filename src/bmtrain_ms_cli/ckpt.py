"""`bmtrain-ms ckpt`: looking at checkpoints and rewriting them."""

from __future__ import annotations

import argparse
import os


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
