"""Conversations to tokens, of which the prompt is masked, and several of them packed into a row."""

from __future__ import annotations

import bisect
import os
from typing import Any, Iterator, Mapping, Sequence

from . import rows
from .batch import IGNORED
from .chat import ALPACA_KEYS, Messages, load_template, of_alpaca, of_messages
from .extras import DataError, refuse_long
from .rows import Problem
from .sources import Piece
from .tokenizing import HuggingFace, load_tokenizer, read_config

KINDS = ("alpaca", "sharegpt", "openai")
OUTPUTS = ("packed_input_ids", "packed_attention_mask", "packed_labels")  # as ModelLink names them


Document = list[list[list[int]]]  # for each output the ids of each sequence


class InstructionRecipe:
    """How rows of conversations become three files: ids, which conversation of its row an id is of (0: padding), and labels.

    Args:
        tokenizer: arguments of `load_tokenizer`.
        settings: `kind`, one of `KINDS`; `keys`, columns by the names of `ALPACA_KEYS`, or `turns`; `template`, see
            `load_template`; `length`, the longest row; `pack`, put several conversations into a row.

    Raises:
        DataError: settings that do not fit, a tokenizer without offsets or without a template, rows that memory has no room for.
    """

    characters, documents = 1 << 22, 4096  # at a time: what is packed together

    def __init__(self, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]):
        made = load_tokenizer(**{**tokenizer, "special": True})  # a template spells them
        if not isinstance(made, HuggingFace):
            raise DataError(f"{tokenizer['path']}: conversations need a tokenizer.json, which says where in the text a token is")
        self._tokenizer, self._settings = made, settings
        folder = os.path.dirname(made.path)
        config = read_config(folder)
        self._template = load_template(settings["template"], folder, config)
        self._length, self._pack = settings["length"], settings["pack"]
        if self._pack:
            refuse_long(self._length)
        self._pad = next((x for x in (made.named(config.get("pad_token")), made.end) if x is not None), 0)
        if settings["kind"] == "alpaca":
            self._names = list(ALPACA_KEYS)
            self._columns = [settings["keys"].get(name, default) for name, default in ALPACA_KEYS.items()]
        else:
            self._names = ["turns"]
            default = "conversations" if settings["kind"] == "sharegpt" else "messages"
            self._columns = [settings["keys"].get("turns", default)]

    def rows(self, piece: Piece) -> Iterator[tuple[str, Messages | Problem, int]]:
        """(where it is, its messages or what is wrong, how long it is) of each row."""
        for place, values in rows.values(piece, self._columns, absent_ok=True):
            if isinstance(values, Problem):
                yield place, values, 0
                continue
            found = of_alpaca(dict(zip(self._names, values))) if len(values) > 1 else of_messages(values[0])
            yield place, found, 0 if isinstance(found, Problem) else sum(len(message["content"]) for message in found)

    def encode(self, held: Sequence[tuple[str, Messages]]) -> tuple[list[Document], list[tuple[str, Problem]]]:
        """The rows of conversations, and those that have none."""
        rendered = [(place, self._template.render(messages)) for place, messages in held]
        wrong = [(place, found) for place, found in rendered if isinstance(found, Problem)]
        texts = [(place, found) for place, found in rendered if not isinstance(found, Problem)]
        samples: list[tuple[list[int], list[int]]] = []
        for (place, found), (ids, offsets) in zip(texts, self._tokenizer.encode_with_offsets([found.text for _, found in texts])):
            labels = _labels(ids, offsets, found.spans)
            if len(ids) > self._length:
                wrong.append((place, Problem("long", f"{len(ids)} tokens, more than --seq-length {self._length}")))
            elif all(label == IGNORED for label in labels):
                wrong.append((place, Problem("broken", "no token of it would be learnt")))
            else:
                samples.append((ids, labels))
        groups = packed([len(ids) for ids, _ in samples], self._length) if self._pack else [[i] for i in range(len(samples))]
        return [self._document([samples[i] for i in group]) for group in groups], wrong

    def _document(self, samples: Sequence[tuple[list[int], list[int]]]) -> Document:
        ids = [x for sample, _ in samples for x in sample]
        mask = [number for number, (sample, _) in enumerate(samples, 1) for _ in sample]
        # the first token follows another conversation, or nothing
        labels = [x for _, sample in samples for x in [IGNORED, *sample[1:]]]
        rest = self._length - len(ids) if self._pack else 0
        return [[ids + [self._pad] * rest], [mask + [0] * rest], [labels + [IGNORED] * rest]]


def _labels(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Ids of tokens that lie in a span; a token that begins in front of it is the template's.

    Offsets of many tokenizers leave blanks out, so that a token of nothing else has no width, at its end.
    """
    found, at = [], 0
    for token, (begin, end) in zip(ids, offsets):
        while at < len(spans) and spans[at][1] < begin + (begin < end):
            at += 1
        inside = at < len(spans) and spans[at][0] + (begin == end) <= begin and end <= spans[at][1]
        found.append(token if inside else IGNORED)
    return found


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which samples share a row: the longest that is left, and then always the longest that still fits.

    Each group in the order of its samples, and groups in that of their first ones.
    """
    left = sorted((length, -i) for i, length in enumerate(lengths))
    groups = []
    while left:
        room, group = capacity, []
        while left:
            place = bisect.bisect_right(left, (room, 1)) - 1
            if place < 0:
                break
            length, number = left.pop(place)
            room -= length
            group.append(-number)
        if not group:
            raise ValueError(f"a sample of {left[0][0]} does not fit into a row of {capacity}")
        groups.append(sorted(group))
    return sorted(groups)
