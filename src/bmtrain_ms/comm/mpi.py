"""Ranks on several hosts, over MPI (mpi4py), with a thread that drives all transfers.

The thread starts non-blocking MPI operations and polls them, sleeping in between: MPICH's own waiting spins, which would take
the core away from a computing rank. Bytes go straight between the tensors' memory and MPI; a reduction is an all-to-all followed
by a sum in rank order on this host (`comm.reduce`), because MPI has no fixed order and, in most builds, no 16-bit floats.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import socket
import threading
import time
from collections import deque
from typing import Any, Sequence

import numpy as np
from mindspore import Tensor

from bmtrain_ms_base import system

from . import ending
from .engine import Clock, CommError, CommTimeoutError, Engine, Work
from .host import LARGEST_SIGNATURE, HostEngine, Job, Operation, Rows, Stages, as_bytes, disagreement
from .reduce import reduce_rows

_SHORTEST_SLEEP = 20e-6
_LONGEST_SLEEP = 500e-6
_CHECK = 1.0  # seconds between two looks at whether the thread still turns


class _Job(Job):
    """`stages` yields the MPI requests of one stage, and is resumed when they are complete."""

    requests: Sequence[Any] = ()
    thread: CommThread  # that has taken it
    where: str = ""  # for messages: its ranks run

    def wait(self) -> list[Tensor]:
        while not self._finished.wait(_CHECK):
            self.thread.check()
        if self.error is not None:
            self.thread.heard()
        return super().wait()

    def advance(self) -> bool:
        """Start the next stage; True when there is none."""
        try:
            self.requests = next(self.stages)
            return False
        except StopIteration:
            return True


class CommThread:
    """Runs jobs one after the other, except point-to-point ones, which run beside them so that two ranks can send at once."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds until a call of MPI counts as lost; most return at once, but not one of them has a time-out."""
        self._queue: queue.SimpleQueue[tuple[_Job | None, bool]] = queue.SimpleQueue()
        self._closed = False
        self._failure: BaseException | None = None
        self.lost: BaseException | None = None
        self._timeout = timeout
        self._turned, self._doing = time.monotonic(), ""
        self._unheard: threading.Timer | None = None
        self._thread = threading.Thread(target=self._run, name="bmtrain_ms-comm", daemon=True)
        self._thread.start()

    def submit(self, job: _Job, ordered: bool) -> _Job:
        """Hand over a job; `ordered` ones start only when the one before has finished."""
        if self._closed:
            raise CommError(f"{job.what}: the engine is closed")
        job.thread = self
        self._turned = time.monotonic()
        self._queue.put((job, ordered))
        return job

    def close(self) -> None:
        """Finish what is queued, then end the thread, unless it is inside MPI for ever."""
        if not self._closed:
            self._closed = True
            self.heard()
            self._turned = time.monotonic()
            self._queue.put((None, False))
            while self._thread.is_alive() and not self._stuck():
                self._thread.join(_CHECK)

    def check(self) -> None:
        """Called by whoever waits.

        Raises:
            CommTimeoutError: the thread is inside MPI, which does not return.
        """
        if self._stuck():
            error = CommTimeoutError(f"{self._doing} did not finish within {self._timeout:g} s: MPI does not return")
            self._fail(error)
            self.heard()
            raise error

    def heard(self) -> None:
        """The rank's own threads know of the failure, or will not ask any more."""
        if self._unheard is not None:
            self._unheard.cancel()

    def _stuck(self) -> bool:
        return time.monotonic() - self._turned > self._timeout

    def _lose(self, error: BaseException) -> None:
        """An operation will never end: end this process too, if its own threads do not even ask, e.g. are inside MPI themselves."""
        self._failure = self.lost = error
        self._unheard = threading.Timer(self._timeout, ending.end_job, [f"ends all ranks: {error}"])
        self._unheard.daemon = True
        self._unheard.start()

    def _run(self) -> None:
        from mpi4py import MPI

        waiting: deque[_Job] = deque()
        active: list[_Job] = []
        ordered_active: _Job | None = None
        closing, sleep = False, _SHORTEST_SLEEP
        while not closing or active or waiting:
            self._turned = time.monotonic()
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
            if self._advance(job):
                job.finish()
                return False
        except BaseException as error:
            self._fail(error)
            job.finish(error)
            return False
        return True

    def _advance(self, job: _Job) -> bool:
        self._doing = job.what
        return job.advance()

    def _poll(self, job: _Job, MPI: Any) -> bool:
        """True when the job has ended."""
        try:
            if self._failure is not None:
                raise self._failure
            if MPI.Request.Testall(job.requests):
                if not self._advance(job):
                    return False
                job.finish()
                return True
            if time.monotonic() < job.deadline:
                return False
            system.write_stacks(f"{job.what} did not finish within {job.timeout:g} s")
            raise CommTimeoutError(
                f"{job.what} did not finish within {job.timeout:g} s. Another rank is dead, stuck, or did not issue this "
                "operation; look for the first error among the other ranks, or raise init_distributed(timeout=...)"
                f"{job.where}"
            )
        except BaseException as error:
            self._fail(error)
            job.finish(error)
            return True

    def _fail(self, error: BaseException) -> None:
        """A group whose ranks are not at the same operation cannot be used again."""
        if type(error) is CommError:  # all ranks have found it
            self._failure = self._failure or error
        elif self._failure is None:
            self._lose(error)


