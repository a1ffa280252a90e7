"""`bmtrain-ms prepare`: text to indexed files of tokens, with the flags of Megatron's and ModelLink's `preprocess_data.py`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Callable

from .options import Commands, positive

_KINDS = {  # by the names that others use
    "auto": "auto",
    "PretrainedFromHF": "auto",
    "HuggingFaceTokenizer": "auto",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "TikTokenizer": "tiktoken",
    "GPT2BPETokenizer": "gpt2",
    "NullTokenizer": "null",
}
_HANDLERS = {
    "GeneralPretrainHandler": None,
    "AlpacaStyleInstructionHandler": "alpaca",
    "SharegptStyleInstructionHandler": "sharegpt",
    "OpenAIStyleInstructionHandler": "openai",
}
_NOT_HERE = {
    "--partitions": "all workers write at the same time anyway; leave it out",
    "--n-subs": "all workers write at the same time anyway; leave it out",
    "--split-sentences": "a column that holds a list of texts becomes a document of that many sequences; split it before",
    "--keep-sequential-samples": "the order is always kept; leave it out",
    "--streaming": "files are always read a piece at a time; leave it out",
    "--overwrite-cache": "nothing is cached; --restart throws away what an interrupted run has left",
}


class _NotHere(argparse.Action):
    """A flag of others' that is not needed here, and says why."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.error(f"{option_string} is not known here: {_NOT_HERE[str(option_string)]}")


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms prepare` understands."""
    parser = commands.add_parser(
        "prepare",
        help="turn text into files of tokens",
        description="Turn text into Megatron's indexed files, PREFIX_KEY_document.bin and .idx. The result does not depend on the "
        "number of workers. What an interrupted run has done is not done again.",
    )
    say = parser.add_argument
    say(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, or names on a hub: hf:owner/name[@revision][:pattern]",
    )
    say("--output-prefix", required=True, metavar="PREFIX", help="of the files that are made")
    say("--json-keys", nargs="+", default=["text"], metavar="KEY", help="columns; each becomes a pair of files (default text)")
    say("--tokenizer-type", choices=_KINDS, default="auto", help="default: by the files that there are")
    say("--tokenizer-name-or-path", "--tokenizer-model", dest="tokenizer", metavar="PATH", help="folder, file or hf:owner/name")
    say("--vocab-file", default=None, metavar="FILE", help="GPT-2's vocab.json")
    say("--merge-file", default=None, metavar="FILE", help="GPT-2's merges.txt")
    say("--vocab-size", type=positive, default=None, metavar="N", help="of the NullTokenizer, whose texts are numbers")
    say("--tiktoken-pattern", default=None, metavar="NAME", help="gpt2, cl100k, llama3 or qwen, where the file's name does not say")
    say("--append-eod", action="store_true", help="the token that ends a document behind each")
    say("--eod-token", default=None, metavar="TOKEN", help="which it is, where the tokenizer does not say")
    say("--parse-special-tokens", action="store_true", help="special tokens that a text spells are special; else they are text")
    say("--workers", type=positive, default=1, metavar="N", help="processes (default 1)")
    say("--skip", nargs="+", default=["empty", "long"], metavar="KIND", help="rows to leave out and count: broken, missing, "
        "not-text, invalid, empty, long; or all; or none (default empty long); others are errors")  # fmt: skip
    say("--handler-name", choices=_HANDLERS, default="GeneralPretrainHandler", help="rows are texts (default), or conversations")
    say("--prompt-type", default=None, metavar="NAME", help="chatml, alpaca, or a file (default: the tokenizer's chat template)")
    say("--map-keys", type=_json, default={}, metavar="JSON", help="columns of conversations, "
        'e.g. {"prompt": "instruction", "query": "input", "response": "output"}; {"turns": "messages"}')  # fmt: skip
    say("--seq-length", type=positive, default=None, metavar="N", help="longest conversation, and a row's length with --pack")
    say("--pack", action="store_true", help="several conversations in a row, which do not see each other")
    say("--log-interval", type=positive, default=None, metavar="N", help="a line every N documents, instead of a progress bar")
    say("--overwrite", action="store_true", help="replace files that are there")
    say("--restart", action="store_true", help="throw away what an interrupted run has left")
    for name in _NOT_HERE:
        say(name, action=_NotHere, nargs="?", help=argparse.SUPPRESS)
    return parser


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from None


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        DataError: see `prepare`; or a file cannot be read or written.
    """
    from bmtrain_ms_base.data.extras import DataError
    from bmtrain_ms_base.data.prepare import PrepareOptions, describe_wrong, prepare
    from bmtrain_ms_base.data.rows import PROBLEMS

    skip = (
        {"all": list(PROBLEMS), "none": []}.get(arguments.skip[0], arguments.skip) if len(arguments.skip) == 1 else arguments.skip
    )
    options = PrepareOptions(
        inputs=arguments.input,
        prefix=arguments.output_prefix,
        tokenizer=_tokenizer(arguments),
        keys=arguments.json_keys,
        instructions=_instructions(arguments),
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        skip=skip,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
    )
    with Shown(arguments.log_interval) as shown:
        try:
            result = prepare(options, shown.show)
        except OSError as error:
            raise DataError(str(error)) from error
    for path in result.left_out:
        print(f"left out, as it is of no kind that can be read: {path}")
    if result.wrong:
        print(f"rows: {describe_wrong(result.wrong)}")
    for name, tokens in zip(result.names, result.tokens):
        print(f"{name}: {result.documents:,} documents, {tokens:,} tokens")
    return 0


def _tokenizer(arguments: argparse.Namespace) -> dict[str, Any]:
    from bmtrain_ms_base.data.extras import DataError

    kind = _KINDS[arguments.tokenizer_type]
    path = {"null": str(arguments.vocab_size or ""), "gpt2": arguments.vocab_file}.get(kind) or arguments.tokenizer
    if path is None:
        need = {"null": "--vocab-size", "gpt2": "--vocab-file and --merge-file"}.get(kind, "--tokenizer-name-or-path")
        raise DataError(f"which tokenizer? {arguments.tokenizer_type} needs {need}")
    return {
        "path": path,
        "kind": kind,
        "special": arguments.parse_special_tokens,
        "merges": arguments.merge_file,
        "pattern": arguments.tiktoken_pattern,
        "end": arguments.eod_token,
    }


def _instructions(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from bmtrain_ms_base.data.extras import DataError

    kind = _HANDLERS[arguments.handler_name]
    if kind is None:
        given = {"--pack": arguments.pack, "--seq-length": arguments.seq_length, "--prompt-type": arguments.prompt_type}
        asked = [name for name, value in {**given, "--map-keys": arguments.map_keys}.items() if value]
        if asked:
            raise DataError(f"{', '.join(asked)} is for conversations: name their --handler-name, {', '.join(list(_HANDLERS)[1:])}")
        return None
    if arguments.seq_length is None:
        raise DataError("conversations need --seq-length, the longest that is kept")
    if arguments.append_eod:
        raise DataError("a conversation ends as its chat template says; leave --append-eod out")
    keys = arguments.map_keys if isinstance(arguments.map_keys, dict) else {}
    known = ["prompt", "query", "response", "system", "history"] if kind == "alpaca" else ["turns"]
    if any(name not in known or not isinstance(value, str) for name, value in keys.items()) or keys != arguments.map_keys:
        raise DataError(f"--map-keys is an object of JSON with some of {', '.join(known)}, and columns for them")
    length = arguments.seq_length
    return {"kind": kind, "keys": keys, "template": arguments.prompt_type, "length": length, "pack": arguments.pack}


class Shown:
    """A progress bar, or lines of a log."""

    def __init__(self, every: int | None):
        self._every, self._next, self._began = every, every or 0, time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Any) -> None:
        """How far it is."""
        rate = (progress.tokens - progress.resumed) / max(time.monotonic() - self._began, 1e-9)
        if self._every is not None:
            if progress.documents >= self._next:  # it may have come past several
                self._next = (progress.documents // self._every + 1) * self._every
                sys.stderr.write(f"{progress.documents:,} documents, {progress.tokens:,} tokens, {rate:,.0f} tokens/s\n")
            return
        if self._bar is None:
            from tqdm import tqdm

            make: Callable[..., Any] = tqdm
            self._bar = make(total=progress.total, desc="prepare", unit="B", unit_scale=True, mininterval=0.5)
        self._bar.n = progress.bytes
        self._bar.set_postfix_str(
            f"{progress.documents:,} documents, {progress.tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False
        )
        self._bar.update(0)
