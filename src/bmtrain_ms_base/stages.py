"""Which layers a pipeline stage holds."""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn, Sequence

from .checks import number, whole

_LONGEST = 100_000  # letters of a layout with all its repetitions


class Stage(NamedTuple):
    """What one stage holds: the embedding or not, layers first to last - 1, the head with the loss or not."""

    embedding: bool
    first: int
    last: int
    head: bool

    @property
    def layers(self) -> range:
        """The numbers of its layers."""
        return range(self.first, self.last)


def divide(layers: int, p: int, v: int = 1, layout: str | Sequence[int] | None = None) -> list[Stage]:
    """What each of the p * v stages holds; stage s is chunk s // p of rank s % p, see [Note: schedules].

    Args:
        layers: how many there are.
        p, v: ranks of the pipeline, and chunks of each.
        layout: None: as BMTrain has it (`PipelineTransformerBlockList.get_part_len_by_stage_id`), the first layers % (p * v)
            stages have one layer more. A list: so many layers in each stage; the embedding is in the first and the head in the last
            one. A text as Megatron-LM's `--pipeline-model-parallel-layout` has it, such as `Et*3|(tt|)*29,t|L`: `E` embedding, `t`
            layer, `L` head and loss, `|` next stage, `*n` so often what is before it, a letter or a `(...)`; commas and blanks mean
            nothing. List and text may have empty stages.

    Raises:
        ValueError: a layout of another number of stages or layers, or one that cannot be read, and where.
    """
    layers, stages = whole("layers", layers, 0), whole("p", p, 1) * whole("v", v, 1)
    if layout is None:
        if layers < stages:
            raise ValueError(
                f"{layers} layers do not fill p * v = {p} * {v} = {stages} stages; take fewer, or say in a layout which are empty"
            )
        counts = [layers // stages + (s < layers % stages) for s in range(stages)]
    elif isinstance(layout, str):
        counts = [cell.count("t") for cell in _expanded(layout).split("|")]
    else:
        counts = [whole("layers of a stage", count, 0) for count in layout]
    if len(counts) != stages:
        raise ValueError(f"the layout has {len(counts)} stages, but p * v = {p} * {v} = {stages}")
    if sum(counts) != layers:
        raise ValueError(f"the layout has {sum(counts)} layers, but the model has {layers}")
    ends = [sum(counts[:s]) for s in range(stages + 1)]
    return [Stage(s == 0, ends[s], ends[s + 1], s == stages - 1) for s in range(stages)]


def costs(stages: Sequence[Stage], layer: float = 1.0, embedding: float = 0.0, head: float = 0.0) -> list[float]:
    """The time of each stage, for `simulate`, from that of a layer, of the embedding, and of the head with the loss.

    For a token a head takes about 2 * vocabulary * dim multiplications and additions, a layer about 24 * dim ** 2: with
    vocabulary / dim = 75 a head takes as long as 6 layers.
    """
    layer, embedding, head = number("layer", layer), number("embedding", embedding), number("head", head)
    return [len(s.layers) * layer + s.embedding * embedding + s.head * head for s in stages]


def _expanded(layout: str) -> str:
    """A layout's letters and bars with all repetitions written out: `E`, then `t` and `|`, then `L`."""

    def refuse(what: str, at: int) -> NoReturn:
        raise ValueError(f"the layout {layout!r} {what} at position {at + 1}")

    groups: list[list[str]] = [[]]  # what is open: the layout, and each `(` in it; the last piece is what `*` repeats
    opened: list[int] = []
    at = 0
    while at < len(layout):
        letter, index = layout[at], at
        at += 1
        if letter in "EtL|":
            groups[-1].append(letter)
        elif letter == "(":
            groups.append([])
            opened.append(index)
        elif letter == ")":
            if not opened:
                refuse("closes what is not open", index)
            opened.pop()
            piece = "".join(groups.pop())
            groups[-1].append(piece)
        elif letter == "*":
            times = re.match(r"\s*([0-9]+)", layout[at:])
            if times is None or not groups[-1]:
                refuse("repeats nothing, or has no number of times after the `*`", index)
            count = int(times[1][:9])
            if len(groups[-1][-1]) * count > _LONGEST:
                refuse(f"has more than {_LONGEST} letters", index)
            groups[-1][-1] *= count
            at += times.end()
        elif letter == "m":
            refuse("has `m`: multi-token prediction does not exist here yet, leave it out; it is", index)
        elif letter != "," and not letter.isspace():
            refuse(f"has {letter!r}, which is none of E t L | ( ) * and numbers after a `*`,", index)
    if opened:
        refuse("does not close the `(`", opened[-1])
    found = "".join(groups[0])
    for letter, place, what in (("E", 0, "first, the embedding"), ("L", -1, "last, the head and the loss")):
        if found.count(letter) != 1 or found[place] != letter:
            raise ValueError(
                f"the layout {layout!r} has {found.count(letter)} of {letter!r}; it must have one, and that must come {what}"
            )
    return found
