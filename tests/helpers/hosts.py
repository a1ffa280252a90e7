"""Two hosts on one machine: each has its own network, name and disk, and they are joined by a cable that can be pulled.

They are namespaces of Linux, so nothing of them is seen from outside, and all of it goes with the last of their processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

from tests.helpers.ranks import ROOT, mpiexec

ADDRESSES = ("10.9.0.1", "10.9.0.2")
NAMESPACES = ["--net", "--uts", "--mount"]
SSHD = "/usr/sbin/sshd"
PROBE = "hostname h1 && mount -t tmpfs none /mnt && mount -t sysfs none /sys && ip link add v1 type veth peer name v2"


def why_not() -> str:
    """Why two hosts cannot be made here; empty where they can."""
    missing = [name for name in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", SSHD) if not shutil.which(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: openssh-server, iproute2)"
    made = subprocess.run(["unshare", *NAMESPACES, "sh", "-c", PROBE], capture_output=True, text=True)
    return f"no namespaces: {made.stderr.strip()}" if made.returncode else ""


def until(happened: Callable[[], Any], what: str, limit: float = 120.0) -> None:
    """Wait for an event."""
    deadline = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what}"
        time.sleep(0.05)


class TwoHosts:
    """Hosts `h1`, where jobs are started, and `h2`, which an ssh server makes reachable; `disk` is another folder on each.

    A context manager; at its end all processes of the hosts are killed.
    """

    def __init__(self, folder: Path):
        self.folder, self.disk = folder, folder / "disk"
        self.disk.mkdir()
        self._hosts: list[subprocess.Popen] = []
        self._started: list[subprocess.Popen] = []  # on them

    def __enter__(self) -> TwoHosts:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in [pid for host in self._hosts for pid in self._processes(host)]:
            os.kill(pid, signal.SIGKILL)
        for host in self._hosts:
            host.kill()
        for process in [*self._hosts, *self._started]:
            process.communicate()

    def command(self, host: int, *command: str) -> list[str]:
        """What runs `command` on a host (0, 1)."""
        return ["nsenter", f"--target={self._hosts[host].pid}", *NAMESPACES, f"--wd={self.folder}", *command]

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """Run on `h1`, in a session of its own."""
        # Both hosts have this machine's memory, over which ranks of different ones must not talk
        env = {**os.environ, "UCX_TLS": "tcp,self", "OMP_NUM_THREADS": "1", "GLOG_v": "3", "BMTRAIN_MS_SILENCE": "5"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        env["HYDRA_LAUNCHER_EXEC"] = str(self.folder / "ssh.sh")
        self._started.append(subprocess.Popen(self.command(0, *command), env=env, start_new_session=True, **options))
        return self._started[-1]

    def mpiexec(self, *script: str, **options: Any) -> subprocess.Popen:
        """Two ranks on each host run a Python script with its arguments."""
        where = ["-launcher", "ssh", "-hosts", ",".join(ADDRESSES), "-ppn", "2", "-n", "4"]
        return self.start([mpiexec(), *where, sys.executable, "-m", "mpi4py", *script], **options)

    def pull_cable(self) -> None:
        subprocess.run(self.command(0, "ip", "link", "set", "v1", "down"), check=True)

    def processes(self) -> dict[int, str]:
        """What runs on the hosts, by pid, without the ssh server and its sessions."""
        found: dict[int, str] = {}
        for pid in [pid for host in self._hosts for pid in self._processes(host)]:
            try:
                text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text and "sshd" not in text.split(" -")[0]:
                found[pid] = text.strip()
        return found

    def _processes(self, host: subprocess.Popen) -> list[int]:
        network, found = os.readlink(f"/proc/{host.pid}/ns/net"), []
        for place in Path("/proc").glob("[0-9]*/ns/net"):
            try:
                if os.readlink(place) == network and int(place.parts[2]) != host.pid:
                    found.append(int(place.parts[2]))
            except OSError:  # it has ended
                continue
        return found

    def _make(self) -> None:
        for name in ("h1", "h2"):  # /sys: UCX looks there for the network
            mounts = f"mount -t sysfs none /sys && mount -t tmpfs none {self.disk} && mount -t tmpfs none /run && mkdir /run/sshd"
            command = ["unshare", *NAMESPACES, "sh", "-c", f"hostname {name} && {mounts} && echo made && exec sleep infinity"]
            self._hosts.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert self._hosts[-1].stdout is not None and self._hosts[-1].stdout.readline() == "made\n"
        cable = ["ip", "link", "add", "v1", "type", "veth", "peer", "name", "v2", "netns", str(self._hosts[1].pid)]
        subprocess.run(self.command(0, *cable), check=True)
        for i, address in enumerate(ADDRESSES):
            for line in (f"addr add {address}/24 dev v{i + 1}", "link set lo up", f"link set v{i + 1} up"):
                subprocess.run(self.command(i, "ip", *line.split()), check=True)
        self._serve()

    def _serve(self) -> None:
        """The ssh server of `h2`, and what calls it."""
        for name in ("key", "host-key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True)
        (self.folder / "sshd.conf").write_text(
            f"Port 2222\nListenAddress {ADDRESSES[1]}\nHostKey {self.folder}/host-key\nAuthorizedKeysFile {self.folder}/key.pub\n"
            "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin prohibit-password\n"
        )
        options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ServerAliveInterval=3"
        (self.folder / "ssh.sh").write_text(f'#!/bin/sh\nexec ssh -p 2222 -i {self.folder}/key {options} "$@"\n')
        (self.folder / "ssh.sh").chmod(0o755)
        self._started.append(subprocess.Popen(self.command(1, SSHD, "-f", "sshd.conf", "-D", "-E", "sshd.log")))
        answer = self.command(0, str(self.folder / "ssh.sh"), ADDRESSES[1], "hostname")
        until(lambda: subprocess.run(answer, capture_output=True, text=True).stdout == "h2\n", "ssh reaches h2", 30)
