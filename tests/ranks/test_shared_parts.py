"""Layers that share a parameter share it in every layout, or are refused: never untied."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
from mindspore import Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SingleEngine, World, use_world
from bmtrain_ms.compat.cells import parameter_table
from bmtrain_ms.model_center import Stages, spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn import add_lora
from tests.helpers.layouts import SIZES, Case, batch_of, parts, whole
from tests.ranks.test_layouts import compare

Run = Callable[..., list[Any]]
STEPS = 4


def tie(model: Any, how: str) -> None:
    """Have layers 0 and 1 share a Cell or a Parameter."""
    first, second = list(model.model.layers)[:2]
    if how == "cell":
        second.self_attn.q_proj = first.self_attn.q_proj
    if how == "norm cell":
        second.input_layernorm = first.input_layernorm
    if how == "attention":
        second.self_attn = first.self_attn
    if how == "parameter":
        parameter_table(second.mlp.down_proj)["weight"] = parameter_table(first.mlp.down_proj)["weight"]
    if how == "adapted":
        add_lora(model, "q_proj|down_proj", rank=3)
        second.self_attn.q_proj, second.mlp.down_proj = first.self_attn.q_proj, first.mlp.down_proj
    if how == "table":
        parameter_table(model.lm_head)["weight"] = parameter_table(model.model.embed_tokens)["weight"]


def trained(world: World, case: Case, how: str) -> dict[str, Any]:
    with use_world(case.world(world)) as here:
        model = Llama(LlamaConfig(**SIZES, num_heads_kv=2))
        tie(model, how)
        spread(model, case.how, case.stages)
        bms.init_parameters(model)
        params = model.trainable_params()
        if how == "adapted":  # B starts at zero, and so would A's gradient
            for p in params:
                size = int(np.prod(p.layout.whole))
                p.copy_full(np.linspace(-0.1, 0.1, size).astype(np.float32).reshape(p.layout.whole))
        first = parts({p.name: (p.layout, p) for p in params})
        manager, optimizer = bms.optim.OptimManager(), bms.optim.AdamOptimizer(params, lr=1e-2)
        manager.add_optimizer(optimizer)
        losses, norms, grads = [], [], {}
        for step in range(STEPS):
            manager.zero_grad()
            value = manager.backward(model.loss, *batch_of(step, here.mesh.dp_rank, case.dp))
            if not step:
                grads = parts({p.name: (p.layout, manager.grad(p) * (1.0 / manager.grads_scale)) for p in params})
            norms.append(manager.clip_grad_norm(optimizer.param_groups, 1.0))
            losses.append(bms.sum_loss(value).asnumpy().item())
            manager.step()
        last = parts({p.name: (p.layout, p) for p in params})
        return {"first": first, "losses": losses, "norms": norms, "grads": grads, "last": last}


def alone(how: str) -> dict[str, Any]:
    with use_world(World(SingleEngine(), Mesh(1, 0), seed=5)) as one:
        found = trained(one, Case(), how)
    return {**found, **{name: whole([found[name]]) for name in ("first", "grads", "last")}}


@pytest.mark.parametrize("how", ["cell", "parameter", "norm cell", "attention", "adapted", "table"])
def test_tensor_parallel_layers_that_share_train_as_on_one_rank(single_world: Any, run_ranks: Run, how: str):
    compare(run_ranks(2, trained, case=Case(tp=2), how=how), alone(how), 2e-5)


@pytest.mark.parametrize("how", ["cell", "parameter", "norm cell"])
def test_layers_that_share_train_in_one_stage_as_on_one_rank(single_world: Any, run_ranks: Run, how: str):
    case = Case(pp=2, stages=Stages([2, 0], micro_batches=2))
    compare(run_ranks(2, trained, case=case, how=how), alone(how), 2e-5)


REFUSED = {
    "cell": "layer 0, on rank 0 of the pipeline, and layer 1, on rank 1, share the parameter self_attn.q_proj",
    "parameter": "layer 0, on rank 0 of the pipeline, and layer 1, on rank 1, share the parameter mlp.down_proj.weight",
    "norm cell": "layer 0, on rank 0 of the pipeline, and layer 1, on rank 1, share the parameter input_layernorm.weight",
    "attention": "layer 0, on rank 0 of the pipeline, and layer 1, on rank 1, share the parameter self_attn.q_proj",
    "table": "the embedding, on rank 0 of the pipeline, and the head, on rank 1, share the parameter weight",
    "rest": "layer 0, on rank 0 of the pipeline, and the rest of the model, on all ranks, share the parameter self_attn.q_proj",
}


def refused(world: World, how: str) -> tuple[str, bool]:
    """What is said, and whether the model is what it was."""
    with use_world(Case(pp=2).world(world)):
        model = Llama(LlamaConfig(**SIZES, num_heads_kv=2))
        tie(model, how)
        if how == "rest":
            parameter_table(model)["extra"] = parameter_table(model.model.layers[0].self_attn.q_proj)["weight"]
        before = [id(p) for p in model.get_parameters()]
        with pytest.raises(ValueError) as error:
            spread(model)
        return str(error.value), before == [id(p) for p in model.get_parameters()] and len(list(model.model.layers)) == 2


@pytest.mark.parametrize("how", REFUSED)
def test_stages_refuse_what_they_would_untie(run_ranks: Run, how: str):
    said, again = run_ranks(2, refused, how=how)
    assert said == again
    assert said[0].startswith(REFUSED[how])
    assert ", and ranks of a pipeline share none between layers: keep the layers that share it in one stage (stages=)" in said[0]
    assert said[1]


class Product(bms.DistributedModule):
    """tanh(x W V)."""

    def __init__(self, shared: Any, own: Any) -> None:
        super().__init__()
        self.w, self.v = shared, own

    def construct(self, x: Tensor) -> Tensor:
        return ops.tanh(ops.matmul(ops.matmul(x, self.w), self.v))


class Penalised(Product):
    """It gathers a parameter itself, though its Block has done so, for a penalty."""

    def construct(self, x: Tensor) -> Tensor:
        return super().construct(x) + (self.parameter("w").gather() ** 2).mean()


class Penalty(bms.DistributedModule):
    """Of a parameter of a layer, beside what it is given."""

    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.w = shared

    def construct(self, x: Tensor) -> Tensor:
        return x + (self.parameter("w").gather() ** 2).mean()


HEADS: list[Callable[[Any], Any]] = [
    lambda shared: Product(shared, made(4)),
    lambda shared: bms.Block(Product(shared, made(4))),
    Penalty,
]


class Outside(bms.DistributedModule):
    """A list, and something behind it that has a parameter of a layer."""

    def __init__(self, shared: Any, head: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layers = bms.PipelineTransformerBlockList([Product(shared, made(1)), Product(made(2), made(3))])
        self.head: Any = head(shared)

    def construct(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)).mean()


class Inside(bms.DistributedModule):
    """A list of layers with penalties of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = bms.PipelineTransformerBlockList([Penalised(made(i), made(i + 9)) for i in range(2)])

    def construct(self, x: Tensor) -> Tensor:
        return self.layers(x).mean()


