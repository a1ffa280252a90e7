"""Models in pipeline stages: who holds what, under which names, and what is refused; each rank of a pipeline alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SimulatedEngine, World, use_world
from bmtrain_ms.model_center import Spread, Stages, spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig, Mixtral, MixtralConfig
from bmtrain_ms.optim.norms import counts_here
from bmtrain_ms.zero import context_of
from tests.helpers.adapters import adapted

pytestmark = pytest.mark.usefixtures("single_world")
ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 37, "dim_model": 24, "num_heads": 4, "num_heads_kv": 2, "dim_ff": 40, "num_layers": 5, "init_std": 0.2}


def config(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **sizes})


def alone_in(rank: int, pp: int, tp: int = 1) -> World:
    return World(SimulatedEngine(rank * tp, pp * tp), Mesh(pp * tp, rank * tp, pp=pp, tp=tp), seed=3)


def batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    ids = np.random.default_rng(0).integers(0, 37, (rows, 7)).astype(np.int32)
    return Tensor(np.ascontiguousarray(ids[:, :-1])), Tensor(np.ascontiguousarray(ids[:, 1:]))


def held(pp: int, stages: Any) -> list[str]:
    """Of each rank what is in its model."""
    found = []
    for rank in range(pp):
        with use_world(alone_in(rank, pp)):
            parts = [p.name.split(".")[:-1] for p in spread(Llama(config()), stages=stages).get_parameters()]
        found.append(" ".join(dict.fromkeys(part[2] if part[1:2] == ["layers"] else part[-1] for part in parts)))
    return found


@pytest.mark.parametrize(
    ("pp", "stages", "right"),
    [
        (2, None, ["embed_tokens 0 1 2", "3 4 norm lm_head"]),
        (3, [3, 2, 0], ["embed_tokens 0 1 2", "3 4", "norm lm_head"]),
        (3, "E|tttt|tL", ["embed_tokens", "0 1 2 3", "4 norm lm_head"]),
        (2, Stages(chunks=2), ["embed_tokens 0 1 3", "2 4 norm lm_head"]),
    ],
)
def test_a_rank_holds_its_own_layers_under_their_global_names(pp: int, stages: Any, right: list[str]):
    assert held(pp, stages) == right


@pytest.mark.parametrize("tp", [1, 2])
def test_initial_values_are_those_of_the_whole_model(tp: int):
    with use_world(World(SimulatedEngine(0, tp), Mesh(tp, 0, tp=tp), seed=3)):
        model = spread(Llama(config(tied=True)))
        bms.init_parameters(model)
        right = {p.name: p.asnumpy() for p in model.get_parameters()}
    seen = set()
    for rank in range(3):
        with use_world(alone_in(rank, 3, tp)) as here:
            for early in (True, False):  # initialised after or before it is spread
                model = Llama(config(tied=True))
                if not early:
                    bms.init_parameters(model)
                spread(model)
                if early:
                    bms.init_parameters(model)
                for p in model.get_parameters():
                    np.testing.assert_array_equal(p.asnumpy(), right[p.name], err_msg=p.name)
                    seen.add(p.name)
            counted = [p.name for p in model.get_parameters() if counts_here(p, here)]
            assert ("model.embed_tokens.weight" in counted) == (rank == 0)
            assert len(counted) == len(list(model.get_parameters())) - (rank == 2)
    assert seen == set(right)


def test_adapters_are_in_stages_too():
    with use_world(alone_in(1, 2)):
        model = spread(adapted(config()))
        assert {p.name.split(".")[2] for p in model.trainable_params() if "down_proj" in p.name} == {"3", "4"}


BIG = """
from pathlib import Path

import bmtrain_ms as bms
from bmtrain_ms.comm import use_world
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.model import Llama
from tests.unit.test_staged import alone_in, config


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


big = config(dim_model=1024, dim_ff=4096, num_layers=16, num_heads=8, num_heads_kv=8, vocab_size=1000)  # 1 GB
with use_world(alone_in(3, 16)):
    for _ in range(4):  # `malloc` has freed memory to give out again, from the second one on
        before = resident()
        model = spread(Llama(big))
        bms.init_parameters(model)
        print(resident() - before)
