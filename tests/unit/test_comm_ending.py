"""How a rank ends that cannot go on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bmtrain_ms.comm.mpi import ranks_by_host

# A process that ends its job, as if it were a rank: MPI does not return, and keeps the interpreter's lock.
SCRIPT = """
import ctypes, sys, types
from bmtrain_ms.comm import ending

class World:
    def Get_rank(self): return 3
    def Abort(self, code): ctypes.PyDLL(None).sleep(1000)

ending.install(types.SimpleNamespace(COMM_WORLD=World()))
raise ValueError("broken\\non purpose")
"""


def test_a_rank_ends_even_if_mpi_does_not_end_it():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    lines = ran.stderr.splitlines()
    assert ran.returncode == 1
    assert lines[0] == "[rank 3] Traceback (most recent call last):"
    assert lines[-2:] == ["[rank 3] ValueError: broken", "[rank 3] on purpose"]


def test_a_rank_ends_even_if_nobody_reads_its_words():
    """As behind a connection to a host that has vanished."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writing, bytes(1 << 12))
        os.set_blocking(writing, True)
        ran = subprocess.run([sys.executable, "-c", SCRIPT], stdout=writing, stderr=writing, timeout=120)
        assert ran.returncode == 1
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    "hosts, text",
    [
        (["h1", "h1", "h2", "h2"], "ranks 0, 1 on h1; 2, 3 on h2"),
        (["h1", "h2", "h1", "h2"], "ranks 0, 2 on h1; 1, 3 on h2"),
        (["a"] * 8 + ["b"] * 3 + ["a"], "ranks 0-7, 11 on a; 8-10 on b"),
        (["a"], "ranks 0 on a"),
    ],
)
def test_ranks_by_host(hosts: list[str], text: str):
    assert ranks_by_host(hosts) == text
