"""A job ends, and says why, when one of its ranks does not go on (real `mpiexec`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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


# Rank 1 waits for ever, and rank 0 does what cannot end well.
LOST = """
import sys, time
import bmtrain_ms
from bmtrain_ms.comm import node
if "mpi" in sys.argv:
    node.connect = lambda *_: None
import os
if os.environ["PMI_RANK"] == "1" and "absent" in sys.argv:
    time.sleep(1000)
world = bmtrain_ms.init_distributed(timeout=3)
world.engine.barrier("all are here").wait()
if world.engine.rank == 1:
    time.sleep(1000)
ACTION
print("went on", flush=True)
"""


def run(
    folder: Path, action: str, ranks: int = 2, limit: float = 90, text: str = SCRIPT, arguments: tuple[str, ...] = ()
) -> tuple[int, str, str]:
    """Exit code, output and errors of a job that ends within `limit` seconds."""
    script = folder / "job.py"
    script.write_text(text.replace("ACTION", action))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    process = subprocess.Popen(
        [mpiexec(), "-n", str(ranks), sys.executable, str(script), *arguments],
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
    return process.returncode, out, err


def test_exception_ends_the_job(tmp_path: Path):
    code, out, err = run(tmp_path, "raise ValueError('broken\\non purpose')")
    assert code != 0
    assert "started 0" in out and "started 1" in out and "went on" not in out
    lines = [line for line in err.splitlines() if line.startswith("[rank ")]
    assert lines[0] == "[rank 1] Traceback (most recent call last):"
    assert "job.py" in lines[1]
    assert lines[-2:] == ["[rank 1] ValueError: broken", "[rank 1] on purpose"]


def test_killed_rank_ends_the_job(tmp_path: Path):
    code, out, _ = run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert code != 0
    assert "started 1" in out and "went on" not in out


def test_healthy_job_ends_with_zero(tmp_path: Path):
    code, out, err = run(tmp_path, "print('nothing', flush=True)")
    assert (code, out.count("went on"), "[rank" in err) == (0, 2, False), err


CAUGHT = """
try:
    world.engine.barrier("never").wait()
except bmtrain_ms.comm.CommTimeoutError:
    pass"""


@pytest.mark.parametrize("engine", ["node", "mpi"])
def test_a_rank_that_catches_the_time_out_and_comes_to_its_end(tmp_path: Path, engine: str):
    """MPI's own end would wait for rank 1."""
    code, out, err = run(tmp_path, CAUGHT, text=LOST, arguments=(engine,))
    assert code != 0 and "went on" in out
    assert "[rank 0] ends all ranks, as an operation was lost: barrier (never) at step 0 on rank 0 of 2 did not finish" in err


def test_a_time_out_while_the_main_thread_is_inside_mpi(tmp_path: Path):
    """It cannot be told there."""
    inside = "from mpi4py import MPI; world.engine.barrier('never'); MPI.COMM_WORLD.Barrier()"
    code, out, err = run(tmp_path, inside, text=LOST, arguments=("mpi",))
    assert code != 0 and "went on" not in out
    assert "[rank 0] ends all ranks: barrier (never) at step 0 on rank 0 of 2 did not finish within 3 s" in err


def test_a_sub_group_that_not_all_its_ranks_make(tmp_path: Path):
    """MPI makes it in one call, which has no time-out."""
    code, out, err = run(tmp_path, "world.engine.subgroup([0, 1])", text=LOST, arguments=("mpi",))
    assert code != 0 and "went on" not in out
    assert "CommTimeoutError: subgroup [0, 1] at step 0 on rank 0 of 2 did not finish within 3 s" in err


def test_a_rank_that_never_comes(tmp_path: Path):
    code, out, err = run(tmp_path, "", text=LOST, arguments=("absent",))
    assert code != 0 and "went on" not in out
    assert "init_distributed did not finish within 3 s" in err or "Timeout (0:00:08)!" in err, err
