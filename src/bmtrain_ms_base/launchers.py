"""Which launcher started this process, and as which rank: read from the variables that launchers set."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Mapping, MutableMapping

from . import board as boards

FOLDERS = "BMTRAIN_MS_FOLDERS"  # ranks of one host as if they were on several: the working folder of each, separated by colons
FUSED_ATTENTION = "BMTRAIN_MS_FUSED_ATTENTION"  # 0: not by MindSpore's flash_attention_score, where a device has none
REHEARSE = "BMTRAIN_MS_REHEARSE"  # asks every rank to rehearse on CPU what a device would run: see `init_distributed`
TERMINAL = "BMTRAIN_MS_TERMINAL"  # 1: what ranks write to stderr is shown on a terminal, by the launcher


class LauncherError(RuntimeError):
    """The variables that launchers set do not say which rank this process is; whoever set them can mend it."""


@dataclass(frozen=True)
class Launch:
    """Where a process stands among those that were started with it.

    Attributes:
        kind: `none`, `launch` (`bmtrain-ms launch`), `mpi`, `msrun`, or `socket` (ranks of one host that `torchrun`, `srun` and
            their like started).
        rank, size: among all.
        local_rank, local_size: among those of this host; the local rank is the device id.
        source: the variables that said so, for messages.
        meeting: names the job, for kind `socket`.
    """

    kind: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: str = field(default="", compare=False, repr=False)
    meeting: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class _Launcher:
    """The variables of a launcher; of several the first that is set counts.

    `kind`: as in `Launch`, or `foreign`: recognised, so that its ranks are refused instead of each being alone.
    `hosts`: how many hosts there are.  `job`: what ranks of one job have in common.
    """

    name: str
    kind: str
    rank: tuple[str, ...]
    size: tuple[str, ...] = ()
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


_LAUNCHERS = (
    _Launcher("msrun", "msrun", ("RANK_ID", "MS_NODE_ID"), ("MS_WORKER_NUM",), ("DEVICE_ID",), ("BMTRAIN_MS_LOCAL_SIZE",)),
    _Launcher("MPICH", "mpi", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",)),
    _Launcher(
        "Open MPI",
        "mpi",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Launcher(
        "torchrun",
        "socket",
        ("RANK",),
        ("WORLD_SIZE",),
        ("LOCAL_RANK",),
        ("LOCAL_WORLD_SIZE",),
        job=("MASTER_ADDR", "MASTER_PORT"),
    ),
    _Launcher("MVAPICH", "foreign", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",)),
    _Launcher("Flux", "foreign", ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",)),
    _Launcher("PALS", "foreign", ("PALS_RANKID",)),
    _Launcher("jsrun", "foreign", ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",)),
    _Launcher("Horovod", "foreign", ("HOROVOD_RANK",), ("HOROVOD_SIZE",)),
    _Launcher(
        "srun",
        "socket",
        ("SLURM_PROCID",),
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        ("SLURM_LOCALID",),
        hosts=("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    _Launcher("PMIx", "foreign", ("PMIX_RANK",)),
    _Launcher("pbsdsh", "foreign", ("PBS_TASKNUM",)),
)
_OUTERMOST = ("srun", "PMIx", "pbsdsh")  # what a process of these starts may be a launcher, whose word counts more

# Variables that say which rank a process is. Those of another launcher mislead the processes that ours starts.
# fmt: off
_SAYS_WHO = (
    "PMI_", "PMIX_", "OMPI_", "PRTE_", "MPI_LOCAL", "MV2_COMM_", "HYDRA_", "HYDI_", "TORCHELASTIC_", "FLUX_TASK_", "FLUX_JOB_",
    "PALS_", "JSM_", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
    "SLURM_STEP", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASK_PID", "SLURM_GTIDS", "SLURM_SRUN_", "PBS_TASKNUM", "PBS_NODENUM",
    "PBS_VNODENUM", "MS_ROLE", "MS_WORKER_NUM", "MS_SERVER_NUM", "MS_NODE_ID", "MS_SCHED_", "MS_TOPO_TIMEOUT",
    "BMTRAIN_MS_BOARD", "BMTRAIN_MS_RANK", "BMTRAIN_MS_SIZE", "BMTRAIN_MS_KIND", "BMTRAIN_MS_LOCAL_SIZE",
    "BMTRAIN_MS_FOLDERS",
)
# fmt: on
# fmt: off
_SAYS_WHO_EXACTLY = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "RANK_ID", "RANK_SIZE", "RANK_TABLE_FILE",
)
# fmt: on


def forget_launchers(env: MutableMapping[str, str], keep: tuple[str, ...] = ()) -> None:
    """Remove what other launchers set, except variables whose names begin with one of `keep`."""
    for name in list(env):
        says = name in _SAYS_WHO_EXACTLY or name.startswith(_SAYS_WHO)
        if says and not name.startswith(keep):
            del env[name]


def forget_board(env: MutableMapping[str, str]) -> None:
    """Remove our own variables."""
    for name in (boards.ADDRESS, boards.RANK, boards.SIZE, boards.KIND):
        env.pop(name, None)


def is_scheduler(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is no rank but msrun's scheduler.

    Raises:
        LauncherError: another launcher says that it is a rank.
    """
    if env.get("MS_ROLE") != "MS_SCHED":
        return False
    for claim in _claims(env):
        if claim.kind != "msrun":
            raise LauncherError(f"MS_ROLE=MS_SCHED (of msrun, for its scheduler) contradicts {claim.source}. {_remedy(claim)}")
    return True


