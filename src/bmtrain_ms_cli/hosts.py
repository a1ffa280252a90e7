#!/usr/bin/env python3
"""Several hosts under one `mpiexec`: each end of a connection notices when the other is gone, and then leaves nothing running.

`mpiexec` calls another host by ssh, and neither of them ever notices that it has vanished. It is told to run this file in place
of ssh. This file runs ssh, and on the other host itself once more (`--guard`), around what `mpiexec` wants to run there. Both ends
send a byte every second; whoever hears nothing for half a minute, or that the other has ended, ends what it has started.
BMTRAIN_MS_SILENCE says how many seconds instead.
It needs nothing but Python, as it runs outside of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Sequence

SSH = "BMTRAIN_MS_SSH"  # what to run in place of `ssh`
BEAT = 1.0  # seconds between two bytes
SILENCE = "BMTRAIN_MS_SILENCE"  # seconds without one
_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
_LAST_WORDS = 2.0  # seconds: `mpiexec` is what forwards them
_TICK = 0.2  # seconds between two looks at the process
_SIGN = b"\0"
_SSH_FAILED, _CUT_OFF = 255, 254  # exit codes of ssh, and of a guard that has lost the connection
_PR_SET_CHILD_SUBREAPER = 36


def mpiexec_options(hosts: Sequence[str], ranks: int) -> list[str]:
    """What `mpiexec` needs to know, for the same number of ranks on each host, neighbouring ranks together.

    Raises:
        ValueError: a host has no name, one that ssh would take for an option, or is named twice; or the ranks cannot be divided.
    """
    option = next((host for host in hosts if host.startswith("-")), None)
    if option is not None:
        raise ValueError(f"--hosts: {option} is no name of a host, which begins with a letter or a digit")
    if not all(hosts) or len(set(hosts)) != len(hosts):
        raise ValueError(f"--hosts {','.join(hosts)}: name every host once, separated by commas, e.g. --hosts node1,node2")
    if ranks % len(hosts):
        raise ValueError(f"-n {ranks}: {len(hosts)} hosts get the same number of ranks each; choose a multiple of {len(hosts)}")
    call = ["-launcher", "ssh", "-launcher-exec", str(Path(__file__).resolve()), "-rmk", "user"]
    return [*call, "-hosts", ",".join(hosts), "-ppn", str(ranks // len(hosts))]


def variables(env: dict[str, str]) -> dict[str, str]:
    """What `mpiexec` needs in its environment so that this file runs, and finds the ssh that HYDRA_LAUNCHER_EXEC names."""
    path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return {"PATH": path, SSH: env.get("HYDRA_LAUNCHER_EXEC", "ssh")}


def call(words: list[str]) -> int:
    """Stand in for `ssh OPTIONS HOST COMMAND...`: run it, and end `mpiexec`, whose child this is, when the host is gone."""
    place = next(i for i, word in enumerate(words) if not word.startswith("-"))
    patience = float(os.environ.get(SILENCE, "30"))
    around = [shlex.quote(sys.executable), shlex.quote(str(Path(__file__).resolve())), "--guard", str(patience)]
    command = [os.environ.get(SSH, "ssh"), *words[: place + 1], *around, *words[place + 1 :]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    silent = _talk(process.stdout.fileno(), process.stdin.fileno(), patience)
    if silent:
        process.kill()
    code = process.wait()
    if silent or code in (_SSH_FAILED, _CUT_OFF):
        told = f"has not answered for {patience:g} s" if silent else "cannot be reached, or its connection has ended"
        with contextlib.suppress(OSError):
            os.write(2, f"bmtrain-ms: host {words[place]} {told}; the job is ended\n".encode())
        time.sleep(_LAST_WORDS)
        os.kill(os.getppid(), signal.SIGKILL)  # it would wait for ever; its ranks here end with it
    return code


def guard(patience: float, command: list[str]) -> int:
    """Be the other host's end: run the command until it ends, or the connection; then nothing that it has started stays."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    _talk(0, 1, patience, process)
    code = process.poll()
    _end_all()
    return _CUT_OFF if code is None else abs(code)


def _talk(heard: int, said: int, patience: float, process: subprocess.Popen | None = None) -> bool:
    """Exchange signs of life until the other end is silent (True), has ended, or `process` has. Other bytes go to the output."""
    os.set_blocking(said, False)  # to a host that has vanished nothing can be written after a while
    heard_at, said_at = time.monotonic(), float("-inf")
    with selectors.DefaultSelector() as selector:
        selector.register(heard, selectors.EVENT_READ)
        while time.monotonic() - heard_at < patience:
            if process is not None and process.poll() is not None:
                return False
            if time.monotonic() - said_at >= BEAT:
                said_at = time.monotonic()
                try:
                    os.write(said, _SIGN)
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    return False
            if selector.select(_TICK):
                data = os.read(heard, 1 << 16)
                if not data:
                    return False
                heard_at = time.monotonic()
                if words := data.replace(_SIGN, b""):
                    os.write(1, words)
    return True


def _end_all() -> None:
    """End everything below this process: SIGTERM, later SIGKILL."""
    start = time.monotonic()
    told: set[int] = set()
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = _descendants()
        if not left:
            return
        late = time.monotonic() - start > _GRACE
        for pid in left:
            if late or pid not in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                told.add(pid)
        time.sleep(0.05)


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()  # pid (name) state parent ...
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, front = [], [os.getpid()]
    while front:
        front = [child for pid in front for child in children.get(pid, [])]
        found += front
    return found


if __name__ == "__main__":
    raise SystemExit(guard(float(sys.argv[2]), sys.argv[3:]) if sys.argv[1] == "--guard" else call(sys.argv[1:]))
