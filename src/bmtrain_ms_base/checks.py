"""Arguments that are of another type than they should be, told at once and by name."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np


def whole(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int; NumPy's whole numbers are some, truth values, texts and 1.5 are none.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is less than `least`.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    if least is not None and count < least:
        raise ValueError(f"{name} must be at least {least}, not {count}")
    return count


def number(name: str, value: Any) -> float:
    """`value` as a float, maybe NaN; NumPy's numbers and tensors of one element are some, truth values and texts are none.

    Raises:
        TypeError: it is not a number.
    """
    if getattr(value, "size", 0) == 1 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if operator.gt(value, 0) else -math.inf
