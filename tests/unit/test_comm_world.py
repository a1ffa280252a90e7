"""init_distributed: what it sets, what it refuses, which engine it chooses."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import mindspore as ms
import numpy as np
import pytest

import bmtrain_ms
from bmtrain_ms import comm
from bmtrain_ms.comm import Launch, Mesh, SingleEngine, World
from bmtrain_ms.compat import runtime

module = importlib.import_module("bmtrain_ms.comm.world")  # the package has a function of that name
pytestmark = pytest.mark.usefixtures("no_world")
LAUNCHER_VARIABLES = ("MS_ROLE", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


@pytest.fixture
def no_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not comm.is_initialized()
    yield
    comm.shutdown()


class Closing(SingleEngine):
    def __init__(self) -> None:
        super().__init__()
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


# One rank without a launcher #


def test_one_rank_without_a_launcher():
    made = bmtrain_ms.init_distributed(seed=3, prefetch=2)
    assert isinstance(made.engine, SingleEngine) and made.engine.lands_in_place
    assert (made.mesh, made.seed, made.launch, made.prefetch) == (Mesh(1, 0), 3, Launch(), 2)
    assert comm.world() is made
    assert comm.is_initialized() and bmtrain_ms.is_initialized()
    assert (bmtrain_ms.rank(), bmtrain_ms.world_size()) == (0, 1)
    assert bmtrain_ms.synchronize() is None


def test_many_worlds_leave_the_environment_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """MindSpore makes the search path of libraries longer each time, until no process can be started any more."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/a:/b")
    paths = []
    for _ in range(3):
        bmtrain_ms.init_distributed()
        bmtrain_ms.shutdown()
        paths.append(os.environ["LD_LIBRARY_PATH"])
    assert paths[0].endswith("/a:/b") and len(set(paths)) == 1


def test_defaults():
    made = bmtrain_ms.init_distributed()
    assert (made.seed, made.prefetch) == (0, 1)


def test_before_initialisation():
    assert not bmtrain_ms.is_initialized()
    assert (bmtrain_ms.rank(), bmtrain_ms.world_size()) == (0, 1)
    text = "^bmtrain_ms is not initialised: call bmtrain_ms.init_distributed.. before building the model$"
    with pytest.raises(RuntimeError, match=text):
        comm.world()
    with pytest.raises(RuntimeError, match=text):
        bmtrain_ms.synchronize()


def test_pynative_mode_is_set():
    ms.set_context(mode=ms.GRAPH_MODE)
    bmtrain_ms.init_distributed()
    assert ms.get_context("mode") == ms.PYNATIVE_MODE


def draws() -> list:
    return [random.random(), np.random.rand(), ms.get_seed(), float(ms.ops.rand(1).asnumpy()[0])]


def test_after_an_operation():
    """Operations stay asynchronous from the first one on, whatever is set then."""
    code = """
import mindspore as ms
import bmtrain_ms
ms.set_device("CPU")
(ms.Tensor([1.0]) * 2).asnumpy()
try:
    bmtrain_ms.init_distributed()
except RuntimeError as error:
    print(error)
assert not bmtrain_ms.is_initialized()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == (
        "init_distributed must come before the first MindSpore operation of the process: CPU ranks run operations "
        "synchronously, and MindSpore cannot change to that later"
    ), ran.stderr


def test_no_thread_spins(tmp_path: Path):
    """On 2.5 the first compiled function starts a thread that takes a core from then on."""
    script = tmp_path / "script.py"  # compiling reads the source
    script.write_text("""
import contextlib, glob, os, time, bmtrain_ms, mindspore as ms

def double(x):
    return (x * 2).sum()

bmtrain_ms.init_distributed()
x = ms.Tensor([1.0, 2.0])
ms.jit(double)(x).asnumpy()
quiet = 0
while quiet < 20:  # a thread that spins is runnable at every look
    states = []
    for path in glob.glob("/proc/self/task/*/stat"):
        with contextlib.suppress(OSError):  # a thread that has ended
            states.append(open(path).read().rsplit(")", 1)[1].split()[0])
    quiet = quiet + 1 if states.count("R") == 1 else 0  # the one that looks
    time.sleep(0.005)
