"""Starting ranks: the commands and the environment, and the command's own part while they run (`supervise` has the other)."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Mapping, Sequence

from bmtrain_ms_base import system
from bmtrain_ms_base.launchers import FOLDERS, REHEARSE, TERMINAL, forget_launchers
from bmtrain_ms_base.system import has_ascend

from . import hosts as several
from .options import FOLDERS_HELP, REHEARSE_HELP, Commands, folders, positive
from .supervise import PASSED_ON


class LaunchError(RuntimeError):
    """The ranks cannot be started."""


# From 4 MiB on `memcpy` writes past the cache. glibc's default is three quarters of the last cache, on a server maybe hundreds of
# MiB: a tensor's copy then reads what it overwrites, 12.5 instead of 21 GB/s. Other C libraries ignore the variable.
COPIES_PAST_THE_CACHE = "glibc.cpu.x86_non_temporal_threshold=0x400000"

_SCHEDULER = "from mindspore import set_context\nfrom mindspore.communication import init\nset_context(device_target='CPU')\ninit()"


_EXIT_CODES = (
    "Exit code: 0 if every rank came to its end; 75 if they were told to stop, and saved; 128 + N if a rank was killed by signal "
    "N, or signal N ended the job without a save; 2 if the command line is wrong; otherwise that of the first rank that failed."
)


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms launch` understands."""
    parser = commands.add_parser(
        "launch", help="start a script on N ranks", description="Start a script on N ranks.", epilog=_EXIT_CODES
    )
    parser.add_argument("-n", "--ranks", type=positive, required=True, help="how many processes")
    parser.add_argument(
        "--with",
        dest="launcher",
        choices=("auto", "mpi", "msrun"),
        default="auto",
        help="auto: msrun where there are Ascend devices; elsewhere ranks are started directly, without MPI",
    )
    parser.add_argument(
        "--hosts",
        type=lambda text: text.split(","),
        default=[],
        help="run on these, e.g. node1,node2, the same number of ranks on each: by mpiexec and ssh",
    )
    parser.add_argument("--folders", type=folders, default=[], help=FOLDERS_HELP)
    parser.add_argument("--rehearse", action="store_true", help=REHEARSE_HELP)
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module's name, as for python -m")
    parser.add_argument("script", help="a Python script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to it")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        LaunchError: see `launch`.
    """
    module = ["-m"] if arguments.module else []
    script = [*module, arguments.script, *arguments.arguments]
    told = {"hosts": arguments.hosts, "folders": arguments.folders, "rehearse": arguments.rehearse}
    return launch(script, arguments.ranks, arguments.launcher, **told)


def launch(
    script: Sequence[str],
    ranks: int,
    launcher: str = "auto",
    variables: Mapping[str, str] | None = None,
    *,
    hosts: Sequence[str] = (),
    folders: Sequence[str] = (),
    rehearse: bool = False,
) -> int:
    """Run a Python script with its arguments on `ranks` processes, of this host unless there are others, and wait for them.

    The first SIGTERM or SIGINT is passed on to the ranks, which may save and end (`train.StopSignals`); SIGHUP, SIGQUIT and SIGUSR1
    count as SIGTERM. What comes within a second of it says the same; a later one ends the ranks within seconds. When a rank fails,
    the others get six seconds. Whatever ends, no process that a rank has started stays.

    Args:
        script: its path, or `-m` and a module, then its arguments.
        ranks: how many.
        launcher: `mpi`: by `mpiexec`; `msrun`: as MindSpore's msrun does, for Ascend devices; `auto`: msrun where there are any,
            and elsewhere neither: ranks of one host need no MPI.
        variables: more environment variables for the ranks.
        hosts: where to run, by `mpiexec` and ssh; the same number of ranks on each.
        folders: ranks are divided among these as if each were the working folder of a host of its own, with a disk that others do
            not see: a rehearsal of several hosts on this one.
        rehearse: on CPU, but as on Ascend devices: see `init_distributed`.

    Returns:
        0 if every rank came to its end; 75 if they were told to stop, and saved; otherwise what the first failing rank ended with,
        or 128 + the signal that ended it.

    Raises:
        LaunchError: the launcher is not installed or not for this host, or the script does not exist.
    """
    if script[0] != "-m" and not Path(script[0]).is_file():
        folder = Path(script[0]).is_dir()
        raise LaunchError(f"{script[0]} {'is a folder: name a script, or a module with -m' if folder else 'does not exist'}")
    if launcher == "msrun" and hosts:
        raise LaunchError("--hosts starts ranks by mpiexec; msrun is started on each host by itself")
    if launcher == "msrun" and not has_ascend():
        raise LaunchError(
            "--with msrun starts Ascend ranks, and this host has no Ascend device; start CPU ranks with: bmtrain-ms launch -n "
            f"{ranks} {' '.join(script)}"
        )
    more = {**(variables or {}), **({REHEARSE: "1"} if rehearse else {}), TERMINAL: str(int(sys.stderr.isatty()))}
    if folders:
        more[FOLDERS] = _checked_folders(folders, ranks, launcher, hosts)
        script = script if script[0] == "-m" else [str(Path(script[0]).absolute()), *script[1:]]
        launcher = "launch"
    if launcher == "auto":
        on_devices = has_ascend() and more.get(REHEARSE, os.environ.get(REHEARSE)) != "1"
        launcher = "mpi" if hosts else "msrun" if on_devices else "launch"
    return _attend(_plan(launcher, script, ranks, hosts), _environment(launcher, ranks, more, hosts))


def _checked_folders(folders: Sequence[str], ranks: int, launcher: str, hosts: Sequence[str]) -> str:
    missing = [folder for folder in folders if not Path(folder).is_dir() or ":" in folder]
    if missing:
        raise LaunchError(f"--folders: {missing[0]} is not a folder; make one for each host that is rehearsed")
    if len(folders) < 2 or ranks % len(folders):
        raise LaunchError(f"--folders: {ranks} ranks cannot be divided among {len(folders)}: name 2 or more, which divide them")
    if hosts or launcher != "auto":
        raise LaunchError("--folders rehearses several hosts on this one: leave --hosts and --with out")
    return ":".join(os.path.abspath(folder) for folder in folders)


def _environment(launcher: str, ranks: int, variables: Mapping[str, str], hosts: Sequence[str]) -> dict[str, str]:
    """The environment of the ranks. Other launchers' variables are removed: a shell that one of them has started hands them on."""
    env = dict(os.environ)
    asked_for = launcher == "mpi" and _hydra_is_asked_for(env)
    forget_launchers(env, keep=("HYDRA_", "SLURM_") if asked_for else ())
    env.update(variables)
    if hosts:
        env.update(several.variables(dict(os.environ)))
    cores, local = len(system.cores()), ranks // max(1, len(hosts))
    env.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // local)))
    env.setdefault("GLIBC_TUNABLES", COPIES_PAST_THE_CACHE)
    if launcher == "mpi" and not asked_for and not hosts:
        env.setdefault("UCX_NET_DEVICES", "lo")  # one host: nobody else needs to reach the ranks
    if hosts or not asked_for:
        env["BMTRAIN_MS_LOCAL_SIZE"] = str(local)
    return env


