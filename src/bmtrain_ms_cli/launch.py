"""Starting ranks: `mpiexec` on CPU, `msrun` on Ascend; signals reach every process, and none is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Mapping, Sequence

from . import hosts as several

SAME_REQUEST = 1.0  # seconds, as `train.StopSignals` has it: a scheduler signals every process, and some signal twice


class LaunchError(RuntimeError):
    """The ranks cannot be started."""


# From 4 MiB on `memcpy` writes past the cache. glibc's default is three quarters of the last cache, on a server maybe hundreds of
# MiB: a tensor's copy then reads what it overwrites, 12.5 instead of 21 GB/s. Other C libraries ignore the variable.
COPIES_PAST_THE_CACHE = "glibc.cpu.x86_non_temporal_threshold=0x400000"


def launch(
    script: Sequence[str],
    ranks: int,
    launcher: str = "auto",
    variables: Mapping[str, str] | None = None,
    *,
    hosts: Sequence[str] = (),
) -> int:
    """Run a Python script with its arguments on `ranks` processes, of this host unless there are others, and wait for them.

    The first SIGTERM or SIGINT is passed on to the ranks, which may save and end (`train.StopSignals`), and so is what comes within
    a second of it; later ones, and under `msrun` every one (it would orphan its workers), to the whole process group.

    Args:
        script: its path, then its arguments.
        ranks: how many.
        launcher: `mpi`, `msrun`, or `auto`: msrun where there are Ascend devices.
        variables: more environment variables for the ranks.
        hosts: where to run, by `mpiexec` and ssh; the same number of ranks on each.

    Returns:
        The launcher's exit code; 128 + signal when a signal ended it.

    Raises:
        LaunchError: the launcher is not installed, or the script does not exist.
    """
    if not Path(script[0]).is_file():
        raise LaunchError(f"{script[0]} does not exist")
    if launcher == "msrun" and hosts:
        raise LaunchError("--hosts starts ranks by mpiexec; msrun is started on each host by itself")
    if launcher == "auto":
        launcher = "msrun" if has_ascend() and not hosts else "mpi"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {**os.environ, **(variables or {})}
    here = ranks // max(1, len(hosts))
    env.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // here)))
    env.setdefault("BMTRAIN_MS_LOCAL_SIZE", str(here))
    env.setdefault("GLIBC_TUNABLES", COPIES_PAST_THE_CACHE)
    if launcher == "msrun":
        command = _msrun_command(script, ranks)
    elif hosts:
        command = _hosts_command(script, ranks, hosts)
        env.update(several.variables(env))
    else:
        command = _mpi_command(script, ranks) if ranks > 1 else [sys.executable, *script]  # one rank needs no MPI
    process = subprocess.Popen(command, env=env, start_new_session=True)

    asked: list[float] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        same_request = asked[-1] - asked[0] < SAME_REQUEST
        chosen = _ranks_of(process.pid) if launcher != "msrun" and same_request else []
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            if not chosen:
                os.killpg(process.pid, signum)
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _end_group(process.pid)
    return 128 - code if code < 0 else code


def _ranks_of(mpiexec: int) -> list[int]:
    """The processes that MPICH's `mpiexec` started: the children of its proxies. None where that cannot be found out."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = status.read_text()  # pid (name) state parent ...
            name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            parents.setdefault(int(rest[1]), []).append((int(status.parent.name), name))
    proxies = [pid for pid, name in parents.get(mpiexec, []) if name.startswith("hydra")]
    return [pid for proxy in proxies for pid, _ in parents.get(proxy, [])]


def has_ascend() -> bool:
    """Whether this host has Ascend devices."""
    return any(Path("/dev").glob("davinci[0-9]*"))


def _mpi_command(script: Sequence[str], ranks: int) -> list[str]:
    # `python -m mpi4py` ends the job when a rank raises or exits with an error, whatever the script does
    return [_tool("mpiexec"), "-n", str(ranks), sys.executable, "-m", "mpi4py", *script]


def _hosts_command(script: Sequence[str], ranks: int, hosts: Sequence[str]) -> list[str]:
    try:
        options = several.mpiexec_options(hosts, ranks)
    except ValueError as error:
        raise LaunchError(str(error)) from error
    mpiexec, *rest = _mpi_command(script, ranks)
    return [mpiexec, *options, *rest]


def _msrun_command(script: Sequence[str], ranks: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    counts = [f"--worker_num={ranks}", f"--local_worker_num={ranks}"]
    where = ["--master_addr=127.0.0.1", f"--master_port={port}", "--join=True", "--log_dir=msrun_log"]
    return [_tool("msrun"), *counts, *where, *script]


def _tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)  # the one of this environment
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        remedy = "pip install 'bmtrain-ms[cpu]'" if name == "mpiexec" else "it comes with MindSpore"
        raise LaunchError(f"{name} was not found; {remedy}")
    return found


def _end_group(group: int) -> None:
    """Kill what the launcher left behind."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing left
