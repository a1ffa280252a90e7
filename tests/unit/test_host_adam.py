"""Adam's arithmetic: chunks and threads change no bit, rounding is to nearest even, MindSpore's fused operation agrees."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from fractions import Fraction
from typing import Any, Iterator

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.compat.device import Device
from bmtrain_ms.compat.runtime import numpy_dtype
from bmtrain_ms.optim import AdamOptimizer, adam, host_adam, update
from bmtrain_ms.optim.adam import DeviceState, HostState
from bmtrain_ms.optim.host_adam import Workers, apply_updates, round_to
from bmtrain_ms.optim.update import CHUNK, Coefficients, Update
from tests.helpers.optim import DTYPES, floats, gradients, numbers, parameters

GROUP = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "hold_steps": 0, "maximize": False}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """One rank; for the module, because hypothesis runs a test several times."""
    bms.init_distributed(seed=0)
    yield
    bms.shutdown()


# Chunks and threads #


def updates(sizes: list[int], low: Any, seed: int = 0) -> list[Update]:
    """One per size, in memory of their own, as in the third step."""
    made = []
    for i, size in enumerate(sizes):
        p, m, v, grad = (numbers(size, seed=4 * (seed + i) + k) for k in range(4))
        copy = None if low is None else np.zeros(size, numpy_dtype(low))
        if copy is not None:
            round_to(p, copy)
        made.append(Update(p, m, v * v, grad, copy, Coefficients.of(GROUP, 3, 0.5)))
    return made


def bits(items: list[Update]) -> list[bytes]:
    return [array.tobytes() for x in items for array in (x.p, x.m, x.v, x.grad, x.low) if array is not None]


@pytest.fixture(scope="module")
def three() -> Workers:
    return Workers(3)


@pytest.mark.parametrize("low", [None, ms.float16, ms.bfloat16], ids=["fp32", "fp16", "bf16"])
@given(chunk=st.integers(1, 9), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)  # the first compiles
def test_chunks_and_threads_change_no_bit(three, low, chunk, sizes, seed):
    whole, apart, threaded = (updates(sizes, low, seed) for _ in range(3))
    apply_updates(whole, Workers(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "CHUNK", chunk)
        apply_updates(apart, Workers(1))
        apply_updates(threaded, three)
    assert bits(whole) == bits(apart) == bits(threaded)


def by_numpy(x: Update) -> None:
    """What numba compiles, one operation at a time."""
    c, one = x.coefficients, np.float32
    grad = x.grad.astype(np.float32) * one(c.factor)
    x.m[...] = x.m * one(c.beta1) + grad * one(1.0 - c.beta1)
    x.v[...] = grad * grad * one(1.0 - c.beta2) + x.v * one(c.beta2)
    if c.rate:
        x.p[...] = x.p * one(c.keep) - x.m / (np.sqrt(x.v) + one(c.eps)) * one(c.rate)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, numpy_dtype(ms.bfloat16)], ids=str)
@pytest.mark.parametrize("setting", [{}, {"hold_steps": 9}, {"weight_decay": 0.0, "maximize": True}, {"lr": 3e38}], ids=str)
@pytest.mark.parametrize("readonly", [False, True])
def test_compiled_loops_have_the_bits_of_numpy(dtype, setting, readonly):
    """No fused multiply-add, no reassociation, nothing in float64: the same on every processor. Infinite and NaN gradients, too."""
    pair = []
    for _ in range(2):
        (x,) = updates([100_003], None)  # not a multiple of what a vector holds
        x.grad[:9] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 1e-30, -1e-7]
        x.v[:3], x.m[:3] = 0.0, 0.0
        with np.errstate(all="ignore"):
            grad = x.grad.astype(dtype)
        grad.flags.writeable = not readonly
        pair.append(replace(x, grad=grad, coefficients=Coefficients.of({**GROUP, **setting}, 3, 0.3)))
    apply_updates(pair[:1], Workers(1))
    with np.errstate(all="ignore"):
        by_numpy(pair[1])
    for mine, theirs in zip((pair[0].p, pair[0].m, pair[0].v), (pair[1].p, pair[1].m, pair[1].v)):
        assert np.isfinite(theirs).any()
        nan = np.isnan(theirs)
        assert np.array_equal(nan, np.isnan(mine))
        assert np.array_equal(host_adam.as_integers(mine[~nan]), host_adam.as_integers(theirs[~nan]))


def test_numba_is_imported_by_init_distributed():
    """Not with the package: it takes longer than all of bmtrain_ms. Nor at the first step, if it cannot be."""
    code = """
