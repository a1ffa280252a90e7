"""A rehearsal of HCCL: what `HcclEngine` calls, with the signatures of the installed MindSpore, over an engine of CPU ranks.

What is kept of HCCL: results are not there before a handle was waited for; inputs must not be written until then; an operation that
is not waited for is noticed; groups have names; a sum is made in the tensors' own type, in an order of its own; only some types
can be summed. What is not: streams, memory, speed, and whatever HCCL does that its documentation does not say.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from abc import ABC, abstractmethod
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication

from ..compat.runtime import host_array, shared_array, shared_tensor
from .engine import Engine, Work
from .hccl import REDUCES, WORLD, HcclEngine

MOVES = (*REDUCES, ms.float64, ms.int16, ms.int64, ms.uint8, ms.uint16, ms.uint32, ms.uint64)  # as ops.Receive checks it


class Signed(ABC):
    """Has the functions of `mindspore.communication.comm_func`, with the signatures of the installed MindSpore: a call that does
    not bind to them is a TypeError, and a function that is not there an AttributeError."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        signature = inspect.signature(getattr(communication.comm_func, name))
        return lambda *args, **kwargs: self._call(name, signature.bind(*args, **kwargs))

    @abstractmethod
    def _call(self, name: str, bound: inspect.BoundArguments) -> Any:
        """Do what the function of that name does."""


class Handle:
    """The handle of an operation in flight."""

    def __init__(self, number: int, what: str, pending: dict[int, str], end: Callable[[], None]):
        self._number, self._pending, self._end = number, pending, end
        pending[number] = what

    def wait(self) -> None:
        """From here on the result is there; may be called again."""
        if self._pending.pop(self._number, None) is not None:
            self._end()


