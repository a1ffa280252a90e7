"""How ranks find each other before they have an engine: every rank shows what the others must know, and sees what they show."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import time
from abc import ABC, abstractmethod
from typing import Any

from bmtrain_ms_base import system
from bmtrain_ms_base.board import EMPTY, ENDED, Board
from bmtrain_ms_base.launchers import Launch

from .engine import CommError, CommTimeoutError

_START_UP = 60.0  # seconds that ranks without a launcher of ours may start one after the other
_GREETING = 2.0  # seconds that a connection may stay silent
_LARGEST = 1 << 16  # bytes of a message


class Meeting(ABC):
    """A way for ranks to exchange facts before they have an engine; `rank`: this one's number, `size`: how many there are."""

    rank: int
    size: int

    @abstractmethod
    def allgather(self, fact: Any) -> list[Any]:
        """Every rank's value (JSON), by rank. All ranks call it, equally often."""

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Free what it holds."""


class MpiMeeting(Meeting):
    """A meeting by an mpi4py communicator."""

    def __init__(self, comm: Any):
        self._comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()

    def allgather(self, fact: Any) -> list[Any]:
        return [json.loads(text) for text in self._comm.allgather(json.dumps(fact))]


class BoardMeeting(Meeting):
    """A meeting by the board of our launcher, which ends the job when a rank dies: so nobody waits for the dead.

    Raises:
        CommError: a rank has ended without joining the others.
        CommTimeoutError: one did not come in time.
    """

    _generations: dict[int, int] = {}  # noqa: RUF012  (of this process: a second world goes on counting)

    def __init__(self, board: Board, launch: Launch, timeout: float):
        self._board, self._timeout = board, timeout
        self.rank, self.size = launch.rank, launch.size

    def allgather(self, fact: Any) -> list[Any]:
        generation = self._generations[os.getpid()] = self._generations.get(os.getpid(), 0) + 1
        rows = self._board.rows
        rows[self.rank].publish(generation, fact)
        deadline, pause = time.monotonic() + self._timeout, 1e-4
        while True:
            found = [row.published(generation) for row in rows]
            missing = [rank for rank, value in enumerate(found) if value is None]
            if not missing:
                return [value for values in found for value in values or ()]
            for rank in missing:
                if rows[rank].state == ENDED and rows[rank].published(generation) is None:
                    raise CommError(f"rank {rank} has ended without joining the others in init_distributed")
            if time.monotonic() > deadline:
                started = [rank for rank in missing if rows[rank].state != EMPTY]
                raise CommTimeoutError(
                    f"rank {', '.join(map(str, missing))} did not come to init_distributed within {self._timeout:g} s"
                    + (" (started, but busy with something else: raise init_distributed(timeout=...))" if started else "")
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)


class SocketMeeting(Meeting):
    """A meeting by a Unix socket of rank 0, named after the job; for ranks of one host that others than our launcher have started.

    Raises:
        CommError: the name is taken, or another user's.
        CommTimeoutError: ranks are missing.
    """

    def __init__(self, launch: Launch):
        self._launch, self.rank, self.size = launch, launch.rank, launch.size
        self._name = f"\0bmtrain_ms-{os.geteuid()}-{launch.meeting}"
        self._deadline = time.monotonic() + _START_UP
        self._peers: dict[int, socket.socket] = {}
        try:
            if self.rank == 0:
                self._listen()
            else:
                self._peers[0] = self._connect()
        except BaseException:
            self.close()
            raise

    def allgather(self, fact: Any) -> list[Any]:
        message = json.dumps(fact).encode()
        if self.rank == 0:
            facts = [fact, *(json.loads(self._receive(rank)) for rank in range(1, self.size))]
            for connection in self._peers.values():
                connection.send(json.dumps(facts).encode())
            return facts
        self._peers[0].send(message)
        return json.loads(self._receive(0))

    def close(self) -> None:
        for connection in self._peers.values():
            connection.close()
        self._peers = {}

    def _receive(self, rank: int) -> bytes:
        self._peers[rank].settimeout(_START_UP)
        try:
            data = self._peers[rank].recv(1 << 20)
        except (socket.timeout, ConnectionError) as error:
            raise CommError(f"rank {rank} did not answer at start-up: {error}") from error
        if not data:
            raise CommError(f"rank {rank} has ended at start-up")
        return data

    def _listen(self) -> None:
        """Take in the others. Whoever else connects, and says nothing, keeps nobody waiting."""
        silent: dict[socket.socket, float] = {}
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, selectors.DefaultSelector() as selector:
            try:
                listener.bind(self._name)
            except OSError as error:
                raise CommError(
                    f"another process has the address {self._name[1:]!r}, where the ranks of this job meet: is there a second rank "
                    f"0 ({self._launch.source}), or another job with the same MASTER_PORT?"
                ) from error
            listener.listen(128)
            selector.register(listener, selectors.EVENT_READ)
            try:
                while len(self._peers) < self.size - 1:
                    self._take_in(listener, selector, silent)
            finally:
                for connection in silent:
                    connection.close()

    def _take_in(self, listener: socket.socket, selector: selectors.BaseSelector, silent: dict[socket.socket, float]) -> None:
        if time.monotonic() > self._deadline:
            raise self._late([rank for rank in range(1, self.size) if rank not in self._peers])
        for key, _ in selector.select(0.2):
            if key.fileobj is not listener:
                self._welcome(key.fileobj, selector, silent)
                continue
            connection, _ = listener.accept()
            if system.is_ours(connection):
                silent[connection] = time.monotonic() + _GREETING
                selector.register(connection, selectors.EVENT_READ)
            else:
                connection.close()
        for connection in [c for c, until in silent.items() if time.monotonic() > until]:
            selector.unregister(connection)
            silent.pop(connection)
            connection.close()

    def _welcome(self, connection: Any, selector: selectors.BaseSelector, silent: dict[socket.socket, float]) -> None:
        selector.unregister(connection)
        silent.pop(connection)
        words = b""
        with contextlib.suppress(OSError):
            words = connection.recv(_LARGEST)
        rank, _, size = words.partition(b"/")
        if not (rank.isdigit() and size.isdigit()) or int(size) != self.size or not 0 < int(rank) < self.size:
            connection.close()
            return
        if int(rank) in self._peers:
            connection.close()
            raise CommError(f"two processes say that they are rank {int(rank)} of {self.size}; look at what starts them")
        self._peers[int(rank)] = connection

    def _connect(self) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.settimeout(_GREETING)
                connection.connect(self._name)
                if not system.is_ours(connection):
                    connection.close()
                    raise CommError(f"another user has the address {self._name[1:]!r}, where the ranks of this job meet")
                connection.send(f"{self.rank}/{self.size}".encode())
                return connection
            except (ConnectionError, FileNotFoundError, BlockingIOError, socket.timeout):
                connection.close()
                if time.monotonic() > self._deadline:
                    raise self._late([0]) from None
                time.sleep(0.05)

    def _late(self, missing: list[int]) -> CommTimeoutError:
        return CommTimeoutError(
            f"rank {', '.join(map(str, missing))} of {self.size} did not come to init_distributed within {_START_UP:g} s. This "
            f"process was started as rank {self.rank} ({self._launch.source}). Are all ranks started (in a batch script: by "
            "srun), on this host, and is init_distributed near their beginning? What always works: bmtrain-ms launch -n "
            f"{self.size} script.py"
        )
