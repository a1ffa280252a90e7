"""The process-wide world: set once by `init_distributed`, read to fill defaults in public functions; everything else is passed."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
from dataclasses import dataclass, field
from typing import Any, ContextManager, Iterator

import mindspore as ms
import numpy as np

from bmtrain_ms_base.board import own_board, own_row
from bmtrain_ms_base.checks import number, whole
from bmtrain_ms_base.mesh import AXES, Mesh
from bmtrain_ms_base.mpi import finalise_in_ranks_only
from bmtrain_ms_base.system import cores, has_ascend, open_streams

from .. import ops
from ..compat import device as devices
from ..compat import habits, runtime
from . import ending, node
from .engine import Clock, Engine
from .launch import Launch, detect, is_scheduler
from .meeting import BoardMeeting, MpiMeeting, SocketMeeting
from .single import SingleEngine
from .trace import Trace, TracingEngine

GATHER_DTYPES = {"float16": ms.float16, "bfloat16": ms.bfloat16, "int8": ms.int8}


@dataclass(frozen=True, eq=False)
class World:
    """Where this process stands, and the ways to talk to others.

    *Everyone* and an axis are different things, also where they have the same ranks: what all decide together (to skip a step, to
    stop, to save) is decided by `everyone`; gradients and losses are averaged along `dp`, parameters gathered along `shard`.

    Attributes:
        everyone: collectives among all ranks.
        mesh: which rank stands where.
        seed: of initialisation and of all stateless randomness.
        launch: launcher, local rank.
        prefetch: how many groups of parameters are gathered ahead.
        gather_dtype: what parameters are gathered in: see `init_distributed`.
        trace: of what happens when, or None.
        micro_batches: into how many a pipeline divides a rank's batch; None: as many as it has stages.
    """

    everyone: Engine
    mesh: Mesh
    seed: int = 0
    launch: Launch = field(default_factory=Launch)
    prefetch: int = 1
    gather_dtype: str | None = None
    trace: Trace | None = None
    micro_batches: int | None = None
    _engines: dict[str, Engine] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_gather_dtype(self.gather_dtype)
        if self.micro_batches is not None:
            object.__setattr__(self, "micro_batches", whole("num_micro_batches", self.micro_batches, 1))
        # all of them now, in one order on every rank: making a group is a collective
        object.__setattr__(self, "_engines", {axis: self._make(axis) for axis in (*AXES, "stage")})

    def along(self, axis: str) -> Engine:
        """Collectives among the ranks that differ from this one along an axis only, see `Mesh`.

        Where these are all ranks it is `everyone`: on Ascend each communicator has buffers of its own.
        """
        return self._engines[axis]

    @property
    def stage(self) -> Engine:
        """Collectives among the ranks of this pipeline stage: those that differ along `dp` and `tp`."""
        return self._engines["stage"]

    def sharing(self, copies: int) -> Engine:
        """Collectives among this rank and its neighbours along `tp` that store the same part of a tensor.

        All of them ask for it in one order, as making a group is a collective; a parameter asks when it is made.

        Args:
            copies: how many they are; a divisor of the ranks along `tp`.
        """
        name = f"tp/{copies}"
        if name not in self._engines:
            first = self.mesh.tp_rank - self.mesh.tp_rank % copies
            whole = self.along("tp")
            if copies in (1, whole.size):
                engine = whole if copies == whole.size else SingleEngine(self.everyone.clock, host=self.everyone.lands_in_place)
            else:
                engine = whole.subgroup(range(first, first + copies))
            self._engines[name] = engine
        return self._engines[name]

    def follow(self, rule: str) -> None:
        """Note by which rule the last step was made, for `Engine.follow`: by ranks that share parameters, not by stages."""
        for axis, engine in self._engines.items():
            if axis != "pp":
                engine.follow(rule)

    def _make(self, axis: str) -> Engine:
        if axis == "stage":
            peers = self.mesh.peers("dp", "tp")
            return self.everyone if len(peers) == self.everyone.size else self.everyone.subgroup(peers)
        size = self.mesh.size(axis)
        if size == self.everyone.size:
            return self.everyone
        if size == 1:
            return SingleEngine(self.everyone.clock, host=self.everyone.lands_in_place)
        return self.everyone.subgroup(self.mesh.peers(axis))

    @property
    def engine(self) -> Engine:
        """`everyone`, where BMTrain says `config["comm"]`."""
        return self.everyone

    @property
    def shards(self) -> Engine:
        """Collectives among the ranks over which parameters are sharded."""
        return self.along("shard")

    def measure(self, name: str) -> ContextManager[None]:
        """A span of the trace around the body of a `with` statement."""
        return contextlib.nullcontext() if self.trace is None else self.trace.measure(name, self.everyone.clock.step)

    # A copied or unpickled parameter belongs to the world of the process that it is in.

    def __deepcopy__(self, memo: dict) -> World:
        return self

    def __reduce__(self) -> tuple:
        return world, ()


_current: list[World] = []
_process: list[int] = []  # that called init_distributed
_cores: list[int] = []  # what this process may use, before the first world took its share
_lost: list[BaseException] = []  # of worlds that were shut down: see `Engine.lost`


def _check_gather_dtype(name: str | None) -> None:
    if name is not None and not (isinstance(name, str) and name in GATHER_DTYPES):
        raise ValueError(f"gather_dtype must be None or one of {', '.join(GATHER_DTYPES)}, not {name!r}")


def world() -> World:
    """The current world.

    Raises:
        RuntimeError: `init_distributed` has not been called.
    """
    if not _current:
        raise RuntimeError("bmtrain_ms is not initialised: call bmtrain_ms.init_distributed() before building the model")
    return _current[-1]


def is_initialized() -> bool:
    """Whether `init_distributed` has been called."""
    return bool(_current)


habits.in_use.append(is_initialized)


def rank() -> int:
    """This process's global rank; 0 before initialisation (BMTrain: `rank`)."""
    return _current[-1].mesh.rank if _current else 0