import sys, bmtrain_ms as bms
assert "numba" not in sys.modules
sys.modules["numba"] = None
bms.init_distributed()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "operations and optimizers on the host are compiled by numba, and it cannot be imported: import of" in done.stderr


# What does not fit #


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("size", [0, 4, 6, 40_000])
@pytest.mark.parametrize("device", ["CPU", "Ascend"])
def test_a_gradient_of_another_size(monkeypatch, dtype, size, device):
    """The loops are compiled and do not look: nothing is read or written beyond the arrays. Nor of the parameters before it."""
    monkeypatch.setattr(Device, "chosen", Device(device))
    first, second = params = parameters(dtype, shapes={"bias": (3,), "layer.weight": (5,)})
    optimizer, before = AdamOptimizer(params), [floats(p).copy() for p in params]
    good = Tensor(np.ones(3, np.float32))
    with pytest.raises(
        ValueError, match=f"the gradient for layer.weight has {size} elements, its shard 5: gradients are those of the"
    ):
        optimizer([good, Tensor(np.ones(size, np.float32)).astype(dtype) if size else Tensor(np.zeros(0, np.float32))])
    assert all(np.array_equal(floats(p), value) for p, value in zip(params, before))
    assert optimizer.state_dict()["steps"] == [0, 0] and not optimizer.state_of(first)["exp_avg"].asnumpy().any()
    optimizer([good, Tensor(np.ones(5, np.float32))])
    assert optimizer.state_dict()["steps"] == [1, 1] and optimizer.state_of(second)["exp_avg"].asnumpy().all()


def test_a_parameter_that_became_another():
    p = ms.Parameter(Tensor(np.ones(4, np.float32)), name="w")
    optimizer = AdamOptimizer([p])
    p.set_dtype(ms.float16)
    text = (
        "parameter w was Float32 of 4 elements when the optimizer was made, and is Float16 of 4; make the optimizer after changing"
    )
    with pytest.raises(ValueError, match=text):
        optimizer([Tensor(np.ones(4, np.float16))])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.float64])
def test_gradients_of_other_types_are_numbers_too(dtype):
    first, second = parameters(shapes={"a": (3,), "b": (3,)})
    second.copy_full(first.asnumpy())
    for p, kind in ((first, dtype), (second, np.float32)):
        AdamOptimizer([p], lr=0.1)([Tensor(np.array([1, 2, 0]).astype(kind))])
    assert np.array_equal(first.asnumpy(), second.asnumpy())


@pytest.mark.parametrize("eps", [1e-50, 1e-44])
def test_an_eps_that_float32_does_not_have(eps):
    """It would make 0 / 0 of a gradient that has always been zero, as that of the padding is."""
    with pytest.raises(ValueError, match=f"eps = {eps} is zero in float32, in which updates are computed; use 1e-30 or more"):
        AdamOptimizer(parameters(shapes={"a": (3,)}), eps=eps)


def test_rounding_to_float32_is_a_copy():
    values = np.array([1.0, 1e-41, np.inf, -0.0], np.float32)
    out = np.ones_like(values)
    round_to(values, out)
    assert out.tobytes() == values.tobytes()
    with pytest.raises(ValueError, match="4 values do not fit into 3"):
        round_to(values, np.zeros(3, np.float16))


@pytest.mark.parametrize("more", [-1, 0, 1, CHUNK + 1])
def test_sizes_around_a_chunk(three, more):
    """Of the real size: every element is updated, once."""
    (x,) = updates([CHUNK + more], ms.bfloat16)
    p, m, v, grad = (array.astype(np.float64) for array in (x.p, x.m, x.v, x.grad))
    apply_updates([x], three)
    m, v = 0.9 * m + 0.05 * grad, 0.999 * v + 0.00025 * grad**2
    expected = p - 0.1 * (m / (1 - 0.9**3) / (np.sqrt(v / (1 - 0.999**3)) + 1e-8) + 0.1 * p)
    np.testing.assert_allclose(x.p, expected, rtol=1e-4, atol=1e-3)  # where v is almost 0 rounding shows
    assert x.low is not None and x.low.tobytes() == x.p.astype(x.low.dtype).tobytes()


