"""CPU ranks over MPI (mpi4py), with a thread that drives all transfers.

The thread starts non-blocking MPI operations and polls them, sleeping in between: MPICH's own waiting spins, which would take
the core away from a computing rank. Bytes go straight between the tensors' memory and MPI; a reduction is an all-to-all followed
by a sum in rank order on this host (`comm.reduce`), because MPI has no fixed order and, in most builds, no 16-bit floats.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any, Generator, Sequence

import numpy as np
from mindspore import Tensor

from ..compat.runtime import from_host, host_array, numpy_dtype
from .engine import Clock, CommError, CommTimeoutError, Engine, Work
from .reduce import reduce_rows

Stages = Generator[list, None, None]  # yields the MPI requests of one stage; resumed when they are complete

_SHORTEST_SLEEP = 20e-6
_LONGEST_SLEEP = 500e-6
_SMALL = 1 << 15  # bytes: below, an all-reduce gathers everything; above, it reduces by parts


class _Job(Work):
    """One operation, from the call until its results are there."""

    def __init__(self, what: str, outputs: list[Tensor], stages: Stages, keep: Any, timeout: float):
        self.what, self.outputs, self.stages, self.timeout = what, outputs, stages, timeout
        self.keep = keep  # the inputs: MPI reads their memory
        self.error: BaseException | None = None
        self.requests: list = []
        self.deadline = 0.0
        self.finished = threading.Event()

    def done(self) -> bool:
        return self.finished.is_set()

    def wait(self) -> list[Tensor]:
        self.finished.wait()
        if self.error is not None:
            raise self.error
        return self.outputs

    def advance(self) -> bool:
        """Start the next stage; True when there is none."""
        try:
            self.requests = next(self.stages)
            return False
        except StopIteration:
            return True

    def finish(self, error: BaseException | None = None) -> None:
        self.error, self.keep, self.requests = error, None, []
        self.finished.set()


class CommThread:
    """Runs jobs one after the other, except point-to-point ones, which run beside them so that two ranks can send at once."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[_Job | None, bool]] = queue.SimpleQueue()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bmtrain_ms-comm", daemon=True)
        self._thread.start()

    def submit(self, job: _Job, ordered: bool) -> _Job:
        """Hand over a job; `ordered` ones start only when the one before has finished."""
        if self._closed:
            raise CommError(f"{job.what}: the engine is closed")
        self._queue.put((job, ordered))
        return job

    def close(self) -> None:
        """Finish what is queued, then end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put((None, False))
            self._thread.join()

    def _run(self) -> None:
        from mpi4py import MPI

        waiting: deque[_Job] = deque()
        active: list[_Job] = []
        ordered_active: _Job | None = None
        closing, sleep = False, _SHORTEST_SLEEP
        while not closing or active or waiting:
            idle = not active and not waiting
            while idle or not self._queue.empty():
                job, ordered = self._queue.get()
                idle, sleep = False, _SHORTEST_SLEEP
                if job is None:
                    closing = True
                elif ordered:
                    waiting.append(job)
                elif self._start(job):
                    active.append(job)
            while waiting and ordered_active is None:
                job = waiting.popleft()
                if self._start(job):
                    active.append(job)
                    ordered_active = job
            progressed = False
            for job in list(active):
                if self._poll(job, MPI):
                    active.remove(job)
                    ordered_active = None if job is ordered_active else ordered_active
                    progressed = True
            if progressed:
                sleep = _SHORTEST_SLEEP
            elif active:
                time.sleep(sleep)
                sleep = min(sleep * 1.3, _LONGEST_SLEEP)

    def _start(self, job: _Job) -> bool:
        """True when the job is now in flight, False when it has ended already."""
        if self._failure is not None:
            job.finish(self._failure)
            return False
        job.deadline = time.monotonic() + job.timeout
        try:
            if job.advance():
                job.finish()
                return False
        except BaseException as error:
            job.finish(error)
            return False
        return True

    def _poll(self, job: _Job, MPI: Any) -> bool:
        """True when the job has ended."""
        try:
            if self._failure is not None:
                raise self._failure
            if MPI.Request.Testall(job.requests):
                if not job.advance():
                    return False
                job.finish()
                return True
            if time.monotonic() < job.deadline:
                return False
            raise CommTimeoutError(
                f"{job.what} did not finish within {job.timeout:g} s. Another rank is dead, stuck, or did not issue this "
                "operation; look for the first error among the other ranks, or raise init_distributed(timeout=...)"
            )
        except BaseException as error:
            self._failure = error  # a group with a lost operation cannot be used again
            job.finish(error)
            return True


class MpiEngine(Engine):
    """Ranks of an MPI communicator."""

    name = "mpi"
    lands_in_place = True

    def __init__(self, comm: Any, clock: Clock | None = None, timeout: float = 600.0, thread: CommThread | None = None):
        """
        Args:
            comm: an mpi4py communicator that nobody else uses.
            clock: the training step, for messages.
            timeout: seconds that an operation may take after its turn has come.
            thread: the one of the engine that this is a sub-group of; it ends with that engine.
        """
        self._comm, self.clock, self._timeout = comm, clock or Clock(), timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._thread, self._owns_thread = thread or CommThread(), thread is None
        self._scratch: dict[int, np.ndarray] = {}  # touched by the thread only, and by one ordered job at a time

    # Collectives #

    def all_gather(self, tensors: Sequence[Tensor], out: Sequence[Tensor] | None = None, label: str = "") -> Work:
        sources = [host_array(x) for x in tensors]
        if out is None:
            out = [self._new((self.size * (x.shape[0] if x.shape else 1), *x.shape[1:]), x.dtype) for x in tensors]
        targets = [host_array(y) for y in out]

        def stages() -> Stages:
            yield [self._comm.Iallgather(_bytes(x), _bytes(y)) for x, y in zip(sources, targets)]

        return self._submit("all_gather", label, list(out), stages(), sources)

    def reduce_scatter(self, tensors: Sequence[Tensor], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        self._check_divisible(tensors, "reduce_scatter")
        sources = [host_array(x) for x in tensors]
        out = [self._new((x.shape[0] // self.size, *x.shape[1:]), x.dtype) for x in tensors]
        targets = [host_array(y).reshape(-1) for y in out]
        return self._submit("reduce_scatter", label, out, self._reduce_parts(sources, targets, op), sources)

    def all_reduce(self, tensors: Sequence[Tensor], op: str = "sum", label: str = "") -> Work:
        self._check_op(op, tensors)
        sources = [host_array(x).reshape(-1) for x in tensors]
        out = [self._new(tuple(x.shape), x.dtype) for x in tensors]
        targets = [host_array(y).reshape(-1) for y in out]
        if sum(x.nbytes for x in sources) <= _SMALL:
            return self._submit("all_reduce", label, out, self._reduce_gathered(sources, targets, op), sources)
        padded = [_pad(x, self.size) for x in sources]
        parts = [np.empty(x.size // self.size, x.dtype) for x in padded]
        wholes = [np.empty_like(x) for x in padded]

        def stages() -> Stages:
            yield from self._reduce_parts(padded, parts, op)
            yield [self._comm.Iallgather(_bytes(x), _bytes(y)) for x, y in zip(parts, wholes)]
            for whole, target in zip(wholes, targets):
                target[...] = whole[: target.size]

        return self._submit("all_reduce", label, out, stages(), sources)

    def broadcast(self, tensors: Sequence[Tensor], root: int = 0, label: str = "") -> Work:
        self._check_peer(root, "root")
        out = list(tensors) if self.rank == root else [self._new(tuple(x.shape), x.dtype) for x in tensors]
        arrays = [host_array(x) for x in out]

        def stages() -> Stages:
            yield [self._comm.Ibcast(_bytes(x), root=root) for x in arrays]

        return self._submit("broadcast", label, out, stages(), arrays)

    def all_to_all(self, tensors: Sequence[Tensor], label: str = "") -> Work:
        self._check_divisible(tensors, "all_to_all")
        sources = [host_array(x) for x in tensors]
        out = [self._new(tuple(x.shape), x.dtype) for x in tensors]
        targets = [host_array(y) for y in out]

        def stages() -> Stages:
            yield [self._comm.Ialltoall(_bytes(x), _bytes(y)) for x, y in zip(sources, targets)]

        return self._submit("all_to_all", label, out, stages(), sources)

    def barrier(self, label: str = "") -> Work:
        def stages() -> Stages:
            yield [self._comm.Ibarrier()]

        return self._submit("barrier", label, [], stages(), None)

    # Point to point #

    def send(self, tensors: Sequence[Tensor], dst: int, label: str = "") -> Work:
        self._check_peer(dst, "dst")
        sources = [host_array(x) for x in tensors]

        def stages() -> Stages:
            yield [self._comm.Isend(_bytes(x), dest=dst, tag=i) for i, x in enumerate(sources)]

        return self._submit(f"send to rank {dst}", label, [], stages(), sources, ordered=False)

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        self._check_peer(src, "src")
        out = [self._new(tuple(x.shape), x.dtype) for x in like]
        targets = [host_array(y) for y in out]

        def stages() -> Stages:
            yield [self._comm.Irecv(_bytes(y), source=src, tag=i) for i, y in enumerate(targets)]

        return self._submit(f"recv from rank {src}", label, out, stages(), targets, ordered=False)

    # Groups #

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        group = self._comm.Get_group().Incl(list(ranks))
        made: list[Any] = []

        def stages() -> Stages:
            made.append(self._comm.Create_group(group, tag=min(ranks)))
            yield []

        self._submit(f"subgroup {list(ranks)}", "", [], stages(), None).wait()
        return MpiEngine(made[0], self.clock, self._timeout, self._thread)

    def close(self) -> None:
        if self._owns_thread:
            self._thread.close()

    # Implementation #

    def _submit(self, op: str, label: str, out: list[Tensor], stages: Stages, keep: Any, ordered: bool = True) -> Work:
        name = f"{op} ({label})" if label else op
        what = f"{name} at step {self.clock.step} on rank {self.rank} of {self.size}"
        return self._thread.submit(_Job(what, out, stages, keep, self._timeout), ordered)

    def _reduce_parts(self, sources: list[np.ndarray], targets: list[np.ndarray], op: str) -> Stages:
        """Every rank receives its part from all, then reduces: sources (size*n, ...) -> targets (n,)."""
        rows = self._rows(targets)
        yield [self._comm.Ialltoall(_bytes(x), _bytes(y)) for x, y in zip(sources, rows)]
        for row, target in zip(rows, targets):
            reduce_rows(row, op, target)

    def _reduce_gathered(self, sources: list[np.ndarray], targets: list[np.ndarray], op: str) -> Stages:
        rows = self._rows(targets)
        yield [self._comm.Iallgather(_bytes(x), _bytes(y)) for x, y in zip(sources, rows)]
        for row, target in zip(rows, targets):
            reduce_rows(row, op, target)

    def _rows(self, targets: list[np.ndarray]) -> list[np.ndarray]:
        """(size, n) of scratch for each target, reused from call to call: fresh pages cost as much as the transfer."""
        total = sum(self.size * _aligned(x.nbytes) for x in targets)
        buffer = self._scratch.get(0)
        if buffer is None or buffer.nbytes < total:
            buffer = self._scratch[0] = np.empty(total, np.uint8)
        rows, start = [], 0
        for x in targets:
            rows.append(buffer[start : start + self.size * x.nbytes].view(x.dtype).reshape(self.size, x.size))
            start += self.size * _aligned(x.nbytes)
        return rows

    @staticmethod
    def _new(shape: tuple[int, ...], dtype: Any) -> Tensor:
        return from_host(np.empty(shape, numpy_dtype(dtype)))


def _bytes(x: np.ndarray) -> list:
    """The MPI buffer specification of an array's raw bytes."""
    from mpi4py import MPI

    return [x.reshape(-1).view(np.uint8), MPI.BYTE]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _pad(x: np.ndarray, multiple: int) -> np.ndarray:
    missing = -x.size % multiple
    return x if not missing else np.concatenate([x, np.zeros(missing, x.dtype)])
