"""Adapters in the files of PEFT: what is written, read and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from mindspore import Tensor

from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.compat.runtime import from_host
from bmtrain_ms.model_center import load_adapters, save_adapters, spread
from bmtrain_ms.nn import add_lora, merge_lora
from tests.golden.models import batches, weight
from tests.unit.test_families import model_of
from tests.unit.test_lora import with_adapters

pytestmark = pytest.mark.usefixtures("single_world")
# What PEFT 0.21 writes of a LoraConfig(r=3, lora_alpha=6, target_modules=[...])
OF_PEFT: dict[str, Any] = json.loads("""
{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
 "base_model_name_or_path": "a/model", "bias": "none", "corda_config": null, "ensure_weight_tying": false, "eva_config": null,
 "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "kasa_config": null,
 "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 6,
 "lora_bias": false, "lora_dropout": 0.0, "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
 "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 3,
 "rank_pattern": {}, "revision": null, "target_modules": ["v_proj", "down_proj", "q_proj"], "target_parameters": null,
 "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
 "use_rslora": false, "velora_config": null}
""")


def change(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def settled(model: Any) -> Any:
    """Its adapters have values that their names say."""
    for p in model.get_parameters():
        if ".lora_" in p.name:
            p.copy_full(from_host(weight(p.name, p.full_shape)))
    return model


@pytest.mark.parametrize("spreads", [False, True])
def test_adapters_come_back_from_pefts_files(tmp_path, spreads: bool):
    model = with_adapters()
    ids = Tensor(batches()["plain"]["ids"])
    before = model(ids).asnumpy()
    save_adapters(model, tmp_path, base="a/model")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    names = safetensors.numpy.load_file(str(tmp_path / "adapter_model.safetensors"))
    assert names["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (3, 24) and len(names) == 12
    again = spread(model_of("llama")) if spreads else model_of("llama")
    assert len(load_adapters(again, tmp_path)) == 6
    assert np.array_equal(again(ids).asnumpy(), before)
    assert [p.name for p in again.trainable_params()] == [p.name for p in model.trainable_params()]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"peft_type": "IA3"}, "is not of LoRA adapters"),
        ({"use_dora": True}, "asks for what is not computed here: use_dora=True"),
        ({"r": None}, "adapter_config.json: r must be a whole number of at least 1, not None"),
        ({"r": "3"}, "adapter_config.json: r must be a whole number of at least 1, not '3'"),
        ({"target_modules": 5}, "target_modules must be a list of layers' names, or a regular expression, not 5"),
        ({"target_modules": "("}, r"target_modules must be a list of layers' names, or a regular expression, not '\('"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, not 'x'"),
        ({"lora_dropout": 1.5}, "lora_dropout must be a number of at least 0 and below 1, not 1.5"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, not 'false'"),
        ({"init_lora_weights": "pissa"}, "asks for what is not computed here: init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": 1}, "init_lora_weights=1"),
        ({"init_lora_weights": "olora", "bias": "all"}, "bias='all', init_lora_weights='olora'"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\]"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication=\[\[0, 1\]\]"),
        ({"target_parameters": ["x"]}, "target_parameters="),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"arrow_config": {"a": 1}}, "arrow_config="),
        ({"of_tomorrow": 0}, "of_tomorrow=0"),
        ({"of_tomorrow": "x"}, "asks for what is not computed here: of_tomorrow='x'"),
        (
            {"rank_pattern": {"q_proj": 0}},
            "rank_pattern must be a table of .*, and a whole number of at least 1 for each, not {'q_p",
        ),
        (
            {"alpha_pattern": {"(": 2}},
            "alpha_pattern must be a table of layers' names, or regular expressions, and a number for each",
        ),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight of shape \(3, \d+\), .* says r=2"),
        ({"r": 4}, r"of shape \(3, \d+\), and the layer's weight has .*; its adapter_config.json says r=4"),
        (
            {"target_modules": ["q_proj"]},
            r"has other adapters than .* says of this Llama: .* leave it out\) and 7 more",
        ),
    ],
)
def test_files_that_are_not_computed_here(tmp_path, changes, text):
    save_adapters(with_adapters(), tmp_path)
    change(tmp_path, changes)
    with pytest.raises(CheckpointError, match=text):
        load_adapters(model_of("llama"), tmp_path)


def test_adapters_of_another_model_are_refused_before_anything_changes(tmp_path):
    save_adapters(with_adapters(), tmp_path)
    other = model_of("qwen3")
    names = [p.name for p in other.get_parameters()]
    with pytest.raises(
        CheckpointError, match=r"has an adapter model.layers.0.self_attn.q_proj.lora_B.weight of shape \(16, 3\), and the "
    ):
        load_adapters(other, tmp_path)
    assert [p.name for p in other.get_parameters()] == names
    with pytest.raises(CheckpointError, match="has no adapters to write: give it some by"):
        save_adapters(other, tmp_path)
    text = (
        r"nowhere has no adapter_config.json, so it has no adapters: give the folder that bmtrain_ms.model_center.save_adapters, "
    )
    with pytest.raises(CheckpointError, match=text):
        load_adapters(other, tmp_path / "nowhere")


@pytest.mark.parametrize("changes", [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"of_tomorrow": None}])
def test_files_as_peft_writes_them(tmp_path, changes):
    model, ids = with_adapters(), Tensor(batches()["plain"]["ids"])
    save_adapters(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**OF_PEFT, **changes}))
    again = model_of("llama")
    load_adapters(again, tmp_path)
    assert np.array_equal(again(ids).asnumpy(), model(ids).asnumpy())


def test_layers_with_settings_of_their_own(tmp_path):
    model, ids = model_of("llama"), Tensor(batches()["plain"]["ids"])
    add_lora(model, "q_proj", rank=2, alpha=4)
    add_lora(model, "v_proj", rank=2, alpha=16)
    add_lora(model, "1.mlp.down_proj", rank=3, alpha=4)
    save_adapters(settled(model), tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (2, 4.0) and said["alpha_pattern"]["model.layers.1.self_attn.v_proj"] == 16.0
    assert said["rank_pattern"]["model.layers.1.mlp.down_proj"] == 3 and "model.layers.1.mlp.down_proj" in said["target_modules"]
    again = model_of("llama")
    load_adapters(again, tmp_path)
    assert np.array_equal(again(ids).asnumpy(), model(ids).asnumpy())


def test_tables_are_read_as_peft_reads_them(tmp_path):
    """The first entry that fits the end of a path counts, and may be a regular expression."""
    save_adapters(with_adapters(), tmp_path)
    change(tmp_path, {"alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 1, "self_attn.*": 9, "down_pro": 5}})
    model = model_of("llama")
    load_adapters(model, tmp_path)
    layers = list(model.model.layers)
    found = [getattr(layer.self_attn, name).alpha for layer in layers for name in ("q_proj", "v_proj")]
    assert found == [1.0, 9.0, 9.0, 9.0] and layers[0].mlp.down_proj.alpha == 6.0


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"rslora": True}])
def test_what_files_say_once_for_all_must_be_one(tmp_path, settings):
    model = model_of("llama")
    add_lora(model, "q_proj", rank=2)
    add_lora(model, "v_proj", rank=2, **settings)
    (name,) = settings
    with pytest.raises(CheckpointError, match=rf"have one {name} for all adapters, not .* of model.layers.0.self_attn.q_proj, "):
        save_adapters(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_adapters_are_loaded_into_a_plain_model(tmp_path):
    model = with_adapters()
    save_adapters(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"^model.layers.0.self_attn.q_proj has an adapter already: load adapters into a pl"):
        load_adapters(model, tmp_path)
    merge_lora(model)
    assert len(load_adapters(model, tmp_path)) == 6


@pytest.mark.parametrize("proven", [False, True])
def test_a_models_folder_is_not_written_with_adapters_in_it(tmp_path, proven):
    model = with_adapters()
    text = (
        r"was not written: model.layers.0.self_attn.q_proj has an adapter, which a model's files do not hold; call merge_lora first"
    )
    with pytest.raises(CheckpointError, match=text):
        model.save_pretrained(tmp_path / "model", proven=proven)
    assert not (tmp_path / "model").exists()
    merge_lora(model)
    model.save_pretrained(tmp_path / "model", proven=proven)
