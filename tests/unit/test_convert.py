"""`bmtrain-ms convert`: files with other names, types and sizes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import bmtrain_ms as bms
from bmtrain_ms.files.format import Reader
from bmtrain_ms.model_center import from_pretrained
from bmtrain_ms.model_center.converting import convert
from bmtrain_ms.model_center.pretrained.names import megatron
from bmtrain_ms_cli.main import main
from tests.helpers.pretrained import DATA, WRITTEN, bits, make, values_of


def run(*words: Any) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_there_and_back_is_the_same(tmp_path: Path, family: str, single_world: Any):
    folder = make(tmp_path / "hf", family)
    (folder / "tokenizer.json").write_text("{}")
    assert run("hf2ms", folder, tmp_path / "ms", "--max-shard-size", "1KB") == 0
    model = from_pretrained(folder)
    before = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    bms.init_parameters(model)
    bms.load(model, tmp_path / "ms")  # which wants our names
    np.testing.assert_equal({p.name: p.asnumpy() for p in model.get_parameters()}, before)
    assert run("ms2hf", tmp_path / "ms", tmp_path / "back") == 0
    assert bits(tmp_path / "back") == bits(folder)
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((folder / name).read_text())
    bms.save(model, tmp_path / "alone.safetensors")
    assert run("ms2hf", tmp_path / "alone.safetensors", tmp_path / "x", "--config", folder) == 0
    assert bits(tmp_path / "x") == bits(folder)


def test_other_types_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make(tmp_path / "hf", "llama")
    assert run("recast", folder, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "400") == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(path) for path in (tmp_path / "out").glob("*.safetensors")) and len(printed) > 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, (dtype, shape, data) in bits(tmp_path / "out").items():
        right = values_of("llama")[name]
        assert dtype == "BFloat16" and shape == right.shape
        upper = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(upper, right.reshape(-1), rtol=2**-8)
    assert run("recast", folder, tmp_path / "out") == 0  # over another model: one file
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_values_that_do_not_fit_into_a_type_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    """They became infinities; what is infinite already stays so."""
    folder = make(tmp_path / "hf", "llama")
    assert run("recast", folder, tmp_path / "given", "--dtype", kind) == 0
    file = tmp_path / "given" / "model.safetensors"
    with Reader(file) as reader:
        info = reader.tensors["lm_head.weight"]
    raw = bytearray(file.read_bytes())
    for value, code in ((np.inf, 0), (1e30, 2)):
        first = np.float32(value).tobytes()[0 if kind == "float32" else 2 :]
        raw[info.start : info.start + len(first)] = first
        file.write_bytes(raw)
        capsys.readouterr()
        assert run("recast", tmp_path / "given", tmp_path / f"out-{code}", "--dtype", "float16") == code
        told = capsys.readouterr().err
        assert ("lm_head.weight has values that float16 cannot hold, as" in told and told.count("\n") == 1) is bool(code)
    assert run("recast", tmp_path / "given", tmp_path / "wide", "--dtype", "float32") == 0


@pytest.mark.parametrize("action", ["hf2ms", "ms2hf", "recast"])
def test_what_is_read_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, monkeypatch: Any):
    """Whatever the folder is called: its values may be the only ones of their type."""
    folder = make(tmp_path / "hf", "llama")
    (tmp_path / "link").symlink_to(folder)
    before = bits(folder)
    monkeypatch.chdir(tmp_path)
    for given, out in (
        (folder, folder),
        (folder, f"{folder}/"),
        (folder, "hf/../hf"),
        ("link", folder),
        (folder, "link"),
        (folder / "model.safetensors", folder),
    ):
        assert run(action, given, out, "--dtype", "float16") == 2
        told = capsys.readouterr()
        assert f"is the folder that {given} is read from, and what is written would replace the model in it" in told.err
        assert told.err.count("\n") == 1 and not told.out
    assert bits(folder) == before and sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    if action == "ms2hf":
        shutil.copytree(folder, tmp_path / "own")
        assert run(action, tmp_path / "own", folder, "--config", "link") == 2
        assert "is the folder that link is read from" in capsys.readouterr().err


def of_earlier_port(family: str) -> dict[str, np.ndarray]:
    """As the converters of bmtrain_mindspore name them."""
    inner = {"gate_proj": "w_in.w0", "up_proj": "w_in.w1", "down_proj": "w_out"}
    found = {}
    for name, x in values_of(family).items():
        if family == "llama":
            for now, before in (
                ("model.embed_tokens", "input_embedding"),
                ("model.norm", "encoder.output_layer_norm"),
                ("lm_head", "output_projection"),
                ("model.layers", "encoder.layers"),
                (".input_layernorm", ".self_att.layernorm"),
                (".post_attention_layernorm", ".ffn.layernorm"),
                *((f"self_attn.{k}_proj", f"self_att.attention.project_{k}") for k in "qkv"),
                ("self_attn.o_proj", "self_att.attention.attention_out"),
                *((f"mlp.{now}", f"ffn.ffn.{before}") for now, before in inner.items()),
            ):
                name = name.replace(now, before)
        else:
            for now, before in (
                ("model.embed_tokens", "input_embedding"),
                ("model.norm", "output_norm"),
                ("model.layers", "layers"),
                *inner.items(),
            ):
                name = name.replace(now, before)
        found[name] = x
    return found


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_files_of_the_earlier_port(tmp_path: Path, family: str):
    folder = make(tmp_path / "hf", family)
    (tmp_path / "old").mkdir()
    safetensors.numpy.save_file(of_earlier_port(family), tmp_path / "old" / "mindspore_model.safetensors")
    (tmp_path / "old" / "config.json").write_text('{"num_layers": 2}')  # its own, which says too little
    assert run("ms2hf", tmp_path / "old", tmp_path / "new", "--names", "bmtrain_mindspore", "--config", folder) == 0
    assert bits(tmp_path / "new") == bits(folder)


def of_megatron(family: str, fused_norms: bool, grouped: bool) -> dict[str, np.ndarray]:
    """As Megatron's core has them; the embedding has a row too many."""
    given, config = values_of(family), WRITTEN[family]["config"]
    groups, head = config["num_key_value_heads"], config.get("head_dim") or 2
    found = {"decoder.final_layernorm.weight": given.pop("model.norm.weight")}
    for name, theirs in (("model.embed_tokens", "embedding.word_embeddings"), ("lm_head", "output_layer")):
        if f"{name}.weight" in given:
            x = given.pop(f"{name}.weight")
            found[f"{theirs}.weight"] = np.concatenate([x, np.full((1, x.shape[1]), 99, np.float32)])
    for i in range(2):
        here, there = f"model.layers.{i}.", f"decoder.layers.{i}."
        own = {name[len(here) :]: x for name, x in given.items() if name.startswith(here)}
        attention, mlp = there + "self_attention.", there + "mlp."
        dense = "mlp.up_proj.weight" in own
        found[attention + "linear_qkv.layer_norm_weight" if fused_norms else there + "input_layernorm.weight"] = own[
            "input_layernorm.weight"
        ]
        found[mlp + "linear_fc1.layer_norm_weight" if dense else there + "pre_mlp_layernorm.weight"] = own[
            "post_attention_layernorm.weight"
        ]
        for part in ("weight", "bias"):
            if f"self_attn.q_proj.{part}" in own:
                rows = [
                    own[f"self_attn.{k}_proj.{part}"].reshape(groups, -1, head, *own[f"self_attn.{k}_proj.{part}"].shape[1:])
                    for k in "qkv"
                ]
                fused = np.concatenate(rows, 1)
                found[attention + f"linear_qkv.{part}"] = fused.reshape(-1, *fused.shape[3:])
        found[attention + "linear_proj.weight"] = own["self_attn.o_proj.weight"]
        for k in "qk":
            if f"self_attn.{k}_norm.weight" in own:
                found[attention + f"{k}_layernorm.weight"] = own[f"self_attn.{k}_norm.weight"]
        if dense:
            found[mlp + "linear_fc1.weight"] = np.concatenate([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]])
            found[mlp + "linear_fc2.weight"] = own["mlp.down_proj.weight"]
            continue
        gate = "mlp.gate.weight" if "mlp.gate.weight" in own else "block_sparse_moe.gate.weight"
        found[mlp + "router.weight"] = own[gate]
        for e in range(4):
            one, fc = gate.replace("gate.weight", f"experts.{e}."), f"experts.linear_fc{{}}.weight{e}"
            fc = fc if grouped else f"experts.local_experts.{e}.linear_fc{{}}.weight"
            names = ("gate_proj", "up_proj", "down_proj") if one.startswith("mlp") else ("w1", "w3", "w2")
            first, second, last = (own[f"{one}{name}.weight"] for name in names)
            found[mlp + fc.format(1)], found[mlp + fc.format(2)] = np.concatenate([first, second]), last
    return found