def test_workers_do_everything_once_and_wait_before_they_raise(three):
    done, lock, gate = [], threading.Lock(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            raise ArithmeticError("item 0")
        gate.wait(0.05)
        with lock:
            done.append(item)

    with pytest.raises(ArithmeticError, match="item 0"):
        three.map(work, list(range(7)))
    assert sorted(done) == list(range(1, 7))
    done.clear()
    three.map(work, list(range(1, 8)))
    assert sorted(done) == list(range(1, 8))


def test_every_thread_has_scratch_of_its_own(three):
    together, addresses = threading.Barrier(3), []

    def note(item: int) -> None:
        together.wait(5)
        addresses.append(host_adam._scratch.of(1).ctypes.data)

    three.map(note, range(3))
    assert len(set(addresses)) == 3


def test_workers_take_the_cores_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert Workers().threads == 3 and Workers(2).threads == 2


# Rounding #


def nearest_even(x: float, digits: int, least: int, largest: float) -> float:
    """The value with `digits` significant binary digits that is nearest to the finite x, in exact arithmetic; inf above `largest`.

    `least`: exponent of the smallest difference, that of the subnormal numbers.
    """
    if x == 0.0:
        return x
    exact = abs(Fraction(x))
    exponent = (exact.numerator.bit_length() - exact.denominator.bit_length()) - digits
    while exact >= Fraction(2) ** (exponent + digits):
        exponent += 1
    while exact < Fraction(2) ** (exponent + digits - 1):
        exponent -= 1
    unit = Fraction(2) ** max(exponent, least)
    rounded = round(exact / unit) * unit  # Fraction rounds halves to even
    value = float("inf") if rounded > Fraction(largest) else float(rounded)
    return -value if x < 0 else value


KINDS = {
    "fp16": (np.dtype(np.float16), 11, -24, 65504.0),
    "bf16": (ms.bfloat16, 8, -133, float.fromhex("0x1.fep127")),
}
ANY = st.one_of(
    st.floats(width=32),
    st.integers(0, (1 << 32) - 1).map(lambda x: float(np.uint32(x).view(np.float32))),
    # halfway between two numbers of 16 bits, or next to it
    st.tuples(st.integers(0, (1 << 16) - 1), st.sampled_from([-1, 0, 1])).map(
        lambda x: float(np.uint32(max(0, (x[0] << 16) + 0x8000 + x[1])).view(np.float32))
    ),
    st.tuples(st.integers(0, (1 << 19) - 1), st.sampled_from([-1, 0, 1])).map(
        lambda x: float(np.uint32(max(0, (x[0] << 13) + 0x1000 + x[1])).view(np.float32))
    ),
)


@pytest.mark.parametrize("kind", KINDS)
@given(x=ANY)
@settings(max_examples=400, deadline=None)  # the first compiles
def test_rounding_is_to_nearest_even(kind, x):
    dtype, *format_ = KINDS[kind]
    out = np.zeros(1, numpy_dtype(dtype))
    with np.errstate(all="ignore"):
        round_to(np.array([x], np.float32), out)
    got = float(out.astype(np.float32)[0])
    if np.isnan(x):
        assert np.isnan(got)
    elif np.isinf(x):
        assert got == x
    else:
        expected = nearest_even(float(np.float32(x)), *format_)
        assert got == expected and np.signbit(got) == np.signbit(expected)


@pytest.mark.parametrize(
    "bits_in, bits_out",
    [
        (0x3F808000, 0x3F80),  # a tie, down to even
        (0x3F818000, 0x3F82),  # a tie, up to even
        (0x3F808001, 0x3F81),
        (0x3F817FFF, 0x3F81),  # truncation would agree
        (0x7F7FFFFF, 0x7F80),  # the largest float32 is inf
        (0x7F7F7FFF, 0x7F7F),
        (0xFF800000, 0xFF80),  # -inf
        (0x7F800001, 0x7FC0),  # a NaN whose bits are all in the lower half stays one
        (0xFFFFFFFF, 0xFFFF),
        (0x80000000, 0x8000),  # -0
        (0x00008000, 0x0000),  # half of the smallest subnormal number
        (0x00008001, 0x0001),
    ],
)
def test_bfloat16_bits(bits_in, bits_out):
    out = np.zeros(1, numpy_dtype(ms.bfloat16))
    round_to(np.array([bits_in], np.uint32).view(np.float32), out)
    assert hex(out.view(np.uint16)[0]) == hex(bits_out)


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16], ids=str)
def test_widening_is_exact(dtype):
    """Every value of 16 bits."""
    low = np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(dtype))
    wide, expected = host_adam._widened(low).copy(), low.astype(np.float32)
    assert np.array_equal(wide, expected, equal_nan=True)
    assert np.array_equal(np.signbit(wide), np.signbit(expected))
    again = np.zeros_like(low)
    round_to(wide, again)
    number = ~np.isnan(expected)
    assert np.array_equal(again.view(np.uint16)[number], low.view(np.uint16)[number])
    assert np.array_equal(np.isnan(again.astype(np.float32)), ~number)


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16], ids=str)
def test_rounding_is_the_types_own_cast(dtype):
    bits_in = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    x = bits_in.view(np.float32)
    x = np.where(np.isnan(x), np.float32(1.0), x)
    x = np.concatenate([x, np.linspace(0, 1e-4, 1 << 16, dtype=np.float32)])  # subnormal in float16
    out = np.zeros(x.size, numpy_dtype(dtype))
    round_to(x, out)
    with np.errstate(all="ignore"):
        assert out.tobytes() == x.astype(out.dtype).tobytes()


