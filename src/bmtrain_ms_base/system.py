"""What Linux knows about processes: who started whom, who ends with whom, who is at the other end of a socket."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import struct
import sys
import weakref
from pathlib import Path
from typing import Any

DUMP = signal.SIGRTMAX - 3  # the runner of a rank answers with its stacks; of the 30 real-time signals one that nobody uses

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 1, 36, 37


def _prctl(option: int, value: Any) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def open_streams() -> None:
    """Have the null device be behind each standard stream that this process was started without, as by `>&-` or some schedulers.

    The next file that is opened would be it otherwise, and get what is written to standard error.
    """
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:  # Python found it closed; whatever has its number since is no stream
            stream = open(os.devnull, mode, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def cores() -> list[int]:
    """The cores that this process may use now, by number."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def die_with(parent: int) -> None:
    """Have the system kill this process when the one that started it ends; `parent` is the one that should have."""
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before the system knew
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans(adopt: bool = True) -> bool:
    """Make processes whose parent ends children of this one, if they descend from it; returns whether they were before."""
    before = ctypes.c_int(0)
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(adopt))
    return bool(before.value)


def descendants(root: int) -> list[int]:
    """Processes that `root` started, that these started, and so on; those that have ended already are left out."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]  # pid (name) state parent ...
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(status.parent.name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        started = children.get(waiting.pop(), [])
        found += started
        waiting += started
    return found


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def name_of(pid: int) -> str:
    """The name of a process's program, empty when it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def tell(pid: int, signum: int) -> None:
    """Send a signal; nothing happens if the process has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signum)


def has_ascend() -> bool:
    """Whether this host has Ascend devices."""
    return any(Path("/dev").glob("davinci[0-9]*"))


def signal_name(signum: int) -> str:
    """The name of a signal, as SIGTERM for 15."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def is_ours(connection: socket.socket, pid: int | None = None) -> bool:
    """Whether this user, and if given the process `pid`, is at the other end of a Unix socket."""
    their_pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid == os.geteuid() and pid in (None, their_pid)


def write_stacks(why: str) -> None:
    """Write the Python stack of every thread to standard error, in one piece: other ranks may be writing theirs."""
    with contextlib.suppress(OSError), os.fdopen(os.memfd_create("stacks"), "r+b") as file:
        file.write(f"{why}; the stacks of this process ({os.getpid()}):\n".encode())
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        os.write(2, file.read())


_CLOSED_IN_CHILDREN: weakref.WeakSet[Any] = weakref.WeakSet()


def close_in_children(holder: Any) -> None:
    """Have `holder.close_in_child()` called in every process that is forked from this one.

    A forked process, e.g. a data worker, has a copy of every socket and lock. While it lives, nobody else can see that its parent
    has ended.
    """
    _CLOSED_IN_CHILDREN.add(holder)


def _after_fork() -> None:
    for holder in list(_CLOSED_IN_CHILDREN):
        holder.close_in_child()
    _CLOSED_IN_CHILDREN.clear()


os.register_at_fork(after_in_child=_after_fork)