"""


def test_nothing_is_allocated_for_layers_of_others():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BIG], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    layer = 4 * (4 * 1024**2 + 3 * 1024 * 4096)
    grown = [int(line) for line in done.stdout.split()]
    assert len(grown) == 4 and layer < grown[0]
    assert max(grown) < 2 * layer  # one layer, and what is needed to draw it


@pytest.mark.parametrize("how", [Spread(), Spread(False), Spread(zero_level=2)], ids=str)
def test_micro_batches_on_one_rank(how: Spread):
    """Stages without a pipeline: the loss is that of the batch, and so are gradients."""
    found = []
    for stages in (None, Stages(micro_batches=3), Stages(chunks=3, micro_batches=3)):
        model = Llama(config())
        bms.init_parameters(model)
        spread(model, how, stages)
        params = model.trainable_params()
        manager = bms.optim.OptimManager(loss_scale=8.0)
        manager.add_optimizer(bms.optim.AdamOptimizer(params))
        ids, targets = batch()
        for reduction in ("mean", "sum"):
            value = manager.backward(model.loss, ids, targets.reshape(-1), reduction=reduction, label_smoothing=0.1)
            assert value.shape == () and value.dtype == ms.float32
            np.testing.assert_allclose(
                value.asnumpy(), model.loss(ids, targets, reduction=reduction, label_smoothing=0.1).asnumpy(), rtol=1e-5
            )
        found.append((value.asnumpy(), {p.name: manager.grad(p).asnumpy() for p in params}))
        assert context_of(params[0].world).pipeline.meter.current == 0
    for value, grads in found[1:]:
        np.testing.assert_allclose(value, found[0][0], rtol=1e-5)
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, found[0][1][name], rtol=1e-3, atol=1e-4 * np.abs(grad).max(), err_msg=name)


def test_a_batch_without_tokens_that_count_has_a_loss_of_zero():
    model = spread(Llama(config()), stages=Stages(micro_batches=2))
    bms.init_parameters(model)
    manager = bms.optim.OptimManager()
    manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
    ids, targets = batch()
    assert manager.backward(model.loss, ids, targets * 0 - 100).asnumpy() == 0.0
    assert not any(manager.grad(p).asnumpy().any() for p in model.trainable_params())


def test_what_is_refused():
    model = spread(Llama(config()), stages=Stages(micro_batches=2))
    bms.init_parameters(model)
    manager = bms.optim.OptimManager()
    manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
    with pytest.raises(RuntimeError, match=r"pass it to the manager as it is, manager\.backward\(model\.loss, \*batch\)"):
        manager.backward(lambda *xs: model.loss(*xs), *batch())
    with pytest.raises(RuntimeError, match=r"pass it to the manager as it is, manager\.backward\(model\.loss, \*batch\)"):
        ms.value_and_grad(model.loss, None, model.trainable_params())(*batch())
    with pytest.raises(RuntimeError, match=r"makes its gradients micro-batch by micro-batch: train it with manager\.backward"):
        manager.backward(lambda ids: model(ids).sum(), batch()[0])
    with pytest.raises(ValueError, match=r"^a batch of 1 row cannot be divided into 2 .*num_micro_batches=1 or less"):
        manager.backward(model.loss, *batch(1))
    with pytest.raises(ValueError, match="is a mean or a sum, not reduction='none'"):
        manager.backward(model.loss, *batch(), reduction="none")
    with pytest.raises(ValueError, match="has been spread already"):
        spread(model)
    with pytest.raises(ValueError, match="unknown pipeline schedule 'zb'; choose one of gpipe, 1f1b, interleaved"):
        Stages(schedule="zb")
    with pytest.raises(TypeError, match="DecoderLayer has none: use BMTrainModelWrapper"):
        spread(Llama(config()).model.layers[0], stages=Stages())
    with use_world(alone_in(0, 3)):
        with pytest.raises(ValueError, match="rank 1 of the 3 of the pipeline would hold neither a layer nor the embedding"):
            spread(Llama(config()), stages=[3, 0, 2])
        with pytest.raises(ValueError, match="the layout has 4 layers, but the model has 5"):
            spread(Llama(config()), stages=[2, 1, 1])
        with pytest.raises(ValueError, match=r"m=2 micro-batches in groups of 3 leave a last group of 2"):
            spread(Llama(config(num_layers=6)), stages=Stages(chunks=2, micro_batches=2))


def test_a_balance_that_depends_on_micro_batches_is_refused():
    """Before anything of the model is left out."""
    sizes = {**SIZES, "num_experts": 4, "top_k": 2, "balance_coef": 0.1}
    model = Mixtral(MixtralConfig(**sizes, balance="global_batch"))
    with pytest.raises(ValueError, match=r"depend on their number, 2: use balance='sequence', or Stages\(micro_batches=1\)"):
        spread(model, stages=Stages(micro_batches=2))
    spread(model, stages=Stages(micro_batches=1))
    spread(Mixtral(MixtralConfig(**sizes, balance="sequence")), stages=Stages(micro_batches=2))


def test_settings_of_the_run():
    bms.shutdown()
    world = bms.init_distributed(engine=SimulatedEngine(3, 4), pipe_size=2, num_micro_batches=6)
    assert (world.mesh.pp, world.mesh.dp, world.mesh.pp_rank, world.micro_batches) == (2, 2, 1, 6)
    assert (bms.config["pipe_size"], bms.config["pipe_rank"], bms.config["micros"]) == (2, 1, 6)
    assert bms.config["pipe_comm"].size == 2 and bms.config["pipe_enabled"]
    model: Any = spread(Llama(config()))
    assert model.stages.table.m == 6 and model.stages.table.name == "1f1b"