class RehearsedComm(Signed):
    """Stands in for `mindspore.communication.comm_func` and `create_group`.

    Attributes:
        stacks: whether gathers are (size, n, ...), as MindSpore's documentation says; its example shows (size * n, ...).
    """

    stacks = False

    def __init__(self, everyone: Engine):
        """`everyone`: moves the bytes; of CPU ranks."""
        self._groups: dict[str, tuple[Engine, list[int]]] = {WORLD: (everyone, list(range(everyone.size)))}
        self._pending: dict[int, str] = {}  # by their number
        self._numbers = itertools.count()

    def unwaited(self) -> list[str]:
        """What was issued and not waited for, e.g. `all_reduce in hccl_world_group`, oldest first."""
        return list(self._pending.values())

    def lost(self) -> list[str]:
        """What of `unwaited` somebody should have waited for: all but gathers, which are made ahead, maybe for nothing."""
        return [what for what in self.unwaited() if not what.startswith("all_gather_into_tensor")]

    def close(self) -> None:
        """End the groups' engines, that of everyone last."""
        for engine, _ in reversed(list(self._groups.values())):
            engine.close()

    def _call(self, name: str, bound: inspect.BoundArguments) -> Any:
        bound.apply_defaults()
        return getattr(self, f"_{name}")(bound.arguments)

    def create_group(self, *args: Any, **kwargs: Any) -> None:
        """Give some ranks, ascending, a name to talk under; they and nobody else call it."""
        asked = inspect.signature(communication.create_group).bind(*args, **kwargs).arguments
        name, ranks = asked["group"], asked["rank_ids"]
        if not isinstance(ranks, list):
            raise TypeError(f"the ranks of a group are a list, not a {type(ranks).__name__}")
        if name not in self._groups:
            self._groups[name] = self._groups[WORLD][0].subgroup(ranks), ranks

    def _all_gather_into_tensor(self, asked: dict[str, Any]) -> tuple[Tensor, Handle | None]:
        x, (group, _) = self._input("all_gather_into_tensor", asked, MOVES), self._group(asked)
        if not x.shape:
            raise ValueError("For all_gather_into_tensor, a scalar has no first dimension")
        out, work = self._gathered(group, x)
        shape = (group.size, *x.shape) if self.stacks else (group.size * x.shape[0], *x.shape[1:])
        return self._begun("all_gather_into_tensor", asked, shape, x, work, lambda: out)

    def _all_reduce(self, asked: dict[str, Any]) -> tuple[Tensor, Handle | None]:
        x, (group, _) = self._input("all_reduce", asked, REDUCES), self._group(asked)
        rows, work = self._gathered(group, x)
        return self._begun("all_reduce", asked, x.shape, x, work, lambda: _reduced(rows, asked["op"]))

    def _reduce_scatter_tensor(self, asked: dict[str, Any]) -> tuple[Tensor, Handle | None]:
        x, (group, _) = self._input("reduce_scatter_tensor", asked, REDUCES), self._group(asked)
        rows, work = self._gathered(group, x)
        mine = lambda: _reduced(rows.reshape(group.size, group.size, -1)[:, group.rank], asked["op"])  # noqa: E731
        return self._begun("reduce_scatter_tensor", asked, (x.shape[0] // group.size, *x.shape[1:]), x, work, mine)

    def _all_to_all_single_with_output_shape(self, asked: dict[str, Any]) -> tuple[Tensor, Handle | None]:
        name = "all_to_all_single_with_output_shape"
        x, (group, _) = self._input(name, asked, MOVES), self._group(asked)
        if asked["output_split_sizes"] or asked["input_split_sizes"]:
            raise NotImplementedError("a rehearsal exchanges equal parts only")
        rows, work = self._gathered(group, x)
        mine = lambda: rows.reshape(group.size, group.size, -1)[:, group.rank]  # noqa: E731
        return self._begun(name, asked, tuple(asked["output_shape"]), x, work, mine)

    def _broadcast(self, asked: dict[str, Any]) -> Tensor:
        x, (group, ranks) = self._input("broadcast", asked, MOVES), self._group(asked)
        rows, work = self._gathered(group, x)
        work.wait()
        return shared_tensor(rows[ranks.index(asked["src"])].reshape(x.shape).copy())

    def _isend(self, asked: dict[str, Any]) -> Handle:
        x, (group, ranks) = self._input("isend", asked, MOVES), self._group(asked)
        work = group.send([x], ranks.index(asked["dst"]), f"tag {asked['tag']}")

        def end() -> None:
            work.wait()
            _check_unwritten("isend", asked["tensor"], x)

        return self._handle("isend", asked, end)

    def _irecv(self, asked: dict[str, Any]) -> tuple[Tensor, Handle]:
        x, (group, ranks) = self._input("irecv", asked, MOVES), self._group(asked)
        work = group.recv([shared_tensor(x)], ranks.index(asked["src"]), f"tag {asked['tag']}")
        target = _garbage(x.shape, x.dtype)

        def end() -> None:
            target[...] = shared_array(work.wait()[0]).reshape(target.shape)

        return shared_tensor(target), self._handle("irecv", asked, end)

    def _barrier(self, asked: dict[str, Any]) -> None:
        self._group(asked)[0].barrier().wait()

    # Implementation #

    def _group(self, asked: dict[str, Any]) -> tuple[Engine, list[int]]:
        """The engine of the group that was asked for, and its members' ranks among everyone."""
        name = WORLD if asked["group"] is None else asked["group"]
        if name not in self._groups:
            raise RuntimeError(f"there is no group {name!r}: create_group makes it")
        return self._groups[name]

    def _handle(self, name: str, asked: dict[str, Any], end: Callable[[], None]) -> Handle:
        return Handle(next(self._numbers), f"{name} in {asked['group'] or WORLD}", self._pending, end)

    @staticmethod
    def _input(name: str, asked: dict[str, Any], types: Sequence[Any]) -> np.ndarray:
        """The values of the tensor as they are now."""
        tensor = asked["tensor"]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"For {name}, the input tensor must be tensor")
        if tensor.dtype not in types:
            raise TypeError(f"For {name}, a tensor of {tensor.dtype} is not among {', '.join(map(str, types))}")
        return np.array(host_array(tensor)).reshape(tensor.shape)

    @staticmethod
    def _gathered(group: Engine, x: np.ndarray) -> tuple[np.ndarray, Work]:
        """(size, elements), each rank's values, when the work has ended."""
        rows = np.empty((group.size, x.size), x.dtype)
        return rows, group.all_gather([x.reshape(-1)], [rows.reshape(-1)])  # type: ignore[list-item]

    def _begun(
        self, name: str, asked: dict[str, Any], shape: tuple[int, ...], x: np.ndarray, work: Work, result: Callable[[], np.ndarray]
    ) -> tuple[Tensor, Handle | None]:
        """An output that holds nothing yet, and the handle that fills it."""
        target, given = _garbage(shape, x.dtype), asked["tensor"]

        def end() -> None:
            work.wait()
            _check_unwritten(name, given, x)
            target[...] = result().reshape(target.shape)

        handle = self._handle(name, asked, end)
        if not asked["async_op"]:
            handle.wait()
        return shared_tensor(target), handle if asked["async_op"] else None


class RehearsedEngine(HcclEngine):
    """`HcclEngine` over CPU ranks, for rehearsals."""

    name = "rehearsed"

    def __init__(self, everyone: Engine):
        """`everyone`: an engine of CPU ranks, `single`, `node` or `mpi`; closed with this one."""
        self.comm = RehearsedComm(everyone)
        self._everyone = everyone
        super().__init__(WORLD, everyone.rank, everyone.size, everyone.clock, self.comm)

    @property
    def lost(self) -> BaseException | None:
        return self._everyone.lost

    def close(self) -> None:
        lost = self.comm.lost()
        if lost:
            warnings.warn(f"{len(lost)} operations were never waited for: {', '.join(lost[:5])}", stacklevel=2)
        self.comm.close()


def _garbage(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """What is there before the result is."""
    return np.full(shape, np.iinfo(dtype).max if dtype.kind in "iu" else np.nan, dtype)


def _reduced(rows: np.ndarray, op: str) -> np.ndarray:
    """The rows reduced in their own type, from the last to the first: HCCL promises no order."""
    wide = np.float32 if rows.dtype.itemsize == 2 else rows.dtype  # rounds each sum as the type itself would
    combine = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}[op]
    total = rows[-1]
    with np.errstate(all="ignore"):
        for row in rows[-2::-1]:
            total = combine(total.astype(wide), row.astype(wide)).astype(rows.dtype)
    return total


def _check_unwritten(name: str, tensor: Tensor, before: np.ndarray) -> None:
    now = np.ascontiguousarray(host_array(tensor)).reshape(-1)
    if now.view(np.uint8).tobytes() != before.reshape(-1).view(np.uint8).tobytes():
        raise RuntimeError(f"the input of {name} was written before its handle was waited for: what other ranks got is undefined")
