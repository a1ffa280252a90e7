"""What a communication engine is: collectives over flat tensors, asynchronous, in the order in which they are issued.

An engine is bound to one group of ranks; `subgroup` makes another. Every rank of the group must issue the same operations in the
same order. All operations take and return lists of tensors: what is passed in one call travels as one collective.
Engines with `lands_in_place` take NumPy arrays in place of tensors, too.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Sequence, Union

import numpy as np
from mindspore import Tensor

from bmtrain_ms_base.board import own_row

from ..compat.runtime import is_float

Buffer = Union[Tensor, np.ndarray]
REDUCE_OPS = ("sum", "mean", "max", "min")


class CommError(RuntimeError):
    """A collective failed."""


class CommTimeoutError(CommError):
    """A collective did not finish in time: a rank is dead, stuck, or took another branch."""


@dataclass
class Clock:
    """The training step, shared by all engines of a process so that errors can name it, and the launcher when the process ends."""

    step: int = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "step" and value:  # 0 is that of a new clock, of which there may be several
            note(value)


def note(step: int, doing: str = "") -> None:
    """Tell the launcher's board, if there is one, what this rank does."""
    row = own_row()
    if row is not None:
        row.note(step, doing)


class Label(str):
    """What an operation is for, with lines that must be the same on every rank: the names and shapes of what travels.

    Engines that compare operations before they start (`node`, `mpi`) name the first line that differs.
    """

    detail: tuple[str, ...]
    one_rule: bool

    def __new__(cls, text: str, detail: Sequence[str] = (), one_rule: bool = True) -> Label:
        """`one_rule`: all who take part have updated their parameters by the same rule (`Engine.follow`)."""
        made = super().__new__(cls, text)
        made.detail, made.one_rule = tuple(detail), one_rule
        return made


class Work(ABC):
    """A collective in flight.

    `outputs` exist from the start and hold the result once `wait` has returned; until then they must not be read, and the inputs
    must not be written.
    """

    outputs: list[Any]

    @abstractmethod
    def done(self) -> bool:
        """Whether `wait` would return at once."""

    @abstractmethod
    def wait(self) -> list[Tensor]:
        """Block until finished and return the outputs; may be called again.

        Raises:
            CommTimeoutError: not finished within the engine's time-out.
            CommError: the collective failed.
        """

    def start_next_part(self) -> None:  # noqa: B027  (most have one part)
        """Start the next part of an operation of several, after waiting for the one before. Called at a point of the program that
        is the same on every rank, so that all issue the same order."""

    def span(self) -> tuple[float, float] | None:
        """When it ran, in seconds of `time.monotonic`; after `wait`. None where that is unknown."""
        return None


class Done(Work):
    """A collective that was finished when it was issued."""

    def __init__(self, outputs: list[Tensor]):
        self.outputs = outputs
        self._made = time.monotonic()

    def span(self) -> tuple[float, float] | None:
        return self._made, self._made

    def done(self) -> bool:
        return True

    def wait(self) -> list[Tensor]:
        return self.outputs


class Engine(ABC):
    """Collectives among the ranks of one group.

    Attributes:
        name: for messages: `single`, `node`, `mpi`, `hccl`, `simulated`.
        rank: this process in the group, 0 <= rank < size.
        size: how many ranks the group has.
        clock: the training step, for messages.
        lands_in_place: whether `all_gather` fills the `out` tensors that it is given.
    """

    name: str
    rank: int
    size: int
    clock: Clock
    lands_in_place: bool = False

    @property
    def lost(self) -> BaseException | None:
        """The error of an operation that never ended, if there is one: the ranks cannot even part in good order then."""
        return None

    @abstractmethod
    def all_gather(self, tensors: Sequence[Buffer], out: Sequence[Buffer] | None = None, label: str = "") -> Work:
        """Concatenate each tensor over the ranks along dim 0: (n, ...) -> (size*n, ...).

        `out`: host tensors of the result's shape to land in, on engines with `lands_in_place`; otherwise new ones are made.
        """

    @abstractmethod
    def reduce_scatter(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        """Reduce each tensor over the ranks and keep this rank's part of dim 0: (size*n, ...) -> (n, ...).

        Floating-point sums are made in float32 (float64 for float64) in rank order and rounded once.
        """

    @abstractmethod
    def all_reduce(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        """Reduce each tensor over the ranks, the same bits on every rank; shape kept."""

    @abstractmethod
    def broadcast(self, tensors: Sequence[Buffer], root: int = 0, label: str = "") -> Work:
        """Rank `root`'s values on every rank; the others pass tensors of the same shapes and types."""

    @abstractmethod
    def all_to_all(self, tensors: Sequence[Buffer], label: str = "") -> Work:
        """Part i of dim 0 goes to rank i: (size*n, ...) -> (size*n, ...), ordered by sender."""

    @abstractmethod
    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        """Send to rank `dst` of the group, which must `recv`."""

    @abstractmethod
    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        """Receive from rank `src` tensors shaped and typed as `like`."""

    @abstractmethod
    def barrier(self, label: str = "") -> Work:
        """Finished when every rank has issued it; no outputs."""

    def compare(self, what: str, value: Any) -> None:  # noqa: B027  (where looking would cost a collective, or wait for a device)
        """Have the next collective fail, on every rank, where ranks of the group were given different values of what is to be the
        same on all: a batch, say. All ranks call it together. On devices nobody looks.

        Args:
            what: they were given, for the message: `input ids`.
            value: a tensor, an array, None, or what `repr` says all of.
        """

    def follow(self, rule: str) -> None:  # noqa: B027  (as above)
        """Have later collectives of parameters fail, on every rank, where ranks of the group made their last step by other rules.

        Args:
            rule: what it was made by (rates, clipping), in words.
        """

    @abstractmethod
    def subgroup(self, ranks: Sequence[int]) -> Engine:
        """An engine over some ranks of this group, renumbered in the order given; called by exactly those ranks."""

    def close(self) -> None:  # noqa: B027  (most engines have nothing to close)
        """Finish what is in flight and free the engine's threads and groups; a second call does nothing."""

    def _note(self, op: str, label: str = "") -> None:
        """What is issued, for the launcher."""
        note(self.clock.step, f"{op} ({label})" if label else op)

    # Checks shared by all engines: errors, and their text, do not depend on the engine in use.

    def _check_op(self, op: str, tensors: Sequence[Buffer]) -> None:
        if op not in REDUCE_OPS:
            raise ValueError(f"unknown reduction {op!r}; choose one of {', '.join(REDUCE_OPS)}")
        if op == "mean" and not all(x.dtype.kind not in "iub" if isinstance(x, np.ndarray) else is_float(x) for x in tensors):
            raise ValueError("the mean of integer tensors is not an integer; use sum, or convert to a float type")

    def _check_peer(self, peer: int, what: str) -> None:
        if not 0 <= peer < self.size:
            raise ValueError(f"{what}={peer} is not a rank of this group of {self.size} (0..{self.size - 1})")

    def _check_divisible(self, tensors: Sequence[Buffer], what: str) -> None:
        for x in tensors:
            if not x.shape or x.shape[0] % self.size:
                raise ValueError(
                    f"{what} splits dim 0 over {self.size} ranks, which a tensor of shape {tuple(x.shape)} does not allow; "
                    f"pad dim 0 to a multiple of {self.size}"
                )

    def _check_subgroup(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._check_peer(rank, "rank")
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"a rank appears twice in the sub-group {list(ranks)}")
        if self.rank not in ranks:
            raise ValueError(f"rank {self.rank} is not in the sub-group {list(ranks)}: only its members create it")
