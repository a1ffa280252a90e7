"""AdamOffloadOptimizer: the bits of AdamOptimizer, transfers beside the arithmetic, its memory, recorded deltas."""

from __future__ import annotations

import math
import mmap
import re
import threading
import time
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

import bmtrain_ms as bms
from bmtrain_ms.compat import runtime
from bmtrain_ms.compat.device import Device
from bmtrain_ms.lr_scheduler import Linear
from bmtrain_ms.optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager, adam, offload, update
from bmtrain_ms.optim.offload import AHEAD, Transfer
from bmtrain_ms_base import memory
from tests.helpers.optim import DTYPES, AdamW, floats, gradients, numbers, parameters, same, states, values

pytestmark = pytest.mark.usefixtures("single_world")

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


class Apart(Transfer):
    """As on a device: what comes and goes is copied."""

    def __init__(self) -> None:
        self.shares_memory = False

    def store(self, p: Parameter, array: np.ndarray) -> None:
        if p.dtype == ms.bfloat16:
            runtime.overwrite(p, runtime.from_host(array))  # MindSpore cannot assign it on CPU
        else:
            super().store(p, array)


EVERY_TRANSFER = pytest.mark.parametrize("transfer", [Transfer, Apart], ids=["shared", "apart"])
SETTINGS = {
    "plain": {},
    "decay": {"weight_decay": 0.3, "eps": 1e-3, "betas": (0.8, 0.95)},
    "held": {"hold_steps": 2},
    "upwards": {"maximize": True},
}


@EVERY_TRANSFER
@EVERY_DTYPE
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_the_bits_of_adam(dtype, settings, transfer):
    """Scaled gradients, one parameter without any in one step."""
    mine, theirs = parameters(dtype), parameters(dtype)
    here = AdamOptimizer(mine, lr=0.1, **settings)
    there = AdamOffloadOptimizer(theirs, lr=0.1, transfer=transfer(), **settings)
    for step in range(1, 6):
        grads = [*gradients(step, dtype)[:3], None if step == 2 else gradients(step, dtype)[3]]
        here.step(grads, 0.5)
        there.step(grads, 0.5)
        assert same(values(mine) + states(here), values(theirs) + states(there)), step
    assert here.state_dict(tensors=False) == there.state_dict(tensors=False)


@EVERY_TRANSFER
@EVERY_DTYPE
def test_rate_zero_leaves_the_parameter(dtype, transfer):
    """The first step of a warm-up."""
    params = parameters(dtype)
    before = values(params)
    optimizer = AdamOffloadOptimizer(params, lr=0.1, transfer=transfer())
    schedule = Linear(optimizer, 0.1, 1, 10)
    optimizer(gradients(1, dtype))
    assert same(values(params), before)
    schedule.step()
    optimizer(gradients(2, dtype))
    assert not any(np.array_equal(floats(p), x.astype(np.float32)) for p, x in zip(params, before))


@EVERY_TRANSFER
@EVERY_DTYPE
def test_starts_from_what_was_loaded(dtype, transfer):
    """Not from what the parameter held when the optimizer was made."""
    p = bms.DistributedParameter(Tensor(np.zeros(2, np.float32)).astype(dtype), name="p")
    optimizer = AdamOffloadOptimizer([p], lr=0.5, transfer=transfer())
    p.copy_full(Tensor(np.array([3.0, 4.0], np.float32)).astype(dtype))
    optimizer([Tensor(np.ones(2, np.float32))])
    assert floats(p).tolist() == [2.5, 3.5]


@EVERY_TRANSFER
def test_plain_parameters(transfer):
    p = Parameter(Tensor(np.ones((2, 3), np.float16)), name="p")
    optimizer = AdamOffloadOptimizer([p], lr=0.5, transfer=transfer())
    optimizer([Tensor(np.full((2, 3), 3.0, np.float16))])
    assert p.shape == (2, 3) and p.asnumpy().tolist() == [[0.5] * 3] * 2


def test_device_memory_is_not_viewed(monkeypatch):
    """Apart from the host's, parameters and gradients are read by copying only."""

    def fail(*args: Any) -> None:
        raise AssertionError("this is an address on the device")

    for module in (adam, offload):
        monkeypatch.setattr(module, "values", fail)
    monkeypatch.setattr(adam, "writable_array", fail)
    for dtype in DTYPES.values():
        params = parameters(dtype)
        optimizer = AdamOffloadOptimizer(params, transfer=Apart())
        optimizer(gradients(1, dtype))
        optimizer.state_dict()


