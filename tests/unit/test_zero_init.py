"""Initial values: by formula, bit-equal for every number of ranks, slice by slice."""

from __future__ import annotations

import math
import tracemalloc

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SingleEngine, World, use_world
from bmtrain_ms_base.layout import Layout, Split
from bmtrain_ms_base.random import CHUNK, chunks, key_of, normal, uniform


class PretendEngine(SingleEngine):
    """Knows its rank and size; initialisation must not communicate, so nothing else is needed."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


def shards(size, shape, method, dtype=ms.float32, name="layer.weight"):
    parts = []
    for rank in range(size):
        with use_world(World(PretendEngine(rank, size), Mesh(size, rank), seed=3)):
            cell = nn.Cell()
            cell.weight = bms.DistributedParameter(bms.empty(*shape, dtype=dtype), init_method=method, name=name)
            bms.init_parameters(cell)
            parts.append(cell.weight.asnumpy())
    whole = np.concatenate(parts)
    count = math.prod(shape)
    assert not whole[count:].astype(np.float32).any()  # padding
    return whole[:count]


METHODS = [
    bms.ParameterInitializer(bms.init.normal_, mean=1.0, std=0.5),
    bms.ParameterInitializer(bms.init.uniform_, a=-1.0, b=2.0),
    bms.ParameterInitializer(bms.init.constant_, 4.0),
    bms.ParameterInitializer(lambda full: full.__setitem__(..., np.random.randn(*full.shape))),
]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1,), (7,), (3, 5), (129, 257), (CHUNK,), (CHUNK + 1,), (2, 3, 4)]), st.sampled_from(METHODS))
def test_bit_equal_for_every_number_of_ranks(shape, method):
    bms.shutdown()
    for dtype in (ms.float32, ms.float16):
        reference = shards(1, shape, method, dtype)
        for size in (2, 3, 8):
            np.testing.assert_array_equal(shards(size, shape, method, dtype), reference)


def test_values_depend_on_seed_and_name_only():
    method = METHODS[0]
    assert not np.array_equal(shards(1, (9,), method), shards(1, (9,), method, name="other.weight"))
    np.testing.assert_array_equal(shards(1, (9,), method), shards(1, (9,), method))


def test_distributions():
    n = 200_000
    words = np.concatenate([w[inside] for _, w, inside in chunks(key_of(0, "x"), 0, n)])
    z, u = normal(words), uniform(words)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and abs((z**3).mean()) < 0.03 and abs((z**4).mean() - 3) < 0.06
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert len(np.unique(words)) == n
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 0.01


def test_fans():
    n = 400
    xavier = shards(1, (n, 3 * n), bms.ParameterInitializer(bms.init.xavier_normal_))
    assert abs(xavier.std() - math.sqrt(2 / (4 * n))) < 1e-4
    bound = math.sqrt(6 / (4 * n))
    flat = shards(1, (n, 3 * n), bms.ParameterInitializer(bms.init.xavier_uniform_))
    assert flat.max() <= bound and flat.max() > 0.999 * bound and flat.min() < -0.999 * bound
    kaiming = shards(1, (n, 3 * n), bms.ParameterInitializer(bms.init.kaiming_normal_))
    assert abs(kaiming.std() - math.sqrt(2 / (3 * n))) < 1e-4
    assert shards(1, (3,), bms.ParameterInitializer(bms.init.ones_)).tolist() == [1, 1, 1]
    assert shards(1, (3,), bms.ParameterInitializer(bms.init.zeros_)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least two dims, not shape"):
        shards(1, (9,), bms.ParameterInitializer(bms.init.xavier_normal_))


def test_never_a_full_tensor():
    size, count = 64, 1 << 24  # 64 MiB full, 1 MiB per rank
    with use_world(World(PretendEngine(5, size), Mesh(size, 5))):
        tracemalloc.start()
        cell = nn.Cell()
        cell.weight = bms.DistributedParameter(bms.empty(count), init_method=METHODS[0], name="w")
        bms.init_parameters(cell)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20, f"{peak / 2**20:.1f} MiB"


def test_other_generators_are_left_alone():
    np.random.seed(1)
    expected = np.random.RandomState(1).randn(3)
    shards(2, (9,), METHODS[3])
    np.testing.assert_array_equal(np.random.randn(3), expected)


def test_a_function_instead_of_an_initializer_is_refused():
    with pytest.raises(TypeError, match=r"init_method of parameter w is a function; wrap it: ParameterInitializer"):
        shards(1, (3,), lambda x: x, name="w")


@pytest.mark.parametrize("function", [bms.init.normal_, bms.init.xavier_uniform_])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_tensor_cut_along_a_dim_has_the_values_of_the_whole_one(function, parts: int, dim: int):
    """As tensor parallelism cuts it, over several chunks of the generator, and then ZeRO."""
    method, shape, key = bms.ParameterInitializer(function), (301, 173), key_of(3, "init", "w")
    whole = method.shard(key, Layout(shape)).reshape(shape)
    out = np.full(shape, np.nan, np.float32)
    for index in range(parts):
        for rank in range(3):
            layout = Layout(shape, (Split(dim, index, parts),), rank, 3)
            shard = method.shard(key, layout)
            assert not shard[layout.owned_size :].any()
            layout.paste(shard, out)
    np.testing.assert_array_equal(out.view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_a_rank_that_owns_nothing_of_a_16_bit_parameter(dtype):
    with use_world(World(PretendEngine(5, 6), Mesh(6, 5))):
        p = bms.DistributedParameter(bms.empty(3, dtype=dtype))
        p.copy_full(Tensor(np.ones(3, np.float32)).astype(dtype))
    assert p.owned == (3, 3) and not p.asnumpy().astype(np.float32).any()
