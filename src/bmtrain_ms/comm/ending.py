"""How a rank ends that cannot go on: the launcher is told, and where that does not help the process ends all the same.

A host that vanishes takes the launcher's connections with it: `MPI_Abort` and `MPI_Finalize` wait for ever then, and so does a
write to an output that nobody reads any more. None of them can be interrupted from Python, and some hold the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Iterator

LAST_WORDS = 1.0  # seconds: a launcher that is told to abort drops what it has not forwarded yet
PATIENCE = 5.0  # seconds for the launcher to end this process
_PR_SET_PDEATHSIG = 1

_mpi: list[Any] = []  # mpi4py.MPI, once it is in use


def install(MPI: Any) -> None:
    """A rank that dies ends the job with its traceback: the others would wait for it until the time-out. Once in a process."""
    if _mpi:
        return
    _mpi.append(MPI)
    _die_with_the_proxy()

    def hook(kind: type[BaseException], error: BaseException, where: Any) -> None:
        end_job("".join(traceback.format_exception(kind, error, where)))

    sys.excepthook = hook


def end_job(text: str) -> None:
    """Write `text` and end all ranks, this one with code 1; does nothing in a process without MPI, where nobody waits."""
    if not _mpi:
        return
    world = _mpi[0].COMM_WORLD
    end_soon(LAST_WORDS + PATIENCE, os.open(os.devnull, os.O_WRONLY))  # first of all: every line below may block
    message = "".join(f"[rank {world.Get_rank()}] {line}\n" for line in text.splitlines())
    writer = threading.Thread(target=_write, args=[message], daemon=True)
    try:
        writer.start()
    except RuntimeError:  # Python 3.12.0 starts no thread at exit
        _write(message)
    time.sleep(LAST_WORDS)
    if writer.is_alive() and _has_proxy():  # it reads no more, so it does not end the other ranks of this host either
        os.kill(os.getppid(), signal.SIGKILL)
    world.Abort(1)
    os._exit(1)


def _write(message: str) -> None:
    sys.stderr.write(message)
    sys.stdout.flush()
    sys.stderr.flush()


def end_soon(seconds: float, stacks: int) -> None:
    """End this process with code 1 when `seconds` have passed, whatever it does then: by a thread that needs no interpreter.

    `stacks`: an open file, by its number, for what every thread did.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=stacks)


@contextlib.contextmanager
def limited(what: str, seconds: float) -> Iterator[None]:
    """The body of the `with` statement, which waits for other ranks inside MPI, ends within `seconds`, or the process does."""

    def late() -> None:
        text = (
            f"{what} did not finish within {seconds:g} s: not all ranks have come; look for the first error among the other ranks"
        )
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    end_soon(seconds + PATIENCE, 2)  # says where, if MPI does not even let `late` run
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()


def _has_proxy() -> bool:
    """Whether `mpiexec` has started this process, by its proxy on this host."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{os.getppid()}/comm").read_text().startswith("hydra")
    return False


def _die_with_the_proxy() -> None:
    """`mpiexec` ends the ranks of a host through its proxy there: without it nobody could."""
    if _has_proxy():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
