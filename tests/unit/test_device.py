"""How a process computes, said in one place: on the host, on a device, or as on a device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import SimulatedEngine
from bmtrain_ms.compat import runtime
from bmtrain_ms.compat.device import Device, asked_for, on_host, rehearsed
from bmtrain_ms.compat.runtime import (
    address,
    from_host,
    host_array,
    kept_on_host,
    overwrite,
    values,
    was_copied,
    writable_array,
    zeros,
)
from bmtrain_ms.optim.adam import DeviceState
from bmtrain_ms_base.launchers import REHEARSE

SOURCE = Path(bms.__file__).parent


# The one place #


@pytest.mark.parametrize(
    ("word", "target", "device"),
    [
        ("0", None, Device("CPU")),
        ("", "CPU", Device("CPU")),
        ("0", "Ascend", Device("Ascend")),
        ("1", None, Device("CPU", rehearsed=True)),
        ("1", "CPU", Device("CPU", rehearsed=True)),
    ],
)
def test_what_is_asked_for(monkeypatch, word, target, device):
    monkeypatch.setenv(REHEARSE, word)
    assert asked_for(target) == device
    assert device.on_host == (device == Device("CPU"))


def test_what_cannot_be_asked_for(monkeypatch):
    monkeypatch.setenv(REHEARSE, "yes")
    with pytest.raises(
        ValueError, match=r"^BMTRAIN_MS_REHEARSE='yes': write 1 to rehearse on CPU what an Ascend device would run, or 0$"
    ):
        bms.init_distributed()
    monkeypatch.setenv(REHEARSE, "1")
    with pytest.raises(
        RuntimeError, match=r"^BMTRAIN_MS_REHEARSE=1 rehearses a device on CPU: leave device='Ascend' out, or write"
    ):
        bms.init_distributed(device="Ascend")


def test_before_it_is_chosen_the_environment_and_mindspore_say(monkeypatch):
    monkeypatch.setattr(Device, "chosen", None)
    assert on_host() and not rehearsed()
    monkeypatch.setenv(REHEARSE, "1")
    assert not on_host() and rehearsed()


ONLY = {  # what is asked of MindSpore, or done to its memory -> where
    r'get_context\("device_target"\)|get_current_device|device_target\(': {"compat/device.py"},
    r"\._data_ptr\b": {"compat/runtime.py"},
    r"__array_interface__\"?\s*[:=]? *=? *\{": {"compat/runtime.py"},
    r"\.asnumpy\(|\.get_bytes\(|from_numpy\(": {"compat/runtime.py", "compat/parameter.py", "compat/reads.py"},
}


@pytest.mark.parametrize("pattern", ONLY)
def test_nobody_else_asks(pattern):
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if re.search(pattern, path.read_text())}
    assert found == ONLY[pattern]


# A rehearsal #


def no_context() -> None:
    raise RuntimeError("Device context of device Ascend is not created yet.")  # 2.5, before the first operation


def test_every_choice_is_that_of_a_device(rehearsed_world, monkeypatch):
    assert not on_host() and rehearsed()
    assert ops_form() == "device"
    assert rehearsed_world.everyone.name == "single" and not rehearsed_world.everyone.lands_in_place
    assert not any(rehearsed_world.along(axis).lands_in_place for axis in ("shard", "dp", "replica"))
    p = bms.DistributedParameter(np.ones(3, np.float32), name="p")
    assert type(bms.optim.AdamOptimizer([p])._states[id(p)]) is DeviceState
    assert not bms.optim.AdamOffloadOptimizer([p])._transfer.shares_memory
    monkeypatch.setattr(ms.runtime, "reset_max_memory_allocated", no_context)
    assert list(bms.see_memory("as on a device")) == ["allocated", "most"]
    assert bms.wait_loader() is None


def ops_form() -> str:
    return bms.ops.chosen().__name__.rpartition(".")[2]


def test_the_next_world_is_on_the_host_again(rehearsed_world, monkeypatch):
    rehearsed_zeros = zeros(4, ms.float32)
    bms.shutdown()
    monkeypatch.delenv(REHEARSE)
    world = bms.init_distributed()
    assert on_host() and ops_form() == "host" and world.everyone.lands_in_place
    assert writable_array(ops.ones(3, ms.float32)) is not None
    assert zeros(4, ms.float32) is not rehearsed_zeros


def test_an_engine_that_was_given_does_not_land_in_place_either(rehearsed_world):
    bms.shutdown()
    world = bms.init_distributed(engine=SimulatedEngine(0, 2))
    assert (world.everyone.name, world.everyone.size, world.everyone.lands_in_place) == ("rehearsed", 2, False)


def test_no_memory_is_shared(rehearsed_world):
    array = np.arange(4, dtype=np.float32)
    x = from_host(array)
    array[:] = 9
    assert host_array(x).tolist() == [0, 1, 2, 3]  # not what was written into the array
    for read in (host_array, values):
        read(x)[:] = 7
        assert (x * 1.0).asnumpy().tolist() == [0, 1, 2, 3]  # nor what was written into what was read
    assert writable_array(x) is None and address(x) is None


def test_addresses_are_refused(rehearsed_world):
    x = from_host(np.ones(4, np.float32))
    for ask in (lambda: runtime._memory(x), lambda: was_copied(x, np.ones(4)), lambda: runtime.is_at(x, np.ones(4))):
        with pytest.raises(RuntimeError, match=r"^the address of a tensor was asked for, .* a fault of bmtrain_ms$"):
            ask()


def test_states_on_the_host_are_written_where_they_are(rehearsed_world):
    array = np.zeros(3, np.float32)
    overwrite(kept_on_host(array), Tensor([1.0, 2.0, 3.0]))
    assert array.tolist() == [1, 2, 3]
    x = Tensor([0.0, 0.0])
    overwrite(x, Tensor([1.0, 2.0]))
    assert x.asnumpy().tolist() == [1, 2]


def test_values_on_a_device_are_copies(monkeypatch):
    """Its address is none that NumPy may read."""
    x = ops.ones(3, ms.float32) * 2.0
    monkeypatch.setattr(Device, "chosen", Device("Ascend"))
    monkeypatch.setattr(runtime, "addressed", lambda x: pytest.fail("was asked for an address"))
    assert values(x).tolist() == [2, 2, 2]
    assert address(x) is None


def test_the_command_s_switch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport bmtrain_ms as bms\nfrom pathlib import Path\nworld = bms.init_distributed()\n"
        "Path(sys.argv[1] + str(bms.rank())).write_text(world.everyone.name)\n"
    )
    command = [sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", "2"]
    for options, name in ((["--rehearse"], "rehearsed"), ([], "node")):
        done = subprocess.run([*command, *options, str(script), name], capture_output=True, text=True, cwd=tmp_path, timeout=90)
        assert done.returncode == 0, done.stderr
        assert [(tmp_path / f"{name}{rank}").read_text() for rank in (0, 1)] == [name, name]
