"""Ranks of one host that read each other's memory.

Who issues an operation tells the others where its inputs lie (*post*); who has everybody's post takes what it needs, with one copy
and without the other's help (`comm.pull`), and says so (*done*). An operation has finished when this rank has taken what it needs
and the others have taken what they need from it. Nobody polls: each process has one thread that sleeps until a message comes.

A post also says what is issued, so ranks that disagree find out before any memory is touched, and a rank that dies closes its
sockets, which the others notice at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np

from bmtrain_ms_base import system

from .engine import Clock, CommError, CommTimeoutError, Engine, Work
from .host import LARGEST_SIGNATURE, HostEngine, Job, Operation, Rows, Stages, as_bytes, disagreement
from .meeting import Meeting
from .pull import Piece, address_of, allow_siblings, pull
from .reduce import in_batches, reduce_rows

Key = tuple[str, int]  # (group or pair of ranks, number of the operation there)
_LARGEST_MESSAGE = 1 << 17  # bytes; a packet must fit into the socket's buffer, 208 KiB by default ...
_MOST_TENSORS = 1 << 12  # ... with the addresses of this many, and a signature
AT_ONCE = 1 << 20  # bytes of each rank that are copied before they are summed up: they are still in the cache then
_GREETING = 2.0  # seconds that a connection may stay silent at start-up
_LAST_WORDS = 5.0  # seconds that a closing engine tries to send what others may need


class _Job(Job):
    """One operation among ranks of this host, which are numbered as in the node group."""

    def __init__(self, operation: Operation, timeout: float, key: Key):
        """`key`: what others call this operation."""
        super().__init__(operation.what, operation.outputs, operation.stages, None, timeout)
        self.key, self.signature = key, operation.signature
        self.line = key[0]  # operations of a line run in order
        self.tells: list[int] = []  # who gets our posts
        self.needs: list[int] = []  # whose posts we need
        self.reads: list[int] = []  # whose memory we read
        self.readers: list[int] = []  # who reads ours
        self.stage, self.pulled = 0, False
        self.keep = next(operation.stages)  # the inputs of the first stage


class _Peer:
    """The connection to another rank. Messages are JSON lists, one a packet; what does not fit in the pipe waits here."""

    def __init__(self, rank: int, connection: socket.socket, pid: int):
        self.rank, self.connection, self.pid = rank, connection, pid
        self.outbox: deque[bytes] = deque()
        self.gone = False  # nothing more will come


class NodeThread:
    """Drives every operation of a process: sends, receives, copies, reduces."""

    def __init__(self, rank: int, peers: Sequence[_Peer]):
        self.rank, self.peers = rank, {peer.rank: peer for peer in peers}
        self._lock = threading.Lock()  # outboxes and the queue of new jobs
        self._new: deque[_Job] = deque()
        self._lines: dict[str, deque[_Job]] = {}  # operations of a group or pair, in order
        self._posts: dict[tuple[Key, int], dict[int, tuple[str, list[int]]]] = {}
        self._done: dict[Key, set[int]] = {}
        self._own: list[list] = []  # messages to oneself
        self._inbox = bytearray(_LARGEST_MESSAGE)
        self._failure: BaseException | None = None
        self._told: BaseException | None = None  # another rank's failure
        self._closed, self._last_words = False, 0.0
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        for peer in peers:
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="bmtrain_ms-node", daemon=True)
        self._thread.start()
        system.close_in_children(self)

    # Called by the rank's own threads #

    def submit(self, job: _Job) -> _Job:
        """Post the operation and queue it."""
        with self._lock:
            if self._closed:
                raise CommError(f"{job.what}: the engine is closed")
            self._new.append(job)
            self._post(job)
        self._waker.send(b"!")
        return job

    @property
    def lost(self) -> BaseException | None:
        """The error of an operation that did not end in time, if there is one; see `Engine.lost`."""
        return self._failure if isinstance(self._failure, CommTimeoutError) else None

    def close(self) -> None:
        """Finish what is queued, then end the thread."""
        if self._thread.is_alive():
            with self._lock:
                self._closed, self._last_words = True, time.monotonic() + _LAST_WORDS
            self._waker.send(b"!")
            self._thread.join()
            self._let_go()

    def close_in_child(self) -> None:
        """A process that was forked from the rank is no rank: while it held the connections, nobody could see the rank end."""
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        for peer in self.peers.values():
            peer.connection.close()
        self._woken.close()
        self._waker.close()
        self._selector.close()

    # The thread #

    def _run(self) -> None:
        try:
            while self._turn():
                for key, _ in self._selector.select(self._patience()):
                    if key.data is None:
                        self._woken.recv(1 << 12)
                    else:
                        self._serve(key.data)
        except BaseException as error:  # a defect here must not leave anybody waiting
            with self._lock:
                self._closed = True
            self._take_new()
            for job in [job for line in self._lines.values() for job in line]:
                job.finish(error)
            raise

    def _turn(self) -> bool:
        """Do what can be done; False when all is done and the engine is closed."""
        while True:
            self._take_new()
            for line in list(self._lines.values()):
                self._progress(line)
            if not self._own:  # a message to oneself wakes nobody
                break
        self._lines = {name: line for name, line in self._lines.items() if line}
        if not self._closed or self._lines or self._new:
            return True
        return any(peer.outbox for peer in self.peers.values()) and time.monotonic() < self._last_words

    def _take_new(self) -> None:
        with self._lock:
            jobs, self._new = self._new, deque()
            own, self._own = self._own, []
        for message in own:
            self._receive(self.rank, *message)
        for job in jobs:
            self._lines.setdefault(job.line, deque()).append(job)

    def _patience(self) -> float | None:
        """Seconds until the first operation is late."""
        heads = [line[0].deadline for line in self._lines.values()]
        if self._closed:
            heads.append(self._last_words)
        return max(0.0, min(heads) - time.monotonic()) if heads else None

    def _progress(self, line: deque[_Job]) -> None:
        while line:
            job = line[0]
            try:
                if not self._advance(job):
                    return
                job.finish()
            except BaseException as error:
                if self._failure is None:
                    self._failure = error  # a group with a lost operation cannot be used again
                    late = isinstance(error, CommTimeoutError)
                    self._send_all(["fail", f"{error}"[:LARGEST_SIGNATURE], late])
                    if late and self._told is None:
                        system.write_stacks(f"rank {self.rank}: {error}")
                job.finish(error)
            line.popleft()
            self._done.pop(job.key, None)

    def _advance(self, job: _Job) -> bool:
        """True when the operation has ended."""
        if self._failure is not None:
            raise self._failure
        if not job.started:
            job.start()
        while not job.pulled:
            posts = self._posts.get((job.key, job.stage), {})
            missing = [peer for peer in job.needs if peer not in posts]
            self._check_posts(job, posts)
            if missing:
                return self._wait_for(job, missing)
            self._posts.pop((job.key, job.stage), None)
            try:
                job.keep = job.stages.send({peer: addresses for peer, (_, addresses) in posts.items()})
                job.stage += 1
                with self._lock:
                    self._post(job)
            except StopIteration:
                job.pulled = True
                with self._lock:
                    self._send(job.reads, ["done", *job.key])
        missing = [peer for peer in job.readers if peer not in self._done.get(job.key, ())]
        return self._wait_for(job, missing) if missing else True

    def _wait_for(self, job: _Job, missing: list[int]) -> bool:
        """Return False while the missing ranks may still come; raise when one of them has ended, or the time is over."""
        if self._told is not None:
            raise self._told
        for rank in missing:
            if rank in self.peers and self.peers[rank].gone:
                raise CommError(f"{job.what} cannot finish: rank {rank} has ended")
        if time.monotonic() < job.deadline:
            return False
        raise CommTimeoutError(
            f"{job.what} did not finish within {job.timeout:g} s: rank {', '.join(map(str, missing))} is dead, stuck, or did not "
            "issue this operation; look for the first error among the ranks, or raise init_distributed(timeout=...)"
        )

    @staticmethod
    def _check_posts(job: _Job, posts: dict[int, tuple[str, list[int]]]) -> None:
        for peer, (signature, _) in posts.items():
            if signature != job.signature:
                raise CommError(f"{job.what}: {disagreement(job.signature, signature, peer)}")

    # Messages #

    def _post(self, job: _Job) -> None:
        """Tell the others what is issued and where its inputs lie. Under the lock."""
        self._send(job.tells, ["post", *job.key, job.stage, job.signature, [address_of(x) for x in job.keep]])

    def _send_all(self, message: list) -> None:
        with self._lock:
            self._send(self.peers, message)

    def _send(self, ranks: Iterable[int], message: list) -> None:
        """Put a message for these ranks into their outboxes; the caller has the lock."""
        packet = json.dumps(message, ensure_ascii=False).encode()
        for rank in ranks:
            if rank == self.rank:
                self._own.append(message)
            elif not self.peers[rank].gone:
                self.peers[rank].outbox.append(packet)
                self._flush(self.peers[rank])

    def _flush(self, peer: _Peer) -> None:
        """Send as much of a peer's outbox as its connection takes now; the caller has the lock."""
        try:
            while peer.outbox:
                peer.connection.send(peer.outbox[0])
                peer.outbox.popleft()
        except BlockingIOError:
            pass
        except OSError:
            peer.outbox.clear()  # it is gone; its end of the connection says so to `_serve`
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outbox else 0)
        if self._selector.get_key(peer.connection).events != wanted:
            self._selector.modify(peer.connection, wanted, peer)

    def _serve(self, peer: _Peer) -> None:
        if peer.outbox:
            with self._lock:
                self._flush(peer)
        while True:
            try:
                length = peer.connection.recv_into(self._inbox)
            except BlockingIOError:
                return
            except OSError:
                length = 0
            if not length:
                with self._lock:
                    peer.gone = True
                    peer.outbox.clear()
                    self._selector.unregister(peer.connection)
                return
            self._receive(peer.rank, *json.loads(self._inbox[:length]))

    def _receive(self, rank: int, kind: str, *rest: Any) -> None:
        if kind == "post":
            name, number, stage, signature, addresses = rest
            self._posts.setdefault(((name, number), stage), {})[rank] = (signature, addresses)
        elif kind == "done":
            self._done.setdefault((rest[0], rest[1]), set()).add(rank)
        elif self._told is None:
            self._told = CommError(f"rank {rank} failed: {rest[0]}")
            if rest[1] and self._failure is None:  # late: this may be the rank that is stuck
                system.write_stacks(f"rank {self.rank}: {self._told}")


