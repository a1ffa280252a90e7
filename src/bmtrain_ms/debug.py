"""A place to put values while debugging, and to find them again (BMTrain: `debug`)."""

from __future__ import annotations

from typing import Any, Iterable

from mindspore import Tensor

from .compat.runtime import from_host, host_array

_values: dict[str, Any] = {}


def set(key: str, value: Any) -> None:
    """Keep a value; of a tensor a copy in host memory, without its history."""
    _values[key] = _copied(value)


def get(key: str, default: Any = None) -> Any:
    """What was kept, or `default`."""
    return _values.get(key, default)


def append(key: str, value: Any) -> None:
    """Add a value to a list, made at first use."""
    _list(key).append(_copied(value))


def extend(key: str, values: Iterable[Any]) -> None:
    """Add several values to a list, made at first use."""
    _list(key).extend(_copied(value) for value in values)


def clear(key: str | None = None) -> None:
    """Forget one value, or all."""
    if key is None:
        _values.clear()
    else:
        _values.pop(key, None)


def _list(key: str) -> list[Any]:
    kept = _values.setdefault(key, [])
    if not isinstance(kept, list):
        raise TypeError(f"debug value {key!r} is a {type(kept).__name__}, not a list; clear it first")
    return kept


def _copied(value: Any) -> Any:
    return from_host(host_array(value).copy()) if isinstance(value, Tensor) else value
