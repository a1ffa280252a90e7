"""CPU ranks under MindSpore's own launcher, `msrun`: refused, and nothing waits for anybody."""

from __future__ import annotations

import contextlib
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
import bmtrain_ms  # msrun runs this file in its scheduler, too
bmtrain_ms.init_distributed(seed=0, device="CPU")
print("began")
"""
REFUSAL = (
    "RuntimeError: msrun starts Ascend ranks only, and this device is CPU: start with bmtrain-ms launch -n 2 script.py, or mpiexec "
    "-n 2 python script.py\n"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def working_in(folder: Path) -> list[int]:
    """Processes that work in this folder: msrun puts its workers into sessions of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(entry / "cwd")) == folder:
                found.append(int(entry.name))
    return found


def test_refused_on_every_rank_and_in_the_scheduler(tmp_path: Path):
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
            code: int | str = process.wait(60)  # MindSpore's imports; the scheduler alone would wait ten minutes
        except subprocess.TimeoutExpired:
            code = "late"
        finally:
            left = working_in(folder)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    logs = {path.name: path.read_text() for path in folder.glob("*.log")}
    assert code not in (0, "late"), "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in sorted(logs.items()))
    assert left == []
    assert logs["scheduler.log"].endswith(REFUSAL), logs
    workers = [logs[f"worker_{rank}.log"] for rank in range(2)]
    # msrun kills the others as soon as one has ended, maybe before they have said why
    assert any(text.endswith(REFUSAL) for text in workers), logs
    assert not any("began" in text for text in logs.values())