""")
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)


def test_operations_are_synchronous_and_the_world_ends_with_the_process():
    code = """
import bmtrain_ms, mindspore as ms, numpy as np
class Loud(bmtrain_ms.comm.SingleEngine):
    def close(self): print("closed", flush=True)
bmtrain_ms.init_distributed(engine=Loud())
array = np.ones((1024, 1024), np.float32)
x = ms.Tensor.from_numpy(array)  # the same memory
found = [x @ x for _ in range(8)]
array[:] = 0  # asynchronous operations would still have to read it
print(*(y.asnumpy().min() for y in found), flush=True)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    *found, last = ran.stdout.split()
    assert found == ["1024.0"] * 8
    assert (ran.returncode, last) == (0, "closed"), ran.stderr


def test_seeds_are_set():
    bmtrain_ms.init_distributed(seed=11)
    first = draws()
    assert first[2] == 11
    random.seed(11), np.random.seed(11)
    assert first[:2] == [random.random(), np.random.rand()]
    comm.shutdown()
    bmtrain_ms.init_distributed(seed=11)
    assert draws() == first
    comm.shutdown()
    bmtrain_ms.init_distributed(seed=12)
    assert all(a != b for a, b in zip(draws(), first))


def test_called_twice():
    made = bmtrain_ms.init_distributed()
    text = "^init_distributed was called before; call bmtrain_ms.shutdown.. first to start over$"
    with pytest.raises(RuntimeError, match=text):
        bmtrain_ms.init_distributed()
    assert comm.world() is made
    bmtrain_ms.shutdown()
    assert bmtrain_ms.init_distributed() is not made


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tp_size": 2}, r"^world size 1 is not divisible by pp \* tp = 1 \* 2 = 2; start a multiple of 2 processes$"),
        ({"tp_size": 0}, r"^tp_size must be at least 1, not 0$"),
        (
            {"pipe_size": 2},
            r"^world size 1 is not divisible by pp \* tp = 2 \* 1 = 2; start a multiple of 2 processes, or choose 1 for pp$",
        ),
        ({"pipe_size": 0}, r"^pipe_size must be at least 1, not 0$"),
        ({"num_micro_batches": 0}, r"^num_micro_batches must be at least 1, not 0$"),
        ({"ep_size": 0}, r"^ep_size must be at least 1, not 0$"),
        ({"ep_size": 2}, r"^ep=2 does not divide the 1 data-parallel ranks: use 1$"),
        (
            {"init_method": "tcp://a:1"},
            r"^init_method='tcp://a:1': ranks find each other by what mpiexec or msrun says; use 'env://'$",
        ),
        ({"prefetch": -1}, r"^prefetch must be 0 \(off\) or more, not -1$"),
        ({"timeout": 0}, r"^timeout must be a positive number of seconds, not 0$"),
        ({"timeout": -2.5}, r"^timeout must be a positive number of seconds, not -2\.5$"),
    ],
)
def test_refused_arguments(arguments: dict, text: str):
    with pytest.raises(ValueError, match=text):
        bmtrain_ms.init_distributed(**arguments)
    assert not comm.is_initialized()


def test_accepted_edges():
    made = bmtrain_ms.init_distributed("env://", 5, 1, None, 1, prefetch=0, timeout=0.5)  # BMTrain's order
    assert (made.prefetch, made.seed) == (0, 5)


def test_a_seed_without_its_name():
    with pytest.raises(TypeError) as info:
        bmtrain_ms.init_distributed(3)  # type: ignore[arg-type]
    assert str(info.value) == "init_method must be 'env://', not 3; a seed is given by its name: init_distributed(seed=3)"
    assert not comm.is_initialized()


def test_an_engine_of_ones_own():
    engine = Closing()
    made = bmtrain_ms.init_distributed(engine=engine)
    assert made.engine is engine
    assert engine.closed == 0


# The end #


def test_shutdown_is_idempotent():
    engine = Closing()
    bmtrain_ms.init_distributed(engine=engine)
    for _ in range(3):
        bmtrain_ms.shutdown()
    assert engine.closed == 1
    assert not comm.is_initialized()


