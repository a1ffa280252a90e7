"""States of Python's and NumPy's global random generators, read whole only where something has been drawn since.

Reading them costs 40 µs, which each forward pass that can be repeated would pay twice: NumPy makes an array of 624 words one by
one, Python a tuple. Their memory is compared instead, 5 KB. What lies where is learnt from generators of our own; where that does
not succeed (another Python, another kind of generator) states are read each time.
"""

from __future__ import annotations

import ctypes
import random
import struct
from typing import Any

import numpy as np

_WORDS = 4 * (624 + 1)  # bytes of a Mersenne Twister: words and position
_HEAD = object.__basicsize__  # bytes of what every Python object begins with

States = tuple[Any, Any]
_known: list[tuple[Any, States]] = []  # what was read last, and what the memory was then


def states() -> States:
    """The states of both generators; for `restore`. Two answers are the same object if nothing was drawn or seeded in between."""
    memory = _memory()
    if memory is None or not _known or _known[0][0] != memory:
        _known[:] = [(memory, (random.getstate(), np.random.get_state(legacy=False)))]
    return _known[0][1]


def restore(before: States) -> None:
    """Have both draw what they drew after `states` returned `before`."""
    random.setstate(before[0])
    np.random.set_state(before[1])


def same(a: States, b: States) -> bool:
    """Whether nothing was drawn or seeded between two answers of `states`."""
    return a is b or _equal(a, b)


def _equal(a: Any, b: Any) -> bool:
    """Nested tuples, dicts, arrays and numbers."""
    if isinstance(a, dict):
        return all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, tuple) and a and isinstance(a[-1], dict):
        return all(map(_equal, a, b))
    return a == b


def _memory() -> tuple[Any, ...] | None:
    """What the states are made of; None where it is not known where that is."""
    ours, theirs = getattr(random.getstate, "__self__", None), getattr(np.random.get_state, "__self__", None)
    bits = getattr(theirs, "_bit_generator", None)
    if _SPARE is None or type(ours) is not random.Random or type(bits) is not np.random.MT19937:
        return None
    return (
        ours.gauss_next,
        ctypes.string_at(id(ours) + _HEAD, _WORDS),
        ctypes.string_at(id(theirs) + _SPARE, 16),
        ctypes.string_at(bits.ctypes.state_address, _WORDS),
    )


def _find_spare() -> int | None:
    """Where in a `RandomState` it is that it has a normal number to spare, and which: those are made in pairs. None: not found, or
    a generator is not what we take it for."""
    number, size = 1.2345678e-77, np.random.RandomState.__basicsize__
    theirs = np.random.RandomState(0)
    theirs.set_state({**theirs.get_state(legacy=False), "has_gauss": 1, "gauss": number})
    place = ctypes.string_at(id(theirs), size).find(struct.pack("d", number)) - 8
    ours = random.Random(0)
    ours.random()
    if place < _HEAD or random.Random.__basicsize__ < _HEAD + _WORDS or not hasattr(ours, "gauss_next"):
        return None
    full = ctypes.string_at(id(theirs) + place, 4)
    theirs.standard_normal()
    empty = ctypes.string_at(id(theirs) + place, 4)
    *words, position = ours.getstate()[1]
    bits = theirs.get_state(legacy=False)["state"]
    right = (
        struct.unpack("ii", full + empty) == (1, 0)
        and ctypes.string_at(id(ours) + _HEAD, _WORDS) == struct.pack("625I", position, *words)
        and ctypes.string_at(theirs._bit_generator.ctypes.state_address, _WORDS) == struct.pack("625I", *bits["key"], bits["pos"])
    )
    return place if right else None


_SPARE = _find_spare()
