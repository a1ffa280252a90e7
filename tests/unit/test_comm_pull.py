"""Reading another process's memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmtrain_ms.comm.pull import _remaining, address_of, pull

CHILD = """
import sys
import numpy as np
x = np.arange(3_000_000, dtype=np.int32)
print(x.__array_interface__["data"][0], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def child():
    """(pid, address of int32 0, 1, 2, ...) of a process that waits."""
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process.pid, int(process.stdout.readline())
    process.communicate()


def test_many_pieces_of_any_size(child):
    pid, start = child
    pieces, expected, position = [], [], 0
    for i in range(2500):  # more than the system takes at once
        n = 1 + i * 37 % 1999
        pieces.append((start + 4 * position, np.zeros(n, np.int32)))
        expected.append(np.arange(position, position + n))
        position = (position + n) % 2_000_000
    pieces.append((0, np.zeros(0, np.int32)))  # nothing to read there
    pull(pid, pieces)
    for (_, here), values in zip(pieces, expected):
        np.testing.assert_array_equal(here, values)


def test_memory_that_is_not_there(child):
    pid, _ = child
    with pytest.raises(OSError, match=rf"reading the memory of process {pid}: Bad address"):
        pull(pid, [(8, np.zeros(4, np.uint8))])


def test_a_process_that_has_ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    x = np.zeros(4, np.uint8)
    with pytest.raises(OSError, match=f"reading the memory of process {process.pid}: No such process"):
        pull(process.pid, [(address_of(x), x)])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_what_is_left_after_a_short_read(sizes, data):
    wanted = [(1000 * i, 7_000_000 + 1000 * i, n) for i, n in enumerate(sizes)]
    copied = data.draw(st.integers(0, sum(sizes)))
    bytes_of = lambda pieces: [(there + k, here + k) for there, here, n in pieces for k in range(n)]  # noqa: E731
    assert bytes_of(_remaining(wanted, copied)) == bytes_of(wanted)[copied:]
