"""Recycled host memory: who refers to it, and how it comes from the system."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from bmtrain_ms.zero.buffers import BufferPool, HostBuffer

MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [0, 1, 4096, MIB, 2 * MIB, 2 * MIB + 1, 3 * MIB + 8, 4 * MIB, 5 * MIB - 1])
def test_a_buffer_holds_what_was_asked_for(nbytes):
    buffer = HostBuffer(nbytes)
    assert buffer.bytes.size == max(nbytes, 1)
    buffer.bytes[:] = 7
    first, end = buffer.address_range()
    assert first == buffer.bytes.ctypes.data and end - first == buffer.bytes.size
    buffer.drop_pages()
    assert not buffer.bytes.any() and buffer.address_range() == (first, end)


@pytest.mark.parametrize("nbytes", [4096, 3 * MIB])
def test_every_view_counts_however_it_was_made(nbytes):
    buffer = HostBuffer(nbytes)
    assert not buffer.in_use()
    views = [buffer.bytes[:64], buffer.bytes[:64].view(np.float32), buffer.bytes[64:128].view(np.float32).reshape(4, 4).T]
    while views:
        assert buffer.in_use()
        views.pop()
    assert not buffer.in_use()


def test_a_buffer_in_use_is_not_handed_out_again():
    pool = BufferPool(spare=2)
    first = pool.acquire(3 * MIB)
    view = first.bytes[:8]
    assert pool.acquire(3 * MIB) is not first
    del view
    assert pool.acquire(3 * MIB) is first


def test_large_buffers_come_in_huge_pages():
    """A block of a small model is written anew in each pass: by 4 KiB, that is 800 faults."""
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        if "[never]" in file.read():
            pytest.skip("this system has no huge pages")
    buffer = HostBuffer(3 * MIB + 8)
    assert buffer.address_range()[0] % (2 * MIB) == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer.bytes[:] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 700  # the system may be out of huge pages for one of two
