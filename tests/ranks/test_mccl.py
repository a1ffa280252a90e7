"""CPU ranks under MindSpore's own launcher, `msrun`. One start: it takes 15 to 25 s."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT

pytestmark = pytest.mark.msrun

SCRIPT = """
import numpy as np
import bmtrain_ms  # msrun runs this file in its scheduler, too
from bmtrain_ms.comm import CommError
from bmtrain_ms.compat.runtime import from_host, host_array

world = bmtrain_ms.init_distributed(seed=0, device="CPU")
engine = world.engine
assert (engine.name, engine.size, world.mesh.world, world.launch.kind) == ("mccl", 2, 2, "msrun")
assert engine.rank == world.mesh.rank == world.launch.rank
# MindSpore ends a collective after 30 s: the first one waits for the rank that starts last
engine.barrier("start").wait()
checks = []


def array(rank, shape, dtype):
    return np.asarray(np.random.default_rng([rank, *shape]).standard_normal(shape) * 30).astype(dtype)


def check(name, y, expected):
    found = host_array(y).reshape(y.shape)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (name, found, expected)
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes(), (name, found, expected)
    checks.append(name)


def total(rows, op="sum"):
    wide = [r.astype(np.float32) if r.dtype.kind == "f" else r for r in rows]
    both = {"sum": np.add, "mean": np.add, "max": np.maximum, "min": np.minimum}[op](*wide)
    return np.asarray(both * np.float32(0.5) if op == "mean" else both).astype(rows[0].dtype)


for dtype in ("float32", "int32", "float16"):
    for shape in ((2,), (6,), (2, 5), (2026,)):
        rows = [array(rank, shape, dtype) for rank in range(2)]
        halves = [np.split(row, 2)[engine.rank] for row in rows]
        x = from_host(rows[engine.rank].copy())
        check("all_gather", engine.all_gather([x]).wait()[0], np.concatenate(rows))
        out = from_host(np.zeros((2 * shape[0], *shape[1:]), dtype))
        assert engine.all_gather([x], [out]).wait()[0] is out
        check("all_gather in place", out, np.concatenate(rows))
        for op in ("sum", "mean", "max", "min") if dtype != "int32" else ("sum", "max", "min"):
            check("reduce_scatter " + op, engine.reduce_scatter([x], op).wait()[0], total(halves, op))
            check("all_reduce " + op, engine.all_reduce([x], op).wait()[0], total(rows, op))
        for root in range(2):
            check("broadcast", engine.broadcast([x], root).wait()[0], rows[root])
        check("all_to_all", engine.all_to_all([x]).wait()[0], np.concatenate(halves))
        assert host_array(x).tobytes() == rows[engine.rank].tobytes()
    odd = [array(rank, (7,), dtype) for rank in range(2)]
    check("odd all_gather", engine.all_gather([from_host(odd[engine.rank])]).wait()[0], np.concatenate(odd))
    scalars = [array(rank, (), dtype) for rank in range(2)]
    check("scalar all_reduce", engine.all_reduce([from_host(scalars[engine.rank])]).wait()[0], total(scalars))
several = engine.all_gather([from_host(array(engine.rank, (n,), "float32")) for n in (1, 3)]).wait()
for y, n in zip(several, (1, 3)):
    check("several", y, np.concatenate([array(rank, (n,), "float32") for rank in range(2)]))
assert engine.barrier("end").wait() == []
assert engine.subgroup([0, 1]) is engine

ADVICE = " on CPU under msrun; start the job with mpiexec (bmtrain-ms launch --with mpi)"
x = from_host(np.ones(2, np.float32))
for call, error, text in (
    (lambda: engine.send([x], 0), CommError, "MindSpore has no point-to-point messages" + ADVICE),
    (lambda: engine.recv([x], 0), CommError, "MindSpore has no point-to-point messages" + ADVICE),
    (lambda: engine.subgroup([engine.rank]), CommError, "MindSpore has no sub-groups" + ADVICE),
    (lambda: engine.all_reduce([x], "product"), ValueError, "unknown reduction 'product'; choose one of sum, mean, max, min"),
    (lambda: engine.broadcast([x], 2), ValueError, "root=2 is not a rank of this group of 2 (0..1)"),
):
    try:
        call()
    except error as caught:
        assert str(caught) == text, caught
    else:
        raise AssertionError(f"no error: {text}")
assert len(checks) > 100
bmtrain_ms.shutdown()
print(f"rank {engine.rank} checked {len(checks)}", flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(folder: Path) -> list[int]:
    """Processes that work in this folder: msrun puts its workers into sessions of their own, and does not end them when it ends."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / "cwd")) == folder:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_collectives_against_numpy(tmp_path: Path):
    folder = tmp_path.resolve()
    (folder / "job.py").write_text(SCRIPT)
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "GLOG_v": "3", "OMP_NUM_THREADS": "1"}
    env["PATH"] = os.pathsep.join([str(bin_folder), env["PATH"]])  # msrun starts whatever `python` is found
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    command = [str(bin_folder / "msrun"), "--worker_num", "2", "--local_worker_num", "2", "--join", "True"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--log_dir", str(folder), "job.py"]
    with (folder / "msrun.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = process.wait(150)
        except subprocess.TimeoutExpired:
            code = "late"
        finally:
            left = descendants(folder)
            for pid in [process.pid] if process.poll() is None else []:
                os.killpg(pid, signal.SIGKILL)
                process.wait()
            for pid in left:
                if pid != process.pid:
                    os.kill(pid, signal.SIGKILL)
    logs = {path.name: path.read_text() for path in folder.glob("*.log")}
    assert code == 0, "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in sorted(logs.items()))
    for rank in range(2):
        assert f"rank {rank} checked 156\n" in logs[f"worker_{rank}.log"], logs
    assert left == []
