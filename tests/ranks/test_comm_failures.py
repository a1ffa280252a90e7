"""A job ends, and says why, when one of its ranks does not go on (real `mpiexec`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import mpiexec

pytestmark = pytest.mark.ranks

# The others wait for rank 1, without a chance to see that it is gone: only the end of the whole job frees them.
SCRIPT = """
import os, signal, sys, time
import bmtrain_ms
world = bmtrain_ms.init_distributed(timeout=600)
world.engine.barrier("all are here").wait()
print(f"started {world.engine.rank}", flush=True)
time.sleep(1)  # until mpiexec has forwarded it
if world.engine.rank == 1:
    ACTION
world.engine.barrier("for rank 1").wait()
print("went on", flush=True)
"""


def run(folder: Path, action: str, ranks: int = 2, limit: float = 90) -> tuple[int, str, str, float]:
    """Exit code, output, errors, and seconds from start to end of the job."""
    script = folder / "job.py"
    script.write_text(SCRIPT.replace("ACTION", action))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    start = time.monotonic()
    process = subprocess.Popen(
        [mpiexec(), "-n", str(ranks), sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, out, err, time.monotonic() - start


def test_exception_ends_the_job(tmp_path: Path):
    code, out, err, seconds = run(tmp_path, "raise ValueError('broken\\non purpose')")
    assert code != 0
    assert "started 0" in out and "started 1" in out and "went on" not in out
    lines = [line for line in err.splitlines() if line.startswith("[rank ")]
    assert lines[0] == "[rank 1] Traceback (most recent call last):"
    assert "job.py" in lines[1]
    assert lines[-2:] == ["[rank 1] ValueError: broken", "[rank 1] on purpose"]
    assert seconds < 60


def test_killed_rank_ends_the_job(tmp_path: Path):
    code, out, _, seconds = run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert code != 0
    assert "started 1" in out and "went on" not in out
    assert seconds < 60


def test_healthy_job_ends_with_zero(tmp_path: Path):
    code, out, err, _ = run(tmp_path, "print('nothing', flush=True)")
    assert (code, out.count("went on"), "[rank" in err) == (0, 2, False), err