def detect(env: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables; a process without a launcher is one rank.

    Raises:
        LauncherError: the variables contradict each other, are those of another process, or of a launcher whose ranks cannot find
            each other; or this process is msrun's scheduler.
    """
    if is_scheduler(env):
        raise LauncherError("this process is msrun's scheduler, not a rank: init_distributed must run in the workers only")
    claims = _claims(env)
    several = [claim for claim in claims if claim.size > 1]
    if boards.ADDRESS in env and boards.own_board(env) is None and (not several or env.get(boards.KIND) != "launch"):
        raise LauncherError(_inherited(env))  # unless another launcher started this process below a rank
    if env.get(boards.KIND) == "launch" and boards.own_board(env) is not None:
        rank, size = int(env[boards.RANK]), int(env[boards.SIZE])
        local = size // len(folders_of(env))
        return Launch("launch", rank, size, rank % local, local, f"{boards.RANK}={rank}, {boards.SIZE}={size}")
    several = [claim for claim in several if not _is_outermost(claim)] or several
    for claim in several[1:]:
        if (claim.rank, claim.size) != (several[0].rank, several[0].size):
            raise LauncherError(
                f"two launchers contradict each other: {several[0].source}, but {claim.source}. Remove the variables of the one "
                f"that did not start this process. {_remedy(max(several, key=lambda one: one.size))}"
            )
    chosen = (several or claims or [Launch()])[0]
    _check(chosen, env)
    return chosen


def folders_of(env: Mapping[str, str]) -> list[str]:
    """The working folders of the hosts that ranks are to be on as if there were several; one of no name where there are none."""
    return env.get(FOLDERS, "").split(":")


def _claims(env: Mapping[str, str]) -> list[Launch]:
    """What each launcher whose variables are there says. One of unknown size counts only where nobody else says anything."""
    found = [(launcher, claim) for launcher in _LAUNCHERS for claim in [_read(launcher, env)] if claim is not None]
    known = [claim for launcher, claim in found if launcher.size]
    return known or [claim for _, claim in found]


def _read(launcher: _Launcher, env: Mapping[str, str]) -> Launch | None:
    if launcher.kind == "msrun" and env.get("MS_ROLE") != "MS_WORKER":
        return None
    said: dict[str, str] = {}

    def value(names: tuple[str, ...], default: int) -> int:
        name = next((name for name in names if env.get(name)), None)
        if name is None:
            return default
        said[name] = env[name]
        try:
            return int(env[name], 0 if launcher.name == "pbsdsh" else 10)
        except ValueError:
            raise LauncherError(f"{name}={env[name]!r}, which {launcher.name} sets, is not a number; remove it") from None

    if launcher.kind != "msrun" and not any(env.get(name) for name in launcher.rank):
        return None
    if launcher.name in ("torchrun", "srun") and not any(env.get(name) for name in launcher.size):
        return None  # RANK alone says nothing; SLURM_PROCID alone is that of a batch script of one task
    rank = value(launcher.rank, 0)
    if launcher.name == "pbsdsh" and rank == 1:
        return None  # the job's own script
    size = value(launcher.size, 1) if launcher.size else 0
    local_rank, local_size = value(launcher.local_rank, rank), value(launcher.local_size, size)
    if value(launcher.hosts, 1) > 1:
        local_size = -1
    source = ", ".join(f"{name}={text}" for name, text in said.items()) + f" (of {launcher.name})"
    job = [env.get(name, "") for name in launcher.job]
    meeting = ":".join([launcher.name, *job]) if any(job) or launcher.name == "srun" else ""
    return Launch(launcher.kind, rank, size, local_rank, local_size, source, meeting)


def _is_outermost(claim: Launch) -> bool:
    return claim.source.endswith(tuple(f"(of {name})" for name in _OUTERMOST))


def _remedy(claim: Launch) -> str:
    count = claim.size if claim.size > 1 else "N"
    return f"Start with: bmtrain-ms launch -n {count} script.py"


def _check(launch: Launch, env: Mapping[str, str]) -> None:
    if launch.kind == "foreign" and launch.size != 1:
        raise LauncherError(
            f"{launch.source} says that this process is one of several, which find each other neither by MPI nor by a socket. "
            f"{_remedy(launch)}"
        )
    hosts = launch.local_size == -1 or launch.local_size < launch.size or launch.local_rank != launch.rank
    if launch.kind == "socket" and launch.size > 1 and hosts:
        raise LauncherError(
            f"{launch.source}: ranks on several hosts find each other by MPI only. Start with: mpiexec -hosts HOST1,HOST2 -n "
            f"{launch.size} python script.py"
        )
    if not 0 <= launch.rank < max(launch.size, 1) or not 0 <= launch.local_rank < abs(launch.local_size or 1):
        raise LauncherError(
            f"the launcher's variables contradict each other: {launch}, which comes from {launch.source}. {_remedy(launch)}"
        )
    if launch.kind == "socket" and launch.size > 1 and not launch.meeting:
        raise LauncherError(
            f"{launch.source} names {launch.size} ranks, but not where they meet: MASTER_ADDR and MASTER_PORT are missing. "
            f"{_remedy(launch)}"
        )


def _inherited(env: Mapping[str, str]) -> str:
    board = boards.open_board(env[boards.ADDRESS])
    rank = env.get(boards.RANK, "?")
    if board is None:
        return (
            f"{boards.ADDRESS} and its like are those of a job whose launcher has ended; remove them from the environment, or "
            "start with: bmtrain-ms launch -n N script.py"
        )
    holder = board.rows[int(rank)].pid if rank.isdecimal() and int(rank) < len(board.rows) else 0
    return (
        f"this process ({os.getpid()}) is not rank {rank}, it has inherited the variables of rank {rank} (process {holder}); call "
        f"init_distributed in the rank itself, or start this process without {boards.ADDRESS}: env -u {boards.ADDRESS} python ..."
    )
