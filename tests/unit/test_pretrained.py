"""Folders of Hugging Face's, in and out, on one rank; names and shapes are those that transformers 5.24 writes."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.files.consolidated import ConsolidatedReader
from bmtrain_ms.files.entries import Entry
from bmtrain_ms.model_center import PretrainedError, Spread, from_pretrained, spread
from bmtrain_ms.model_center.model import FAMILIES, Grok1, Grok1Config, Llama, LlamaConfig, MiniCPM, MiniCPMConfig, Mixtral, Qwen2
from bmtrain_ms.model_center.pretrained import load_pretrained
from bmtrain_ms.model_center.pretrained.family import IGNORED
from bmtrain_ms.model_center.pretrained.reading import Files, Source, blocks, choose, runs
from bmtrain_ms.model_center.pretrained.writing import Target
from bmtrain_ms_base.layout import Layout, Split
from tests.helpers.checkpoints import counted_bytes
from tests.helpers.pretrained import WRITTEN, bits, make, values_of

pytestmark = pytest.mark.usefixtures("single_world")
IDS = Tensor(np.arange(1, 8, dtype=np.int32)[None])
SIZES = {"vocab_size": 11, "dim_model": 8, "num_heads": 2, "dim_ff": 6, "num_layers": 1}


def values(model: Any) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in model.get_parameters()}


# In and out #


@pytest.mark.parametrize("family", WRITTEN)
def test_what_is_read_is_written_to_the_byte(tmp_path: Path, family: str):
    folder = make(tmp_path / "theirs", family)
    model = from_pretrained(folder)
    assert WRITTEN[family]["config"]["model_type"] in model.FAMILY.model_types
    assert model(IDS).shape == (1, 7, 11)
    model.save_pretrained(tmp_path / "ours")
    assert bits(tmp_path / "ours") == bits(folder)
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == WRITTEN[family]["config"]


@pytest.mark.parametrize("family", WRITTEN)
def test_a_model_of_ours_has_their_names_and_shapes(tmp_path: Path, family: str):
    config = from_pretrained(make(tmp_path / "theirs", family)).config
    kind = next(model for model in FAMILIES if model.CONFIG is type(config))
    model: Any = kind(config)  # type: ignore[call-arg, arg-type]
    bms.init_parameters(model)
    model.save_pretrained(tmp_path / "ours")
    with ConsolidatedReader(tmp_path / "ours") as reader:
        assert {name: list(info.shape) for name, info in reader.tensors.items()} == WRITTEN[family]["tensors"]
    again = from_pretrained(tmp_path / "ours")
    assert again.config == config and type(again) is kind
    np.testing.assert_equal(values(again), values(model))


def test_families_that_transformers_does_not_have(tmp_path: Path):
    grok = Grok1(Grok1Config(**SIZES, num_heads_kv=1, dim_head=4, num_experts=2, top_k=1))
    minicpm = MiniCPM(MiniCPMConfig(**SIZES, dtype="float16"))
    for model in (grok, minicpm):
        bms.init_parameters(model)
        model.save_pretrained(tmp_path / "x")
        again = from_pretrained(tmp_path / "x")
        assert again.config == model.config
        np.testing.assert_equal(values(again), values(model))
        if model is grok:
            assert sorted(bits(tmp_path / "x")) == sorted(
                [
                    "model.embed_tokens.weight",
                    *(f"model.layers.0.attn.{x}_proj.weight" for x in "kovq"),
                    *(
                        f"model.layers.0.moe_block.experts.{e}.{x}.weight"
                        for e in (0, 1)
                        for x in ("linear", "linear_1", "linear_v")
                    ),
                    "model.layers.0.moe_block.gate.weight",
                    *(f"model.layers.0.{x}.scale" for x in ("post_attn_norm", "post_moe_norm", "pre_attn_norm", "pre_moe_norm")),
                    "model.norm.scale",
                ]
            )


def test_the_earlier_spelling_of_the_config(tmp_path: Path):
    """As transformers 4 writes it, with a scaled rope, half and tied."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8, "longest": 64}
    model = Llama(LlamaConfig(**SIZES, dtype="float16", tied=True, rope_base=5e5, rope_scaling=scaling))
    bms.init_parameters(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "float16" and config["rope_theta"] == 5e5 and config["max_position_embeddings"] == 64
    assert config["rope_scaling"]["original_max_position_embeddings"] == 8
    assert "lm_head.weight" not in bits(tmp_path)  # once
    assert from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2"])
def test_fused_experts(tmp_path: Path, family: str):
    """As transformers 5 has them in memory."""
    right = from_pretrained(make(tmp_path / "each", family))
    fused = {name: x for name, x in values_of(family).items() if ".experts." not in name}
    for number in range(2):
        prefix = f"model.layers.{number}.mlp.experts."
        stacked = {p.name: p.asnumpy().reshape(p.full_shape) for p in right.get_parameters() if p.name.startswith(prefix)}
        if stacked:
            gate, up, down = (stacked[f"{prefix}{x}_proj.weight"] for x in ("gate", "up", "down"))
            fused[prefix + "gate_up_proj"], fused[prefix + "down_proj"] = np.concatenate([gate, up], 1), down
    np.testing.assert_equal(values(from_pretrained(make(tmp_path / "fused", family, fused))), values(right))


def test_gpt2_as_its_base_alone_is_published(tmp_path: Path):
    base = {name.removeprefix("transformer."): x for name, x in values_of("gpt2").items()}
    base["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)  # a mask, which is computed
    right = from_pretrained(make(tmp_path / "whole", "gpt2"))
    np.testing.assert_equal(values(from_pretrained(make(tmp_path / "base", "gpt2", base))), values(right))


def test_several_files_types_and_changes(tmp_path: Path):
    folder = make(tmp_path / "theirs", "llama")
    model = Llama.from_pretrained(folder, Spread(), dtype="bfloat16", norm_eps=0.5)
    assert model.config.norm_eps == 0.5 and model.config.dtype == "bfloat16"
    with pytest.raises(ValueError, match="has been spread already"):
        spread(model)
    model.save_pretrained(tmp_path / "ours", max_shard_size=600)
    names = [name for name in os.listdir(tmp_path / "ours") if name.endswith(".safetensors")]
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(names) and len(names) > 2
    assert index["metadata"] == {"total_size": sum(len(data) for _, _, data in bits(tmp_path / "ours").values())}
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["rms_norm_eps"] == 0.5 and config["torch_dtype"] == "bfloat16" and config["eos_token_id"] == 2
    assert "dtype" not in config and "rope_parameters" not in config  # said once
    again = from_pretrained(tmp_path / "ours", dtype="float32")
    assert again.config.rope_base == 1e4
    for name, x in values(model).items():
        np.testing.assert_array_equal(values(again)[name], x.astype(np.float32))


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path):
    folder = make(tmp_path / "theirs", "llama")
    beside = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_x.py"]
    for name in [*beside, "README.md"]:
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    model = from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(
        [*beside, "additional_chat_templates", "config.json", "model.safetensors"]
    )
    assert (tmp_path / "ours" / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    model.save_pretrained(folder)  # into itself
    assert bits(folder) == bits(tmp_path / "ours") and (folder / "tokenizer.json").read_text() == "tokenizer.json"
    fresh = Llama(model.config)
    bms.init_parameters(fresh)
    fresh.save_pretrained(tmp_path / "other", source=folder)
    assert (tmp_path / "other" / "tokenizer.json").exists()
    with pytest.raises(PretrainedError, match=r"model_type is 'llama', not 'qwen2'"):
        Qwen2.from_pretrained(make(tmp_path / "q", "qwen2")).save_pretrained(tmp_path / "q2", source=folder)
    assert not (tmp_path / "q2").exists()


# What is said of ties #


def test_ties(tmp_path: Path):
    tied = values_of("qwen2")
    both = {**tied, "lm_head.weight": tied["model.embed_tokens.weight"]}
    model = from_pretrained(make(tmp_path / "both", "qwen2", both))
    np.testing.assert_equal(values(model), values(from_pretrained(make(tmp_path / "one", "qwen2"))))
    wrong = {**tied, "lm_head.weight": tied["model.embed_tokens.weight"] + 1}
    text = r"has an lm_head.weight that is not the embedding's table, .* pass tied=False to use it, or remove it$"
    with pytest.raises(PretrainedError, match=text):
        from_pretrained(make(tmp_path / "wrong", "qwen2", wrong))
    assert from_pretrained(tmp_path / "wrong", tied=False).lm_head is not None
    folder = make(tmp_path / "llama", "llama", {n: x for n, x in values_of("llama").items() if n != "lm_head.weight"})
    with pytest.raises(
        PretrainedError, match=r"(?s)missing  lm_head.weight  needed: \(11, 8\)\nThere is no lm_head.*pass tied=True"
    ):
        from_pretrained(folder)
    assert from_pretrained(folder, tied=True).lm_head is None


# What does not fit #


def test_differences_are_a_table_and_nothing_is_changed(tmp_path: Path):
    model = from_pretrained(make(tmp_path / "right", "llama"))
    before = values(model)
    tensors = {name: x + 1 for name, x in values_of("llama").items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(9, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((6, 8), np.int64)
    tensors["odd\x1bname"] = np.ones(3, np.float32)
    folder = make(tmp_path / "wrong", "llama", tensors)
    with pytest.raises(PretrainedError) as info:
        load_pretrained(model, folder)
    assert str(info.value).split("\n") == [
        f"{folder} does not fit the model: 4 differences",
        "  shape       model.norm.weight                  (9,) in the files, (8,) here",
        "  type        model.layers.0.mlp.up_proj.weight  I64 in the files, F32 here",
        "  missing     model.layers.1.mlp.up_proj.weight  needed: (6, 8)",
        "  unexpected  odd\\x1bname                        in model.safetensors",
    ]
    np.testing.assert_equal(values(model), before)
    assert isinstance(info.value, CheckpointError)


def test_another_family_and_many_differences(tmp_path: Path):
    folder = make(tmp_path / "x", "mixtral", values_of("llama"))
    with pytest.raises(PretrainedError, match=r"(?s)and \d+ more\nAre these files of a MixtralForCausalLM\?$") as info:
        Mixtral.from_pretrained(folder)
    assert len(str(info.value).split("\n")) == 33
    with pytest.raises(PretrainedError, match=r"config\.json: model_type is 'mixtral', not 'llama'"):
        Llama.from_pretrained(folder)
    with pytest.raises(
        PretrainedError, match=r"says model_type 'bert', which is not among the families here: llama, mistral, minicpm, "
    ):
        from_pretrained(make(tmp_path / "y", "llama", model_type="bert"))
    with pytest.raises(PretrainedError, match=r"is of LlamaForSequenceClassification, which predicts no next token"):
        from_pretrained(make(tmp_path / "y", "llama", architectures=["LlamaForSequenceClassification"]))
    with pytest.raises(
        PretrainedError, match=r"cannot be computed as its config says: hidden_act='relu' \(computed here: 'silu'\)"
    ):
        from_pretrained(make(tmp_path / "y", "llama", hidden_act="relu"))
    with pytest.raises(CheckpointError, match=r"config.json cannot be used: .*unexpected keyword argument 'depth'"):
        from_pretrained(make(tmp_path / "y", "llama"), depth=3)


@pytest.mark.parametrize(
    "family, changes, text",
    [
        ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps must be a number, not 'x'"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps must be a number, not nan"),
        ("llama", {"hidden_size": 8.5}, "hidden_size must be a whole number of at least 0, not 8.5"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be a whole number of at least 0, not True"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ("llama", {"rope_parameters": "x"}, "rope_parameters must be an object, not 'x'"),
        (
            "llama",
            {"rope_theta": "x", "vocab_size": []},
            "vocab_size must be a whole number of at least 0, not []; rope_theta must be a number,",
        ),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta must be a number, not 'x'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": [2]}}, "rope_scaling.factor must be a number, not [2]"),
        ("llama", {"architectures": 5}, "architectures must be a list of texts, not 5"),
        ("llama", {"model_type": "llama", "dtype": 5}, "dtype must be a text, not 5"),
        ("llama", {"hidden_size": 0}, "dim_model must be at least 1, not 0 (dim_model is hidden_size there)"),
        ("qwen3_moe", {"mlp_only_layers": ["a"]}, "mlp_only_layers must be a list of whole numbers, not ['a']"),
        ("qwen2", {"layer_types": 5}, "layer_types must be a list of texts, not 5"),
        ("qwen2", {"sliding_window": "7"}, "sliding_window must be a whole number of at least 0, not '7'"),
        ("gpt2", {"n_embd": "x"}, "n_embd must be a whole number of at least 0, not 'x'"),
    ],
)
def test_values_of_another_type_are_told_with_file_and_field(tmp_path: Path, family: str, changes: dict[str, Any], text: str):
    folder = make(tmp_path / "x", family, **changes)
    with pytest.raises(PretrainedError) as info:
        from_pretrained(folder, dtype="float32")
    assert str(info.value).startswith(f"{folder / 'config.json'}: {text}") and "\n" not in str(info.value)


@pytest.mark.parametrize("family", WRITTEN)
def test_no_value_of_a_config_is_a_riddle(tmp_path: Path, family: str):
    """Whatever stands where something else should: it changes nothing, or the error has the file and the field."""
    for name in WRITTEN[family]["config"].keys() - IGNORED:
        for value in ("x", 0, -1, [[]]):
            folder = make(tmp_path / "x", family, **{name: value})
            try:
                from_pretrained(folder, dtype="float32")
            except CheckpointError as error:
                told = str(error)
                there = "config.json" in told and (name in told or value in (0, -1))  # of the right type: the file at least
                assert there or "does not fit the model" in told, (name, value, told)


def test_files_that_are_damaged(tmp_path: Path):
    model = from_pretrained(make(tmp_path / "x", "llama"))
    model.save_pretrained(tmp_path / "several", max_shard_size=600)
    before, file = values(model), sorted((tmp_path / "several").glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged: the file has \d+ bytes, its tensors end at"):
        load_pretrained(model, tmp_path / "several")
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} does not exist"):
        load_pretrained(model, tmp_path / "several")
    header = (tmp_path / "x" / "model.safetensors").read_bytes()
    file.write_bytes(header)
    safetensors.numpy.save_file({"other": np.ones(1, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"has no tensor .*, which its index says it has"):
        load_pretrained(model, tmp_path / "several")
    np.testing.assert_equal(values(model), before)
    (tmp_path / "x" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is damaged: "):
        from_pretrained(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json is damaged: it is not an object"):
        from_pretrained(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder: give the one that config.json and the weights are in"):
        from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        from_pretrained(tmp_path / "empty")


def test_types_that_are_not_here(tmp_path: Path):
    folder = make(tmp_path / "x", "llama")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["model.norm.weight"]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(PretrainedError, match=r"type  model.norm.weight  F8_E4M3 in the files, F32 here"):
        from_pretrained(folder)


# Writing #


def test_a_model_that_was_written_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = from_pretrained(make(tmp_path / "x", "llama"))
    write = Target.write
    monkeypatch.setattr(Target, "write", lambda self, name, start, x: write(self, name, start, x * 3))
    with pytest.raises(PretrainedError, match=r"was written, but what it holds is another model: logits of a prompt differ by"):
        model.save_pretrained(tmp_path / "y")
    model.save_pretrained(tmp_path / "y", proven=False)


def test_a_model_that_cannot_be_computed_is_written_and_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = from_pretrained(make(tmp_path / "x", "llama"))

    def refuse(*_: Any) -> None:
        raise TypeError("Unsupported data type!\nThe supported data types are ...")

    monkeypatch.setattr(Llama, "construct", refuse)
    text = r"y was written, and not proven: the model cannot be computed here \(Unsupported data type!\); proven=False leaves that"
    with pytest.raises(PretrainedError, match=text):
        model.save_pretrained(tmp_path / "y")
    assert bits(tmp_path / "y") == bits(tmp_path / "x")


def test_a_disk_that_is_full_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make(tmp_path / "x", "llama")
    model, before = from_pretrained(folder), bits(folder)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Target, "write", full)
    with pytest.raises(CheckpointError, match=r"x cannot be written: .*No space left"):
        model.save_pretrained(folder)
    assert bits(folder) == before and sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match=r"max_shard_size must be a number of bytes, or like 5GB"):
        model.save_pretrained(folder, max_shard_size="much")


# Reading #


def test_only_what_is_needed_is_read(tmp_path: Path):
    model = from_pretrained(make(tmp_path / "x", "llama"))
    with counted_bytes() as counts:
        load_pretrained(model, tmp_path / "x")
    size = (tmp_path / "x" / "model.safetensors").stat().st_size
    assert counts == {"model.safetensors": size}  # header and each tensor once


def test_links_as_in_the_cache_of_hugging_face(tmp_path: Path):
    right = from_pretrained(make(tmp_path / "blobs", "llama"))
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    model = from_pretrained(tmp_path / "snapshot")
    np.testing.assert_equal(values(model), values(right))
    model.save_pretrained(tmp_path / "new")
    assert not any(path.is_symlink() for path in (tmp_path / "new").iterdir())


@pytest.mark.parametrize("family", WRITTEN)
def test_any_layout_has_its_elements(tmp_path: Path, family: str):
    """Of every parameter, cut along every dim and in shards: without the ranks."""
    folder = make(tmp_path, family)
    model = from_pretrained(folder)
    shapes = {p.name: tuple(p.layout.whole) for p in model.get_parameters()}
    with Files(folder) as files:
        chosen, differences = choose(files, model.FAMILY.pieces, shapes)
        source = Source(files, chosen, shapes)
        assert not differences
        for p in model.get_parameters():
            whole = p.asnumpy().reshape(shapes[p.name])
            for dim, parts, ranks in itertools.product(range(whole.ndim), (1, 2, 3), (1, 2, 5)):
                if parts > whole.shape[dim]:
                    continue
                for part, rank in itertools.product(range(parts), range(ranks)):
                    splits = (Split(dim, part, parts),) if parts > 1 else ()
                    layout = Layout(shapes[p.name], splits, rank, ranks)
                    found = Entry(p.dtype, lambda: p, lambda _: None, layout).read_from(source, p.name)  # noqa: B023
                    np.testing.assert_array_equal(found, layout.cut(whole), err_msg=f"{p.name} {layout}")


@pytest.mark.parametrize(
    ("shape", "box", "count"),
    [
        ((4, 6), [(0, 4), (0, 6)], 1),
        ((4, 6), [(1, 3), (0, 6)], 1),
        ((4, 6), [(1, 3), (2, 4)], 2),
        ((2, 3, 4), [(0, 2), (1, 3), (0, 4)], 2),
    ],
)
def test_runs_are_contiguous_and_all_of_the_box(shape: tuple[int, ...], box: list[tuple[int, int]], count: int):
    whole = np.arange(1, np.prod(shape) + 1).reshape(shape)
    there = tuple(slice(*part) for part in box)
    out = np.zeros_like(whole[there])
    parts = list(runs(shape, there))
    for inside, run in parts:
        flat = whole[run].reshape(-1)
        assert (np.diff(flat) == 1).all()
        out[inside] = whole[run]
    assert len(parts) == count and np.array_equal(out, whole[there])
    for most in (1, 2, 5, 100):
        again = np.zeros_like(out)
        for inside, block in blocks(there, most):
            assert 0 < whole[block].size <= most and not again[inside].any()
            again[inside] = whole[block]
        assert np.array_equal(again, out)
