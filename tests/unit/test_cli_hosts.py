"""`bmtrain-ms launch --hosts`: what mpiexec is told, and the two ends of a connection. Real hosts: `tests/ranks/test_hosts.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bmtrain_ms_cli import hosts
from bmtrain_ms_cli.main import main


def test_mpiexec_calls_other_hosts_by_our_file_which_calls_them_as_the_user_says():
    words = hosts.mpiexec_options(["one", "two"], 4)
    caller = words[words.index("-launcher-exec") + 1]
    assert os.access(caller, os.X_OK) and Path(caller) == Path(hosts.__file__).resolve()
    assert words[-4:] == ["-hosts", "one,two", "-ppn", "2"]
    env = hosts.variables({"PATH": "/bin", "HYDRA_LAUNCHER_EXEC": "/opt/my ssh"})
    assert env == {"PATH": f"{Path(sys.executable).parent}:/bin", "BMTRAIN_MS_SSH": "/opt/my ssh"}
    assert hosts.variables({"PATH": "/bin"})["BMTRAIN_MS_SSH"] == "ssh"


@pytest.mark.parametrize(
    "words, text",
    [
        (["-n", "5", "--hosts", "a,b"], "-n 5: 2 hosts get the same number of ranks each; choose a multiple of 2"),
        (["-n", "4", "--hosts", "a,a"], "--hosts a,a: name every host once, separated by commas, e.g. --hosts node1,node2"),
        (["-n", "4", "--hosts", "a,"], "--hosts a,: name every host once, separated by commas, e.g. --hosts node1,node2"),
        (["-n", "4", "--hosts", ""], "--hosts : name every host once, separated by commas, e.g. --hosts node1,node2"),
        (
            ["-n", "4", "--hosts=-oProxyCommand=x,a"],
            "--hosts: -oProxyCommand=x is no name of a host, which begins with a letter or a digit",
        ),
        (["-n", "4", "--hosts=a,-b"], "--hosts: -b is no name of a host, which begins with a letter or a digit"),
        (
            ["-n", "4", "--hosts", "a,b", "--with", "msrun"],
            "--hosts starts ranks by mpiexec; msrun is started on each host by itself",
        ),
    ],
)
def test_hosts_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], text: str):
    (tmp_path / "train.py").touch()
    assert main(["launch", *words, str(tmp_path / "train.py")]) == 2
    assert capsys.readouterr().err == f"bmtrain-ms: {text}\n"


def ssh(folder: Path, body: str) -> dict[str, str]:
    """The environment of a caller whose ssh is this shell script, which gets OPTIONS HOST COMMAND."""
    path = folder / "ssh"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return {**os.environ, "BMTRAIN_MS_SSH": str(path), "BMTRAIN_MS_SILENCE": "3"}


# In place of mpiexec: it waits for ever, and is killed by the caller that it has started.
MPIEXEC = "import subprocess, sys, time; print(subprocess.run(sys.argv[1:]).returncode, flush=True); time.sleep(1000 * IDLE)"


def called(env: dict[str, str], *command: str, idle: int = 0) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", MPIEXEC.replace("IDLE", str(idle)), sys.executable, hosts.__file__, "-x", "there", *command]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)


def test_a_command_on_another_host_ends_as_it_does(tmp_path: Path):
    """What it says arrives, without the signs of life; its orphans are ended."""
    env = ssh(tmp_path, 'shift 2; exec sh -c "$*"')
    ran = called(env, "sh", "-c", f"'sleep 300 & echo $! > {tmp_path}/pid; echo said; echo written >&2; exit 7'")
    assert (ran.returncode, ran.stdout) == (0, "7\n") and set(ran.stderr.split()) == {"said", "written"}
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "body, text",
    [
        ("exec sleep 300", "host there has not answered for 3 s; the job is ended"),
        ("exit 255", "host there cannot be reached, or its connection has ended; the job is ended"),
    ],
)
def test_a_host_that_does_not_answer(tmp_path: Path, body: str, text: str):
    ran = called(ssh(tmp_path, body), "true", idle=1)
    assert ran.returncode == -9 and ran.stderr == f"bmtrain-ms: {text}\n"


def test_a_guard_that_hears_nothing_ends_what_it_has_started(tmp_path: Path):
    command = [
        sys.executable,
        hosts.__file__,
        "--guard",
        "2",
        "sh",
        "-c",
        f"echo $$ > {tmp_path}/pid; trap '' TERM; sleep 300; sleep 300",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.wait(60) == 254
    assert not Path(f"/proc/{int((tmp_path / 'pid').read_text())}").exists()


def test_a_rank_whose_host_cannot_be_reached_was_not_killed(tmp_path: Path):
    (tmp_path / "script.py").write_text("")
    env = {**ssh(tmp_path, "exit 255"), "HYDRA_LAUNCHER_EXEC": str(tmp_path / "ssh")}
    words = [sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", "2", "--hosts", "localhost,there.invalid", "script.py"]
    ran = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == [
        "bmtrain-ms: host there.invalid cannot be reached, or its connection has ended; the job is ended",
        "bmtrain-ms: rank 1 was never started, or its host is lost; exit code 1",
    ]
