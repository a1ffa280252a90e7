"""Any layout, one result: a model with experts over real ranks has the values, losses, gradients, norms and updates of one rank."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SingleEngine, World, use_world
from bmtrain_ms.nn import Linear, MoE, RouterConfig, Routing, update_router_bias
from tests.helpers.layouts import parts, whole

Run = Callable[..., list[Any]]
SEQUENCES, LENGTH, DIM, VOCAB, STEPS = 4, 5, 6, 13, 10

CONFIGS = {
    "global": RouterConfig(balance="global_batch", balance_coef=0.05, z_coef=0.02, bias=True, bias_rate=1e-2),
    "sequence": RouterConfig("sigmoid", True, 2.5, 4, 2, "two_best", balance="sequence", balance_coef=0.05),
}


@dataclass(frozen=True)
class Case:
    """A layout and how the model runs on it."""

    dp: int = 1
    tp: int = 1
    ep: int = 1
    replica: int = 1
    again: bool = True
    zero_level: int = 3
    micro_batches: int = 1
    dtype: str = "float32"
    config: str = "sequence"
    blocks: bool = True

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in vars(self).items() if value != getattr(Case, name))


class Layer(nn.Cell):
    def __init__(self, dtype: Any, config: RouterConfig):
        super().__init__()
        shared = Linear(DIM, DIM, dtype=dtype, init_std=0.3)
        self.mlp = MoE(DIM, 7, 8, 3, config, shared, dtype=dtype, init_std=0.5)

    def construct(self, x: Tensor, routing: Routing) -> Tensor:
        return x + self.mlp(x, routing)


class Model(nn.Cell):
    """An embedding, two layers of experts, and logits; tensor-parallel ranks have a part of the rows each, padding behind them."""

    def __init__(self, case: Case):
        super().__init__()
        dtype, config = getattr(ms, case.dtype), CONFIGS[case.config]
        self.tp, self.dtype = case.tp, dtype
        self.embed = bms.nn.VPEmbedding(VOCAB, DIM, dtype, init_std=1.0, scatter_output=True)
        layers = [Layer(dtype, config) for _ in range(2)]
        if case.blocks:
            self.layers = bms.TransformerBlockList([bms.Block(x, case.again, case.zero_level) for x in layers])
        else:
            self.layers = nn.CellList(layers)

    def loss(self, ids: np.ndarray, targets: np.ndarray) -> Tensor:
        """The mean over the tokens of ids (sequences, length)."""
        tokens = ids.size
        rows = -(-tokens // self.tp)
        padded = np.full(rows * self.tp, -1, np.int32)
        padded[:tokens] = ids.reshape(-1)
        mine = np.arange(rows) + rows * bms.comm.world().mesh.tp_rank
        routing = Routing(mine < tokens, np.minimum(mine // ids.shape[1], len(ids) - 1))
        hidden = self.embed(Tensor(padded))
        for layer in self.layers if isinstance(self.layers, nn.CellList) else [self.layers]:
            hidden = layer(hidden, routing)
        return routing.add_losses(self.embed.cross_entropy(hidden, Tensor(targets.reshape(-1).astype(np.int32))))


def batch(step: int, case: Case, dp_rank: int, micro_batch: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng([3, step]).integers(0, VOCAB, (SEQUENCES, LENGTH + 1))
    mine = ids.reshape(case.dp, case.micro_batches, -1, LENGTH + 1)[dp_rank, micro_batch]
    return mine[:, :-1].astype(np.int32), mine[:, 1:]


def train(world: World, case: Case, steps: int = STEPS) -> dict[str, Any]:
    mesh = Mesh(case.ranks, world.mesh.rank, tp=case.tp, ep=case.ep, replica=case.replica)
    with use_world(World(world.everyone, mesh, seed=5)) as here:
        model = Model(case)
        bms.init_parameters(model)
        params = model.trainable_params()
        first = parts({p.name: (p.layout, p) for p in params})
        manager = bms.optim.OptimManager(loss_scale=2.0**5 if case.dtype == "float16" else None)
        optimizer = bms.optim.AdamOptimizer(params, lr=3e-3, weight_decay=0.01)
        manager.add_optimizer(optimizer)
        losses, norms, grads = [], [], {}
        for step in range(steps):
            manager.zero_grad()
            total = 0.0
            for i in range(case.micro_batches):
                value = manager.backward(
                    lambda *given: model.loss(*given) / case.micro_batches, *batch(step, case, here.mesh.dp_rank, i)
                )
                total += bms.sum_loss(value).asnumpy().item()
            losses.append(total)
            if not step:
                grads = parts({p.name: (p.layout, manager.grad(p) * (1.0 / manager.grads_scale)) for p in params})
            norms.append(manager.clip_grad_norm(optimizer.param_groups, 1.0))
            manager.step()
            update_router_bias(model)
        last = parts({p.name: (p.layout, p) for p in params})
        biases = {p.name: p.asnumpy().tolist() for p in model.get_parameters() if "bias" in p.name and not p.requires_grad}
        return {"first": first, "losses": losses, "norms": norms, "grads": grads, "last": last, "biases": biases}


def steps_of(dtype: str) -> int:
    """In 16 bits rounding has a token choose another expert sooner or later, in any layout."""
    return STEPS if dtype == "float32" else 2


@functools.cache
def one_rank(dtype: str, config: str, micro_batches: int) -> dict[str, Any]:
    case = Case(dtype=dtype, config=config, micro_batches=micro_batches, blocks=False)
    with use_world(World(SingleEngine(), Mesh(1, 0))) as one:
        found = train(one, case, steps_of(dtype))
    return {**found, **{name: whole([found[name]]) for name in ("first", "grads", "last")}}


def compare(answers: list[dict[str, Any]], right: dict[str, Any], close: float) -> None:
    first, grads, last = (whole([answer[name] for answer in answers]) for name in ("first", "grads", "last"))
    assert sorted(first) == sorted(right["first"]) == sorted(grads)
    for name, values in first.items():
        np.testing.assert_array_equal(values, right["first"][name], err_msg=name)
    for name, grad in grads.items():
        atol = close * np.abs(right["grads"][name]).max()
        np.testing.assert_allclose(grad, right["grads"][name], rtol=0, atol=atol, err_msg=name)
    for answer in answers:
        assert answer["losses"] == answers[0]["losses"] and answer["norms"] == answers[0]["norms"]
        assert answer["biases"] == right["biases"]
    np.testing.assert_allclose(answers[0]["losses"], right["losses"], rtol=close)
    np.testing.assert_allclose(answers[0]["norms"], right["norms"], rtol=10 * close)
    for name, values in last.items():
        np.testing.assert_allclose(values, right["last"][name], rtol=0, atol=100 * close * np.abs(values).max(), err_msg=name)


CASES = [
    Case(dp=2, ep=2),
    Case(dp=2, ep=2, config="global"),
    Case(dp=2, ep=2, again=False),
    Case(dp=2, ep=2, again=False, zero_level=2, micro_batches=2),
    Case(dp=2, ep=2, config="global", blocks=False),
    Case(tp=2),
    Case(tp=2, config="global"),
    Case(dp=4, ep=4, zero_level=2),
    Case(dp=4, ep=4, config="global", again=False),
    Case(dp=4, ep=2, config="global"),
    Case(dp=4, ep=2, replica=2, again=False),
    Case(dp=2, ep=2, tp=2),
    Case(dp=2, ep=2, tp=2, config="global", again=False, zero_level=2),
    Case(dp=2, ep=2, tp=2, micro_batches=2),
    Case(tp=3),  # 20 tokens: a row that is none
    Case(dp=2, ep=2, config="global", dtype="float16"),
    Case(dp=2, ep=2, tp=2, dtype="float16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_one_rank(run_ranks: Run, case: Case):
    """Of the whole batch in one piece, also where ranks have it in several: balance of sequences does not depend on that."""
    right = one_rank(case.dtype, case.config, 1)
    found = run_ranks(case.ranks, train, case=case, steps=steps_of(case.dtype))
    compare(found, right, 2e-5 if case.dtype == "float32" else 2e-2)


def test_trap_6_expert_grad_times_ep(run_ranks: Run):
    """Neither times ep nor divided by it; on two ranks, with and without expert parallelism, and on four."""
    right = one_rank("float32", "sequence", 1)["grads"]
    for case in (Case(dp=2), Case(dp=2, ep=2), Case(dp=4, ep=2), Case(dp=4, ep=4)):
        grads = whole([answer["grads"] for answer in run_ranks(case.ranks, train, case=case, steps=1)])
        for name in (name for name in grads if ".experts." in name):
            ratio = np.sum(grads[name] * right[name]) / np.sum(right[name] ** 2)
            assert ratio == pytest.approx(1.0, rel=1e-4), (str(case), name)


def collectives(world: World, again: bool, idle: bool) -> list[tuple[str, str]]:
    """Of one layer, forward and backward. `idle`: rank 1 has no tokens, and all choose an expert of rank 0."""
    engine = RecordingEngine(world.everyone)
    with use_world(World(engine, Mesh(2, world.mesh.rank, ep=2), seed=1, prefetch=0)):
        layer = Layer(ms.float32, RouterConfig(balance="global_batch", balance_coef=0.1))
        bms.init_parameters(layer)
        layer.update_parameters_name("layer.")
        tokens = np.full(4, not (idle and world.mesh.rank))
        if idle:
            layer.mlp.gate.parameter("weight").copy_full(np.zeros((8, DIM), np.float32))
        block, routing = bms.Block(layer, again), Routing(tokens)
        x = bms.DistributedParameter(np.random.default_rng(world.mesh.rank).normal(size=(4, DIM)).astype(np.float32), name="x")
        params = [*layer.trainable_params(), x]
        engine.events.clear()
        _, grads = ms.value_and_grad(lambda: routing.add_losses((block(x.gather() * 1.0, routing) ** 2).mean()), None, params)()
        for p, grad in zip(params, grads):
            assert np.isfinite(grad.asnumpy()).all()
            if idle and ".experts." in p.name and world.mesh.rank:
                assert not grad.asnumpy().any(), p.name  # present, and zero
        return engine.calls()


THERE = [("all_gather", "experts, counts"), ("all_to_all", "experts, there"), ("all_to_all", "experts, back")]
BALANCE = ("all_reduce", "router, choices along stage")
TOKENS = ("all_reduce", "router, tokens")  # once for the pass
BACK = [("all_to_all", "experts, back, backward"), ("all_to_all", "experts, there, backward")]


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_the_collectives_of_a_layer(run_ranks: Run, again: bool, idle: bool):
    """In this order on every rank, whatever it has to do."""
    first, second = run_ranks(2, collectives, again=again, idle=idle)
    assert first == second
    mine = [call for call in first if "experts, " in call[1] or "router" in call[1]]
    assert mine == [BALANCE, *THERE, TOKENS, *(THERE if again else []), *BACK]