@pytest.mark.parametrize(
    ("family", "fused_norms", "grouped"),
    [("llama", True, True), ("qwen2", True, True), ("qwen3_moe", False, True), ("mixtral", True, False)],
)
def test_names_of_megatron(tmp_path: Path, family: str, fused_norms: bool, grouped: bool):
    folder = make(tmp_path / "hf", family)
    file = tmp_path / "megatron.safetensors"
    safetensors.numpy.save_file(of_megatron(family, fused_norms, grouped), file)
    assert run("ms2hf", file, tmp_path / "new", "--names", "megatron", "--config", folder) == 0
    assert bits(tmp_path / "new") == bits(folder)


def test_names_of_latent_attention_in_megatron():
    config = type("Config", (), {"kv_rank": 6})
    names = megatron("deepseek_v2", config, 11)
    expected = {
        "self_attn.q_proj": ["linear_q_proj.weight"],
        "self_attn.q_a_proj": ["linear_q_down_proj.weight"],
        "self_attn.q_a_layernorm": ["linear_q_up_proj.layer_norm_weight", "q_layernorm.weight"],
        "self_attn.q_b_proj": ["linear_q_up_proj.weight"],
        "self_attn.kv_a_proj_with_mqa": ["linear_kv_down_proj.weight"],
        "self_attn.kv_a_layernorm": ["linear_kv_up_proj.layer_norm_weight", "kv_layernorm.weight"],
        "self_attn.kv_b_proj": ["linear_kv_up_proj.weight"],
        "self_attn.o_proj": ["linear_proj.weight"],
    }
    for ours, theirs in expected.items():
        ways = names(f"model.layers.1.{ours}.weight", (4,))
        assert [way[0].name for way in ways] == [f"decoder.layers.1.self_attention.{name}" for name in theirs]
    (way,) = names("model.layers.1.mlp.shared_experts.up_proj.weight", (4, 8))
    assert way[0].name == "decoder.layers.1.mlp.shared_experts.linear_fc1.weight" and way[0].theirs[0] == slice(4, 8)


