"""Which launcher started this process, and as which rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping

# launcher -> (rank, size, local rank, local size); MPICH's Hydra first, then Open MPI
_MPI_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


@dataclass(frozen=True)
class Launch:
    """`kind`: `none`, `mpi` or `msrun`. The local rank counts the processes of this host; it is the device id."""

    kind: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def detect(env: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables; a process without a launcher is one rank.

    Raises:
        RuntimeError: the variables contradict each other, or this process is msrun's scheduler.
    """
    if env.get("MS_ROLE") == "MS_SCHED":
        raise RuntimeError("this process is msrun's scheduler, not a rank: init_distributed must run in the workers only")
    if env.get("MS_ROLE") == "MS_WORKER":
        size = int(env.get("MS_WORKER_NUM", "1"))
        rank = int(env.get("RANK_ID", env.get("MS_NODE_ID", "0")))
        local_rank = int(env.get("DEVICE_ID", str(rank)))
        local_size = int(env.get("BMTRAIN_MS_LOCAL_SIZE", str(size)))
        return _checked(Launch("msrun", rank, size, local_rank, local_size))
    for rank, size, local_rank, local_size in _MPI_VARIABLES:
        if rank in env:
            total = int(env.get(size, "1"))
            mine = int(env[rank])
            launch = Launch("mpi", mine, total, int(env.get(local_rank, env[rank])), int(env.get(local_size, str(total))))
            return _checked(launch)
    return Launch()


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.size or not 0 <= launch.local_rank < launch.local_size:
        raise RuntimeError(f"the launcher's variables contradict each other: {launch}")
    return launch
