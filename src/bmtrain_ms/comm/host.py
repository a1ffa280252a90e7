"""Collectives over host memory, written once for every way of moving bytes between processes.

A transport moves raw bytes (`_gather`, `_exchange`, ...); types, shapes, reductions and their fixed order live here. An
operation is a generator, its *stages*: it runs on the transport's thread and yields whenever it must wait for other ranks.
"""

from __future__ import annotations

import hashlib
import threading
import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Generator, Sequence

import numpy as np
import xxhash
from mindspore import Tensor

from ..compat.runtime import host_array, numpy_dtype, shared_array, shared_tensor
from .engine import Buffer, Engine, Work
from .reduce import reduce_rows

Stages = Generator[Any, Any, Any]
Rows = Sequence[np.ndarray]  # one flat array per rank, in rank order

LARGEST_SIGNATURE = 1 << 14  # bytes
_GIVEN = "given: "  # begins a line of a signature that says what a rank was given, see `Engine.compare`
_SMALL = 1 << 15  # bytes: below, an all-reduce gathers everything; above, it reduces by parts


class Job(Work):
    """One operation, from the call until its results are there.

    Attributes:
        what: for messages: operation, label, step and rank.
        stages: see the module's docstring.
        keep: the inputs, whose memory others read.
    """

    def __init__(self, what: str, outputs: list[Tensor], stages: Stages, keep: Any, timeout: float):
        self.what, self.outputs, self.stages, self.keep, self.timeout = what, outputs, stages, keep, timeout
        self.error: BaseException | None = None
        self.started = self.ended = self.deadline = 0.0  # seconds of time.monotonic
        self._finished = threading.Event()

    def done(self) -> bool:
        return self._finished.is_set()

    def wait(self) -> list[Tensor]:
        self._finished.wait()
        if self.error is not None:
            raise self.error
        return self.outputs

    def span(self) -> tuple[float, float] | None:
        return self.started, self.ended

    def start(self) -> None:
        """Note that the operation's turn has come; called by the transport's thread."""
        self.started = time.monotonic()
        self.deadline = self.started + self.timeout

    def finish(self, error: BaseException | None = None) -> None:
        """Called by the transport's thread, once."""
        self.ended = time.monotonic()
        self.error, self.keep = error, None
        self._finished.set()


@dataclass(frozen=True)
class Operation:
    """What a transport runs.

    Attributes:
        op: e.g. `reduce_scatter`.
        pair: (sender, receiver) of a message; None for a collective.
        root: the rank whose values a broadcast sends.
        what: for messages to people: operation, label, step and rank.
        signature: what must be the same on every rank.
        outputs, stages, arrays: the results, how to get them, and the memory that others read.
    """

    op: str
    pair: tuple[int, int] | None
    root: int | None
    what: str
    signature: str
    outputs: list[Tensor]
    stages: Stages
    arrays: Rows