# MindSpore's fused operation #

SETTINGS = [{}, {"weight_decay": 0.3, "eps": 1e-3}, {"hold_steps": 2}, {"maximize": True, "betas": (0.5, 0.75)}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_the_device_state_agrees(monkeypatch, dtype, setting):
    """It runs on CPU too; within the rounding of float32."""
    on_host, on_device = parameters(dtype), parameters(dtype)
    host = AdamOptimizer(on_host, lr=0.1, **setting)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Device, "chosen", Device("Ascend"))
        device = AdamOptimizer(on_device, lr=0.1, **setting)
    assert {type(s) for s in device._states.values()} == {DeviceState}
    assert {type(s) for s in host._states.values()} == {HostState}
    for step in range(1, 6):
        grads = gradients(step, dtype)
        host.step(grads, 0.5)
        device.step(grads, 0.5)
    for p, q in zip(on_host, on_device):
        mine, theirs = host.state_of(p), device.state_of(q)
        assert list(mine) == list(theirs)
        for name in mine:
            np.testing.assert_allclose(theirs[name].asnumpy(), mine[name].asnumpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        tolerance = {ms.float32: 1e-5, ms.float16: 1e-3, ms.bfloat16: 1e-2}[dtype]
        np.testing.assert_allclose(floats(q), floats(p), rtol=tolerance, atol=1e-6)


def test_the_device_state_without_a_rate(monkeypatch):
    """Rate zero: decay is divided by it."""
    monkeypatch.setattr(Device, "chosen", Device("Ascend"))
    (p,) = parameters(shapes={"a": (5,)})
    before = p.asnumpy().copy()
    optimizer = AdamOptimizer([p], lr=0.0, weight_decay=0.5)
    optimizer([Tensor(np.ones(5, np.float32))])
    assert np.array_equal(p.asnumpy(), before)
    np.testing.assert_allclose(optimizer.state_of(p)["exp_avg"].asnumpy(), np.full(5, 0.1), rtol=1e-6)


def test_a_parameter_without_memory_of_its_own(monkeypatch):
    (p,) = parameters(shapes={"a": (5,)})
    optimizer = AdamOptimizer([p])
    monkeypatch.setattr(adam, "writable_array", lambda tensor: None)
    with pytest.raises(RuntimeError, match="parameter a has no contiguous memory on the host; set_data a contiguous tensor"):
        optimizer([Tensor(np.ones(5, np.float32))])


def test_states_are_allocated_at_once():
    """Float32: two moments; 16 bits: and the master."""
    full, half = parameters(shapes={"a": (1000,)})[0], bms.DistributedParameter(bms.empty(1000, dtype=ms.bfloat16), name="b")
    assert (HostState(full).nbytes(), HostState(half).nbytes()) == (8000, 12000)
    assert (HostState(full, shared=False).nbytes(), HostState(half, shared=False).nbytes()) == (12000, 14000)
