"""The tensors of a model or of its training: what this rank stores of each, and whether a file fits."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterable, Mapping, Protocol, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from bmtrain_ms_base.layout import Box, Layout

from ..compat.runtime import from_host, numpy_dtype, overwrite
from ..zero import DistributedParameter
from .boxes import extents
from .errors import CheckpointError
from .format import TYPE_NAMES

GRADIENT = "gradient."  # what names of accumulated gradients begin with

# What is there: name -> (shape, MindSpore dtype)
Described = Mapping[str, tuple[tuple[int, ...], Any]]


class Readable(Protocol):
    """Where values come from; see `ShardedReader`."""

    def read(self, name: str, box: Box, out: np.ndarray) -> Any:
        """Write a box of the whole tensor to `out`."""

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray) -> Any:
        """Write elements [start, stop) of the flattened whole tensor to `out`."""


@dataclass(frozen=True)
class Entry:
    """A tensor to save or load.

    Attributes:
        dtype: of MindSpore.
        get: what this rank stores: its flat shard, or the whole tensor (replicated).
        set: takes what `get` gives.
        layout: where the shard lies in the whole tensor; None: replicated on every rank.
        of_model: False: of an optimizer, or a gradient.
    """

    dtype: Any
    get: Callable[[], Tensor]
    set: Callable[[Tensor], None]
    layout: Layout | None
    of_model: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self.get().shape) if self.layout is None else self.layout.whole

    @property
    def count(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def read_from(self, source: Readable, name: str) -> np.ndarray:
        """What `get` gives, read from a tensor called `name` of this shape, and converted to this dtype."""
        layout = self.layout or Layout(self.shape)
        out = np.zeros(layout.length, numpy_dtype(self.dtype))
        if layout.local == layout.whole:
            start, stop = layout.owned
            source.read_flat(name, start, stop, out[: stop - start])
        else:
            for piece, box in layout.boxes():
                source.read(name, box, out[piece].reshape(extents(box)))
        return out if self.layout is not None else out.reshape(self.shape)


@dataclass(frozen=True)
class LoadResult:
    """What did not match: names `missing` in the file, `unexpected` ones in it, and which were `converted` from what to what."""

    missing: list[str]
    unexpected: list[str]
    converted: list[str] = field(default_factory=list)


def model_entries(model: nn.Cell) -> dict[str, Entry]:
    """Every parameter of a model, tied ones once, and its persistent buffers."""
    if not isinstance(model, nn.Cell):
        raise TypeError(f"the model comes first, then the path: {type(model).__name__} is no Cell")
    entries = {}
    for p in model.get_parameters():
        if p.name in entries:
            raise CheckpointError(f"two parameters are called {p.name}; call model.check_names_and_refresh_name()")
        entries[p.name] = sharded_entry(p) if isinstance(p, DistributedParameter) else _replicated_entry(p)
    for name, tensor in _persistent_buffers(model):
        if name in entries:
            raise CheckpointError(f"a parameter is called {name}, as a buffer of the model is; rename it")
        entries[name] = replace(companion_entry(None, tensor), of_model=True)
    return entries


def _persistent_buffers(model: nn.Cell) -> list[tuple[str, Tensor]]:
    """The buffers of `register_buffer`, which MindSpore has since 2.7; what older ones call buffers are Parameters."""
    if not hasattr(model, "named_buffers"):
        return []
    persistent = set(model.state_dict())
    return [(name, tensor) for name, tensor in model.named_buffers() if name in persistent]


def sharded_entry(p: DistributedParameter) -> Entry:
    """A parameter's entry."""
    return Entry(p.dtype, lambda: p, p.set_shard, p.layout)


def companion_entry(p: DistributedParameter | None, tensor: Tensor) -> Entry:
    """The entry of a tensor that is sharded as `p` is (a moment, a master), or the same on every rank; written in place."""
    layout = None if p is None else p.layout
    return Entry(tensor.dtype, lambda: tensor, lambda values: overwrite(tensor, values), layout, of_model=False)