def world_size() -> int:
    """How many ranks there are; 1 before initialisation (BMTrain: `world_size`)."""
    return _current[-1].mesh.world if _current else 1


def synchronize() -> None:
    """Wait until every rank has come here (BMTrain: `synchronize`)."""
    world().everyone.barrier("synchronize").wait()


@contextlib.contextmanager
def use_world(temporary: World) -> Iterator[World]:
    """Make `temporary` the current world inside a `with` block: tests run several worlds in one process."""
    _current.append(temporary)
    try:
        yield temporary
    finally:
        _current.pop()


def init_distributed(
    init_method: str = "env://",
    seed: int = 0,
    pipe_size: int = -1,
    num_micro_batches: int | None = None,
    tp_size: int = 1,
    *,
    ep_size: int = 1,
    prefetch: int = 1,
    gather_dtype: str | None = None,
    shard_size: int | None = None,
    trace: bool = False,
    engine: Engine | None = None,
    device: str | None = None,
    timeout: float = 600.0,
) -> World:
    """Join the other ranks and choose the settings that suit this device (BMTrain: `init_distributed`).

    The launcher is recognised by its variables: on CPU `bmtrain-ms launch`, `mpiexec`, `torchrun` and `srun` give the *node*
    engine, `mpiexec` on several hosts *mpi*; `msrun` gives *hccl*, on Ascend only; no launcher gives one rank.
    Python's, NumPy's and MindSpore's generators get the same seed on every rank. On CPU each rank gets its share of the cores, and
    operations run synchronously (`compat.runtime.configure_cpu`).

    Args:
        init_method: only `env://`: what the launcher says.
        seed: of initialisation and of all randomness.
        pipe_size: stages of a pipeline, over which `model_center.spread` divides a model's layers; -1: one.
        num_micro_batches: into how many a pipeline divides each rank's batch; default: as many as it has stages.
        tp_size: how many neighbouring ranks divide tensors among them; they are to get the same batch.
        ep_size: over how many neighbouring data-parallel ranks the experts of `nn.MoE` are divided; each gets a batch of its own.
        prefetch: gather this many groups ahead of the one that computes; 0 turns overlap off.
        gather_dtype: gather parameters in fewer bits: `bfloat16`, `float16` or `int8`; what each costs: `bmtrain_ms.zero.wire`.
        shard_size: shard over so many neighbouring data-parallel ranks (those of a node) and replicate across: more memory, gathers
            inside a node, and a reduce across nodes. Default: shard over all of them.
        trace: keep note of what is computed and moved when, for `comm.write_trace`.
        engine: use this one instead of the launcher's.
        device: `CPU` or `Ascend`; default: what MindSpore is set to. Where the environment has `BMTRAIN_MS_REHEARSE=1`, MindSpore
            computes on CPU, and everything else is as on Ascend: a rehearsal, slower, of what a device would run.
        timeout: seconds until a collective gives up (CPU ranks over mpiexec; HCCL has its own variables).

    Raises:
        RuntimeError: called twice, after an operation on CPU, under a parallel mode of MindSpore's, the launcher does not fit the
            device (CPU ranks under `msrun`), or a rehearsal is asked for on Ascend.
        TypeError: `init_method` is a number (the seed is the second argument), or an option that must be a number is none.
        ValueError: an option out of range, sizes that do not divide the ranks, or `BMTRAIN_MS_REHEARSE` is neither 1 nor 0.
    """
    if _current:
        raise RuntimeError("init_distributed was called before; call bmtrain_ms.shutdown() first to start over")
    pipe_size, micro_batches = _checked_pipe(init_method, pipe_size, num_micro_batches)
    seed, prefetch, shard_size = _checked_settings(seed, prefetch, shard_size, gather_dtype, timeout)
    chosen = devices.asked_for(device)
    if is_scheduler():
        _serve_as_scheduler(chosen.target)
    habits.refuse_parallel_mode()
    launch = detect()
    engine = _choose(chosen, launch, engine, timeout)
    _seed_generators(seed)
    record = Trace() if trace else None
    ranks = _placed(engine, record, shard_size, tp_size, pipe_size, ep_size)
    return _enter(World(*ranks, seed, launch, prefetch, gather_dtype, record, micro_batches))


