"""Ranks on two hosts: real ones but for their hardware, see `tests.helpers.hosts`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest

from tests.helpers.hosts import ADDRESSES, TwoHosts, until, why_not
from tests.helpers.models import train_twin
from tests.helpers.ranks import ROOT

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(why_not()), reason=why_not())]

JOB = str(ROOT / "tests" / "helpers" / "hosts_job.py")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with TwoHosts(tmp_path) as made:
        yield made


def job(hosts: TwoHosts, mode: str, **arguments: Any) -> list[str]:
    return [JOB, mode, json.dumps({"disk": str(hosts.disk / "run"), "notes": str(hosts.folder), **arguments})]


def finished(hosts: TwoHosts, mode: str) -> list[dict[str, np.ndarray]]:
    """What each rank notes."""
    process = hosts.mpiexec(*job(hosts, mode), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return [dict(np.load(hosts.folder / f"rank-{rank}.npz")) for rank in range(4)]


def training(hosts: TwoHosts, launcher: Callable[..., subprocess.Popen], *command: str) -> subprocess.Popen:
    """A job whose ranks are in the middle of their work."""
    output = hosts.folder / "output"
    with open(output, "wb") as file:
        process = launcher(hosts, *command, stdout=file, stderr=file)

    def started() -> bool:
        assert process.poll() is None, output.read_text()
        return all((hosts.folder / f"started-{rank}").exists() for rank in range(4))

    until(started, "all ranks train")
    return process


def test_training_on_two_hosts_and_resuming_from_their_own_disks(hosts: TwoHosts, single_world: Any):
    first = finished(hosts, "train")
    for rank in first[1:]:
        assert rank.keys() == first[0].keys()
        for name, array in first[0].items():
            np.testing.assert_array_equal(rank[name], array, err_msg=name)
    kinds: dict[str, dict[str, np.ndarray]] = {"initial": {}, "grads": {}, "final": {}}
    for name, array in first[0].items():
        kind, _, rest = name.partition(" ")
        kinds.get(kind, {})[rest] = array
    twin = train_twin(kinds["initial"], 5, False)
    np.testing.assert_allclose(first[0]["losses"], twin["losses"], rtol=1e-6)
    for kind, atol in (("grads", 1e-6), ("final", 2e-5)):
        assert kinds[kind].keys() == twin[kind].keys()
        for name, expected in twin[kind].items():
            np.testing.assert_allclose(kinds[kind][name], expected, atol=atol, err_msg=f"{kind} {name}")

    files = []
    for host in range(2):
        command = hosts.command(host, "ls", str(hosts.disk / "run" / "step-00000002"))
        files.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert [len(names) for names in files] == [3, 3] and set(files[0]) & set(files[1]) == {"index.json"}  # its ranks' only
    for rank in finished(hosts, "resume"):
        for name, array in rank.items():
            assert array.tobytes() == first[0][name].tobytes(), name
    assert hosts.processes() == {}


def test_a_host_that_vanishes(hosts: TwoHosts):
    """Every rank ends at its time-out, those that the launcher cannot reach too; nothing is left anywhere."""
    process = training(hosts, TwoHosts.mpiexec, *job(hosts, "forever"))
    hosts.pull_cable()
    until(lambda: not hosts.processes(), "nothing is left")
    assert process.wait(60) != 0
    for rank in range(4):
        text = (hosts.folder / f"error-{rank}").read_text()
        assert re.match(rf"all_reduce \(loss\) at step \d+ on rank {rank} of 4 did not finish within 10 s\. ", text)
        assert text.endswith(". The group: ranks 0, 1 on h1; 2, 3 on h2")


def launched(hosts: TwoHosts, *script: str, **options: Any) -> subprocess.Popen:
    """Two ranks on each host, by the command."""
    words = ["launch", "-n", "4", "--hosts", ",".join(ADDRESSES), *script]
    return hosts.start([sys.executable, "-m", "bmtrain_ms_cli", *words], **options)


def test_the_launcher_says_which_host_has_vanished(hosts: TwoHosts):
    """Long before the ranks' own time-out."""
    process = training(hosts, launched, *job(hosts, "forever", timeout=600.0))
    hosts.pull_cable()
    assert process.wait(120) != 0
    assert f"bmtrain-ms: host {ADDRESSES[1]} has not answered for 5 s; the job is ended\n" in (hosts.folder / "output").read_text()
    until(lambda: not hosts.processes(), "nothing is left")


def test_sigterm_to_the_launcher_ends_the_ranks_of_both_hosts(hosts: TwoHosts):
    process = training(hosts, launched, *job(hosts, "forever", timeout=600.0))
    process.terminate()
    until(lambda: not hosts.processes(), "nothing is left")
    assert process.wait(60) != 0


def test_a_host_that_cannot_be_reached(hosts: TwoHosts):
    hosts.pull_cable()
    process = launched(hosts, *job(hosts, "forever"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and f"bmtrain-ms: host {ADDRESSES[1]} " in out and "; the job is ended\n" in out
    until(lambda: not hosts.processes(), "nothing is left")
