"""Adapters on several ranks train as on one: ZeRO, tensor-parallel, pipelines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from safetensors.numpy import load_file

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SingleEngine, World, use_world
from bmtrain_ms.compat.autograd import no_grad
from bmtrain_ms.files.errors import CheckpointError
from bmtrain_ms.model_center import Spread, Stages, load_adapters, save_adapters, spread
from bmtrain_ms.model_center.model import DeepseekV2, DeepseekV2Config, Llama, LlamaConfig
from bmtrain_ms.nn import add_lora, freeze, merge_lora, thaw
from tests.helpers.layouts import SIZES, Case, batch_of, parts, whole
from tests.ranks.test_layouts import compare

LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|down_proj|lm_head"


def trained(world: World, case: Case, folder: Path, latent: bool = False, late: bool = False) -> dict[str, Any]:
    """`late`: the model has been spread, initialised and used before it is given adapters."""
    with use_world(case.world(world)) as here:
        model = _latent() if latent else Llama(LlamaConfig(**SIZES, num_heads_kv=2))
        layers = "_proj" if latent else LAYERS
        if late:
            spread(model, case.how, case.stages)
            bms.init_parameters(model)
            model.loss(*batch_of(0, here.mesh.dp_rank, case.dp))
            assert all(re.search(layers, path) for path in add_lora(model, layers, rank=3, alpha=6))
        else:
            add_lora(model, layers, rank=3, alpha=6)
            spread(model, case.how, case.stages)
            bms.init_parameters(model)
        params = model.trainable_params()
        first = parts({p.name: (p.layout, p) for p in model.get_parameters()})
        manager = bms.optim.OptimManager()
        optimizer = bms.optim.AdamOptimizer(params, lr=3e-2)
        manager.add_optimizer(optimizer)
        losses, norms, grads = [], [], {}
        for step in range(4):
            manager.zero_grad()
            value = manager.backward(model.loss, *batch_of(step, here.mesh.dp_rank, case.dp))
            if step == 1:  # A's gradient is zero as long as B is
                grads = parts({p.name: (p.layout, manager.grad(p) * (1.0 / manager.grads_scale)) for p in params})
            norms.append(manager.clip_grad_norm(optimizer.param_groups, 1.0))
            losses.append(bms.sum_loss(value).asnumpy().item())
            manager.step()
        save_adapters(model, folder)
        last = parts({p.name: (p.layout, p) for p in params})
        return {"first": first, "losses": losses, "norms": norms, "grads": grads, "last": last}


def _latent() -> DeepseekV2:
    sizes = {"q_rank": 6, "kv_rank": 8, "dim_nope": 6, "dim_rope": 4, "dim_value": 5, "num_experts": 0}
    return DeepseekV2(DeepseekV2Config(**SIZES, **sizes))


def test_adapters_of_latent_vectors_are_those_of_one_rank(run_ranks: Callable[..., list[Any]], tmp_path: Path):
    """Whose up-projection is given all rows by every tensor-parallel rank."""
    (found,) = run_ranks(1, trained, case=Case(), folder=tmp_path / "one", latent=True)
    right = {**found, **{part: whole([found[part]]) for part in ("first", "grads", "last")}}
    assert any(".kv_b_proj.lora_A." in name for name in right["grads"])
    for late in (False, True):
        compare(run_ranks(2, trained, case=Case(tp=2), folder=tmp_path / "many", latent=True, late=late), right, 2e-5)


EARLY = [Case(dp=2), Case(tp=2), Case(tp=4), Case(pp=2)]
LATE = [Case(), Case(dp=2), Case(dp=2, how=Spread(False, 2)), Case(tp=2), Case(tp=4), Case(pp=2), Case(pp=2, how=Spread(False))]


@pytest.mark.parametrize(
    "case, late",
    [*((case, False) for case in EARLY), *((case, True) for case in LATE)],
    ids=lambda x: "late" * x if x in (0, 1) else str(x),
)
def test_adapters_are_those_of_one_rank(run_ranks: Callable[..., list[Any]], tmp_path: Path, case: Case, late: bool):
    (found,) = run_ranks(1, trained, case=Case(), folder=tmp_path / "one")
    right = {**found, **{part: whole([found[part]]) for part in ("first", "grads", "last")}}
    assert len(right["grads"]) == 26 and all(".lora_" in name for name in right["grads"])
    answers = run_ranks(case.ranks, trained, case=case, folder=tmp_path / "many", late=late)
    compare(answers, right, 2e-5)
    saved, last = load_file(str(tmp_path / "many" / "adapter_model.safetensors")), whole([answer["last"] for answer in answers])
    assert sorted(saved) == sorted(f"base_model.model.{name}" for name in last)
    for name, values in last.items():
        assert (saved[f"base_model.model.{name}"] == values).all()
    configs = [json.loads((tmp_path / ranks / "adapter_config.json").read_text()) for ranks in ("one", "many")]
    assert configs[0] == configs[1] and configs[0]["r"] == 3


def reloaded(world: World, case: Case, folder: Path, late: bool) -> dict[str, Any]:
    """Adapters of files in front of a batch's loss, and the plain model that they are merged into."""
    with use_world(case.world(world)) as here:
        model, batch = Llama(LlamaConfig(**SIZES, num_heads_kv=2)), batch_of(0, here.mesh.dp_rank, case.dp)
        bms.init_parameters(model)
        if late:
            spread(model, case.how, case.stages)
            paths = load_adapters(model, folder)
        else:
            paths = load_adapters(model, folder)
            spread(model, case.how, case.stages)
        with no_grad():
            adapted = bms.sum_loss(model.loss(*batch)).asnumpy().item()
            merged = merge_lora(model)
            again = bms.sum_loss(model.loss(*batch)).asnumpy().item()
        values = parts({p.name: (p.layout, p) for p in model.get_parameters()})
        return {"adapted": adapted, "again": again, "paths": paths, "merged": merged, "values": values}