def _seed_generators(seed: int) -> None:
    for seed_it in (random.seed, np.random.seed, ms.set_seed):
        seed_it(seed)


def _choose(device: devices.Device, launch: Launch, engine: Engine | None, timeout: float) -> Engine:
    """Have everything computed on that device; how its ranks talk, by `engine` if one is given."""
    open_streams()  # before the engine has files
    if engine is None:
        engine = _make_engine(launch, device.target, timeout)
    elif device.target == "CPU":
        _configure_cpu(launch)
    if device.rehearsed:
        engine = _rehearse(engine, launch)
    devices.choose(device)
    ops.use_default()
    return engine


def _enter(made: World) -> World:
    _current.append(made)
    _process[:] = [os.getpid()]
    row = own_row()
    if row is not None:
        row.join()
    return made


def _placed(
    engine: Engine, trace: Trace | None, shard_size: int | None, tp_size: int, pp: int, ep_size: int
) -> tuple[Engine, Mesh]:
    """All ranks, traced if they are to be, and where this one stands among them."""
    try:
        tp, ep = whole("tp_size", tp_size, 1), whole("ep_size", ep_size, 1)
        mesh = Mesh.data_parallel(engine.size, engine.rank, shard_size, tp, pp, ep)
    except ValueError:
        engine.close()
        raise
    return (engine if trace is None else TracingEngine(engine, trace)), mesh


def _check_method(init_method: Any) -> None:
    if not isinstance(init_method, str):
        raise TypeError(f"init_method must be 'env://', not {init_method!r}; a seed is given by its name: init_distributed(seed=3)")
    if init_method != "env://":
        raise ValueError(f"init_method={init_method!r}: ranks find each other by what mpiexec or msrun says; use 'env://'")


def _checked_pipe(init_method: Any, pipe_size: int, num_micro_batches: int | None) -> tuple[int, int | None]:
    """Both as whole numbers; the first argument is looked at first."""
    _check_method(init_method)
    stages = 1 if pipe_size == -1 else whole("pipe_size", pipe_size, 1)
    return stages, None if num_micro_batches is None else whole("num_micro_batches", num_micro_batches, 1)


def _checked_settings(
    seed: int, prefetch: int, shard_size: int | None, gather_dtype: str | None, timeout: float
) -> tuple[int, int, int | None]:
    """Seed, prefetch and shard_size as whole numbers."""
    seed, prefetch = whole("seed", seed), whole("prefetch", prefetch)
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be between 0 and {(1 << 32) - 1}, as NumPy's, not {seed}")
    if prefetch < 0:
        raise ValueError(f"prefetch must be 0 (off) or more, not {prefetch}")
    shard_size = None if shard_size is None else whole("shard_size", shard_size)
    _check_gather_dtype(gather_dtype)
    if not number("timeout", timeout) > 0:
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
    return seed, prefetch, shard_size


def shutdown() -> None:
    """Finish what is in flight and forget the world; does nothing when there is none. Called at exit."""
    while _current:
        engine = _current.pop().everyone
        engine.close()
        if engine.lost is not None:
            _lost.append(engine.lost)


def _at_exit() -> None:
    """Not in a process that was forked from the rank: what it has is a copy, whose other end the rank still needs.

    A script may catch the error of a lost operation and come to its end; MPI's own end would wait for the others for ever.
    """
    if _process == [os.getpid()]:
        shutdown()
        if _lost:
            ending.end_job(f"ends all ranks, as an operation was lost: {_lost[0]}")


finalise_in_ranks_only()
atexit.register(_at_exit)  # before MPI's finalisation