class NodeEngine(HostEngine):
    """Ranks of one host; see the module's docstring."""

    name = "node"

    def __init__(self, thread: NodeThread, ranks: Sequence[int], clock: Clock, timeout: float, name: str = "", owner: bool = False):
        """
        Args:
            thread: drives the operations.
            ranks: the group, as ranks of the thread.
            clock: the training step, for messages.
            timeout: seconds that an operation may take after its turn has come.
            name: of the group; the same on all its ranks, and used once.
            owner: whether closing the engine ends the thread.
        """
        super().__init__()
        self._thread, self._ranks, self.clock, self._timeout, self._owner = thread, list(ranks), clock, timeout, owner
        self.rank, self.size = self._ranks.index(thread.rank), len(self._ranks)
        self._group = name
        self._made: dict[tuple[int, ...], int] = {}  # sub-groups
        self._issued: dict[str, int] = {}

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        self._check_subgroup(ranks)
        count = self._made[tuple(ranks)] = self._made.get(tuple(ranks), 0) + 1
        name = f"{self._group}/{','.join(map(str, ranks))}#{count}"
        members = [self._ranks[i] for i in ranks]
        return NodeEngine(self._thread, members, self.clock, self._timeout, name)

    @property
    def lost(self) -> BaseException | None:
        return self._thread.lost

    def close(self) -> None:
        if self._owner:
            self._thread.close()

    # The transport #

    def _submit(self, operation: Operation) -> Work:
        if len(operation.arrays) > _MOST_TENSORS:
            raise CommError(
                f"{operation.what}: {len(operation.arrays)} tensors are too many for one operation; pass at most {_MOST_TENSORS}"
            )
        op, pair = operation.op, operation.pair
        if pair is None:
            job = self._job(operation, self._group)
            others = [rank for rank in self._ranks if rank != self._thread.rank]
            job.tells = job.needs = others
            if operation.root is not None:
                root = self._ranks[operation.root]
                job.reads, job.readers = ([], others) if root == self._thread.rank else ([root], [])
            elif op != "barrier":
                job.reads = job.readers = others
        else:
            sender, receiver = (self._ranks[rank] for rank in pair)
            job = self._job(operation, f"{self._group}:{sender}>{receiver}", mark="<" if op == "recv" else ">")
            if op == "recv":
                job.needs = job.reads = [sender]
            else:
                job.tells = job.readers = [receiver]
        return self._thread.submit(job)

    def _job(self, operation: Operation, line: str, mark: str = "") -> _Job:
        """`mark`: tells the ends of a message apart, which count it alike but do not wait for each other's order."""
        number = self._issued[line + mark] = self._issued.get(line + mark, 0) + 1
        job = _Job(operation, self._timeout, (line, number))
        job.line = line + mark
        return job

    def _pull(self, rank: int, pieces: Sequence[Piece]) -> None:
        there = self._ranks[rank]
        try:
            pull(os.getpid() if there == self._thread.rank else self._thread.peers[there].pid, pieces)
        except OSError as error:
            raise CommError(f"rank {rank} has ended, or its memory cannot be read: {error}") from error

    def _others(self) -> list[int]:
        """Ranks of the group, starting behind this one: so not all read from the same one first."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]

    def _gather(self, sources: Rows, targets: Rows) -> Stages:
        posts = yield sources
        flat = [as_bytes(y).reshape(self.size, -1) for y in targets]
        for source, rows in zip(sources, flat):
            rows[self.rank] = as_bytes(source)
        for rank in self._others():
            self._pull(rank, [(there, rows[rank]) for there, rows in zip(posts[self._ranks[rank]], flat)])

    def _exchange(self, sources: Rows, targets: Rows) -> Stages:
        posts = yield sources
        flat = [as_bytes(y).reshape(self.size, -1) for y in targets]
        for source, rows in zip(sources, flat):
            rows[self.rank] = as_bytes(source).reshape(self.size, -1)[self.rank]
        for rank in self._others():
            there = posts[self._ranks[rank]]
            self._pull(rank, [(start + self.rank * rows[rank].nbytes, rows[rank]) for start, rows in zip(there, flat)])

    def _reduce_parts(self, sources: Rows, targets: Rows, op: str) -> Stages:
        posts = yield sources
        own = [x.reshape(self.size, -1)[self.rank] for x in sources]
        for batch in in_batches(targets, AT_ONCE):
            scratch = self._scratch_like([(self.size, part.stop - part.start, targets[i].dtype) for i, part in batch])
            for rank in self._others():
                there = posts[self._ranks[rank]]
                starts = (there[i] + self.rank * own[i].nbytes + part.start * own[i].itemsize for i, part in batch)
                self._pull(rank, [(start, rows[rank]) for start, rows in zip(starts, scratch)])
            for (i, part), rows in zip(batch, scratch):
                gathered = [own[i][part] if rank == self.rank else rows[rank] for rank in range(self.size)]
                reduce_rows(gathered, op, targets[i][part])

    def _broadcast(self, arrays: Rows, root: int) -> Stages:
        posts = yield arrays
        if root != self.rank:
            self._pull(root, list(zip(posts[self._ranks[root]], map(as_bytes, arrays))))

    def _send(self, sources: Rows, dst: int) -> Stages:
        yield sources

    def _recv(self, targets: Rows, src: int) -> Stages:
        posts = yield targets
        self._pull(src, list(zip(posts[self._ranks[src]], map(as_bytes, targets))))

    def _meet(self) -> Stages:
        yield []


def connect(meeting: Meeting, clock: Clock, timeout: float, launcher: int = 0) -> NodeEngine | None:
    """The engine of ranks that all run on one host, or None where they cannot read each other's memory.

    Collective over `meeting`, which is needed no longer afterwards. `launcher`: the process from which all ranks descend, by
    default this one's parent.
    """
    if not hasattr(socket, "SOCK_SEQPACKET") or not Path("/proc/self").exists():
        return None  # not Linux
    allow_siblings(launcher or os.getppid())
    token = np.frombuffer(secrets.token_bytes(16), np.uint8)
    rank, size = meeting.rank, meeting.size
    name = f"\0bmtrain_ms-{secrets.token_hex(8)}"  # an abstract address: no file, gone with the socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen(max(size, 128))
        facts = meeting.allgather([socket.gethostname(), name, os.getpid(), address_of(token), token.tobytes().hex()])
        readable = all(host == facts[0][0] and _can_read(pid, there, bits) for host, _, pid, there, bits in facts)
        if not all(meeting.allgather(readable)):
            return None
        peers = []
        for other in range(rank):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect(facts[other][1])
            connection.send(bytes.fromhex(facts[other][4]) + rank.to_bytes(4, "little"))
            peers.append(_Peer(other, connection, facts[other][2]))
        peers += _welcome(listener, token.tobytes(), {other: facts[other][2] for other in range(rank + 1, size)}, timeout)
    return NodeEngine(NodeThread(rank, peers), range(size), clock, timeout, owner=True)


def _welcome(listener: socket.socket, token: bytes, expected: dict[int, int], timeout: float) -> list[_Peer]:
    """Take in the ranks that are processes `expected`, and nobody else; who connects and says nothing keeps nobody waiting."""
    peers: list[_Peer] = []
    deadline = time.monotonic() + timeout
    while expected:
        listener.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except (socket.timeout, BlockingIOError):
            missing = ", ".join(map(str, expected))
            raise CommTimeoutError(f"rank {missing} did not connect within {timeout:g} s; look for the first error there") from None
        if system.is_ours(connection) and any(system.is_ours(connection, pid) for pid in expected.values()):
            connection.settimeout(_GREETING)  # a rank's greeting follows at once
            with contextlib.suppress(OSError):
                hello = connection.recv(64)
                rank = int.from_bytes(hello[16:], "little")
                if hello[:16] == token and rank in expected and system.is_ours(connection, expected[rank]):
                    peers.append(_Peer(rank, connection, expected.pop(rank)))
                    continue
        connection.close()  # not of this job
    return peers


def _can_read(pid: int, there: int, bits: str) -> bool:
    """Whether process `pid` is the one that it should be, and lets us read."""
    here = np.zeros(len(bits) // 2, np.uint8)
    try:
        pull(pid, [(there, here)])
    except OSError:
        return False
    return here.tobytes().hex() == bits
