"""`bmtrain-ms generate`: texts of a model in a folder of Hugging Face's, or a conversation with it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

from .options import Commands, not_negative, number_from, path, positive, seed, some_text, utf8


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms generate` understands."""
    parser = commands.add_parser("generate", help="continue texts with a model, or talk to it")
    parser.add_argument("--model", type=path, required=True, help="folder of Hugging Face's: config.json, weights, tokenizer")
    parser.add_argument("--adapters", type=path, help="folder of PEFT's, whose adapters are added")
    parser.add_argument("--prompt", type=utf8, action="append", help="a text to continue; several times for several")
    parser.add_argument("--chat", action="store_true", help="answer line by line, with the tokenizer's chat template")
    parser.add_argument("--system", type=utf8, help="what a conversation is told first")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--temperature", type=number_from(0), default=0.0, help="0, the default, takes the most likely token")
    parser.add_argument("--top-k", type=not_negative, default=0, help="only so many of the most likely tokens (default: all)")
    parser.add_argument(
        "--top-p", type=number_from(0, 1, above=True), default=1.0, help="only the most likely tokens that have this probability"
    )
    parser.add_argument(
        "--min-p", type=number_from(0, 1), default=0.0, help="only tokens this many times as likely as the most likely one"
    )
    parser.add_argument(
        "--repetition-penalty", type=number_from(0, above=True), default=1.0, help="above 1: what was said is less likely"
    )
    parser.add_argument("--beams", type=positive, default=1, help="search for the most likely text with so many at once")
    parser.add_argument(
        "--stop", type=some_text, action="append", default=[], help="a text that ends the answer; several times for several"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="to compute in (default: the files')")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        CheckpointError: the model or the adapters cannot be read.
        DataError: the tokenizer or its chat template cannot be read, or a setting is out of range.
    """
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    from bmtrain_ms_base.data.extras import DataError
    from bmtrain_ms_base.data.tokenizing import load_tokenizer, read_config

    _check(arguments)
    tokenizer = load_tokenizer(str(arguments.model), special=arguments.chat)
    template = _template(arguments.model, read_config(str(arguments.model))) if arguments.chat else None
    ends = _ends(arguments.model, tokenizer)
    prompts = [(text, _ids(tokenizer, text)) for text in arguments.prompt or ()]
    import bmtrain_ms as bms
    from bmtrain_ms import model_center

    bms.init_distributed()
    writer = None
    try:
        model = model_center.from_pretrained(arguments.model, dtype=arguments.dtype)
        if arguments.adapters is not None:
            model_center.load_adapters(model, arguments.adapters)
        writer = _Writer(model, tokenizer, ends, arguments)
        for i, (text, ids) in enumerate(prompts):
            writer.answer(ids, text if i == 0 else f"\n{text}")
        if template is not None:
            _talk(writer, template, tokenizer, arguments.system)
    except (ValueError, FloatingPointError) as error:
        if writer is not None:
            writer.end_line()
        raise DataError(str(error)) from error
    finally:
        bms.shutdown()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before MindSpore is started."""
    from bmtrain_ms_base.data.extras import DataError

    if (arguments.prompt is not None) == arguments.chat:
        raise DataError("give either --prompt TEXT, or --chat")
    if arguments.system is not None and not arguments.chat:
        raise DataError("--system is for --chat")
    if arguments.beams > 1 and arguments.temperature:
        raise DataError(
            f"--beams {arguments.beams} takes the most likely text: leave the temperature at 0, not {arguments.temperature:g}"
        )
    kinds = (
        ("--model", arguments.model, "config.json", "one of Hugging Face's: config.json, weights, tokenizer"),
        (
            "--adapters",
            arguments.adapters,
            "adapter_config.json",
            "one that bmtrain-ms finetune with a section lora, or PEFT, wrote",
        ),
    )
    for option, folder, file, what in kinds:
        if folder is not None and not folder.is_dir():
            raise DataError(f"{option} {folder}: there is no such folder; give {what}")
        if folder is not None and not (folder / file).is_file():
            raise DataError(f"{option} {folder}: the folder has no {file}; give {what}")


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt."""
    from bmtrain_ms_base.data.extras import DataError

    found = tokenizer.encode([text])[0]
    if not found:
        raise DataError("an empty prompt has no tokens to continue: write something, or use a tokenizer that begins texts")
    return found


class _Writer:
    """Answers on standard output, as they come."""

    def __init__(self, model: Any, tokenizer: Any, ends: list[int], arguments: argparse.Namespace):
        from bmtrain_ms.model_center.generation import stop_strings

        self._model, self._tokenizer, self._arguments = model, tokenizer, arguments
        self._open = False
        self._told: dict[str, Any] = {
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "min_p": arguments.min_p,
            "repetition_penalty": arguments.repetition_penalty,
            "num_beams": arguments.beams,
            "eos_id": ends,
            "seed": arguments.seed,
            "stop": stop_strings(tokenizer.decode, arguments.stop) if arguments.stop else None,
        }

    def show(self, text: str) -> None:
        """Write without ending the line."""
        sys.stdout.write(text)
        sys.stdout.flush()
        self._open = not text.endswith("\n") if text else self._open

    def end_line(self) -> None:
        """End a line that has been begun: an error comes on one of its own."""
        if self._open:
            self.show("\n")

    def answer(self, ids: list[int], front: str = "") -> str:
        """What follows on the tokens; shown token by token, but for beams. `front` is shown first, when the model has answered."""
        from bmtrain_ms.model_center.generation import generate

        seen: list[int] = []
        shown = ""

        def show(tokens: Any) -> None:
            nonlocal shown
            if not seen:
                self.show(front)
            seen.append(int(tokens[0]))
            text = self._tokenizer.decode(seen)
            if text.startswith(shown) and not text.endswith("\ufffd"):  # a character may take several tokens
                self.show(text[len(shown) :])
                shown = text

        live = None if self._arguments.beams > 1 else show
        new = generate(self._model, [ids], self._arguments.max_new_tokens, on_token=live, **self._told)[0]
        text = self._tokenizer.decode(new)
        self.show("" if seen else front)
        self.show(text[len(shown) :] + "\n" if text.startswith(shown) else "\n")
        return text


def _talk(writer: _Writer, template: Any, tokenizer: Any, system: str | None) -> None:
    """A line is what the user says; an empty one, or the end of input, ends the conversation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode([text])[0]  # noqa: E731
    if hasattr(tokenizer, "encode_with_offsets"):  # without tokens around: the template writes them
        encode = lambda text: tokenizer.encode_with_offsets([text])[0][0]  # noqa: E731
    for line in _lines(writer):
        messages.append({"role": "user", "content": line})
        answer = writer.answer(encode(template.text(messages, prompt=True)))
        messages.append({"role": "assistant", "content": answer})