@EVERY_TRANSFER
@pytest.mark.parametrize("gather", [False, True], ids=["shards", "whole"])
def test_state_round_trip(transfer, gather):
    """10 steps, the state into an optimizer of other settings, 10 more; also into AdamOptimizer, whose state it is."""
    params = parameters(ms.bfloat16)
    optimizer = AdamOffloadOptimizer(params, lr=0.1, weight_decay=0.1, transfer=transfer())
    for step in range(1, 11):
        optimizer(gradients(step, ms.bfloat16))
    state, reached = optimizer.state_dict(gather), [floats(p).reshape(p.full_shape) for p in params]
    others = [
        AdamOffloadOptimizer(parameters(ms.bfloat16), lr=9.0, betas=(0.1, 0.1), transfer=transfer()),
        AdamOptimizer(parameters(ms.bfloat16), eps=1.0),
    ]
    for other in others:
        for q, x in zip(other.parameters, reached):
            q.copy_full(x)
        other.load_state_dict(state)
    for step in range(11, 21):
        for each in (optimizer, *others):
            each(gradients(step, ms.bfloat16))
    for other in others:
        assert same(values(params) + states(optimizer), values(other.parameters) + states(other))


def test_a_state_is_loaded_into_host_memory(monkeypatch):
    """Also where MindSpore's operations write to a device: the arrays are ours."""
    optimizer, other = (AdamOffloadOptimizer(parameters(ms.float16), transfer=Apart()) for _ in range(2))
    optimizer(gradients(1, ms.float16))
    state = optimizer.state_dict()
    monkeypatch.setattr(Device, "chosen", Device("Ascend"))
    monkeypatch.setattr(runtime.ops, "assign", lambda *args: None)  # goes to a copy on the device
    other.load_state_dict(state)
    assert same(states(other), states(optimizer))


@EVERY_TRANSFER
def test_under_the_manager(transfer):
    """Next to AdamOptimizer, with a loss scale and an overflow."""
    layers = [bms.nn.Linear(4, 3, dtype=ms.float16) for _ in range(2)]
    for i, layer in enumerate(layers):
        bms.init_parameters(layer)
        layer.update_parameters_name(f"layer{i}.")
    layers[1].parameter("weight").copy_full(layers[0].parameter("weight").asnumpy().reshape(3, 4).copy())
    manager = OptimManager(loss_scale=64.0)
    manager.add_optimizer(AdamOptimizer(layers[0].trainable_params(), lr=0.1))
    manager.add_optimizer(AdamOffloadOptimizer(layers[1].trainable_params(), lr=0.1, transfer=transfer()))
    before = values(layers[1].get_parameters())
    for step in range(4):
        x = Tensor(numbers(5, 4, seed=step).astype(np.float16))
        factor = math.inf if step == 0 else 1.0
        manager.zero_grad()
        manager.backward(lambda x, factor: (sum((layer(x) ** 2).sum() for layer in layers) * factor).astype(ms.float32), x, factor)
        assert manager.step().updated == bool(step)
        if step == 0:
            assert same(values(layers[1].get_parameters()), before)
    assert same(values(layers[0].get_parameters()), values(layers[1].get_parameters()))
    assert manager.loss_scale == 32.0


# Transfers beside the arithmetic #


class Recorded(Apart):
    """Which parameter is fetched and stored, when; each takes a while."""

    def __init__(self, order: dict[int, int], seconds: float = 0.0):
        super().__init__()
        self.order, self.seconds = order, seconds  # size of the parameter -> its number
        self.events: list[tuple[str, int]] = []
        self.changed = threading.Condition()

    def note(self, what: str, size: int) -> None:
        with self.changed:
            self.events.append((what, self.order[size]))
            self.changed.notify_all()

    def reached(self, what: str, number: int) -> bool:
        """Wait for an event; False: it did not come."""
        with self.changed:
            return self.changed.wait_for(lambda: (what, number) in self.events, timeout=60)

    def fetch(self, grad: Tensor) -> np.ndarray:
        self.note("fetch", grad.size)
        time.sleep(self.seconds)
        array = super().fetch(grad)
        self.note("fetched", grad.size)
        return array

    def store(self, p: Parameter, array: np.ndarray) -> None:
        self.note("store", p.size)
        time.sleep(self.seconds)
        super().store(p, array)
        self.note("stored", p.size)