def _replicated_entry(p: Parameter) -> Entry:
    return Entry(p.dtype, lambda: p, lambda full: p.set_data(full), None)


def named_now(model: nn.Cell, there: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint -> name here, of tensors that earlier releases called otherwise: parameters, and what is kept for them.

    A model says so by a method `earlier_name`: name of a parameter now -> in files of earlier releases.
    """
    now, found = _parameters_by_earlier_name(model), {}
    for name in there:
        parts = name.split(".", 3)
        of_optimizer = parts[0] == "optimizer" and len(parts) == 4  # optimizer.0.exp_avg.NAME
        kind = ".".join(parts[:3]) + "." if of_optimizer else GRADIENT if name.startswith(GRADIENT) else ""
        own = name[len(kind) :]
        if now.get(own, own) != own:
            found[name] = kind + now[own]
    return found


def state_named_now(model: nn.Cell, state: Any) -> Any:
    """A copy of the JSON beside the tensors, with the names that parameters have now in its lists of `names`."""
    now = _parameters_by_earlier_name(model)

    def renamed(x: Any) -> Any:
        if isinstance(x, list):
            return [renamed(item) for item in x]
        if not isinstance(x, dict):
            return x
        return {
            key: [now.get(name, name) if isinstance(name, str) else name for name in value]
            if key == "names" and isinstance(value, list)
            else renamed(value)
            for key, value in x.items()
        }

    return renamed(state) if now else state


def _parameters_by_earlier_name(model: nn.Cell) -> dict[str, str]:
    if not hasattr(model, "earlier_name"):
        return {}
    names = [p.name for p in model.get_parameters()]
    return {model.earlier_name(name): name for name in names if model.earlier_name(name) != name}


def apply_entries(entries: Mapping[str, Entry], source: Readable, names: Mapping[str, str] | None = None) -> None:
    """Fill every entry with what this rank stores of it; `names`: what it is called in the source, if it is not its name."""
    for name, entry in entries.items():
        entry.set(from_host(entry.read_from(source, name if names is None else names[name])))


def compare(there: Described, entries: Mapping[str, Entry], strict: bool, what: str, where: str = "the file") -> LoadResult:
    """What does not match; `there` is in the file, which messages call `where`.

    Raises:
        CheckpointError: shapes differ, or (strict) names, or types that hold other values: floats, integers, truth values.
    """
    result = LoadResult([name for name in entries if name not in there], [name for name in there if name not in entries])
    shapes, kinds = [], []
    for name, entry in entries.items():
        shape, dtype = there.get(name, (entry.shape, entry.dtype))
        if shape != entry.shape:
            shapes.append(f"{name}: {shape} in {where}, {entry.shape} here")
        if dtype != entry.dtype:
            result.converted.append(f"{name}: {dtype} in {where}, {entry.dtype} here")
            if _kind(dtype) != _kind(entry.dtype):
                kinds.append(result.converted[-1])
    problems = []
    if strict and kinds:
        problems.append(f"{len(kinds)} types differ: " + _first(kinds))
    if shapes:
        problems.append(f"{len(shapes)} shapes differ: " + _first(shapes))
    if strict and result.missing:
        problems.append(f"{len(result.missing)} missing in {where}: " + _first(_with_hints(result.missing, result.unexpected)))
    if strict and result.unexpected:
        problems.append(f"{len(result.unexpected)} unexpected in {where}: " + _first(result.unexpected))
    if problems:
        raise CheckpointError(f"{what} does not fit the model; " + "; ".join(problems))
    return result


def _kind(dtype: Any) -> str:
    """`f` for floats, `i` for integers, `b` for truth values."""
    kind = TYPE_NAMES.get(dtype, "?").lstrip("B")[:1]
    return {"F": "f", "I": "i", "U": "i"}.get(kind, "b")


def _with_hints(names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    hints = [difflib.get_close_matches(name, candidates, 1) for name in names[:10]]
    return [f"{name} (did you mean {hint[0]}?)" if hint else name for name, hint in zip(names, hints)] + list(names[10:])


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")