def _plan(launcher: str, script: Sequence[str], ranks: int, hosts: Sequence[str]) -> dict[str, Any]:
    """What `supervise.Job` needs to know."""
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), *script]
    plan: dict[str, Any] = {"kind": launcher, "ranks": ranks, "command": command, "scheduler": None, "variables": [{}] * ranks}
    if hosts:
        plan["command"] = [_tool("mpiexec"), *_options(hosts, ranks), "-n", str(ranks), *command]
    elif launcher == "mpi":
        plan["command"] = [*_mpiexec(), "-n", str(ranks), *command]
    elif launcher == "msrun":
        # msrun itself runs `python`, whichever that is, takes a core to wait, and loses signals: this is what it does otherwise
        cluster = {
            "MS_WORKER_NUM": str(ranks),
            "MS_SCHED_HOST": "127.0.0.1",
            "MS_SCHED_PORT": str(_free_port()),
            "MS_TOPO_TIMEOUT": "600",
            "RANK_SIZE": str(ranks),
        }
        plan["scheduler"] = [sys.executable, "-c", _SCHEDULER], {**cluster, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
        plan["variables"] = [
            {**cluster, "MS_ROLE": "MS_WORKER", "MS_NODE_ID": f"{i}", "RANK_ID": f"{i}", "DEVICE_ID": f"{i}"} for i in range(ranks)
        ]
    return plan


def _hydra_is_asked_for(env: Mapping[str, str]) -> bool:
    """Whether the user has told MPICH's launcher where and how to start ranks."""
    return any(name.startswith("HYDRA_") for name in env)


def _mpiexec() -> list[str]:
    if _hydra_is_asked_for(os.environ):
        return [_tool("mpiexec")]
    found = _tool("mpiexec")
    simple = Path(found).with_name("mpiexec.gforker")  # MPICH's for one host: no proxies, no ports, no files
    return [str(simple)] if simple.exists() else [found, "-launcher", "fork", "-rmk", "user", "-iface", "lo"]


def _options(hosts: Sequence[str], ranks: int) -> list[str]:
    try:
        return several.mpiexec_options(hosts, ranks)
    except ValueError as error:
        raise LaunchError(str(error)) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)  # the one of this environment
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise LaunchError(f"{name} was not found; pip install 'bmtrain-ms[cpu]'")
    return found


def _attend(plan: dict[str, Any], env: dict[str, str]) -> int:
    """Start the supervising process, pass signals on to it, and wait; clean up after it if it is killed."""
    readable, writable = os.pipe()
    mine = set(system.descendants(os.getpid()))
    adopted_before = system.adopt_orphans()
    supervise = [sys.executable, str(Path(__file__).with_name("supervise.py")), str(readable), json.dumps(plan)]
    before: dict[int, Any] = {}

    def pass_on(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):  # it has just ended by itself
            os.write(writable, bytes([signum]))

    try:
        if threading.current_thread() is threading.main_thread():
            for signum in PASSED_ON:
                if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup
                    before[signum] = signal.signal(signum, pass_on)
        process = subprocess.Popen(supervise, env=env, pass_fds=[readable], start_new_session=True)
        os.close(readable)
        code = process.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(writable)
        _end_all(mine)
        system.adopt_orphans(adopted_before)
    if code < 0:
        name = system.signal_name(-code)
        sys.stderr.write(f"bmtrain-ms: the supervising process (pid {process.pid}) was killed by {name}; ")
        sys.stderr.write(f"the ranks were ended; exit code {128 - code}\n")
        return 128 - code
    return code


def _end_all(spared: set[int], patience: float = 10.0) -> None:
    """Kill the descendants of this process: what a killed supervisor has left."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        left = [pid for pid in system.descendants(os.getpid()) if pid not in spared]
        if not left:
            return
        for pid in left:
            system.tell(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
