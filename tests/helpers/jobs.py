"""Jobs of the launcher as a user sees them: a command, its exit code, its last line, and what is left of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Callable, Iterator

LIMIT = 60.0  # seconds until something that must happen counts as not happening

ON_ASCEND = """
from bmtrain_ms_cli import launch, main
launch.has_ascend = lambda: True  # the command would refuse msrun's way here
raise SystemExit(main.main())
"""


class JobUnderTest:
    """`bmtrain-ms launch` of a small script. Every process below it carries a mark, by which it is found wherever it went.

    `note`: the folder into which the script writes; `NOTE` in its text.
    """

    def __init__(self, folder: Path, body: str, ranks: int, launcher: str = "auto", **variables: str):
        self.note, self.ranks = folder, ranks
        self.mark = f"BMTRAIN_MS_TEST_JOB={folder}".encode()
        path = folder / "job.py"
        path.write_text(
            "import os, signal, sys, time\nRANK = int(os.environ['BMTRAIN_MS_RANK'])\n" + HELPERS + textwrap.dedent(body)
        )
        start = ["-c", ON_ASCEND] if launcher == "msrun" else ["-m", "bmtrain_ms_cli"]
        command = [sys.executable, *start, "launch", "-n", str(ranks), "--with", launcher, str(path), str(folder)]
        env = {**os.environ, **variables, "BMTRAIN_MS_TEST_JOB": str(folder), "OMP_NUM_THREADS": "1"}
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            # under nohup, as this test may be, SIGHUP is ignored, and the launcher respects that
            hear = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err, start_new_session=True, preexec_fn=hear)

    @property
    def err(self) -> str:
        return (self.note / "err").read_text()

    @property
    def out(self) -> str:
        return (self.note / "out").read_text()

    @property
    def last_line(self) -> str:
        return self.err.splitlines()[-1]

    def written(self, name: str, limit: float = LIMIT) -> list[int]:
        """The numbers that each rank has noted under `name`, once all have."""
        paths = [self.note / f"{name}-{rank}" for rank in range(self.ranks)]
        there = lambda: all(path.exists() for path in paths)  # noqa: E731
        until(lambda: there() or self.process.poll() is not None, f"{name} of every rank", limit)
        assert there(), f"the job ended before {name} of every rank:\n{self.err}"
        return [int(path.read_text()) for path in paths]

    def supervisor(self) -> int:
        """Its process."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def alive(self) -> list[str]:
        """Command lines of the processes of this job that have not ended."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def ended(self) -> int:
        """Wait for it; nothing may be left. Returns the exit code."""
        code = self.process.wait(LIMIT)
        assert self.alive() == []
        return code

    def end(self) -> None:
        """Whatever is still there, after a failed test."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        self.process.wait()


HELPERS = '''
import os, signal, sys, time
RANK = int(os.environ['BMTRAIN_MS_RANK'])

def note(name, value=""):
    path = f"{sys.argv[1]}/{name}-{RANK}"
    with open(path + ".new", "w") as file:
        file.write(str(value))
    os.rename(path + ".new", path)

def leave_a_child():
    """Which ignores SIGTERM, holds the output, and has a session of its own."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.setsid()
        time.sleep(300)
    note("child", pid)

'''


@contextlib.contextmanager
def job(folder: Path, body: str, ranks: int, launcher: str = "auto", **variables: str) -> Iterator[JobUnderTest]:
    """Of the test; whatever happens, nothing of it stays."""
    made = JobUnderTest(folder, body, ranks, launcher, **variables)
    try:
        yield made
    finally:
        made.end()


def until(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> None:
    """Wait for an event."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def says(text: str, pattern: str) -> bool:
    """Whether a whole line matches; `PID` stands for a process."""
    return re.fullmatch("bmtrain-ms: " + pattern.replace("PID", r"\(pid \d+\)"), text) is not None