def made(seed: int) -> Any:
    return bms.DistributedParameter(np.random.default_rng(seed).normal(0, 0.5, (6, 6)).astype(np.float32))


def of_a_list(world: World) -> list[str]:
    with use_world(Case(pp=2).world(world)):
        said, x = [], Tensor(np.ones((2, 6), np.float32))
        shared = made(0)
        with pytest.raises(ValueError) as error:
            bms.PipelineTransformerBlockList([Product(shared, made(1)), Product(shared, made(2))])
        said.append(str(error.value))
        bms.PipelineTransformerBlockList([Product(shared, made(1)), Product(made(2), made(3))])
        with pytest.raises(ValueError) as error:
            bms.PipelineTransformerBlockList([Product(made(1), made(2)), Product(made(3), shared)])
        said.append(str(error.value))
        for head in HEADS:
            model = Outside(made(0), head)
            model.update_parameters_name()
            manager = bms.optim.OptimManager()
            manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
            with pytest.raises(RuntimeError) as of_run:
                manager.backward(model, x)
            said.append(str(of_run.value))
        return said


def test_a_list_refuses_what_it_would_untie(run_ranks: Run):
    said, again = run_ranks(2, of_a_list)
    assert said == again
    assert said[0].startswith("layer 0, on rank 0 of the pipeline, and layer 1, on rank 1, share the parameter w, and ranks of")
    assert said[1].startswith("v of layer 1, on rank 1 of the pipeline, is a parameter of another list's stage 0, too")
    for text in said[2:]:
        assert text.startswith(
            "w of layer 0 of a PipelineTransformerBlockList, which stage 0 has, is used outside of the list, too:"
        )


def penalised(world: World, pp: int = 1) -> dict[str, np.ndarray]:
    """Gradients of this rank's layers."""
    with use_world(Case(pp=pp).world(world) if pp > 1 else world):
        model = Inside()
        model.update_parameters_name()
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
        rows = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
        manager.backward(model, Tensor(np.split(rows, pp)[world.mesh.rank]))
        grads = ((p, manager.grad(p)) for p in model.trainable_params())
        return {p.name: grad.asnumpy().reshape(6, 6) for p, grad in grads if grad is not None}


def test_a_layer_may_gather_its_parameters_itself(run_ranks: Run):
    with use_world(World(SingleEngine(), Mesh(1, 0))) as one:
        wanted = penalised(one)
    first, second = run_ranks(2, penalised, pp=2)
    assert len(first) == len(second) == 2 and {*first, *second} == {*wanted}
    for name, grad in {**first, **second}.items():
        np.testing.assert_allclose(grad, wanted[name], rtol=0, atol=1e-6)