class HostEngine(Engine):
    """An engine whose tensors live in host memory; subclasses move bytes."""

    lands_in_place = True

    def __init__(self) -> None:
        self._scratch = np.empty(0, np.uint8)  # touched by the transport's thread only, and by one collective at a time
        self._rule = ""  # of the last step
        self._given: dict[str, str] = {}  # what the next collective compares, and a digest of it

    # Collectives #

    def all_gather(self, tensors: Sequence[Buffer], out: Sequence[Buffer] | None = None, label: str = "") -> Work:
        sources = [shared_array(x) for x in tensors]
        if out is None:
            out = [self._new((self.size * (x.shape[0] if x.shape else 1), *x.shape[1:]), x.dtype) for x in tensors]
        targets = [shared_array(y) for y in out]
        return self._issue("all_gather", label, list(out), self._gather(sources, targets), sources)

    def reduce_scatter(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        self._check_divisible(tensors, "reduce_scatter")
        sources = [shared_array(x) for x in tensors]
        made = [np.empty((x.shape[0] // self.size, *x.shape[1:]), x.dtype) for x in sources]
        out, targets = [shared_tensor(y) for y in made], [y.reshape(-1) for y in made]
        return self._issue("reduce_scatter", label, out, self._reduce_parts(sources, targets, op), sources, kind=op)

    def all_reduce(self, tensors: Sequence[Buffer], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        sources = [shared_array(x).reshape(-1) for x in tensors]
        out = [self._new(tuple(x.shape), x.dtype) for x in tensors]
        targets = [shared_array(y).reshape(-1) for y in out]
        small = sum(x.nbytes for x in sources) <= _SMALL
        reduce = self._reduce_gathered if small else self._reduce_by_parts
        return self._issue("all_reduce", label, out, reduce(sources, targets, op), sources, kind=op)

    def broadcast(self, tensors: Sequence[Buffer], root: int = 0, label: str = "") -> Work:
        self._check_peer(root, "root")
        out = list(tensors) if self.rank == root else [self._new(tuple(x.shape), x.dtype) for x in tensors]
        arrays = [shared_array(x) for x in out]
        return self._issue("broadcast", label, out, self._broadcast(arrays, root), arrays, root=root)

    def all_to_all(self, tensors: Sequence[Buffer], label: str = "") -> Work:
        self._check_divisible(tensors, "all_to_all")
        sources = [shared_array(x) for x in tensors]
        out = [self._new(tuple(x.shape), x.dtype) for x in tensors]
        targets = [shared_array(y) for y in out]
        return self._issue("all_to_all", label, out, self._exchange(sources, targets), sources)

    def compare(self, what: str, value: Any) -> None:
        self._given[what] = _digest(value)

    def follow(self, rule: str) -> None:
        self._rule = rule

    def barrier(self, label: str = "") -> Work:
        return self._issue("barrier", label, [], self._meet(), [])

    # Point to point #

    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        self._check_peer(dst, "dst")
        sources = [shared_array(x) for x in tensors]
        return self._issue("send", label, [], self._send(sources, dst), sources, pair=(self.rank, dst))

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        self._check_peer(src, "src")
        out = [self._new(tuple(x.shape), x.dtype) for x in like]
        targets = [shared_array(y) for y in out]
        return self._issue("recv", label, out, self._recv(targets, src), targets, pair=(src, self.rank))

    # What a transport does #

    @abstractmethod
    def _submit(self, operation: Operation) -> Work:
        """Start an operation; collectives of a group run in the order of the calls, messages beside them."""

    @abstractmethod
    def _gather(self, sources: Rows, targets: Rows) -> Stages:
        """Every rank's source into every rank's target, (size * n), in rank order."""

    @abstractmethod
    def _exchange(self, sources: Rows, targets: Rows) -> Stages:
        """Part i of my source to rank i; targets (size * n) ordered by sender."""

    @abstractmethod
    def _reduce_parts(self, sources: Rows, targets: Rows, op: str) -> Stages:
        """The op over this rank's part of every rank's source into the target, by `reduce_rows`."""

    @abstractmethod
    def _broadcast(self, arrays: Rows, root: int) -> Stages:
        """The root's arrays into the others'."""

    @abstractmethod
    def _send(self, sources: Rows, dst: int) -> Stages:
        """This rank's arrays, on their way to rank `dst`."""

    @abstractmethod
    def _recv(self, targets: Rows, src: int) -> Stages:
        """The arrays of rank `src` into this rank's."""

    @abstractmethod
    def _meet(self) -> Stages:
        """Wait for every rank."""

    # Implementation #

    def _reduce_gathered(self, sources: Rows, targets: Rows, op: str) -> Stages:
        gathered = [np.empty((self.size, x.size), x.dtype) for x in targets]
        yield from self._gather(sources, gathered)
        for rows, target in zip(gathered, targets):
            reduce_rows(rows, op, target)

    def _reduce_by_parts(self, sources: Rows, targets: Rows, op: str) -> Stages:
        padded = [_pad(x, self.size) for x in sources]
        parts = [np.empty(x.size // self.size, x.dtype) for x in padded]
        wholes = [np.empty_like(x) for x in padded]
        yield from self._reduce_parts(padded, parts, op)
        yield from self._gather(parts, wholes)
        for whole, target in zip(wholes, targets):
            target[...] = whole[: target.size]

    def _scratch_like(self, wanted: Sequence[tuple[int, int, np.dtype]]) -> list[np.ndarray]:
        """(rows, n) arrays, whose memory is reused from call to call: fresh pages cost as much as the transfer."""
        total = sum(_aligned(rows * n * dtype.itemsize) for rows, n, dtype in wanted)
        if self._scratch.nbytes < total:
            self._scratch = np.empty(total, np.uint8)
        made, start = [], 0
        for rows, n, dtype in wanted:
            nbytes = rows * n * dtype.itemsize
            made.append(self._scratch[start : start + nbytes].view(dtype).reshape(rows, n))
            start += _aligned(nbytes)
        return made

    def _issue(
        self,
        op: str,
        label: str,
        out: list[Tensor],
        stages: Stages,
        arrays: Rows,
        kind: str = "",
        pair: tuple[int, int] | None = None,
        root: int | None = None,
    ) -> Work:
        """`kind`: what else must be the same on every rank.  `pair`: (sender, receiver) of a message.  `root`: of a broadcast."""
        kind = kind if root is None else f"from rank {root}"
        signature = signature_of("message", kind, "", arrays)
        if pair is None:
            rule = self._rule if getattr(label, "one_rule", False) else ""
            when = f"at step {self.clock.step}{rule and f', after {rule}'}"
            given, self._given = [f"{_GIVEN}{what}: {digest}" for what, digest in self._given.items()], {}
            signature = signature_of(op, kind, label, arrays, when, given)
        self._note(op, label)
        peer = "" if pair is None else f" to rank {pair[1]}" if op == "send" else f" from rank {pair[0]}"
        return self._submit(Operation(op, pair, root, self._what(op + peer, label), signature, out, stages, arrays))

    def _what(self, op: str, label: str) -> str:
        """The operation as messages name it: with its label, the step and this rank."""
        name = f"{op} ({label})" if label else op
        return f"{name} at step {self.clock.step} on rank {self.rank} of {self.size}"

    @staticmethod
    def _new(shape: tuple[int, ...], dtype: Any) -> Tensor:
        return shared_tensor(np.empty(shape, numpy_dtype(dtype)))


def signature_of(op: str, kind: str, label: str, arrays: Rows, when: str = "", given: Sequence[str] = ()) -> str:
    """What must agree between ranks: the operation, when it is issued, what they were given, then one line for each tensor."""
    first = " ".join(filter(None, (op, kind))) + (f" ({label})" if label else "")
    sizes = "tensors of " + ", ".join(f"{x.size} {x.dtype}" for x in arrays)
    detail = getattr(label, "detail", ())
    text = "\n".join([first, when, *given, *detail, sizes])
    if len(text.encode()) <= LARGEST_SIGNATURE:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return f"{text.encode()[:LARGEST_SIGNATURE].decode(errors='ignore')}\n... (digest of all: {digest})"


def disagreement(mine: str, theirs: str, peer: int) -> str:
    """What differs between two signatures: lines of text, the first of which names the operation."""
    here, there = mine.splitlines(), theirs.splitlines()
    given, other = (dict(line[len(_GIVEN) :].rsplit(": ", 1) for line in x if line.startswith(_GIVEN)) for x in (here, there))
    for what in given:
        if what in other and other[what] != given[what]:
            return (
                f"rank {peer} was given other {what} than this rank: ranks that differ along tp or pp only must be given the same. "
                "Choose rows by world().mesh.dp_rank of mesh.dp, not by the global rank"
            )
    advice = "Every rank must issue the same operations in the same order: look for a branch that only some ranks take"
    if here[0] != there[0]:
        return f"rank {peer} issued {there[0]} instead. {advice}"
    if here[1] != there[1]:
        return (
            f"rank {peer} is {there[1]}, and this rank {here[1]}: parameters would be updated by different rules. Every rank must "
            "call step, zero_grad and clip_grad_norm alike and set the same rates: decide by what all know, e.g. the mean loss "
            "(bmtrain_ms.distributed.all_reduce)"
        )
    alike = "The models must be built alike on every rank"
    mine_only, theirs_only = here[len(there) - 1 : -1], there[len(here) - 1 : -1]
    for a, b in zip(here[2:-1], there[2:-1]):
        if a != b:
            return f"rank {peer} has {b} where this rank has {a}. {alike}"
    if mine_only or theirs_only:
        return f"only {'this rank' if mine_only else f'rank {peer}'} has {(mine_only or theirs_only)[0]}. {alike}"
    return f"rank {peer} has {there[-1]} where this rank has {here[-1]}. {alike}"


def _digest(value: Any) -> str:
    if not isinstance(value, (Tensor, np.ndarray)):
        return repr(value)
    array = host_array(value) if isinstance(value, Tensor) else value
    return f"{array.shape} {xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)}"


def as_bytes(x: np.ndarray) -> np.ndarray:
    """The array's memory."""
    return x.reshape(-1).view(np.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _pad(x: np.ndarray, multiple: int) -> np.ndarray:
    missing = -x.size % multiple
    return x if not missing else np.concatenate([x, np.zeros(missing, x.dtype)])
