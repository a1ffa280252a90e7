"""Jobs whose ranks form a world: what each launcher gives them, what they see when one of them ends, and what stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.jobs import LIMIT, job, says
from tests.helpers.ranks import mpiexec

pytestmark = pytest.mark.ranks

START = """
import numpy as np
import bmtrain_ms as bms
from bmtrain_ms.compat.runtime import from_host, host_array
world = bms.init_distributed(seed=0, timeout=TIMEOUT)
engine = world.engine
def total():
    return int(host_array(engine.all_reduce([from_host(np.ones(1, np.float32))], label="ones").wait()[0]).item())
"""


def begun(timeout: float = 600) -> str:
    return START.replace("TIMEOUT", f"{timeout}")


def foreign(folder: Path, body: str, variables: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """What ranks end with that another launcher starts with these variables: exit code, output, errors."""
    path = folder / "rank.py"
    path.write_text(begun() + textwrap.dedent(body))
    kept = {name: text for name, text in os.environ.items() if not name.startswith("BMTRAIN_MS_")}
    started = [
        subprocess.Popen(
            [sys.executable, str(path)],
            env={**kept, "GLOG_v": "3", "OMP_NUM_THREADS": "1", **words},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in variables
    ]
    try:
        return [(process.returncode, out, err) for process in started for out, err in [process.communicate(timeout=LIMIT)]]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("launcher", ["auto", "mpi"])
def test_a_killed_rank_is_named_by_the_others_and_by_the_launcher(tmp_path: Path, launcher: str):
    """Although a forked child of it lives: it has copies of neither the connections nor the lock. MPI's files go, too."""
    body = """
    from bmtrain_ms.checkpoint.folder import FolderLock
    if RANK == 1:
        from pathlib import Path
        lock = FolderLock(Path(sys.argv[1]))
    leave_a_child()
    note("files", 1)
    with open(sys.argv[1] + f"/maps-{RANK}", "w") as file:
        file.write(open("/proc/self/maps").read())
    engine.clock.step = 12
    total()
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    engine.barrier("for rank 1").wait()
    """
    with job(tmp_path, begun() + textwrap.dedent(body), 2, launcher) as made:
        assert made.ended() == 137, made.err
        line = r"rank 1 PID was killed by SIGKILL at step 12, in all_reduce \(ones\); exit code 137"
        assert says(made.last_line, line), made.err
        assert "barrier (for rank 1) at step 12 on rank 0 of 2 cannot finish: rank 1 has ended" in made.err
        assert "is still there" not in made.err
    maps = (tmp_path / "maps-0").read_text() + (tmp_path / "maps-1").read_text()
    files = set(re.findall(r"/dev/shm/\S+$", maps, re.MULTILINE))
    assert bool(files) == (launcher == "mpi") and not [name for name in files if os.path.exists(name)]


