"""Parameters that parts of a model share, where the parts are on different ranks of a pipeline: they would be untied."""

from __future__ import annotations

from typing import Iterable, Iterator, NamedTuple, Sequence

from mindspore import Parameter, nn

from ..compat.cells import child_table, parameter_table


class Part(NamedTuple):
    """A part of a model: what messages call it, which rank of the pipeline has it (None: all), and its parameters with names."""

    name: str
    rank: int | None
    parameters: Iterable[tuple[str, Parameter]]


def refuse_shared(parts: Sequence[Part], remedy: str) -> None:
    """Raise ValueError where parts on different ranks have a parameter in common: each would train one of its own."""
    seen: dict[int, tuple[Part, str]] = {}
    for part in parts:
        for path, p in part.parameters:
            first, name = seen.setdefault(id(p), (part, path))
            if first.rank != part.rank:
                raise ValueError(
                    f"{first.name}, on {_where(first)} of the pipeline, and {part.name}, on {_where(part)}, share the parameter "
                    f"{name}, and ranks of a pipeline share none between layers: {remedy}"
                )


def outside(cell: nn.Cell, known: Sequence[nn.Cell | None], path: str = "") -> Iterator[tuple[str, Parameter]]:
    """The parameters of a cell, with their paths, without those of the known cells."""
    for name, p in parameter_table(cell).items():
        if p is not None:
            yield path + name, p
    for name, child in child_table(cell).items():
        if child is not None and not any(child is other for other in known):
            yield from outside(child, known, f"{path}{name}.")


def _where(part: Part) -> str:
    return "all ranks" if part.rank is None else f"rank {part.rank}"
