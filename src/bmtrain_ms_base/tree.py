"""Nested arguments and results as flat lists of leaves."""

from __future__ import annotations

from typing import Any, Callable, Iterator

Rebuild = Callable[[Iterator[Any]], Any]


def flatten(tree: Any) -> tuple[list[Any], Rebuild]:
    """Take tuples, lists, named tuples and dicts apart, at any depth; everything else is a leaf.

    Returns:
        The leaves, and a function that makes the same structure from an iterator over as many leaves.
    """
    if isinstance(tree, dict):
        keys, parts = list(tree), [flatten(value) for value in tree.values()]
        make: Callable[[list], Any] = lambda values: type(tree)(zip(keys, values))  # noqa: E731
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        parts = [flatten(value) for value in tree]
        make = lambda values: type(tree)(*values)  # noqa: E731
    elif isinstance(tree, (tuple, list)):
        parts = [flatten(value) for value in tree]
        make = type(tree)
    else:
        return [tree], next
    leaves = [leaf for part, _ in parts for leaf in part]
    rebuilds = [rebuild for _, rebuild in parts]
    return leaves, lambda leaves: make([rebuild(leaves) for rebuild in rebuilds])
