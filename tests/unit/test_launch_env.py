"""Which launcher started a process is read from its variables only."""

from __future__ import annotations

import pytest

from bmtrain_ms.comm.launch import Launch, detect

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
        # msrun's own variables win: it may itself run inside an MPI allocation
        ({**MPICH, **MSRUN, "RANK_ID": "2"}, Launch("msrun", 2, 8, 1, 4)),
        ({**MPICH, **OPEN_MPI, "PMI_RANK": "2"}, Launch("mpi", 2, 8, 1, 4)),
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


def test_scheduler():
    with pytest.raises(RuntimeError, match=r"^this process is msrun's scheduler, not a rank: init_distributed must run in"):
        detect({"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2"})


def test_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch):
    for name, value in MPICH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MS_ROLE", raising=False)
    assert detect() == Launch("mpi", 5, 8, 1, 4)
