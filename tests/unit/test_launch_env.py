"""Which launcher started a process is read from its variables only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bmtrain_ms.comm.launch import Launch, detect, is_scheduler
from bmtrain_ms_base import board as boards
from bmtrain_ms_base.launchers import forget_launchers

MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MSRUN = {
    "MS_ROLE": "MS_WORKER",
    "MS_WORKER_NUM": "8",
    "RANK_ID": "5",
    "MS_NODE_ID": "5",
    "DEVICE_ID": "1",
    "BMTRAIN_MS_LOCAL_SIZE": "4",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("env", "launch"),
    [
        ({}, Launch("none", 0, 1, 0, 1)),
        ({"PATH": "/bin", "RANK_ID": "3"}, Launch()),
        (MPICH, Launch("mpi", 5, 8, 1, 4)),
        (OPEN_MPI, Launch("mpi", 5, 8, 1, 4)),
        (MSRUN, Launch("msrun", 5, 8, 1, 4)),
        # without the local variables every rank is on this host
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch("mpi", 1, 2, 1, 2)),
        ({"PMI_RANK": "0"}, Launch("mpi", 0, 1, 0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Launch("mpi", 1, 2, 1, 2)),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "RANK_ID": "1"}, Launch("msrun", 1, 2, 1, 2)),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "MS_NODE_ID": "1"}, Launch("msrun", 1, 2, 1, 2)),
        ({"MS_ROLE": "MS_WORKER"}, Launch("msrun", 0, 1, 0, 1)),
        (TORCHRUN, Launch("socket", 1, 2, 1, 2)),
        (SRUN, Launch("socket", 1, 2, 1, 2)),
        # two that agree
        ({**MPICH, **MSRUN}, Launch("msrun", 5, 8, 1, 4)),
        ({**MPICH, **OPEN_MPI}, Launch("mpi", 5, 8, 1, 4)),
        # one rank says nothing: a shell may have been started so
        ({**TORCHRUN, "PMI_RANK": "0", "PMI_SIZE": "1"}, Launch("socket", 1, 2, 1, 2)),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, Launch("socket", 1, 2, 1, 2)),
        # a launcher inside an allocation or a batch script
        ({**SRUN, **MPICH}, Launch("mpi", 5, 8, 1, 4)),
        ({**TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch("socket", 1, 2, 1, 2)),
        ({"PBS_TASKNUM": "1"}, Launch()),
        ({"SLURM_PROCID": "0"}, Launch()),
        ({"SLURM_NTASKS": "4"}, Launch()),
        ({"RANK": "3"}, Launch()),
        ({**OPEN_MPI, "PMIX_RANK": "5"}, Launch("mpi", 5, 8, 1, 4)),
    ],
)
def test_detect(env: dict, launch: Launch):
    assert detect(env) == launch


@pytest.mark.parametrize(
    "env",
    [
        {"PMI_RANK": "2", "PMI_SIZE": "2"},
        {"PMI_RANK": "-1", "PMI_SIZE": "2"},
        {"PMI_RANK": "1"},
        {**MPICH, "MPI_LOCALRANKID": "4"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "5"},
        {**MSRUN, "RANK_ID": "8"},
        {**MSRUN, "DEVICE_ID": "4"},
    ],
)
def test_contradictions(env: dict):
    with pytest.raises(RuntimeError, match=r"^the launcher's variables contradict each other: Launch\(kind='(mpi|msrun)'"):
        detect(env)


HOW = r"[Ss]tart with: bmtrain-ms launch -n "


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (
            {**MPICH, **OPEN_MPI, "PMI_RANK": "2"},
            rf"^two launchers contradict each other: PMI_RANK=2, .*, but OMPI_.*{HOW}8 ",
        ),
        ({**MPICH, **MSRUN, "RANK_ID": "2"}, rf"RANK_ID=2, .*, but PMI_RANK=5, PMI_SIZE=8.*{HOW}8 script.py"),
        ({**MPICH, **TORCHRUN}, rf"PMI_RANK=5, PMI_SIZE=8.*, but RANK=1, WORLD_SIZE=2.*{HOW}8 script.py"),
        ({"PMIX_RANK": "0"}, rf"^PMIX_RANK=0 \(of PMIx\) says that this process is one of several.*{HOW}N script.py"),
        ({"PBS_TASKNUM": "2"}, rf"^PBS_TASKNUM=2.*{HOW}N script.py"),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "3"}, rf"^FLUX_TASK_RANK=0, FLUX_JOB_SIZE=3 .*{HOW}3 script.py"),
        ({**TORCHRUN, "LOCAL_RANK": "0"}, "ranks on several hosts find each other by MPI only. Start with: mpiexec -hosts "),
        ({**SRUN, "SLURM_NNODES": "2"}, "ranks on several hosts find each other by MPI only. Start with: mpiexec -hosts "),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are missing"),
        ({"PMI_RANK": "0", "PMI_SIZE": "many"}, "^PMI_SIZE='many', which MPICH sets, is not a number; remove it"),
        ({"BMTRAIN_MS_BOARD": "1:2:ab", "BMTRAIN_MS_RANK": "0"}, "of a job whose launcher has ended"),
        ({"BMTRAIN_MS_BOARD": "nonsense"}, "of a job whose launcher has ended"),
    ],
)
def test_one_sentence_says_what_is_wrong_and_what_works(env: dict, text: str):
    with pytest.raises(RuntimeError, match=text):
        detect(env)


def test_a_process_that_has_inherited_a_ranks_variables_is_not_that_rank():
    board = boards.Board.make(2)
    env = {boards.ADDRESS: board.address, boards.RANK: "1", boards.SIZE: "2", boards.KIND: "launch"}
    board.rows[1].start()
    assert detect(env) == Launch("launch", 1, 2, 1, 2)
    program = "from bmtrain_ms_base.launchers import detect; detect()"
    child = subprocess.run([sys.executable, "-c", program], env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert (
        child.returncode == 1 and f"is not rank 1, it has inherited the variables of rank 1 (process {os.getpid()})" in child.stderr
    )
    # another launcher that it has started says who it is
    child = subprocess.run([sys.executable, "-c", program], env={**os.environ, **env, **TORCHRUN}, check=False)
    assert child.returncode == 0


def test_our_launcher_forgets_what_others_set():
    env = {
        **MPICH,
        **OPEN_MPI,
        **MSRUN,
        **TORCHRUN,
        **SRUN,
        "PMI_FD": "3",
        "HYDRA_LAUNCHER": "ssh",
        "PATH": "/bin",
        "OMP_NUM_THREADS": "2",
    }
    forget_launchers(env)
    assert env == {"PATH": "/bin", "OMP_NUM_THREADS": "2", "SLURM_JOB_ID": "7", "DEVICE_ID": "1"}
    assert detect(env) == Launch()


def test_the_scheduler_of_msrun_is_no_rank_of_another_launcher():
    assert is_scheduler({"MS_ROLE": "MS_SCHED"}) and not is_scheduler(MSRUN)
    with pytest.raises(RuntimeError, match=r"^MS_ROLE=MS_SCHED \(of msrun, for its scheduler\) contradicts PMI_RANK=5.*" + HOW):
        is_scheduler({**MPICH, "MS_ROLE": "MS_SCHED"})


def test_scheduler():
    with pytest.raises(RuntimeError, match=r"^this process is msrun's scheduler, not a rank: init_distributed must run in"):
        detect({"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2"})


def test_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch):
    for name, value in MPICH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MS_ROLE", raising=False)
    assert detect() == Launch("mpi", 5, 8, 1, 4)