@pytest.mark.parametrize("case", [Case(dp=2), Case(tp=2), Case(tp=4), Case(pp=2)], ids=str)
def test_adapters_of_files_are_loaded_and_merged_on_any_layout(run_ranks: Callable[..., list[Any]], tmp_path: Path, case: Case):
    """Before the model is spread, or after."""
    run_ranks(1, trained, case=Case(), folder=tmp_path)
    (right,) = run_ranks(1, reloaded, case=Case(), folder=tmp_path, late=False)
    assert right["adapted"] == pytest.approx(right["again"], rel=1e-6)
    assert not any(".lora_" in name for name in right["values"])
    for late in (False, True):
        answers = run_ranks(case.ranks, reloaded, case=case, folder=tmp_path, late=late)
        assert sorted({path for answer in answers for path in answer["paths"]}) == sorted(right["paths"])
        for answer in answers:
            assert answer["merged"] == len(answer["paths"]) if late else answer["merged"] > 0  # a stage has some of them
            assert [answer["adapted"], answer["again"]] == pytest.approx([right["adapted"]] * 2, rel=1e-6)
        found, expected = whole([answer["values"] for answer in answers]), whole([right["values"]])
        assert found.keys() == expected.keys()
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-6, err_msg=name)


def misfit(world: World, folder: Path) -> str:
    with use_world(Case(pp=2).world(world)):
        model = spread(Llama(LlamaConfig(**{**SIZES, "num_layers": 3}, num_heads_kv=2)), stages=Stages())
        names = [p.name for p in model.get_parameters()]
        with pytest.raises(CheckpointError) as caught:
            load_adapters(model, folder)
        assert names == [p.name for p in model.get_parameters()]
        return str(caught.value)


def test_adapters_that_no_stage_has_a_layer_for_are_refused_on_all(run_ranks: Callable[..., list[Any]], tmp_path: Path):
    run_ranks(1, trained, case=Case(), folder=tmp_path)
    told = run_ranks(2, misfit, folder=tmp_path)
    assert told[0] == told[1] and "has other adapters than its adapter_config.json says of this Llama" in told[0]