class MpiEngine(HostEngine):
    """Ranks of an MPI communicator."""

    name = "mpi"

    def __init__(
        self,
        comm: Any,
        clock: Clock | None = None,
        timeout: float = 600.0,
        thread: CommThread | None = None,
        hosts: Sequence[str] | None = None,
    ):
        """
        Args:
            comm: an mpi4py communicator that nobody else uses.
            clock: the training step, for messages.
            timeout: seconds that an operation may take after its turn has come.
            thread: the one of the engine that this is a sub-group of; it ends with that engine.
            hosts: where the ranks run, by rank; asked for if not given.
        """
        super().__init__()
        self._comm, self.clock, self._timeout = comm, clock or Clock(), timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._hosts: list[str] = list(hosts or comm.allgather(socket.gethostname()))
        self._thread, self._owns_thread = thread or CommThread(timeout), thread is None

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        group = self._comm.Get_group().Incl(list(ranks))
        made: list[Any] = []

        def stages() -> Stages:
            made.append(self._comm.Create_group(group, tag=min(ranks)))
            yield []

        job = _Job(self._what(f"subgroup {list(ranks)}", ""), [], stages(), None, self._timeout)
        self._thread.submit(job, ordered=True).wait()
        return MpiEngine(made[0], self.clock, self._timeout, self._thread, [self._hosts[i] for i in ranks])

    @property
    def lost(self) -> BaseException | None:
        return self._thread.lost

    def close(self) -> None:
        if self._owns_thread:
            self._thread.close()

    # The transport #

    def _submit(self, operation: Operation) -> Work:
        stages, ordered = operation.stages, operation.pair is None
        if ordered:
            stages = self._compared(operation.what, operation.signature, stages)
        job = _Job(operation.what, operation.outputs, stages, operation.arrays, self._timeout)
        if len(set(self._hosts)) > 1:
            job.where = f". The group: {ranks_by_host(self._hosts)}"
        return self._thread.submit(job, ordered)

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

    def _reduce_parts(self, sources: Rows, targets: Rows, op: str) -> Stages:
        parts = self._scratch_like([(self.size, y.size, y.dtype) for y in targets])
        yield from self._exchange(sources, parts)
        for rows, target in zip(parts, targets):
            reduce_rows(rows, op, target)

    def _broadcast(self, arrays: Rows, root: int) -> Stages:
        yield [self._comm.Ibcast(_buffer(x), root=root) for x in arrays]

    def _send(self, sources: Rows, dst: int) -> Stages:
        yield [self._comm.Isend(_buffer(x), dest=dst, tag=i) for i, x in enumerate(sources)]

    def _recv(self, targets: Rows, src: int) -> Stages:
        yield [self._comm.Irecv(_buffer(y), source=src, tag=i) for i, y in enumerate(targets)]

    def _meet(self) -> Stages:
        yield [self._comm.Ibarrier()]


def ranks_by_host(hosts: Sequence[str]) -> str:
    """The ranks of each host, in words: `ranks 0, 1 on h1; 2, 3 on h2`, or `ranks 0-7 on h1; 8-15 on h2`, from each rank's host."""
    texts = []
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, there in enumerate(hosts) if there == host]
        runs = [[rank for _, rank in run] for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
        names = [", ".join(map(str, run)) if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in runs]
        texts.append(f"{', '.join(names)} on {host}")
    return f"ranks {'; '.join(texts)}"


def _buffer(x: np.ndarray) -> list:
    """The MPI buffer specification of an array's raw bytes."""
    from mpi4py import MPI

    return [as_bytes(x), MPI.BYTE]