def test_shutdown_without_a_world():
    assert bmtrain_ms.shutdown() is None


# A temporary world #


class Pair(SingleEngine):
    size, rank = 2, 1


def test_use_world():
    outer = bmtrain_ms.init_distributed()
    inner = World(Pair(), Mesh(2, 1), seed=5)
    with comm.use_world(inner) as current:
        assert current is inner is comm.world()
        assert (bmtrain_ms.rank(), bmtrain_ms.world_size()) == (1, 2)
    assert comm.world() is outer
    with pytest.raises(KeyError), comm.use_world(inner):
        raise KeyError
    assert comm.world() is outer


def test_a_copied_world_is_the_world_of_this_process():
    made = bmtrain_ms.init_distributed()
    assert copy.deepcopy([made])[0] is made
    assert pickle.loads(pickle.dumps(made)) is made


# Choosing an engine #


def test_the_scheduler_of_msrun_serves_and_leaves(monkeypatch: pytest.MonkeyPatch):
    served = []
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setattr("mindspore.communication.init", lambda: served.append(True))
    with pytest.raises(SystemExit) as left:
        bmtrain_ms.init_distributed(device="Ascend")
    assert (left.value.code, served) == (0, [True])


def test_the_scheduler_of_cpu_ranks_leaves_as_they_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setattr("mindspore.communication.init", lambda: pytest.fail("it would wait for the ranks"))
    with pytest.raises(
        RuntimeError, match=r"^msrun starts Ascend ranks only, .* -n N script\.py, or mpiexec -n N python script\.py$"
    ):
        bmtrain_ms.init_distributed()


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list:
    """What would have been set on this process."""
    calls: list = []
    affinity = {0, 1}
    monkeypatch.setattr(module, "_cores", [])
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: affinity)
    monkeypatch.setattr(runtime, "configure_cpu", lambda threads: calls.append(("threads", threads)))
    monkeypatch.setattr(runtime, "configure_ascend", lambda device: calls.append(("ascend", device)))
    monkeypatch.setattr(module.os, "sched_setaffinity", lambda pid, cores: calls.append(("cores", list(cores))))
    return calls