MANY = {f"p{i}": (i + 1,) for i in range(7)}
ORDER = {i + 1: i for i in range(7)}


def recording(monkeypatch: pytest.MonkeyPatch, transfer: Recorded, wait: bool) -> None:
    """Note the arithmetic too; with `wait` it goes on when the next gradient is on its way."""
    apply_updates = offload.apply_updates

    def noted(updates: Any, workers: Any) -> None:
        size = updates[0].p.size
        transfer.note("compute", size)
        if wait and size < len(MANY):
            assert transfer.reached("fetch", ORDER[size] + 1), "the next gradient is not fetched while this one is used"
        apply_updates(updates, workers)
        transfer.note("computed", size)

    monkeypatch.setattr(offload, "apply_updates", noted)


def test_the_next_gradient_arrives_during_the_arithmetic(monkeypatch):
    """In order, for every parameter, and not more than a few ahead."""
    transfer = Recorded(ORDER)
    recording(monkeypatch, transfer, wait=True)
    params = parameters(ms.float16, MANY)
    optimizer = AdamOffloadOptimizer(params, transfer=transfer)
    optimizer(gradients(1, ms.float16, MANY))
    at = {event: i for i, event in enumerate(transfer.events)}
    for k in range(7):
        assert at["fetched", k] < at["compute", k] < at["computed", k] < at["store", k] < at["stored", k]
        if k < 6:
            assert at["fetch", k + 1] < at["computed", k]
        if k + AHEAD < 7:
            assert at["fetch", k + AHEAD] > at["computed", k]
    assert len(transfer.events) == 6 * 7  # each once


def test_parameters_leave_during_the_arithmetic(monkeypatch):
    """A store waits for the arithmetic of the next parameter: it would wait in vain if that came after it."""

    class Held(Recorded):
        def store(self, p: Parameter, array: np.ndarray) -> None:
            if p.size < len(MANY):
                assert self.reached("compute", ORDER[p.size] + 1), "the arithmetic waits for a store"
            super().store(p, array)

    transfer = Held(ORDER)
    recording(monkeypatch, transfer, wait=False)
    optimizer = AdamOffloadOptimizer(parameters(ms.float16, MANY), transfer=transfer)
    optimizer(gradients(1, ms.float16, MANY))
    assert transfer.events[-1] == ("stored", 6)  # `step` ends after the last


@EVERY_DTYPE
def test_slow_transfers_change_nothing(dtype):
    mine, theirs = parameters(dtype, MANY), parameters(dtype, MANY)
    here = AdamOptimizer(mine, lr=0.1)
    there = AdamOffloadOptimizer(theirs, lr=0.1, transfer=Recorded(ORDER, 0.005))
    for step in (1, 2):
        here(gradients(step, dtype, MANY))
        there(gradients(step, dtype, MANY))
        assert same(values(mine), values(theirs))


@pytest.mark.parametrize("where", ["fetch", "store"])
@pytest.mark.parametrize("number", [0, 3, 6])
def test_what_a_transfer_raises_comes_out_of_step(where, number):
    class Failing(Recorded):
        def note(self, what: str, size: int) -> None:
            super().note(what, size)
            if (what, self.order[size]) == (where, number):
                raise OSError(f"{where} of {number}")

    optimizer = AdamOffloadOptimizer(parameters(ms.float16, MANY), transfer=Failing(ORDER))
    with pytest.raises(OSError, match=f"{where} of {number}"):
        optimizer(gradients(1, ms.float16, MANY))


# Memory #


@pytest.mark.parametrize("transfer, full, half", [(Transfer, 8, 12), (Apart, 12, 14)], ids=["shared", "apart"])
def test_the_budget(transfer, full, half, capsys, monkeypatch):
    """As the docstring says, on one line, at construction."""
    monkeypatch.setattr(offload, "available_memory", lambda: 3 << 29)
    shapes = {"large": (1 << 20,)}
    for dtype, each in ((ms.float32, full), (ms.float16, half), (ms.bfloat16, half)):
        optimizer = AdamOffloadOptimizer(parameters(dtype, shapes), transfer=transfer())
        assert optimizer.nbytes == each << 20
        assert capsys.readouterr().err == (
            f"AdamOffloadOptimizer: {each / 1024:.3f} GiB of host memory for each of 1 ranks of this host ({each}.0 bytes for each "
            "of 1048576 elements), 1.5 GiB are available\n"
        )
    mixed = parameters(ms.float32, {"a": (100,)}) + parameters(ms.float16, {"b": (100,)})
    assert AdamOffloadOptimizer(mixed, transfer=transfer()).nbytes == 100 * (full + half)
    assert f"({(full + half) / 2:.1f} bytes for each of 200 elements)" in capsys.readouterr().err


