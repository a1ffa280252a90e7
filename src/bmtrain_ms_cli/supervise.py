"""The process that starts the ranks of a job, watches them, and leaves nothing behind. It has a session of its own.

The command itself (`launch`) holds the other end of a pipe. What it reads there are signals to pass on; its end means that the
command was killed. It is the reaper of every process below it, so that it finds what a rank has started, whoever the parent was.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # its modules are no top-level ones

import contextlib
import json
import selectors
import signal
import subprocess
import time
from typing import Any

from bmtrain_ms_base import board as boards
from bmtrain_ms_base import system
from bmtrain_ms_cli.ends import EXIT_STOPPED, End, judge
from bmtrain_ms_cli.remains import Remains

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)
SAME_REQUEST = 1.0  # seconds, as `train.StopSignals` has it: a scheduler signals every process, and some signal twice

_GRACE = 6.0  # seconds that ranks get to find out that another one has ended, and to say so
_TERMINATION = 2.0  # seconds from SIGTERM to SIGKILL
_IMPATIENCE = 4.0  # seconds from the second signal, or the end of the command, to SIGKILL
_LAST_WORDS = 0.5  # seconds: `mpiexec` drops what it has not forwarded yet
_TICK = 0.1  # seconds: how often to look at the board


class _Rank:
    """One of the processes. `told`: signals that it got. `by_us`: whether the launcher has decided that it must end."""

    def __init__(self, number: int, row: boards.Row):
        self.number, self.row = number, row
        self.pid = 0
        self.status: int | None = None
        self.over, self.by_us = False, False
        self.at, self.told = 0.0, 0

    def ended(self, status: int | None) -> None:
        """Note that the process has ended, and how."""
        self.status, self.over, self.at = status, True, time.monotonic()

    def end(self) -> End:
        """How the rank ended, for the verdict."""
        row, status, by_us = self.row, self.status, self.by_us
        finished = row.state == boards.ENDED
        passed_on = bool(self.told) and not by_us and status is not None and os.WIFSIGNALED(status)
        ended_by_it = passed_on and os.WTERMSIG(status or 0) in (signal.SIGTERM, signal.SIGINT)
        if finished and ((by_us and row.code) or ended_by_it):  # the script was done; only its process was still there
            status, by_us = row.code << 8, False
        at = row.ended_at if finished else self.at
        known = finished or row.state == boards.EMPTY  # the latter: on another host, where nothing is noted
        return End(self.number, self.pid, status, known, row.caused, at, by_us, row.step, row.doing, row.error)


class Job:
    """The processes of one launch.

    Args:
        plan: `kind`: `launch`, `mpi` or `msrun`; `ranks`; `command`: of a rank, or of `mpiexec` with all; `variables`: what each
            rank gets besides; `scheduler`: a command and its variables, or None.
        pipe: to the command that was launched.
    """

    def __init__(self, plan: dict[str, Any], pipe: int):
        self._plan, self._front = plan, os.getppid()
        self._board = boards.Board.make(plan["ranks"])
        self._ranks = [_Rank(i, row) for i, row in enumerate(self._board.rows)]
        self._launcher = 0  # the pid of mpiexec
        self._launcher_status: int | None = None
        self._helpers: set[int] = set()  # mpiexec and the scheduler
        self._requests: list[int] = []  # signals, as ranks get them
        self._asked, self._asked_at = 0, 0.0
        self._term_at = self._kill_at = float("inf")
        self._pipe: int | None = pipe
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)
        self._selector.register(_wake_up_by_signals(), selectors.EVENT_READ)
        self._remains = Remains() if plan["kind"] == "mpi" else None

    def run(self) -> int:
        """Watch until all ranks have ended, and what they left; returns the exit code."""
        self._start()
        while True:
            self._reap()
            self._look_at_the_board()
            if all(rank.over for rank in self._ranks):
                break
            self._decide()
            self._listen(_TICK)
        self._clean()
        code, text = judge([rank.end() for rank in self._ranks], self._asked)
        if text:
            _say(text)
        return code

    # Starting #

    def _start(self) -> None:
        plan, env = self._plan, dict(os.environ)
        env.update({boards.ADDRESS: self._board.address, boards.SIZE: str(plan["ranks"]), boards.KIND: plan["kind"]})
        if plan["scheduler"] is not None:
            command, variables = plan["scheduler"]
            self._helpers.add(self._spawn(command, {**os.environ, **variables}, subprocess.DEVNULL))
        if plan["kind"] == "mpi":
            self._launcher = self._spawn(plan["command"], env, None)
            self._helpers.add(self._launcher)
            return
        for rank, variables in zip(self._ranks, plan["variables"]):
            words = {**env, **variables, boards.RANK: str(rank.number)}
            rank.pid = self._spawn(plan["command"], words, None if rank.number == 0 else subprocess.DEVNULL)

    @staticmethod
    def _spawn(command: list[str], env: dict[str, str], stdin: int | None) -> int:
        process = subprocess.Popen(command, env=env, stdin=stdin)
        process.returncode = 0  # `_reap` is who waits for it
        return process.pid

    # Watching #

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._helpers.discard(pid)
            if pid == self._launcher:
                self._launcher_status = status
            for rank in self._ranks:
                if rank.pid == pid and self._plan["kind"] != "mpi":
                    rank.ended(status)

    def _look_at_the_board(self) -> None:
        """Read the board, which says under `mpiexec` which processes the ranks are, and how they ended."""
        if self._plan["kind"] != "mpi":
            return
        for rank in self._ranks:
            row = rank.row
            if rank.over:
                continue
            rank.pid = row.pid
            alone = row.waiter and not system.is_alive(row.waiter)  # who waited was killed, and the rank with it
            if row.status is not None:
                rank.ended(row.status)
            elif alone:
                system.tell(rank.pid, signal.SIGKILL) if rank.pid else None
                rank.ended(signal.SIGKILL)
            elif self._launcher_status is not None:  # a rank on another host, or one that was never started
                lost = os.WIFSIGNALED(self._launcher_status) and not self._asked and not rank.pid  # by `hosts.call`: no rank's end
                rank.ended(None if lost else self._launcher_status)

    def _decide(self) -> None:
        now = time.monotonic()
        going = [rank for rank in self._ranks if not rank.over]
        if self._term_at == float("inf") and any(self._has_failed(rank) for rank in self._ranks):
            self._term_at = now + _GRACE
            self._kill_at = min(self._kill_at, self._term_at + _TERMINATION)
        if now >= min(self._term_at, self._kill_at) and not any(rank.by_us for rank in going):
            self._dump(going)
            for rank in going:
                rank.by_us = True
                self._tell(rank, signal.SIGTERM)
        if now >= self._kill_at:
            for rank in going:
                rank.by_us = True
                self._tell(rank, signal.SIGKILL)
        for rank in going:
            if rank.row.state != boards.EMPTY or self._plan["kind"] != "mpi":  # else its process is not known yet
                for signum in self._requests[rank.told :]:
                    self._tell(rank, signum)
                rank.told = len(self._requests)

    @staticmethod
    def _has_failed(rank: _Rank) -> bool:
        """Whether a rank has failed, also one whose process is still there after its script: MPI may be waiting for the others."""
        if rank.over:
            return rank.end().failed
        return rank.row.state == boards.ENDED and rank.row.code not in (0, EXIT_STOPPED)

    @staticmethod
    def _tell(rank: _Rank, signum: int) -> None:
        if rank.pid:
            system.tell(rank.pid, signum)

    @staticmethod
    def _dump(ranks: list[_Rank]) -> None:
        """Ranks that go on although others have failed are stuck: where?"""
        for rank in ranks:
            if rank.row.state in (boards.STARTED, boards.JOINED):
                _say(f"rank {rank.number} (pid {rank.pid}) is still there; its stacks:")
                system.tell(rank.pid, system.DUMP)
                time.sleep(0.2)

    # Signals #

    def _listen(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            data = os.read(key.fd, 4096)
            for signum in data:
                if signum in PASSED_ON:
                    self._request(signum)
            if not data and key.fd == self._pipe:
                self._lose_the_command()
        if self._pipe is not None and os.getppid() != self._front:
            self._lose_the_command()

    def _lose_the_command(self) -> None:
        """Go on without the command, which was killed."""
        if self._pipe is not None:
            self._selector.unregister(self._pipe)
            self._pipe = None
            _say(f"the command (pid {self._front}) was killed, so the ranks are told to end")
        self._request(signal.SIGTERM)
        self._kill_at = min(self._kill_at, time.monotonic() + _IMPATIENCE)

    def _request(self, signum: int) -> None:
        """The first asks ranks to save and end, a later one to end at once."""
        now = time.monotonic()
        if self._requests and now - self._asked_at < SAME_REQUEST:
            return
        if self._requests:
            self._kill_at = min(self._kill_at, now + _IMPATIENCE)
        else:
            self._asked, self._asked_at = signum, now
        self._requests.append(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

    # Cleaning #

    def _clean(self) -> None:
        """End what the ranks have left behind, then what started them."""
        self._end(_TERMINATION, spare_launcher=True)
        deadline = time.monotonic() + (_IMPATIENCE if all(not rank.end().failed for rank in self._ranks) else _LAST_WORDS)
        while self._launcher in self._helpers and time.monotonic() < deadline:
            self._listen(0.02)
            self._reap()
        self._end(0.0)
        if self._remains is not None:
            self._remains.remove()

    def _end(self, grace: float, spare_launcher: bool = False) -> None:
        """End every process below this one: SIGTERM, and later SIGKILL."""
        start = time.monotonic()
        told: set[int] = set()
        while time.monotonic() < start + grace + _IMPATIENCE:
            self._reap()
            below = [pid for pid in system.descendants(os.getpid()) if not (spare_launcher and self._is_launcher(pid))]
            if not below:
                return
            late = time.monotonic() >= start + grace
            for pid in below:
                if late or pid not in told:
                    system.tell(pid, signal.SIGKILL if late else signal.SIGTERM)
                    told.add(pid)
            self._listen(0.02)

    def _is_launcher(self, pid: int) -> bool:
        """Whether a process is `mpiexec`, one of its proxies, or one of the processes that wait for the ranks there."""
        waits = any(rank.row.waiter == pid for rank in self._ranks)
        return self._launcher != 0 and (pid == self._launcher or waits or system.name_of(pid).startswith("hydra"))


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        os.write(2, f"bmtrain-ms: {text}\n".encode())


def _wake_up_by_signals() -> int:
    """A file that becomes readable, with the signal's number in it, when one comes."""
    readable, writable = os.pipe()
    for end in (readable, writable):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for signum in (signal.SIGCHLD, *PASSED_ON):
        if signal.getsignal(signum) != signal.SIG_IGN or signum == signal.SIGCHLD:  # under nohup SIGHUP stays ignored
            signal.signal(signum, lambda *_: None)
    return readable


def main() -> None:
    """Run the job that is described in the arguments: the number of the pipe, and a plan as JSON."""
    system.open_streams()
    system.adopt_orphans()
    raise SystemExit(Job(json.loads(sys.argv[2]), int(sys.argv[1])).run())


if __name__ == "__main__":
    main()
