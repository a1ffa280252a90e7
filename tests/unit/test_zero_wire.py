"""Formats in which parameters travel: what they cost, element by element."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SingleEngine, World, use_world
from bmtrain_ms.compat.runtime import from_host, host_array
from bmtrain_ms.zero.wire import BLOCK, wire_for

pytestmark = pytest.mark.usefixtures("single_world")  # bfloat16 is made by an operation, and the world must come before the first

SHARDS = arrays(np.float32, st.integers(1, 3 * BLOCK), elements=st.floats(-6e4, 6e4, width=32))


def there_and_back(name: str, shard: np.ndarray, ranks: int = 2) -> np.ndarray:
    """What arrives when every rank gives the same shard: (ranks, n)."""
    wire = wire_for(name, ms.float32)
    parts = [np.empty(n, dtype) for n, dtype in wire.sizes(shard.size)]
    wire.encode(shard, parts)
    out = np.full((ranks, shard.size), np.nan, np.float32)
    wire.decode([np.stack([x] * ranks) for x in parts], out)
    return out


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHARDS)
def test_bounds(shard):
    wide = np.abs(shard.astype(np.float64))
    starts = np.arange(0, shard.size, BLOCK)
    largest = np.repeat(np.maximum.reduceat(wide, starts), BLOCK)[: shard.size]
    bounds = {
        "bfloat16": wide * 2.0**-8 + 1e-40,
        "float16": np.maximum(wide * 2.0**-11, 2.0**-25),
        "int8": largest / 254 * (1 + 1e-5) + 1e-40,
    }
    for name, bound in bounds.items():
        for row in there_and_back(name, shard):
            assert (np.abs(row.astype(np.float64) - shard) <= bound).all(), name


def test_a_block_of_tiny_values_becomes_zero():
    assert not there_and_back("int8", np.full(3, 1e-45, np.float32)).any()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8"])
def test_what_is_kept_exactly(name):
    for values in (np.zeros(300), np.full(300, -0.0), np.ones(300), np.full(7, -127.0), np.arange(-127, 128)):
        np.testing.assert_array_equal(there_and_back(name, values.astype(np.float32))[1], values)


def test_values_that_are_not_finite_stay_so():
    shard = np.ones(2 * BLOCK, np.float32)
    shard[3], shard[5] = np.inf, np.nan
    for name in ("bfloat16", "float16"):
        np.testing.assert_array_equal(there_and_back(name, shard)[0], shard)
    arrived = there_and_back("int8", shard)[0]
    assert np.isnan(arrived[:BLOCK]).all() and (arrived[BLOCK:] == 1).all()


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8"])
def test_devices_make_the_same_bits(name, n):
    """The path that an Ascend device takes, on CPU."""
    shard = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    shard[0] = 0.0
    if n > BLOCK:
        shard[:BLOCK] = 0.0
        shard[BLOCK] = np.nan
    wire = wire_for(name, ms.float32)
    parts = wire.encode_on_device(from_host(shard))
    expected = [np.empty(count, dtype) for count, dtype in wire.sizes(n)]
    wire.encode(shard, expected)
    for part, array in zip(parts, expected):
        np.testing.assert_array_equal(host_array(part).view(np.uint8), array.view(np.uint8))
    arrived = wire.decode_on_device(parts, 1, n, ms.float32)
    np.testing.assert_array_equal(host_array(arrived), there_and_back(name, shard)[0])


def test_what_travels_as_it_is():
    assert wire_for(None, ms.float32) is None
    assert wire_for("bfloat16", ms.float16) is None
    assert wire_for("int8", ms.float16) is not None


def test_bytes():
    assert [(n, str(d)) for n, d in wire_for("int8", ms.float32).sizes(257)] == [(512, "int8"), (2, "float32")]
    assert [(n, d.itemsize) for n, d in wire_for("bfloat16", ms.float32).sizes(257)] == [(257, 2)]


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8"])
def test_a_parameter_is_gathered_in_it(name, host):
    values = np.random.default_rng(0).standard_normal((37, 9)).astype(np.float32)
    with use_world(World(SingleEngine(host=host), Mesh(1, 0), gather_dtype=name)):
        p = bms.DistributedParameter(values, name="w")
        full = host_array(p.gather())
        np.testing.assert_array_equal(host_array(p), values.reshape(-1))  # what is stored keeps its precision
    np.testing.assert_array_equal(full, there_and_back(name, values.reshape(-1))[0].reshape(values.shape))
    assert (full != values).any()


def test_float16_refuses_what_it_cannot_hold():
    with use_world(World(SingleEngine(), Mesh(1, 0), gather_dtype="float16")):
        p = bms.DistributedParameter(Tensor(np.array([1.0, -7e4], np.float32)), name="w")
        text = r"^parameter w cannot be gathered: value 70000 is beyond float16; use gather_dtype='bfloat16'$"
        with pytest.raises(ValueError, match=text):
            p.gather()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"^gather_dtype must be None or one of float16, bfloat16, int8, not 'int4'$"):
        World(SingleEngine(), Mesh(1, 0), gather_dtype="int4")
