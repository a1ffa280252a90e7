"""How ranks find each other, with threads for ranks; strangers, missing ranks, and what forked processes may hold."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms.checkpoint.folder import FolderLock
from bmtrain_ms.comm import CommError, CommTimeoutError, meeting
from bmtrain_ms.comm.launch import Launch
from bmtrain_ms.comm.meeting import BoardMeeting, SocketMeeting
from bmtrain_ms.files.errors import CheckpointError
from bmtrain_ms_base import board as boards
from bmtrain_ms_base import system


def together(size: int, function: Any) -> list[Any]:
    """What `function(rank)` returns, or raises, on that many threads."""
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def place(rank: int, size: int, name: str) -> Launch:
    return Launch("socket", rank, size, rank, size, f"RANK={rank}", name)


def test_ranks_meet_at_a_socket():
    name = secrets.token_hex(8)

    def meet(rank: int) -> list[Any]:
        made = SocketMeeting(place(rank, 3, name))
        try:
            return [made.allgather([rank, "é\0"]), made.allgather(rank * 2)]
        finally:
            made.close()

    assert together(3, meet) == [[[[0, "é\0"], [1, "é\0"], [2, "é\0"]], [0, 2, 4]]] * 3


def test_strangers_who_say_nothing_or_nonsense_keep_nobody_waiting():
    name = secrets.token_hex(8)
    address = f"\0bmtrain_ms-{os.geteuid()}-{name}"
    strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]

    def meet(rank: int) -> Any:
        if rank == 1:
            for stranger, words in zip(strangers, (b"", b"nonsense", b"1/7")):
                while stranger.connect_ex(address):
                    time.sleep(0.01)
                if words:
                    stranger.send(words)
        made = SocketMeeting(place(rank, 2, name))
        try:
            return made.allgather(rank)
        finally:
            made.close()

    assert together(2, meet) == [[0, 1], [0, 1]]
    for stranger in strangers:
        stranger.close()


def test_missing_ranks_are_named_with_what_it_may_mean(monkeypatch):
    monkeypatch.setattr(meeting, "_START_UP", 0.3)
    name = secrets.token_hex(8)

    def late(rank: int) -> Any:
        made = SocketMeeting(place(rank, 3, name))
        try:
            return made.allgather(rank)
        finally:
            made.close()

    results = together(2, late)
    assert isinstance(results[0], CommTimeoutError)
    assert "rank 2 of 3 did not come to init_distributed within 0.3 s" in f"{results[0]}"
    assert "in a batch script: by srun" in f"{results[0]}" and "bmtrain-ms launch -n 3 script.py" in f"{results[0]}"
    with pytest.raises(CommTimeoutError, match=r"^rank 0 of 3 did not come"):
        SocketMeeting(place(1, 3, secrets.token_hex(8)))


def test_one_rank_twice_is_told():
    name = secrets.token_hex(8)

    def meet(thread: int) -> Any:
        made = SocketMeeting(place(min(thread, 1), 3, name))
        try:
            return made.allgather(0)
        finally:
            made.close()

    results = together(3, meet)
    assert "two processes say that they are rank 1 of 3" in f"{results[0]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(f"\0bmtrain_ms-{os.geteuid()}-{name}")
        with pytest.raises(CommError, match="is there a second rank 0"):
            SocketMeeting(place(0, 2, name))


def test_ranks_meet_at_the_board_again_and_again(monkeypatch):
    board = boards.Board.make(2)
    monkeypatch.setattr(BoardMeeting, "_generations", {})

    def meet(rank: int) -> list[Any]:
        made = BoardMeeting(boards.open_board(board.address), place(rank, 2, ""), 10)
        monkeypatch.setattr(made, "_generations", {}, raising=False)  # each thread is a process of its own here
        return [made.allgather([rank, turn]) for turn in range(50)]

    assert together(2, meet) == [[[[0, turn], [1, turn]] for turn in range(50)]] * 2


def test_a_rank_that_has_ended_or_is_busy_is_named_at_the_board():
    board = boards.Board.make(2)
    board.rows[1].start()
    with pytest.raises(CommTimeoutError, match=r"^rank 1 did not come to init_distributed within 0.2 s \(started, but busy"):
        BoardMeeting(board, place(0, 2, ""), 0.2).allgather(1)
    board.rows[1].end(0)
    with pytest.raises(CommError, match=r"^rank 1 has ended without joining the others in init_distributed"):
        BoardMeeting(board, place(0, 2, ""), 60).allgather(1)


def test_what_a_rank_notes_is_read_as_it_is_and_a_forked_process_notes_nothing():
    board = boards.Board.make(3)
    row = board.rows[2]
    row.start()
    row.note(7, "all_gather (层.3)\n" + "x" * 500)
    pid = os.fork()
    if pid == 0:
        row.note(9, "of the child")
        row.end(0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (row.step, row.state, row.pid) == (7, boards.STARTED, os.getpid())
    assert row.doing.startswith("all_gather (层.3) xx") and len(row.doing) < 256
    assert boards.open_board(board.address.replace(":", ":9")) is None
    assert boards.open_board(board.address[:-1] + "x") is None


def test_a_lock_ends_with_its_process_although_a_forked_one_lives(tmp_path: Path):
    lock = FolderLock(tmp_path)
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        there.send(b"forked")
        there.recv(1)  # until the test has ended
        os._exit(0)
    try:
        assert here.recv(6) == b"forked"
        with pytest.raises(CheckpointError):
            FolderLock(tmp_path)  # this process still has it
        lock.release()
        FolderLock(tmp_path).release()
    finally:
        here.send(b"!")
        os.waitpid(child, 0)
        here.close()
        there.close()


def test_only_this_user_and_the_process_that_was_named_are_taken_for_a_peer():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    assert system.is_ours(here) and system.is_ours(here, os.getpid()) and not system.is_ours(here, os.getppid())
    here.close()
    there.close()


def test_a_process_ends_with_the_one_that_started_it():
    """Also if that one has ended before it could be said."""
    program = "import os, time; from bmtrain_ms_base import system; system.die_with(PARENT); print('alive', flush=True)"
    for parent, said in ((os.getpid(), "alive\n"), (1, "")):
        words = [sys.executable, "-c", program.replace("PARENT", f"{parent}")]
        assert subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False).stdout == said
