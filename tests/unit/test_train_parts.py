"""The parts of a run, made as its settings say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms import lr_scheduler
from bmtrain_ms.model_center import parameter_count
from bmtrain_ms.train.parts import config_of, families, make_manager, make_model, model_problems, size_schemas
from bmtrain_ms_base.config import ConfigError, Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.usefixtures("single_world")

RECIPES = Path(__file__).resolve().parents[2] / "docs" / "recipes"
TINY = {"family": "llama", "vocab_size": 32, "dim_model": 8, "num_heads": 2, "dim_ff": 16, "num_layers": 1}


def settings(**sections: Any) -> Settings:
    return Settings.model_validate({"model": TINY, **sections})


def wrong(**model: Any) -> str:
    return "\n".join(model_problems(Settings.model_validate({"model": {**TINY, **model}})))


def test_sizes_are_checked_before_a_rank_is_started():
    assert wrong() == ""
    assert wrong(dim_modle=3) == "model.dim_modle: there is no such size of llama; did you mean dim_model?"
    assert wrong(family="lama") == "model.family: there is no lama; did you mean llama?"
    assert "dim_model=8 is not a multiple of num_heads=3" in wrong(num_heads=3)
    assert "model: num_layers" in wrong(num_layers="x")
    assert wrong(norm_eps=float("nan")) == "model: norm_eps must be a finite number, not nan"
    assert wrong(norm_eps=0) == "model: norm_eps must be above 0, not 0"
    assert wrong(rope_base=-1.0) == "model: rope_base must be above 0, not -1.0"
    assert wrong(init_std="wide") == "model: init_std must be a number, not 'wide'"


def test_what_the_layout_asks_of_the_model_is_checked_too():
    def found(layout: dict[str, Any], **model: Any) -> list[str]:
        return model_problems(Settings.model_validate({"model": {**TINY, **model}, "layout": layout}))

    assert found({"tp": 2}, num_heads=1) == ["layout.tp: 2 does not divide the 1 heads of the model"]
    assert found({"ep": 2}) == ["layout.ep: it is 2, and the model has no experts"]
    assert found({"ep": 3}, family="mixtral", num_heads_kv=1) == ["layout.ep: 3 does not divide the 8 experts of the model"]
    assert found({"pp": 2})[0].startswith("layout: 1 layers do not fill p * v = 2 * 1 = 2 stages")
    assert found({"pp": 2, "stages": [1, 1]}, num_layers=3)[0].startswith("layout: ")
    assert not found({"pp": 2, "tp": 2}, num_layers=2)


def test_families_are_named_as_people_do():
    assert {"llama", "qwen3_moe", "deepseek_v2", "grok1", "gpt2", "minicpm", "mixtral"} <= set(families())


def test_editors_know_the_sizes_of_each_family():
    found = size_schemas()
    assert found["dim_model"]["type"] == "integer"
    assert "grok1" in found["softcap"]["description"]
    assert "dtype" not in found


def test_a_vocabulary_is_the_tokenizers_in_whole_tables():
    sizes = {name: value for name, value in TINY.items() if name != "vocab_size"}
    assert config_of(Settings.model_validate({"model": sizes}), 300).vocab_size == 384
    assert config_of(settings(), 300).vocab_size == 32
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 32 is less than the tokenizer's 300"):
        make_model(settings(), 300)


def test_biases_and_norms_do_not_decay_and_inner_matrices_learn_slower():
    model = make_model(settings(), None)
    manager = make_manager(settings(optimizer={"lr": 0.5, "weight_decay": 0.25, "mup_width": 4.0}), model)
    groups = {
        p.name: (group["weight_decay"], group["lr"] if group["own_lr"] else 0.5)
        for group in manager.optimizers[0].param_groups
        for p in group["params"]
    }
    assert groups["model.norm.weight"] == (0.0, 0.5)
    assert groups["model.layers.0.input_layernorm.weight"] == (0.0, 0.5)
    assert groups["model.embed_tokens.weight"] == groups["lm_head.weight"] == (0.25, 0.5)
    assert {groups[f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.down_proj")} == {(0.25, 0.125)}
    assert len(groups) == len(model.trainable_params())


@pytest.mark.parametrize(
    ("told", "kind", "rates"),
    [
        ({"name": "constant"}, lr_scheduler.NoDecay, [1.0, 1.0]),
        ({"name": "linear", "min_lr": 0.5}, lr_scheduler.Linear, [0.75, 0.5]),
        ({"name": "cosine"}, lr_scheduler.Cosine, [0.5, 0.0]),
        ({"name": "wsd", "decay": 2}, lr_scheduler.WSD, [1.0, 0.0]),
        ({"name": "wsd", "decay": 10, "shape": "exponential"}, lr_scheduler.WSD, [2 * 0.5**0.5 - 1, 0.0]),
        ({"name": "exponential", "gamma": 0.5}, lr_scheduler.Exponential, [0.5**5, 0.5**10]),
        ({"name": "noam"}, lr_scheduler.Noam, [5**-0.5, 10**-0.5]),
    ],
)
def test_schedules(told, kind, rates):
    manager = make_manager(settings(optimizer={"lr": 1.0}, schedule=told, train={"steps": 10}), make_model(settings(), None))
    (made,) = manager.lr_schedulers
    assert type(made) is kind
    assert [made.get_lr_decay(n) for n in (5, 10)] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("grok1_40b/variant", 40_970_557_440),
        ("grok1_40b/run", 40_165_251_072),
        ("llama2_7b", 6_738_415_616),
        ("minicpm5_1b", 1_080_632_832),
        ("minicpm4_0.5b", 433_873_920),
        ("deepseek_v2_lite", 15_706_484_224),
        ("gpt2", 124_439_808),
    ],
)
def test_recipes_are_of_the_models_they_are_named_after(name, count):
    made = Settings.model_validate(tomllib.loads((RECIPES / f"{name}.toml").read_text()))
    assert model_problems(made) == []
    assert parameter_count(families()[str(made.model.family)], config_of(made, None)) == count
