"""Open files that hold a lock: it goes with the process that took it, and forked children have no part in it."""

from __future__ import annotations

import os

_held: set[int] = set()


def hold(file: int) -> None:
    """Close this file in forked children: one that outlives its parent would keep the lock."""
    _held.add(file)


def let_go(file: int) -> None:
    """Close it; does nothing the second time, and in a forked child, which has closed it."""
    if file in _held:
        _held.discard(file)
        os.close(file)


def _close_in_child() -> None:
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