def frozen(world: World, stages: Any) -> list[Any]:
    """What ranks of a pipeline freeze and adapt that do not all have it, and what is said where nobody has."""
    case = Case(pp=2, stages=stages)
    with use_world(case.world(world)):
        model = spread(Llama(LlamaConfig(**SIZES, num_heads_kv=2)), case.how, case.stages)
        done = [freeze(model, "embed_tokens"), thaw(model, "lm_head"), freeze(model, r"layers\.1\.mlp\.up_proj")]
        for function in (freeze, thaw):
            with pytest.raises(ValueError, match=r"^no parameter of this Llama has 'nothing' in its name"):
                function(model, "nothing")
        with pytest.raises(ValueError, match=r"^no Linear layer has 'nothing' in its path"):
            add_lora(model, "nothing")
        trained = [p.name for p in model.get_parameters() if not p.requires_grad]
        return [done, trained, add_lora(model, "layers.1.*q_proj")]


@pytest.mark.parametrize("stages", [[1, 1], "E|ttL"], ids=str)
def test_what_some_stages_do_not_have_is_frozen_and_adapted(run_ranks: Any, stages: Any):
    first, last = run_ranks(2, frozen, stages=Stages(stages))
    up = "model.layers.1.mlp.up_proj.weight"
    assert first == [[["model.embed_tokens.weight"], [], []], ["model.embed_tokens.weight"], []]
    assert last == [[[], ["lm_head.weight"], [up]], [up], ["model.layers.1.self_attn.q_proj"]]


def dropped(world: World, case: Case, late: bool) -> list[float]:
    """Losses and norms of two steps of two passes each, with a dropout in front of adapters, the head's too.

    What is evaluated in between, on each layout another number of passes, changes nothing of what is drawn.
    """
    with use_world(case.world(world)) as here:
        model, found = Llama(LlamaConfig(**SIZES, num_heads_kv=2)), []
        if late:
            spread(model, case.how, case.stages)
        add_lora(model, "q_proj|down_proj|lm_head", rank=3, dropout=0.4)
        if not late:
            spread(model, case.how, case.stages)
        bms.init_parameters(model)
        model.set_train(True)
        manager, optimizer = bms.optim.OptimManager(), bms.optim.AdamOptimizer(model.trainable_params(), lr=3e-2)
        manager.add_optimizer(optimizer)
        for step in range(2):
            manager.zero_grad()
            for number in range(2):
                loss = manager.backward(model.loss, *batch_of(2 * step + number, here.mesh.dp_rank, case.dp))
                found.append(bms.sum_loss(loss).asnumpy().item())
                for _ in range(here.everyone.size - 1):
                    model.loss(*batch_of(8, here.mesh.dp_rank, case.dp))
            found.append(manager.clip_grad_norm(optimizer.param_groups, 1.0))
            manager.step()
        found.append(bms.sum_loss(model.loss(*batch_of(9, here.mesh.dp_rank, case.dp))).asnumpy().item())
        return found


DROPPED = [
    Case(dp=2),
    Case(pp=2, stages=Stages(micro_batches=1)),
    Case(pp=2, how=Spread(recompute=False), stages=Stages(micro_batches=3)),
    Case(pp=1, stages=Stages(chunks=2, micro_batches=2)),
    Case(pp=2, dp=2),
]


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_masks_in_front_of_adapters_are_those_of_one_rank(single_world: Any, run_ranks: Any, case: Case, late: bool):
    with use_world(World(SingleEngine(), Mesh(1, 0), seed=5)) as one:
        right = dropped(one, Case(), late)
    for found in run_ranks(case.ranks, dropped, case=case, late=late):
        np.testing.assert_allclose(found, right, rtol=2e-4)


def in_pieces(world: World, case: Case) -> dict[str, Any]:
    """The loss of an adapted head for some tokens at a time, and its gradients."""
    with use_world(case.world(world)) as here:
        model = Llama(LlamaConfig(**SIZES, num_heads_kv=2))
        add_lora(model, "lm_head|q_proj", rank=3, alpha=6)
        spread(model, case.how, case.stages)
        bms.init_parameters(model)
        for p in model.trainable_params():
            size = int(np.prod(p.layout.whole))
            p.copy_full(np.sin(np.arange(size, dtype=np.float32)).reshape(p.layout.whole) / 9)
        params, manager = model.trainable_params(), bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(params))
        found = {}
        for rows in (None, 3):
            manager.zero_grad()
            value = manager.backward(model.loss, *batch_of(0, here.mesh.dp_rank, case.dp), rows=rows)
            found[f"loss {rows}"] = bms.sum_loss(value).asnumpy().item()
            for p in params:
                found[f"{p.name} {rows}"] = manager.grad(p).asnumpy().copy()
        return found