@pytest.mark.parametrize("ranks, enough", [(1, True), (3, False)])
def test_not_enough_memory_is_told(ranks, enough, capsys, monkeypatch, single_world):
    """All ranks of the host count."""
    monkeypatch.setattr(offload, "available_memory", lambda: 2000)
    object.__setattr__(single_world, "launch", replace(single_world.launch, local_size=ranks))
    AdamOffloadOptimizer(parameters(shapes={"a": (100,)}))
    text = capsys.readouterr().err
    assert f"for each of {ranks} ranks of this host (8.0 bytes" in text
    assert text.endswith(
        "are available\n" if enough else "are available: NOT ENOUGH. Use more ranks or hosts, or a smaller model\n"
    )


def test_the_system_does_not_say(capsys, monkeypatch):
    monkeypatch.setattr(offload, "available_memory", lambda: None)
    AdamOffloadOptimizer(parameters())
    assert capsys.readouterr().err.endswith("elements)\n")


def test_available_memory(monkeypatch, tmp_path):
    free = memory.available_memory()
    assert free is None or 0 < free < 1 << 50
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert memory.available_memory() is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:       16 kB\nMemFree:  2 kB\nMemAvailable:    5 kB\n")
    assert memory.available_memory() == 5120


@pytest.mark.parametrize(
    ("version", "path", "limit", "used", "cached", "free"),
    [
        (2, "/job/step", 9000, 6000, 500, 3500),
        (2, "/job/step", 9000, 9500, 0, 0),
        (2, "/job/step", "max", 6000, 0, 1 << 20),
        (2, "/../elsewhere", 9000, 6000, 0, 1 << 20),
        (2, "/", 9000, 6000, 0, 3000),
        (1, "/job/step", 9000, 6000, 500, 3500),
        (1, "/job/step", 9223372036854771712, 6000, 0, 1 << 20),
    ],
)
@pytest.mark.parametrize("around", [False, True], ids=["own group", "the one around"])
def test_available_memory_of_a_container(monkeypatch, tmp_path, version, path, limit, used, cached, free, around):
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / name.lstrip("/"))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable:    1024 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"7:pids:/\n{'0:' if version == 2 else '4:memory'}:{path}\n")
    folder = tmp_path / "sys" / "fs" / "cgroup" / ("" if version == 2 else "memory")
    folder /= path.lstrip("/") if ".." not in path else "not seen"
    folder = folder.parent if around and path == "/job/step" else folder
    folder.mkdir(parents=True)
    names = ["memory.max", "memory.current"] if version == 2 else ["memory.limit_in_bytes", "memory.usage_in_bytes"]
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'' if version == 2 else 'total_'}inactive_file {cached}\n")
    assert memory.available_memory() == free


