"""Conversations: how rows hold them, how a chat template makes a text of one, and which of it a model is to learn."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import xxhash

from .extras import DataError, needed
from .rows import MISSING, Problem

Messages = list[dict[str, Any]]

ALPACA_KEYS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
        "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
        "{% else %}### Response:\n{{ message.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}


def of_alpaca(values: Mapping[str, Any]) -> Messages | Problem:
    """A row with an instruction, perhaps an input, a response, and perhaps a system's text and what was said before.

    Args:
        values: by the names that `ALPACA_KEYS` has; what the row lacks is `MISSING`.
    """
    messages: Messages = []
    system = values["system"]
    if system not in (MISSING, None, ""):
        messages.append({"role": "system", "content": system})
    history = values["history"]
    for pair in [] if history in (MISSING, None) else history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return Problem("not-text", "history is not made of pairs")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    for name in ("prompt", "response"):
        if values[name] in (MISSING, None):
            return Problem("missing", f"no {name}")
    parts = [values["prompt"], *([] if values["query"] in (MISSING, None, "") else [values["query"]])]
    if not all(isinstance(part, str) for part in parts):
        return Problem("not-text", "the prompt is no text")
    messages.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    messages.append({"role": "assistant", "content": values["response"]})
    return checked(messages)


def of_messages(turns: Any) -> Messages | Problem:
    """A list of turns, as OpenAI's `messages` (role, content) or ShareGPT's `conversations` (from, value) are."""
    if turns in (MISSING, None):
        return Problem("missing", "no conversation")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Problem("not-text", "a conversation is a list of turns")
    messages: Messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        rest = {key: value for key, value in turn.items() if key not in ("role", "from", "value") and value is not None}
        messages.append({**rest, "role": _ROLES.get(role, role), "content": turn.get("content", turn.get("value"))})
    return checked(messages)


def checked(messages: Messages) -> Messages | Problem:
    """The messages, if they are texts and an assistant says something."""
    for i, message in enumerate(messages):
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            return Problem("not-text", f"turn {i + 1} has no role or no text")
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            return Problem("invalid", f"turn {i + 1} is not UTF-8")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        return Problem("empty", "no assistant says anything")
    return messages


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and the spans (begin, end) of it that are to be learnt, in characters."""

    text: str
    spans: Sequence[tuple[int, int]]


class ChatTemplate:
    """A chat template of Hugging Face's, run in jinja2's sandbox.

    What is learnt of a conversation are the assistant's turns, with the token that closes each, and without what the template
    writes in front of it when it asks for an answer. A turn that is rendered otherwise once others follow is not learnt.

    Args:
        text: the template.
        tokens: `bos_token` and what else it asks for.

    Attributes:
        digest: of the template, and of the tokens that it asks for.

    Raises:
        DataError: it is none.
        MissingLibraryError: jinja2 is not installed.
    """

    def __init__(self, text: str, tokens: Mapping[str, Any]):
        jinja2 = needed("jinja2.sandbox", "a chat template")
        self._errors = needed("jinja2", "a chat template").TemplateError
        environment = jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = self._refuse
        # marks of what an assistant says, which some templates have; turns are found without
        plain = text
        for mark in ("{% generation %}", "{%- generation %}", "{%- generation -%}", "{% endgeneration %}", "{%- endgeneration %}"):
            plain = plain.replace(mark, "")
        try:
            self._template = environment.from_string(plain)
        except self._errors as error:
            raise DataError(f"the chat template cannot be read: {error}") from error
        self._tokens = {"bos_token": "", "eos_token": "", **{k: v for k, v in tokens.items() if isinstance(v, str)}}
        asked = needed("jinja2.meta", "a chat template").find_undeclared_variables(environment.parse(plain))
        used = {name: self._tokens[name] for name in sorted(asked & self._tokens.keys())}
        self.digest = xxhash.xxh3_128_hexdigest(json.dumps([text, used]).encode())

    def _refuse(self, message: str) -> None:
        raise self._errors(message)

    def text(self, messages: Messages, prompt: bool = False) -> str:
        """The text of a conversation; `prompt`: up to where the assistant's answer begins.

        Raises:
            DataError: the template refuses it.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **self._tokens)
        except Exception as error:  # a template is somebody's program
            raise DataError(f"the chat template refuses it: {error}") from error

    def render(self, messages: Messages) -> Rendered | Problem:
        """The text, and what of it is to be learnt."""
        try:
            whole = self.text(messages)
            spans = []
            for i, message in enumerate(messages):
                if message["role"] == "assistant" and message["content"]:
                    before, with_it = self.text(messages[:i], prompt=True), self.text(messages[: i + 1])
                    if whole.startswith(with_it) and with_it.startswith(before):
                        spans.append((len(before), len(before) + len(with_it[len(before) :].rstrip())))
        except DataError as error:
            return Problem("broken", str(error))
        if not any(begin < end for begin, end in spans):
            return Problem("broken", "nothing of it would be learnt with this chat template")
        return Rendered(whole, spans)


_ADVICE = f"--prompt-type takes {', '.join(TEMPLATES)}, or a file"


def load_template(choice: str | None, folder: str, config: Mapping[str, Any], advice: str = "") -> ChatTemplate:
    """The chat template that was chosen, or that of a tokenizer's folder.

    Args:
        choice: one of `TEMPLATES`, or a file; None: the folder's.
        folder: of the tokenizer.
        config: of its `tokenizer_config.json`.
        advice: what to do where there is none, if that is not the option `--prompt-type`.

    Raises:
        DataError: there is none.
    """
    if choice in TEMPLATES:
        return ChatTemplate(TEMPLATES[choice], config)
    path = choice or os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return ChatTemplate(file.read(), config)
    found = config.get("chat_template")
    if isinstance(found, list):
        default = (entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default")
        found = next((entry.get("template") for entry in default), None)
    if choice is not None or not isinstance(found, str):
        what = f"there is no chat template {choice}" if choice else f"the tokenizer in {folder} has no chat template"
        raise DataError(f"{what}: {advice or _ADVICE}")
    return ChatTemplate(found, config)