def _lines(writer: _Writer) -> Iterator[str]:
    from bmtrain_ms_base.data.extras import DataError

    while True:
        if sys.stdin.isatty():
            writer.show("> ")
        try:
            line = sys.stdin.readline()
            line.encode()  # where the locale is not UTF-8, bytes come as they are
        except UnicodeError:
            raise DataError("a line of the conversation must be UTF-8") from None
        if not line.strip():
            return
        yield line.rstrip("\n")


def _template(folder: Path, config: dict[str, Any]) -> Any:
    from bmtrain_ms_base.data.chat import load_template

    advice = "--chat needs one, as tokenizer_config.json's chat_template or a file chat_template.jinja; --prompt does without"
    return load_template(None, str(folder), config, advice)


def _ends(folder: Path, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the model's files, and by the tokenizer's."""
    from bmtrain_ms_base.data.extras import DataError

    for file in (folder / "generation_config.json", folder / "config.json"):
        if not file.is_file():
            continue
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        if not isinstance(given, dict):
            raise DataError(f"{file} is damaged: it is not an object")
        found = given.get("eos_token_id")
        if found is not None:
            ends = found if isinstance(found, list) else [found]
            if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
                raise DataError(f"{file}: eos_token_id must be a token's number, or a list of some, not {found!r}")
            return ends
    return [] if tokenizer.end is None else [tokenizer.end]