@pytest.mark.parametrize("case", [Case(dp=2), Case(tp=2), Case(pp=2)], ids=str)
def test_an_adapted_head_takes_rows_on_every_layout(run_ranks: Callable[..., list[Any]], case: Case):
    for found in run_ranks(case.ranks, in_pieces, case=case):
        wanted = [name for name in found if name.endswith(" None")]
        assert len(wanted) > 1 and any(found[name].any() for name in wanted if "lora" in name)
        for name in wanted:
            pieces = found[name.replace(" None", " 3")]
            np.testing.assert_allclose(pieces, found[name], rtol=0, atol=2e-5 * np.abs(found[name]).max(), err_msg=name)


def shared(world: World) -> list[float]:
    """Losses before and after a merge of adapted layers that were in two places when they were divided, and how many there were."""
    with use_world(Case(tp=2).world(world)):
        model = Llama(LlamaConfig(**SIZES, num_heads_kv=2))
        first, second = list(model.model.layers)[:2]
        add_lora(model, "0.*q_proj|0.*down_proj", rank=3, alpha=6)
        second.self_attn.q_proj, second.mlp.down_proj = first.self_attn.q_proj, first.mlp.down_proj
        spread(model)
        bms.init_parameters(model)
        for p in model.trainable_params():
            size = int(np.prod(p.layout.whole))
            p.copy_full(np.sin(np.arange(size, dtype=np.float32)).reshape(p.layout.whole) / 9)
        with no_grad():
            before = model.loss(*batch_of(0, 0, 1)).asnumpy().item()
            return [merge_lora(model), before, model.loss(*batch_of(0, 0, 1)).asnumpy().item()]


def test_adapted_layers_that_were_divided_in_two_places_are_merged_once(run_ranks: Callable[..., list[Any]]):
    for count, before, after in run_ranks(2, shared):
        assert count == 2 and after == pytest.approx(before, rel=1e-5)


def of_one_stage(world: World, folder: Path) -> list[Any]:
    """What is said where only the last stage has what is refused; and the files of adapters that it alone has."""
    with use_world(Case(pp=2).world(world)):
        model = spread(Llama(LlamaConfig(**SIZES, num_heads_kv=2)), stages=Stages())
        bms.init_parameters(model)
        add_lora(model, "1.*q_proj", rank=2, alpha=4)
        add_lora(model, "1.*v_proj", rank=3, alpha=4)
        save_adapters(model, folder)
        said = []
        for function in (lambda: add_lora(model, "q_proj"), lambda: thaw(model, "nobody")):
            with pytest.raises(ValueError) as caught:
                function()
            said.append(str(caught.value))
        for function in (lambda: load_adapters(model, folder), lambda: model.save_pretrained(folder / "model", proven=False)):
            with pytest.raises(CheckpointError) as refused:
                function()
            said.append(str(refused.value))
        trained = [p.name for p in model.trainable_params()]
        merge_lora(model)
        return [said, trained, load_adapters(model, folder)]


def test_what_one_stage_refuses_all_do(run_ranks: Callable[..., list[Any]], tmp_path: Path):
    first, last = run_ranks(2, of_one_stage, folder=tmp_path)
    layers = [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]
    assert first[0][:2] == last[0][:2] and first[0][0].startswith(f"{layers[0]} has an adapter already")
    assert ["rank(s) [1] failed" in text for text in first[0]] == [False, False, True, True]
    assert last[0][2].startswith(f"{layers[0]} has an adapter already") and "call merge_lora first" in last[0][3]
    assert first[1:] == [[], []] and len(last[1]) == 4 and last[2] == layers
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["rank_pattern"] == {layers[0]: 2, layers[1]: 3} and said["target_modules"] == layers
