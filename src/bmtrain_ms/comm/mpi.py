"""Ranks on several hosts, over MPI (mpi4py), with a thread that drives all transfers.

The thread starts non-blocking MPI operations and polls them, sleeping in between: MPICH's own waiting spins, which would take
the core away from a computing rank. Bytes go straight between the tensors' memory and MPI; a reduction is an all-to-all followed
by a sum in rank order on this host (`comm.reduce`), because MPI has no fixed order and, in most builds, no 16-bit floats.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import deque
from typing import Any, Optional, Sequence

import numpy as np

from bmtrain_ms_base import system

from .engine import Clock, CommError, CommTimeoutError, Engine, Work
from .host import LARGEST_SIGNATURE, HostEngine, Job, Operation, Rows, Stages, as_bytes, disagreement

_SHORTEST_SLEEP = 20e-6
_LONGEST_SLEEP = 500e-6


class _Job(Job):
    """`stages` yields the MPI requests of one stage, and is resumed when they are complete."""

    requests: Sequence[Any] = ()

    def advance(self) -> bool:
        """Start the next stage; True when there is none."""
        try:
            self.requests = next(self.stages)
            return False
        except StopIteration:
            return True


class CommThread:
    """Runs jobs one after the other, except point-to-point ones, which run beside them so that two ranks can send at once."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[_Job | None, bool]] = queue.SimpleQueue()
        self._closed = False
        self._failure: Optional[BaseException] = None
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
        job.start()
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
            system.write_stacks(f"{job.what} did not finish within {job.timeout:g} s")
            raise CommTimeoutError(
                f"{job.what} did not finish within {job.timeout:g} s. Another rank is dead, stuck, or did not issue this "
                "operation; look for the first error among the other ranks, or raise init_distributed(timeout=...)"
            )
        except BaseException as error:
            self._failure = error  # a group with a lost operation cannot be used again
            job.finish(error)
            return True


class MpiEngine(HostEngine):
    """Ranks of an MPI communicator."""

    name = "mpi"

    def __init__(self, comm: Any, clock: Clock | None = None, timeout: float = 600.0, thread: CommThread | None = None):
        """
        Args:
            comm: an mpi4py communicator that nobody else uses.
            clock: the training step, for messages.
            timeout: seconds that an operation may take after its turn has come.
            thread: the one of the engine that this is a sub-group of; it ends with that engine.
        """
        super().__init__()
        self._comm, self.clock, self._timeout = comm, clock or Clock(), timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._thread, self._owns_thread = thread or CommThread(), thread is None

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        group = self._comm.Get_group().Incl(list(ranks))
        made: list[Any] = []

        def stages() -> Stages:
            made.append(self._comm.Create_group(group, tag=min(ranks)))
            yield []

        job = _Job(self._what(f"subgroup {list(ranks)}", ""), [], stages(), None, self._timeout)
        self._thread.submit(job, ordered=True).wait()
        return MpiEngine(made[0], self.clock, self._timeout, self._thread)

    def close(self) -> None:
        if self._owns_thread:
            self._thread.close()

    # The transport #

    def _submit(self, operation: Operation) -> Work:
        stages, ordered = operation.stages, operation.pair is None
        if ordered:
            stages = self._compared(operation.what, operation.signature, stages)
        return self._thread.submit(_Job(operation.what, operation.outputs, stages, operation.arrays, self._timeout), ordered)

    def _compared(self, what: str, signature: str, stages: Stages) -> Stages:
        """First see that all ranks issue the same operation: MPI would hang, crash, or mix up the data."""
        text = signature.encode()
        digest = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.uint8)
        digests = np.empty((self.size, 16), np.uint8)
        yield [self._comm.Iallgather(_buffer(digest), _buffer(digests))]
        if (digests != digest).any():
            mine = np.zeros(LARGEST_SIGNATURE + 64, np.uint8)
            mine[: len(text)] = np.frombuffer(text, np.uint8)
            texts = np.empty((self.size, mine.size), np.uint8)
            yield [self._comm.Iallgather(_buffer(mine), _buffer(texts))]
            rank = int(np.flatnonzero((digests != digest).any(1))[0])
            raise CommError(f"{what}: {disagreement(signature, texts[rank].tobytes().rstrip(bytes(1)).decode(), rank)}")
        yield from stages

    def _gather(self, sources: Rows, targets: Rows) -> Stages:
        yield [self._comm.Iallgather(_buffer(x), _buffer(y)) for x, y in zip(sources, targets)]

    def _exchange(self, sources: Rows, targets: Rows) -> Stages:
        yield [self._comm.Ialltoall(_buffer(x), _buffer(y)) for x, y in zip(sources, targets)]

    def _parts(self, sources: Rows) -> Stages:
        rows = self._scratch_like([(self.size, x.size // self.size, x.dtype) for x in sources])
        yield from self._exchange(sources, rows)
        return rows

    def _broadcast(self, arrays: Rows, root: int) -> Stages:
        yield [self._comm.Ibcast(_buffer(x), root=root) for x in arrays]

    def _send(self, sources: Rows, dst: int) -> Stages:
        yield [self._comm.Isend(_buffer(x), dest=dst, tag=i) for i, x in enumerate(sources)]

    def _recv(self, targets: Rows, src: int) -> Stages:
        yield [self._comm.Irecv(_buffer(y), source=src, tag=i) for i, y in enumerate(targets)]

    def _meet(self) -> Stages:
        yield [self._comm.Ibarrier()]


def _buffer(x: np.ndarray) -> list:
    """The MPI buffer specification of an array's raw bytes."""
    from mpi4py import MPI

    return [as_bytes(x), MPI.BYTE]
