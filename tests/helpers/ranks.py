"""Real ranks for tests: groups of processes that stay alive between tests, because importing MindSpore takes seconds.

`RankPool(n).run(function, **kwargs)` runs a module-level `function(world, **kwargs)` on n MPI ranks and returns their results in
rank order. Run as a module (`python -m tests.helpers.ranks ADDRESS`) this file is one rank.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[2]
GRACE = 3.0  # seconds that the other ranks get after the first failure


class RankError(AssertionError):
    """A rank failed; the message starts with the failing rank's traceback."""


def mpiexec() -> str:
    """The launcher that belongs to this environment's MPI."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not found:
        raise RuntimeError("no mpiexec: pip install 'bmtrain-ms[cpu]'")
    return found


class RankPool:
    """n ranks, started at first use, killed as a group when one fails or time runs out."""

    def __init__(self, size: int, rehearse: bool = False):
        """`rehearse`: they compute as on devices."""
        self.size, self.rehearse = size, rehearse
        self._process: subprocess.Popen | None = None
        self._ranks: dict[int, Connection] = {}

    def run(self, function: Callable, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Results by rank. Raises RankError when a rank raises, dies or is late."""
        if self._process is None:
            self._start()
        for connection in self._ranks.values():
            connection.send((function.__module__, function.__qualname__, kwargs))
        results, failures = self._collect(timeout)
        if not failures and len(results) == self.size:
            return [results[rank] for rank in range(self.size)]
        self.kill()
        late = sorted(set(range(self.size)) - set(results) - set(failures))
        parts = [f"rank {rank} of {self.size} failed:\n{text}" for rank, text in failures.items()]
        if late:
            parts.append(f"ranks without an answer: {late} (time-out {timeout:g} s, or waiting for the failed ones)")
        raise RankError("\n".join(parts))

    def kill(self) -> None:
        """End every rank of this pool, and nothing else."""
        if self._process is None:
            return
        for connection in self._ranks.values():
            connection.close()
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, signum)
            except ProcessLookupError:
                break
            try:
                self._process.wait(2)
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        self._process, self._ranks = None, {}

    def _start(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            key = secrets.token_bytes(16)
            address = str(Path(folder) / "ranks")
            with Listener(address, "AF_UNIX", authkey=key) as listener:
                env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOG_v": "3", "BMTRAIN_MS_TEST_KEY": key.hex()}
                if self.rehearse:
                    env["BMTRAIN_MS_REHEARSE"] = "1"
                env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
                command = [mpiexec(), "-n", str(self.size), sys.executable, "-m", "tests.helpers.ranks", address]
                self._process = subprocess.Popen(command, env=env, start_new_session=True)
                listener._listener._socket.settimeout(90)  # a rank that cannot even start
                for _ in range(self.size):
                    connection = listener.accept()
                    self._ranks[connection.recv()] = connection

    def _collect(self, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        pending = {connection: rank for rank, connection in self._ranks.items()}
        while pending and time.monotonic() < deadline:
            for connection in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
                rank = pending.pop(connection)
                try:
                    ok, value = connection.recv()
                except (EOFError, ConnectionError):
                    ok, value = False, "the process died without a word"
                (results if ok else failures)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results, failures


def _serve(address: str) -> None:
    import faulthandler
    import warnings

    faulthandler.enable()
    warnings.simplefilter("ignore")
    import bmtrain_ms
    from tests.helpers.apart import set_apart

    set_apart()
    world = bmtrain_ms.init_distributed(seed=0, timeout=60)
    warnings.simplefilter("error")
    connection = Client(address, "AF_UNIX", authkey=bytes.fromhex(os.environ["BMTRAIN_MS_TEST_KEY"]))
    connection.send(world.engine.rank)
    while True:
        try:
            module, name, kwargs = connection.recv()
        except EOFError:
            os._exit(0)  # the test run is over
        world.engine.clock.step = 0  # what the test before left behind
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = True, function(world, **kwargs)
            assert not (lost := _lost(world)), f"nobody waited for {lost}"
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)


def _lost(world: Any) -> list[str]:
    """Operations of a rehearsal that nobody has waited for; none on CPU ranks."""
    comm = getattr(world.engine, "comm", None)
    return [] if comm is None else comm.lost()


if __name__ == "__main__":
    _serve(sys.argv[1])
