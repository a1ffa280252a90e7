"""`bmtrain-ms tokenizer`: a tokenizer of one's own."""

from __future__ import annotations

import argparse

from .options import Commands, path, positive


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms tokenizer` understands."""
    parser = commands.add_parser(
        "tokenizer",
        help="train a tokenizer on text",
        description="Train a byte-level BPE tokenizer, and write a folder as Hugging Face's, with the chat template chatml.",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, folders, or names on a hub: hf:owner/name"
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="columns with text (default text)")
    parser.add_argument("--vocab-size", type=positive, default=32000, metavar="N", help="how many tokens (default 32000)")
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        DataError: there is no text, or a file cannot be read or written.
    """
    from bmtrain_ms_base.data.extras import DataError
    from bmtrain_ms_base.data.new_tokenizer import train_folder
    from bmtrain_ms_base.data.tokenizing import load_tokenizer

    if arguments.vocab_size < 260:
        raise DataError(f"--vocab-size {arguments.vocab_size}: 256 bytes and 3 special tokens need 259; take more")
    try:
        folder = train_folder(arguments.input, arguments.vocab_size, arguments.output, arguments.json_keys)
    except OSError as error:
        raise DataError(str(error)) from error
    print(f"{folder}: {load_tokenizer(str(folder)).vocab_size:,} tokens")
    return 0
