"""Float32 masters of parameters that others change: by loading, in place, before the first step or later."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms.compat.device import Device
from bmtrain_ms.compat.runtime import from_host, numpy_dtype, overwrite, writable_array
from bmtrain_ms.optim import AdamOffloadOptimizer, AdamOptimizer
from bmtrain_ms.optim.offload import Transfer
from tests.helpers.optim import DTYPES

pytestmark = pytest.mark.usefixtures("single_world")

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


def on_a_device(params: list[Parameter], monkeypatch: pytest.MonkeyPatch) -> AdamOptimizer:
    with monkeypatch.context() as patch:
        patch.setattr(Device, "chosen", Device("Ascend"))
        return AdamOptimizer(params, lr=0.5)


class Copying(Transfer):
    """As between two memories."""

    def __init__(self) -> None:
        self.shares_memory = False

    def store(self, p: Parameter, array: np.ndarray) -> None:
        overwrite(p, from_host(array))


PLACES = {
    "host": lambda params, monkeypatch: AdamOptimizer(params, lr=0.5),
    "device": on_a_device,
    "offload": lambda params, monkeypatch: AdamOffloadOptimizer(params, lr=0.5, transfer=Copying()),
}
LOADED = {"sharded": lambda x: bms.DistributedParameter(x, name="p"), "plain": lambda x: Parameter(Tensor(x), name="p")}


def put(p: Parameter, values: np.ndarray) -> None:
    p.copy_full(values) if isinstance(p, bms.DistributedParameter) else p.set_data(Tensor(values))


def assign(p: Parameter, values: np.ndarray) -> None:
    if p.dtype == ms.bfloat16:  # which MindSpore cannot assign on CPU
        overwrite(p, from_host(values))
    else:
        ops.assign(p, Tensor(values))


def write(p: Parameter, values: np.ndarray) -> None:
    """Into its memory, one element after the other."""
    memory = writable_array(p)
    assert memory is not None
    for i, x in enumerate(values):
        memory.reshape(-1)[i] = x


@pytest.mark.parametrize("put", [put, assign, write], ids=["loaded", "assigned", "written"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", LOADED)
@EVERY_DTYPE
def test_a_parameter_that_is_written_after_a_step_is_not_undone(monkeypatch, dtype, kind, place, put):
    """Only its second element is other than before: the first keeps the bits of its master."""
    p = LOADED[kind](np.array([1.0, 2.0, 3.0], np.float32).astype(numpy_dtype(dtype)))
    optimizer = PLACES[place]([p], monkeypatch)
    grad = Tensor(np.array([0.001, 1.0, 1.0], np.float32)).astype(dtype)
    for _ in range(3):
        optimizer([grad])
    if dtype != ms.float32:
        before = optimizer.state_of(p)["master"].asnumpy().copy()
    new = p.asnumpy().reshape(-1).copy()
    new[1], new[2] = 40.0, np.nan
    put(p, new)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer([grad])
    assert p.asnumpy().tobytes() == new.tobytes()
    if dtype != ms.float32:
        master = optimizer.state_of(p)["master"].asnumpy()
        assert master[0] == before[0] and master[0] != np.float32(new[0]) and master[1] == 40.0 and np.isnan(master[2])
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer([grad])
    assert 35.0 < float(p.asnumpy().reshape(-1)[1]) < 40.0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model_first", [True, False])
def test_a_model_and_its_state_are_loaded_in_any_order(monkeypatch, model_first, place):
    """The master's bits survive, although the parameter is its rounding."""
    start = np.linspace(0.1, 1.0, 5).astype(np.float16)
    p, q = (bms.DistributedParameter(start, name="p") for _ in range(2))
    first, second = (PLACES[place]([x], monkeypatch) for x in (p, q))
    steps = [Tensor(np.linspace(-1.0, i, 5).astype(np.float16)) for i in range(4)]
    for grad in steps[:2]:
        first([grad])
    second([steps[0] * 3.0])  # it has been somewhere else
    loads = [lambda: q.copy_full(p.asnumpy()), lambda: second.load_state_dict(first.state_dict())]
    for load in loads if model_first else loads[::-1]:
        load()
    for grad in steps[2:]:
        first([grad])
        second([grad])
    masters = [optimizer.state_of(x)["master"].asnumpy().tobytes() for optimizer, x in ((first, p), (second, q))]
    assert masters[0] == masters[1]
    assert p.asnumpy().tobytes() == q.asnumpy().tobytes()
