"""`bmtrain-ms convert`: models' files for who wants files; `from_pretrained` and `save_pretrained` need no conversion."""

from __future__ import annotations

import argparse
import os

from .options import Commands, path

_TEXTS = {
    "hf2ms": "write a folder of Hugging Face's as bmtrain_ms.load reads it",
    "ms2hf": "write files of bmtrain_ms.save, of bmtrain_mindspore or with Megatron's names as transformers reads them",
    "recast": "write a folder of Hugging Face's with another type, or files of another size",
}


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms convert` understands."""
    parser = commands.add_parser("convert", help="rewrite models' files: other names, types and sizes")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in _TEXTS.items():
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("path", type=path, help="a folder, an index or a safetensors file")
        action.add_argument("out", type=path, help="another folder; a model that is there is replaced at the end")
        action.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of all tensors (default: as they are)")
        action.add_argument("--max-shard-size", default="5GB", help="largest file, e.g. 200MiB (default 5GB)")
        if name == "ms2hf":
            names = ("bmtrain_ms", "bmtrain_mindspore", "megatron")
            action.add_argument("--names", choices=names, default="bmtrain_ms", help="whose names there are (default bmtrain_ms)")
            action.add_argument("--config", type=path, help="folder with config.json and tokenizer, if they are not in PATH")
        else:
            action.add_argument("--pickles", action="store_true", help="read pytorch_model.bin if that is all there is")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        DataError: what is to be written is no folder, or what is read is in it.
        CheckpointError: files are missing, damaged, do not fit their config, or cannot be written.
    """
    _check_out(arguments)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    from bmtrain_ms.checkpoint import CheckpointError
    from bmtrain_ms.model_center.converting import convert

    options = {"dtype": arguments.dtype, "max_shard_size": arguments.max_shard_size}
    read, write = ("hf", "ms") if arguments.action == "hf2ms" else ("hf", "hf")
    if arguments.action == "ms2hf":
        read = "ms" if arguments.names == "bmtrain_ms" else arguments.names
        options["config"] = arguments.config
    else:
        options["pickles"] = arguments.pickles
    try:
        for written in convert(arguments.path, arguments.out, read, write, **options):
            print(written)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return 0


def _check_out(arguments: argparse.Namespace) -> None:
    """Refuse a place that cannot be written: no folder, or the one that is read, whose model would be replaced."""
    from bmtrain_ms_base.data.extras import DataError

    if arguments.out.exists() and not arguments.out.is_dir():
        raise DataError(f"{arguments.out} is not a folder: give one to write to, it is made if it is not there")
    for given in (arguments.path, getattr(arguments, "config", None)):
        if given is None:
            continue
        folder = given if given.is_dir() else given.parent
        if folder.is_dir() and arguments.out.is_dir() and os.path.samefile(folder, arguments.out):
            raise DataError(
                f"{arguments.out} is the folder that {given} is read from, and what is written would replace the model in it: "
                "give another folder to write to"
            )
