"""BMTrain's test_training and test_model_wrapper: every way to run a GPT trains it to the same parameters.

Upstream compares mean, deviation, maximum and minimum of each parameter to 1e-2; here every element counts, and the reference
knows nothing of bmtrain_ms: gradients of a plain model, averaged and clipped by NumPy.
"""

from __future__ import annotations

import warnings
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import World
from bmtrain_ms.loss import FusedCrossEntropy
from tests.helpers.gpt import LAYERS, Gpt, sharded, tokens
from tests.helpers.wrapped import whole

pytestmark = pytest.mark.ranks

STEPS = {False: 5, True: 2}  # half: MindSpore's float16 on CPU takes five times as long
LIMIT = 0.5
ADAM = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
KINDS = ["wrapper", "list", "unrolled"]
LOSSES = {"fused": FusedCrossEntropy(), "ops": lambda logits, y: ops.cross_entropy(logits.astype(ms.float32), y)}


def make_optimizer(name: str, params: list[Any]) -> Any:
    if name == "AdamWeightDecay":
        beta1, beta2 = ADAM["betas"]
        return nn.AdamWeightDecay(params, ADAM["lr"], beta1, beta2, ADAM["eps"], ADAM["weight_decay"])
    return getattr(bms.optim, name)(params, **ADAM)


def by_path(world: World, model: nn.Cell) -> dict[str, np.ndarray]:
    return {path: whole(world, p).astype(np.float32) for path, p in model.parameters_and_names()}


def train_sharded(world: World, kind: str, loss: str, optimizer: str, half: bool) -> dict[str, Any]:
    model = sharded(kind, ms.float16 if half else ms.float32)
    manager = bms.optim.OptimManager(loss_scale=1024.0 if half else None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*without a float32 copy")
        manager.add_optimizer(make_optimizer(optimizer, model.trainable_params()))
    groups = [{"params": model.trainable_params()}]
    losses, norms = [], []
    for step in range(STEPS[half]):
        manager.zero_grad()
        ids, targets = tokens(step, world.engine.rank)
        losses.append(manager.backward(lambda ids, y: LOSSES[loss](model(ids), y), ids, targets).asnumpy().item())
        norms.append(manager.clip_grad_norm(groups, LIMIT))
        assert manager.step()
    return {"losses": losses, "norms": norms, "final": by_path(world, model)}


def train_plain(world: World, loss: str, optimizer: str, half: bool) -> dict[str, Any]:
    model, scale = Gpt(ms.float16 if half else ms.float32), 1024.0 if half else 1.0
    params = model.trainable_params()
    native = make_optimizer(optimizer, params) if optimizer == "AdamWeightDecay" else None
    initial = by_path(world, model)
    masters = [p.astype(ms.float32).asnumpy().astype(np.float64) for p in params]
    moments = [[np.zeros_like(m), np.zeros_like(m)] for m in masters]
    losses, norms = [], []
    for step in range(STEPS[half]):
        ids, targets = tokens(step, world.engine.rank)
        value, grads = ms.value_and_grad(lambda ids, y: LOSSES[loss](model(ids), y) * scale, None, params)(ids, targets)
        losses.append(value.asnumpy().item() / scale)
        gathered = [world.engine.all_gather([g.astype(ms.float32).reshape(-1)]).wait()[0].asnumpy() for g in grads]
        means = [g.reshape(world.engine.size, *p.shape).astype(np.float64).mean(0) / scale for g, p in zip(gathered, params)]
        norms.append(float(np.sqrt(sum((g**2).sum() for g in means))))
        means = [g * min(1.0, LIMIT / (norms[-1] + 1e-6)) for g in means]
        if native is not None:
            native(tuple(Tensor(g.astype(np.float32)).astype(p.dtype) for g, p in zip(means, params)))
            continue
        beta1, beta2 = ADAM["betas"]
        for p, master, (m, v), g in zip(params, masters, moments, means):
            m += (1 - beta1) * (g - m)
            v += (1 - beta2) * (g * g - v)
            update = m / (1 - beta1 ** (step + 1)) / (np.sqrt(v / (1 - beta2 ** (step + 1))) + ADAM["eps"])
            master -= ADAM["lr"] * (update + ADAM["weight_decay"] * master)
            p.set_data(Tensor(master.astype(np.float32)).astype(p.dtype))
    return {"losses": losses, "norms": norms, "final": by_path(world, model), "initial": initial}


def train_every_way(world: World, optimizer: str, settings: list[tuple[str, bool]]) -> dict[tuple, dict[str, Any]]:
    answers = {}
    for loss, half in settings:
        answers["plain", loss, half] = train_plain(world, loss, optimizer, half)
        for kind in KINDS:
            answers[kind, loss, half] = train_sharded(world, kind, loss, optimizer, half)
    return answers


FULL, HALF = False, True


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("AdamOptimizer", [("fused", FULL), ("ops", FULL), ("fused", HALF)]),
        ("AdamOffloadOptimizer", [("fused", FULL), ("ops", FULL), ("ops", HALF)]),
        ("AdamWeightDecay", [("ops", FULL), ("fused", HALF)]),  # MindSpore compiles each for seconds
    ],
)
def test_training(run_ranks: Callable[..., list[Any]], optimizer: str, settings: list[tuple[str, bool]]):
    first, second = run_ranks(2, train_every_way, optimizer=optimizer, settings=settings, timeout=240)
    for (kind, loss, half), got in first.items():
        setting = f"{kind} {loss} half={half}"
        plain = first["plain", loss, half]
        rtol, atol = (5e-3, 2e-3) if half else (1e-5, 2e-5)
        np.testing.assert_allclose(got["losses"], plain["losses"], rtol=rtol, err_msg=setting)
        np.testing.assert_allclose(got["norms"], plain["norms"], rtol=4 * rtol, err_msg=setting)
        assert min(plain["norms"]) > LIMIT, "clipping is part of it"
        assert sorted(got["final"]) == sorted(plain["final"]) and len(got["final"]) == 5 + 10 * LAYERS
        for name, value in plain["final"].items():
            np.testing.assert_allclose(got["final"][name], value, rtol=rtol, atol=atol, err_msg=f"{name} {setting}")
            moved = np.abs(value - plain["initial"][name]).max()
            assert moved > (1 if half else 50) * atol, f"{name} {setting}: {moved}"
        other = second[kind, loss, half]
        assert other["losses"] != got["losses"], "each rank has its own data"
        for name, value in got["final"].items():
            np.testing.assert_array_equal(other["final"][name], value, err_msg=f"ranks differ in {name}: {setting}")


def logits(world: World) -> None:
    plain = Gpt()
    model = Gpt()
    assert bms.BMTrainModelWrapper(model, verbose=False) is model is not plain
    assert len(model.wrap_report.blocks) == LAYERS
    assert not any(isinstance(p, bms.DistributedParameter) for p in plain.get_parameters())
    for step in range(3):
        ids, _ = tokens(step, world.engine.rank)
        np.testing.assert_array_equal(model(ids).asnumpy(), plain(ids).asnumpy())


def test_model_wrapper(run_ranks: Callable[..., list[Any]]):
    """Upstream compares a model with itself: its wrapper, too, works in place."""
    run_ranks(4, logits)