@pytest.fixture
def communication(monkeypatch: pytest.MonkeyPatch, configured: list) -> list:
    """MindSpore's communication, as it looks on rank 3 of 4 of an msrun job."""
    monkeypatch.setattr("mindspore.communication.init", lambda *backend: configured.append(("init", *backend)))
    monkeypatch.setattr("mindspore.communication.get_rank", lambda: 3)
    monkeypatch.setattr("mindspore.communication.get_group_size", lambda: 4)
    variables = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "RANK_ID": "3", "DEVICE_ID": "1"}
    for name, value in {**variables, "BMTRAIN_MS_LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return configured


def test_ascend_under_msrun(communication: list):
    made = bmtrain_ms.init_distributed(device="Ascend")
    assert (made.engine.name, made.engine.rank, made.engine.size) == ("hccl", 3, 4)
    assert made.mesh == Mesh(4, 3)
    assert made.launch == Launch("msrun", 3, 4, 1, 2)
    assert communication == [("ascend", 1), ("init", "hccl")]


@pytest.mark.parametrize("ascend, way", [(False, ""), (True, " --with mpi")])
def test_cpu_under_msrun(communication: list, monkeypatch: pytest.MonkeyPatch, ascend: bool, way: str):
    """Refused with the command that works, also where the command itself would choose msrun; nothing of the process is changed."""
    monkeypatch.setattr(module, "has_ascend", lambda: ascend)
    with pytest.raises(RuntimeError) as refused:
        bmtrain_ms.init_distributed(device="CPU")
    assert str(refused.value) == (
        f"msrun starts Ascend ranks only, and this device is CPU: start with bmtrain-ms launch{way} -n 4 script.py, or mpiexec "
        "-n 4 python script.py"
    )
    assert communication == [] and not comm.is_initialized()


def test_one_ascend_card_without_a_launcher(configured: list):
    made = bmtrain_ms.init_distributed(device="Ascend")
    assert isinstance(made.engine, SingleEngine) and not made.engine.lands_in_place
    assert configured == [("ascend", 0)]


def test_ascend_under_mpiexec(configured: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    text = r"^Ascend ranks are started with msrun \(bmtrain-ms launch --with msrun\), not with mpiexec$"
    with pytest.raises(RuntimeError, match=text):
        bmtrain_ms.init_distributed(device="Ascend")
    assert not comm.is_initialized()


def test_other_devices(configured: list):
    with pytest.raises(RuntimeError, match=r"^device target 'GPU' is not supported; use CPU or Ascend$"):
        bmtrain_ms.init_distributed(device="GPU")
    assert configured == []


def test_mpiexec_with_one_rank_needs_no_mpi(configured: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    made = bmtrain_ms.init_distributed(device="CPU")
    assert isinstance(made.engine, SingleEngine)
    assert made.launch == Launch("mpi", 0, 1, 0, 1)


def test_mpiexec_without_mpi4py(configured: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: {0})
    text = r"^this process was started by mpiexec, but mpi4py cannot be imported; pip install 'bmtrain-ms\[cpu\]'$"
    with pytest.raises(RuntimeError, match=text):
        bmtrain_ms.init_distributed(device="CPU")
    assert not comm.is_initialized()


# Shares of the cores #


def share(monkeypatch: pytest.MonkeyPatch, calls: list, cores: set[int], rank: int, ranks: int) -> Any:
    calls.clear()
    monkeypatch.setattr(module, "_cores", [])
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: cores)
    module._configure_cpu(Launch("mpi", rank, ranks, rank, ranks))
    return dict(calls)


def test_ranks_share_the_cores(configured: list, monkeypatch: pytest.MonkeyPatch):
    eight = {0, 2, 4, 6, 8, 10, 12, 14}
    got = [share(monkeypatch, configured, eight, rank, 2) for rank in range(2)]
    assert got == [{"cores": [0, 2, 4, 6], "threads": 4}, {"cores": [8, 10, 12, 14], "threads": 4}]
    got = [share(monkeypatch, configured, eight, rank, 3) for rank in range(3)]
    assert [g["cores"] for g in got] == [[0, 2], [4, 6], [8, 10]]
    assert share(monkeypatch, configured, eight, 0, 1) == {"threads": 8}


def test_more_ranks_than_cores(configured: list, monkeypatch: pytest.MonkeyPatch):
    got = [share(monkeypatch, configured, {4, 5}, rank, 5) for rank in range(5)]
    assert [g["cores"] for g in got] == [[4], [5], [4], [5], [4]]
    assert all(g["threads"] == 1 for g in got)


def test_a_second_world_gets_the_same_share(configured: list, monkeypatch: pytest.MonkeyPatch):
    mine = {0, 1, 2, 3}
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(mine))

    def pin(pid: int, cores: list[int]) -> None:
        mine.intersection_update(cores)
        configured.append(("cores", list(cores)))

    monkeypatch.setattr(module.os, "sched_setaffinity", pin)
    for _ in range(2):
        module._configure_cpu(Launch("mpi", 1, 2, 1, 2))
    assert configured == [("cores", [2, 3]), ("threads", 2)] * 2


# How parameters are gathered #


@pytest.mark.one_engine
def test_gather_dtype_and_shard_size_are_kept(configured: list):
    made = bmtrain_ms.init_distributed(device="CPU", gather_dtype="bfloat16", shard_size=1)
    assert (made.gather_dtype, made.mesh.replica, made.along("shard")) == ("bfloat16", 1, made.everyone)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"gather_dtype": "int4"}, "gather_dtype must be None or one of float16, bfloat16, int8, not 'int4'"),
        (
            {"shard_size": 2},
            "shard_size=2 does not divide the 1 ranks; give the number of ranks of a node, or None to shard over all",
        ),
        (
            {"shard_size": 0},
            "shard_size=0 does not divide the 1 ranks; give the number of ranks of a node, or None to shard over all",
        ),
    ],
)
def test_wrong_ways_to_gather(configured: list, options: dict, text: str):
    with pytest.raises(ValueError) as caught:
        bmtrain_ms.init_distributed(device="CPU", **options)
    assert str(caught.value) == text
    assert not comm.is_initialized()