def _serve_as_scheduler(target: str) -> None:
    """`msrun` runs the script once more as its scheduler, which brings the ranks together. Does not return."""
    if target != "Ascend":  # as every rank does: none would come, and msrun itself waits until its scheduler ends
        raise RuntimeError(_not_under_msrun(target))
    from mindspore.communication import init

    init()  # ends the process itself when the ranks have left
    raise SystemExit(0)


def _not_under_msrun(target: str) -> str:
    ranks = os.environ.get("MS_WORKER_NUM") or "N"
    way = " --with mpi" if has_ascend() else ""  # where the command would choose msrun itself
    return (
        f"msrun starts Ascend ranks only, and this device is {target}: start with bmtrain-ms launch{way} -n {ranks} script.py, or "
        f"mpiexec -n {ranks} python script.py"
    )


def _make_engine(launch: Launch, target: str, timeout: float) -> Engine:
    if target == "Ascend":
        runtime.configure_ascend(launch.local_rank)
        if launch.kind == "msrun":
            from mindspore.communication import get_group_size, get_rank, init

            from .hccl import HcclEngine

            init("hccl")
            return HcclEngine("hccl_world_group", get_rank(), get_group_size())
        if launch.kind == "mpi":
            raise RuntimeError("Ascend ranks are started with msrun (bmtrain-ms launch --with msrun), not with mpiexec")
        if launch.size > 1:
            raise RuntimeError(f"Ascend ranks are started with msrun: bmtrain-ms launch --with msrun -n {launch.size} script.py")
        return SingleEngine(host=False)
    if target != "CPU":
        raise RuntimeError(f"device target {target!r} is not supported; use CPU or Ascend")
    if launch.kind == "msrun":
        raise RuntimeError(_not_under_msrun(target))
    _configure_cpu(launch)
    if launch.size == 1:
        return SingleEngine()
    return _make_mpi_engine(launch, timeout) if launch.kind == "mpi" else _make_node_engine(launch, timeout)


def _rehearse(engine: Engine, launch: Launch) -> Engine:
    """An engine as a device has it, over that of CPU ranks."""
    from .rehearsed import RehearsedEngine

    if launch.kind == "none" and isinstance(engine, SingleEngine):
        return SingleEngine(engine.clock, host=False)  # as on a device: without msrun there is no HCCL
    return RehearsedEngine(engine) if engine.lands_in_place else engine


def _make_node_engine(launch: Launch, timeout: float) -> Engine:
    """The engine of ranks of one host that were not started by MPI."""
    board = own_board()
    meeting = SocketMeeting(launch) if board is None else BoardMeeting(board, launch, timeout)
    try:
        engine = node.connect(meeting, Clock(), timeout, 0 if board is None else board.launcher)
    finally:
        meeting.close()
    if engine is None:
        raise RuntimeError(
            "the ranks are not allowed to read each other's memory (process_vm_readv), or are on several hosts; with MPI they need "
            f"not: bmtrain-ms launch --with mpi -n {launch.size} script.py"
        )
    return engine


def _make_mpi_engine(launch: Launch, timeout: float) -> Engine:
    with ending.limited("init_distributed", timeout):
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise RuntimeError(
                "this process was started by mpiexec, but mpi4py cannot be imported; pip install 'bmtrain-ms[cpu]'"
            ) from error

        from .mpi import MpiEngine

        mpi_world = MPI.COMM_WORLD
        found = mpi_world.Get_rank(), mpi_world.Get_size()
        if found != (launch.rank, launch.size):
            raise RuntimeError(
                f"{launch.source} says rank {launch.rank} of {launch.size}, but mpi4py's MPI ({MPI.get_vendor()[0]}) says rank "
                f"{found[0]} of {found[1]}: it is not the MPI of the launcher. Start with: bmtrain-ms launch -n {launch.size} "
                "script.py"
            )
        board = own_board()
        if board is None:  # our launcher ends the others itself
            ending.install(MPI)
        found = node.connect(MpiMeeting(mpi_world), Clock(), timeout, 0 if board is None else board.launcher)
        return found or MpiEngine(mpi_world.Dup(), Clock(), timeout)


def _configure_cpu(launch: Launch) -> None:
    if not _cores:
        _cores.extend(cores())
    runtime.configure_cpu(_take_cores(launch))


def _take_cores(launch: Launch) -> int:
    """Each rank of a host gets its share of the cores; more ranks than cores share one each. Returns how many it got."""
    share = max(1, len(_cores) // launch.local_size)
    if launch.local_size > 1:
        start = launch.local_rank * share % len(_cores)
        os.sched_setaffinity(0, _cores[start : start + share])
    return share