@pytest.mark.parametrize("launcher", ["auto", "mpi", "mpiexec"])
def test_a_forked_process_that_ends_does_no_harm(tmp_path: Path, launcher: str):
    """Neither to connections nor to MPI; and it has no engine."""
    body = """
    assert total() == 2
    pid = os.fork()
    if pid == 0:
        try:
            total()
        except bms.comm.CommError as error:
            sys.exit(3 if "the engine is closed" in str(error) else 4)
        sys.exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert total() == 2
    print("unharmed", flush=True)
    """
    if launcher == "mpiexec":
        path = tmp_path / "job.py"
        path.write_text("import os, sys\n" + begun() + textwrap.dedent(body))
        command = [mpiexec(), "-n", "2", sys.executable, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0 and done.stdout.count("unharmed") == 2, done.stderr
        return
    with job(tmp_path, begun() + textwrap.dedent(body), 2, launcher) as made:
        assert made.ended() == 0 and made.out.count("unharmed") == 2, made.err


def test_at_a_time_out_every_rank_shows_its_stacks(tmp_path: Path):
    """The one that is stuck outside of any collective, too."""
    body = """
    def stuck_here():
        time.sleep(300)
    total()
    stuck_here() if RANK == 1 else total()
    """
    with job(tmp_path, begun(timeout=3) + textwrap.dedent(body), 2) as made:
        assert made.ended() == 1
        assert says(made.last_line, r"rank 0 PID failed .*: bmtrain_ms.comm.engine.CommTimeoutError: .*; exit code 1"), made.err
        stacks = re.findall(r"^rank (\d): .*; the stacks of this process", made.err, re.MULTILINE)
        assert sorted(stacks) == ["0", "1"] and made.err.index("in stuck_here") < made.err.index("is still there"), made.err


def test_only_loopback_is_listened_on(tmp_path: Path):
    body = "note('joined', total())\ntime.sleep(300)"
    for launcher in ("auto", "mpi"):
        folder = tmp_path / launcher
        folder.mkdir()
        with job(folder, begun() + body, 2, launcher) as made:
            assert made.written("joined") == [2, 2]
            pids = [p.name for p in Path("/proc").glob("[0-9]*") if made.mark in environment(p)]
            listening = addresses(pids)
            assert len(pids) >= 4 and (listening == [] if launcher == "auto" else set(listening) <= {"0100007F"}), listening


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def addresses(pids: list[str]) -> list[str]:
    """That these processes listen on, as /proc has them."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(file))
            except OSError:
                continue
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


TORCHRUN = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": f"{os.getpid()}", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    "variables",
    [
        [{**TORCHRUN, "RANK": f"{i}", "LOCAL_RANK": f"{i}"} for i in range(2)],
        [{**SRUN, "SLURM_PROCID": f"{i}", "SLURM_LOCALID": f"{i}"} for i in range(2)],
    ],
    ids=["torchrun", "srun"],
)
def test_ranks_of_other_launchers_find_each_other(tmp_path: Path, variables: list[dict[str, str]]):
    ended = foreign(tmp_path, "print(engine.name, engine.rank, total())", variables)
    assert [(code, out) for code, out, _ in ended] == [(0, "node 0 2\n"), (0, "node 1 2\n")], ended


def test_an_mpi_that_is_not_the_launchers_is_refused(tmp_path: Path):
    """As under Open MPI's mpirun, with mpi4py of MPICH."""
    words = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    ((code, _, err),) = foreign(tmp_path, "", [words])
    assert code == 1
    assert "OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2 (of Open MPI) says rank 1 of 2, but mpi4py's MPI (MPICH) says" in err
    assert "says rank 0 of 1: it is not the MPI of the launcher. Start with: bmtrain-ms launch -n 2 script.py" in err


@pytest.mark.msrun
@pytest.mark.parametrize("way", ["SIGTERM", "SIGKILL of a rank"])
def test_ranks_of_msrun_are_watched_like_others(tmp_path: Path, way: str):
    """They save when the command is told to stop, the death of one is noticed, and no process stays, the scheduler neither.

    MindSpore's own start on CPU stands for that of HCCL: ranks and scheduler find each other in the same way.
    """
    save = """
    import bmtrain_ms as bms
    from mindspore.communication import init
    cores = os.sched_getaffinity(0)
    bms.init_distributed(engine=bms.comm.SingleEngine())
    os.sched_setaffinity(0, cores)  # on one, MindSpore's thread for connections comes before it knows their names: minutes
    init()
    def save(signum, frame):
        note("told", signum)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    note("joined", os.getpid())
    while True:
        time.sleep(0.1)
    """
    before = set(os.listdir())
    with job(tmp_path, save, 2, "msrun") as made:
        pids = made.written("joined", 4 * LIMIT)  # MindSpore's own start-up takes its time
        if way == "SIGTERM":
            made.process.send_signal(signal.SIGTERM)
            assert made.ended() == 75, made.err
            assert says(made.last_line, "2 ranks stopped after SIGTERM, and may be resumed; exit code 75")
        else:
            os.kill(pids[1], signal.SIGKILL)
            assert made.ended() == 137, made.err
            assert says(made.last_line, "rank 1 PID was killed by SIGKILL; exit code 137"), made.err
    assert set(os.listdir()) == before  # no folder of logs
