"""Nested arguments and results as flat lists of leaves."""

from __future__ import annotations

import copy
from typing import Any, Callable, Iterator

Rebuild = Callable[[Iterator[Any]], Any]


def flatten(tree: Any) -> tuple[list[Any], Rebuild]:
    """Take tuples, lists, named tuples and dicts apart, at any depth; everything else is a leaf.

    Returns:
        The leaves, and a function that makes the same structure from an iterator over as many leaves.
    """
    make: Callable[[list], Any]
    if isinstance(tree, dict):
        keys, held = list(tree), list(tree.values())
        make = lambda values: _refilled(tree, zip(keys, values))  # noqa: E731
    elif isinstance(tree, (tuple, list)):  # a subclass, as a ParameterTuple, may take no list of what it holds
        held = list(tree)
        make = (lambda values: type(tree)(*values)) if hasattr(tree, "_fields") else tuple if isinstance(tree, tuple) else list
    else:
        return [tree], next
    if not any(isinstance(value, (dict, tuple, list)) for value in held):
        return held, lambda leaves: make([next(leaves) for _ in held])
    parts = [flatten(value) for value in held]
    leaves = [leaf for part, _ in parts for leaf in part]
    rebuilds = [rebuild for _, rebuild in parts]
    return leaves, lambda leaves: make([rebuild(leaves) for rebuild in rebuilds])


def _refilled(like: dict, items: Iterator[tuple[Any, Any]]) -> dict:
    """A dict of the same kind, e.g. with the same default factory."""
    made = copy.copy(like)
    made.clear()
    made.update(items)
    return made
