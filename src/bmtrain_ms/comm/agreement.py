"""What the ranks of an engine decide, count or tell each other together: small collectives, in few lines at the call."""

from __future__ import annotations

import json
from typing import Any, Sequence

import numpy as np

from ..compat.runtime import from_host, host_array
from .engine import Engine


class SharedError(RuntimeError):
    """An error of one rank that is raised on all of them.

    Attributes:
        speaker: the rank whose text says most, and which alone needs to show it.
    """

    speaker = 0


def agree(engine: Engine, error: BaseException | None, what: str, kind: type[SharedError] = SharedError) -> None:
    """Raise on all ranks if one has an error; where it is one of `kind` itself, as it is. `what`: failed, for the others' text."""
    flags = host_array(engine.all_gather([from_host(np.array([error is not None], np.float32))], label="agree").wait()[0])
    if not flags.any():
        return
    ranks = np.flatnonzero(flags).tolist()
    told = kind(f"{what}: rank(s) {ranks} failed; see their messages" if error is None else f"{what}: {error}")
    raised = error if isinstance(error, kind) else told
    raised.speaker = ranks[0]
    raise raised from (None if raised is error else error)


def any_rank(engine: Engine, mine: bool, label: str) -> bool:
    """Whether it is true on some rank; the same answer on every one."""
    return bool(reduce_numbers(engine, [mine], label, op="max")[0])


def all_ranks(engine: Engine, mine: bool, label: str) -> bool:
    """Whether it is true on every rank; the same answer on every one."""
    return bool(reduce_numbers(engine, [mine], label, op="min")[0])


def reduce_numbers(
    engine: Engine, mine: Sequence[float] | np.ndarray, label: str, dtype: Any = np.float32, op: str = "sum"
) -> np.ndarray:
    """Each number's sum over the ranks, or its `max`, `min`, `mean`; as `dtype`."""
    with np.errstate(over="ignore"):  # inf, as a sum in float32 has it
        numbers = np.array(mine, dtype)
    return host_array(engine.all_reduce([from_host(numbers)], op, label).wait()[0])


def gather_json(value: Any, engine: Engine, label: str) -> list[Any]:
    """Every rank's value, which JSON can hold, by rank."""
    return [json.loads(text) for text in all_gather_bytes(engine, json.dumps(value).encode(), label)]


def all_gather_bytes(engine: Engine, data: bytes, label: str = "") -> list[bytes]:
    """Every rank's bytes, however many they are, by rank."""
    lengths = host_array(engine.all_gather([from_host(np.array([len(data)], np.int64))], label=label).wait()[0])
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = host_array(engine.all_gather([from_host(padded)], label=label).wait()[0]).reshape(engine.size, -1)
    return [row[:n].tobytes() for row, n in zip(rows, lengths)]
