"""BMTrain's names that do not exist here say what to use instead."""

from __future__ import annotations

from typing import Any, Callable, Mapping


def absent(module: str, advice: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`: an AttributeError, with advice for those names."""

    def missing(name: str) -> Any:
        raise AttributeError(f"module {module!r} has no attribute {name!r}" + (f": {advice[name]}" if name in advice else ""))

    return missing