def test_pickles_become_safetensors(tmp_path: Path):
    (tmp_path / "hf").mkdir()
    shutil.copy(DATA / "llama.bin", tmp_path / "hf" / "pytorch_model.bin")
    config = {**WRITTEN["llama"]["config"], "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    config.update(tie_word_embeddings=True, dtype="bfloat16", num_key_value_heads=2)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert run("recast", tmp_path / "hf", tmp_path / "out") == 2
    assert run("recast", tmp_path / "hf", tmp_path / "out", "--pickles") == 0
    assert len(bits(tmp_path / "out")) == 11


def test_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def says(text: str, *words: Any) -> None:
        assert run(*words) == 2
        assert text in capsys.readouterr().err

    folder = make(tmp_path / "hf", "gpt2")
    says("Megatron's names of gpt2 are not known here", "ms2hf", folder, tmp_path / "out", "--names", "megatron")
    folder = make(tmp_path / "qwen", "qwen2")
    words = ("ms2hf", folder / "model.safetensors", tmp_path / "out", "--names", "bmtrain_mindspore")
    says("bmtrain_mindspore has no qwen2: it has llama and deepseek_v2", *words)
    says("max_shard_size must be", "recast", folder, tmp_path / "out", "--max-shard-size", "big")
    says("does not fit the model: 26 differences", "recast", make(tmp_path / "x", "qwen2", {}), tmp_path / "out")
    says("config.json does not exist", "ms2hf", tmp_path / "x" / "model.safetensors", tmp_path / "out", "--config", tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    says("file is not a folder: give one to write to", "recast", folder, tmp_path / "file")
    with pytest.raises(ValueError, match="read one of hf, ms, bmtrain_mindspore, megatron, and write hf or ms, not 'hf' and 'x'"):
        convert(folder, tmp_path / "out", "hf", "x")
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, not 'int8'"):
        convert(folder, tmp_path / "out", "hf", "hf", dtype="int8")
