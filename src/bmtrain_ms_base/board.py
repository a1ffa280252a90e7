"""The board: a few pages of memory in which every rank of a job notes what it does, and the launcher reads how it ended.

The launcher makes it (a memory file, which has no name that could stay behind) and ranks open it through the launcher's `/proc`
entry, however they were started. Each rank writes its own row only.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import struct
import time
import zlib
from typing import Any, Mapping

ADDRESS, RANK, SIZE, KIND = "BMTRAIN_MS_BOARD", "BMTRAIN_MS_RANK", "BMTRAIN_MS_SIZE", "BMTRAIN_MS_KIND"

EMPTY, STARTED, JOINED, ENDED = range(4)  # states of a rank; joined: `init_distributed` has returned once

_HEAD = struct.Struct("<16sI")  # token, ranks
_FACT = struct.Struct("<QII")  # generation, length, checksum
_ROW = 4096
_PID, _STATE, _STEP, _WAITED, _ENDED, _CODE, _CAUSED, _WAITER, _DOING, _ERROR, _FACTS = 0, 8, 16, 24, 40, 48, 52, 56, 64, 320, 576
_TEXT = 256  # bytes for what it does, and for its error
_FACT_SIZE = 1600


class Row:
    """What one rank says about itself."""

    def __init__(self, memory: mmap.mmap, start: int):
        self._memory, self._start = memory, start
        self._owner = 0  # the process that may write

    # Written by the rank #

    def start(self) -> None:
        """This process is the rank."""
        self._put("<q", _PID, os.getpid())
        self._put("<q", _STATE, STARTED)
        self._owner = os.getpid()

    def take(self) -> bool:
        """Whether this process is the one that has started as this rank; then it may write."""
        if self.pid == os.getpid():
            self._owner = os.getpid()
        return self._mine()

    def join(self) -> None:
        """Note that the rank has found the others."""
        if self._mine():
            self._put("<q", _STATE, JOINED)

    def note(self, step: int, doing: str = "") -> None:
        """The training step, and the collective that is issued."""
        if self._mine():
            self._put("<q", _STEP, step)
            if doing:
                self._write(_DOING, doing)

    def end(self, code: int, error: str = "", caused: bool = False) -> None:
        """The script has come to its end; `caused`: by the failure of another rank."""
        if self._mine():
            self._write(_ERROR, error)
            self._put("<d", _ENDED, time.monotonic())
            self._put("<i", _CODE, code)
            self._put("<i", _CAUSED, caused)
            self._put("<q", _STATE, ENDED)

    def wait(self) -> None:
        """This process will wait for the rank, which is its child, in the launcher's place."""
        self._put("<q", _WAITER, os.getpid())

    def waited(self, status: int) -> None:
        """Note that the rank has ended, with this status of `os.waitpid`."""
        self._put("<qq", _WAITED, 1, status)

    # Read by the launcher #

    pid = property(lambda self: self._get("<q", _PID))
    waiter = property(lambda self: self._get("<q", _WAITER))
    state = property(lambda self: self._get("<q", _STATE))
    step = property(lambda self: self._get("<q", _STEP))
    ended_at = property(lambda self: self._get("<d", _ENDED))
    code = property(lambda self: self._get("<i", _CODE))
    caused = property(lambda self: bool(self._get("<i", _CAUSED)))
    doing = property(lambda self: self._read(_DOING))
    error = property(lambda self: self._read(_ERROR))

    @property
    def status(self) -> int | None:
        """What `waited` was told, or None."""
        known, status = struct.unpack_from("<qq", self._memory, self._start + _WAITED)
        return status if known else None

    # What ranks tell each other #

    def publish(self, generation: int, fact: Any) -> None:
        """Show a value (JSON) to the other ranks. The one before stays: somebody may still be reading it."""
        data = json.dumps(fact).encode()
        if len(data) > _FACT_SIZE - _FACT.size:
            raise ValueError(f"{len(data)} bytes do not fit on the board")
        place = self._start + _FACTS + generation % 2 * _FACT_SIZE
        self._memory[place + _FACT.size : place + _FACT.size + len(data)] = data
        _FACT.pack_into(self._memory, place, generation, len(data), zlib.crc32(data))

    def published(self, generation: int) -> list | None:
        """[value], or None while it is not there."""
        place = self._start + _FACTS + generation % 2 * _FACT_SIZE
        found, length, checksum = _FACT.unpack_from(self._memory, place)
        data = self._memory[place + _FACT.size : place + _FACT.size + min(length, _FACT_SIZE)]
        return [json.loads(data)] if found == generation and zlib.crc32(data) == checksum else None

    def _mine(self) -> bool:
        """Whether the row is this process's: not in a process that was forked from the rank."""
        return os.getpid() == self._owner

    def _put(self, form: str, offset: int, *values: Any) -> None:
        struct.pack_into(form, self._memory, self._start + offset, *values)

    def _get(self, form: str, offset: int) -> Any:
        return struct.unpack_from(form, self._memory, self._start + offset)[0]

    def _write(self, offset: int, text: str) -> None:
        struct.pack_into(f"{_TEXT}s", self._memory, self._start + offset, text.encode(errors="replace")[: _TEXT - 1])

    def _read(self, offset: int) -> str:
        (data,) = struct.unpack_from(f"{_TEXT}s", self._memory, self._start + offset)
        text = data.partition(b"\0")[0].decode(errors="ignore")
        return "".join(c if c.isprintable() else " " for c in text)


class Board:
    """All rows; `launcher`: the process that made it."""

    def __init__(self, memory: mmap.mmap, launcher: int, ranks: int):
        self.launcher = launcher
        self.rows = [Row(memory, _ROW * (1 + i)) for i in range(ranks)]
        self.address = ""

    @classmethod
    def make(cls, ranks: int) -> Board:
        """A new one, of this process."""
        file = os.memfd_create("bmtrain_ms-board")
        os.truncate(file, _ROW * (1 + ranks))
        memory = mmap.mmap(file, _ROW * (1 + ranks))
        token = secrets.token_bytes(16)
        _HEAD.pack_into(memory, 0, token, ranks)
        board = cls(memory, os.getpid(), ranks)
        board.address = f"{os.getpid()}:{file}:{token.hex()}"
        return board


def open_board(address: str) -> Board | None:
    """The board of the launcher that set `BMTRAIN_MS_BOARD`; None when that has ended, or is on another host."""
    try:
        launcher, file, token = address.split(":")
        handle = os.open(f"/proc/{int(launcher)}/fd/{int(file)}", os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        memory = mmap.mmap(handle, 0)
    except (OSError, ValueError):
        return None
    finally:
        os.close(handle)
    if len(memory) < _ROW:
        return None
    found, ranks = _HEAD.unpack_from(memory, 0)
    if found.hex() != token or len(memory) != _ROW * (1 + ranks):
        return None
    return Board(memory, int(launcher), ranks)


_opened: dict[tuple[str, int], Board | None] = {}  # by address, and by process: a forked one is not the rank


def own_board(env: Mapping[str, str] = os.environ) -> Board | None:
    """The board on which this very process is a rank, or None."""
    key = env.get(ADDRESS, ""), os.getpid()
    if key not in _opened:
        board = open_board(key[0])
        rank = env.get(RANK, "")
        known = board is not None and rank.isdecimal() and int(rank) < len(board.rows)
        _opened[key] = board if known and board.rows[int(rank)].take() else None
    return _opened[key]


def own_row(env: Mapping[str, str] = os.environ) -> Row | None:
    """This rank's row, or None where there is no board."""
    board = own_board(env)
    return None if board is None else board.rows[int(env[RANK])]