def provided(array: np.ndarray) -> bool:
    """Whether the system has given memory to all whole pages of an array; it is promised first, and given when it is touched."""
    page, start = mmap.PAGESIZE, array.ctypes.data
    first, last = -(-start // page), (start + array.nbytes) // page
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        flags = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    return bool((flags >> np.uint64(62)).all())  # in memory, or swapped out


@EVERY_TRANSFER
def test_memory_is_provided_at_construction(transfer):
    """Not at the first step, when a run is under way (BMTrain)."""
    size = 18 << 20  # arrays so large that malloc asks the system for each
    assert not provided(np.empty(size, np.float32))
    p = bms.DistributedParameter(bms.empty(size, dtype=ms.float16), name="large")
    optimizer = AdamOffloadOptimizer([p], transfer=transfer())
    assert all(provided(x) for state in optimizer._states.values() for x in state._arrays)
    addresses = [x.ctypes.data for state in optimizer._states.values() for x in state._arrays]
    optimizer([Tensor(np.ones(size, np.float16))])
    assert addresses == [x.ctypes.data for state in optimizer._states.values() for x in state._arrays]


# Recorded deltas #


@EVERY_TRANSFER
@EVERY_DTYPE
@pytest.mark.parametrize("setting", [{}, {"hold_steps": 9}, {"maximize": True}], ids=str)
def test_deltas(dtype, transfer, setting, monkeypatch):
    """Mean and variance of what a step subtracts before the rate, in float64; in several chunks."""
    monkeypatch.setattr(update, "CHUNK", 10)
    params = parameters(dtype)
    optimizer = AdamOffloadOptimizer(params, 0.1, weight_decay=0.2, record_delta=True, transfer=transfer(), **setting)
    references = [AdamW(floats(p), 0.1, weight_decay=0.2, **setting) for p in params]
    for step in range(1, 4):
        grads = gradients(step, dtype)
        optimizer.step(grads, 0.25)
        for reference, grad in zip(references, grads):
            reference.step(0.25 * floats(grad))
        deltas = np.concatenate([reference.delta for reference in references])
        assert optimizer.get_avg_delta() == pytest.approx(deltas.mean(), rel=1e-4, abs=1e-5)
        assert optimizer.get_var_delta() == pytest.approx(deltas.var(), rel=1e-4)


def test_recording_deltas_changes_no_bit():
    results = []
    for record in (False, True):
        params = parameters(ms.bfloat16)
        optimizer = AdamOffloadOptimizer(params, 0.1, weight_decay=0.1, hold_steps=1, record_delta=record)
        for step in (1, 2, 3):
            optimizer(gradients(step, ms.bfloat16))
        results.append(values(params) + states(optimizer))
    assert same(*results)


def test_deltas_are_those_of_the_parameters_with_a_gradient():
    first, second = parameters(shapes={"a": (4,), "b": (3,)})
    optimizer = AdamOffloadOptimizer([first, second], eps=1e-12, record_delta=True)
    optimizer.step([None, Tensor(np.array([1.0, -2.0, 3.0], np.float32))])
    assert optimizer.get_avg_delta() == pytest.approx(1 / 3) and optimizer.get_var_delta() == pytest.approx(8 / 9)


def test_there_are_no_deltas_yet():
    optimizer = AdamOffloadOptimizer(parameters(), record_delta=True)
    for ask in (optimizer.get_avg_delta, optimizer.get_var_delta):
        with pytest.raises(RuntimeError, match="no step has been made yet"):
            ask()


def test_deltas_that_are_not_recorded():
    optimizer = AdamOffloadOptimizer(parameters())
    optimizer(gradients(1))
    for ask in (optimizer.get_avg_delta, optimizer.get_var_delta):
        with pytest.raises(RuntimeError, match=re.escape("deltas are not recorded; make the optimizer with record_delta=True")):
            ask()


# Errors #


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"lr": -1.0}, "need lr, weight_decay >= 0, eps > 0"),
        ({"hold_steps": -2}, "hold_steps must be 0 or more, not -2"),
    ],
    ids=str,
)
def test_settings_out_of_range(bad, text):
    with pytest.raises(ValueError, match=text):
        AdamOffloadOptimizer(parameters(), **bad)


def test_unknown_settings():
    with pytest.raises(ValueError, match=r"a parameter group has unknown settings \['record_delta'\]"):
        AdamOffloadOptimizer([{"params": parameters(), "record_delta": True}])


def test_the_variance_of_equal_deltas():
    """Rounding must not make it negative: it is a standard deviation's square."""
    (p,) = parameters(shapes={"a": (1000,)})
    p.copy_full(np.zeros(1000, np.float32))
    optimizer = AdamOffloadOptimizer([p], record_delta=True)
    for step in range(5):
        optimizer([Tensor(np.full(1000, 0.1 + 0.1 * step, np.float32))])
        assert 0.0 <= optimizer.get_var_delta() < 1e-9


@EVERY_TRANSFER
def test_values_that_are_loaded_are_kept(transfer):
    """In float32, whatever their bits: these are those of the master's bfloat16."""
    (p,) = parameters(shapes={"a": (3,)})
    p.copy_full(np.array([1.0, 1e-41, 2.0], np.float32))
    optimizer = AdamOffloadOptimizer([p], lr=0.0, transfer=transfer())
    optimizer([Tensor(np.zeros(3, np.float32))])
    loaded = np.array([0x3F80, 0, 0x40A00000], np.uint32).view(np.float32)
    p.copy_full(loaded)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer([Tensor(np.zeros(3, np.float32))])
    assert p.asnumpy().tobytes() == loaded.tobytes()
