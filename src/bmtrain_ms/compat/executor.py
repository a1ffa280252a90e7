"""MindSpore's PyNative executor: where it lives, and the few of its methods that are used."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Iterator

try:  # since 2.9 the old module warns on import
    from mindspore.graph import api as _api
except ImportError:  # 2.5
    from mindspore.common import api as _api

PyNativeExecutor = _api._PyNativeExecutor
executor = _api._pynative_executor
no_grad = _api._no_grad
JitExecutor = getattr(_api, "_JitExecutor", None) or _api._MindsporeFunctionExecutor  # 2.5
GRAD_TAKES_HAS_AUX = "has_aux" in inspect.signature(PyNativeExecutor.grad).parameters

# the error of a gradient that is taken inside of another one
NESTED = (
    "a gradient was taken inside of a function that is being differentiated (a gradient penalty, an adversarial example), through "
    "a Block, a sharded parameter or another operation of bmtrain_ms, whose derivatives have no derivative. Take the inner "
    "gradient first, in a call of its own, and pass its result as an argument; where gradients must flow through it, build that "
    "network of plain MindSpore Cells, without bmtrain_ms, on every rank"
)


@dataclass
class UnderWay:
    """What `compat.autograd` counts of what is going on in this process.

    Attributes:
        depth: backward passes; recomputation nests them.
        forwards: recorded forward passes of `value_and_grad`.
        joins: backward passes that are made of several.
        set_aside: functions that run unrecorded because their derivative is ours, or is recorded later.
        younger: whether the function whose backward pass it is has younger ones.
        hookable: contexts that want hooks on outputs of `custom_op`.
        closed: contexts in which no gradient may be taken.
    """

    depth: int = 0
    forwards: int = 0
    joins: int = 0
    set_aside: int = 0
    younger: bool = False
    hookable: int = 0
    closed: int = 0


under_way = UnderWay()


def recording() -> bool:
    """Whether operations executed now are recorded for a backward pass."""
    return executor.grad_flag() and executor.enable_grad()


def finish() -> None:
    """Wait until the operations that were issued have run, which MindSpore may hand to threads of its own (0.7 µs on CPU)."""
    executor.sync()


def differentiated() -> bool:
    """Whether what is executed now belongs to a pass whose gradient is taken, recorded now or later or in a way of ours; not so in
    evaluation and generation."""
    return under_way.set_aside > 0 or recording()


def inside_pass() -> bool:
    """Whether what is executed now is inside of a pass whose gradient is taken, also if it has none itself, under `no_grad`."""
    return under_way.forwards > 0 or differentiated()


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Run what is differentiated later without recording it: it is to be run again, recorded, for its gradient."""
    under_way.set_aside += 1
    try:
        with no_grad():
            yield
    finally:
        under_way.set_aside -= 1


@contextlib.contextmanager
def hookable() -> Iterator[None]:
    """Let `Tensor.register_hook` work on outputs of `custom_op` too, at the cost of a copy of each; on 2.5 it would be ignored."""
    under_way.hookable += 1
    try:
        yield
    finally:
        under_way.hookable -= 1
