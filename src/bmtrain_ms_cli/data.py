"""`bmtrain-ms data`: looking at files of tokens, checking, joining and dividing them."""

from __future__ import annotations

import argparse

from .options import Commands, number_from, positive


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms data` understands."""
    parser = commands.add_parser("data", help="look at files of tokens, check, join and divide them")
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    inspect = action("inspect", "say what a pair of .bin and .idx holds")
    inspect.add_argument("name", help="its name, without .bin or .idx")
    inspect.add_argument("--show", type=positive, default=0, metavar="N", help="print the ids of the first N sequences too")
    verify = action("verify", "read all of a pair, and check each id")
    verify.add_argument("name", help="its name, without .bin or .idx")
    verify.add_argument("--vocab-size", type=positive, default=None, help="ids are below it (default: as the file beside it says)")
    merge = action("merge", "put pairs one behind the other")
    merge.add_argument("--input", nargs="+", required=True, metavar="NAME", help="pairs in order, or folders of them, by name")
    merge.add_argument("--output-prefix", required=True, metavar="NAME", help="of the new pair, without .bin or .idx")
    split = action("split", "divide a pair's documents, in order, by their tokens")
    split.add_argument("name", help="its name, without .bin or .idx")
    split.add_argument("--parts", type=number_from(0, above=True), nargs="+", required=True, metavar="SIZE", help="e.g. 98 1 1")
    split.add_argument("--output-prefix", required=True, metavar="NAME", help="of the new pairs: NAME_0, NAME_1 ...")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        DataError: files are damaged, or cannot be read or written.
    """
    from bmtrain_ms_base.data import tools
    from bmtrain_ms_base.data.extras import DataError

    try:
        if arguments.action == "inspect":
            print(tools.inspect(arguments.name, arguments.show))
        elif arguments.action == "verify":
            print(tools.verify(arguments.name, arguments.vocab_size))
        elif arguments.action == "merge":
            print(tools.merge(arguments.input, arguments.output_prefix))
        else:
            print("\n".join(tools.split(arguments.name, arguments.output_prefix, arguments.parts)))
    except OSError as error:
        raise DataError(str(error)) from error
    return 0
