"""The examples in docs/ run as their first lines say, on two ranks, and what is wrong is one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from bmtrain_ms.data import python_documentation, train_tokenizer
from tests.helpers.hub import hub

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
pytestmark = pytest.mark.ranks


def launched(folder: Path, example: str, *words: Any, ranks: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", str(ranks), str(EXAMPLES / example), *map(str, words)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment)


def losses(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(found) for found in re.findall(r"^step \d+ \|.*loss: ([\d.]+)", done.stdout, re.MULTILINE)]


def falls(found: list[float], steps: int) -> None:
    """By more than steps differ from each other."""
    assert len(found) == steps and all(np.isfinite(found))
    assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.3, found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(python_documentation()[:40]), encoding="utf-8")
    return path


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"small_llama.py", *TINY, "lora.py"}


@pytest.mark.parametrize("more", [[], ["--fp16"]], ids=["fp32", "fp16"])
def test_small_llama(tmp_path: Path, text: Path, more: list[str]):
    saved = tmp_path / "model.safetensors"
    done = launched(tmp_path, "small_llama.py", "--text", text, "--steps", 10, "--length", 32, "--save", saved, *more)
    falls(losses(done), 10)
    lines = done.stdout.splitlines()
    assert any(line.startswith("held-out loss: ") for line in lines) and any(line.startswith("The ") for line in lines)
    assert saved.stat().st_size > (4 if more else 8) * 10**6


def test_small_llama_of_a_text_on_a_hub(tmp_path: Path, text: Path):
    """TinyStories' files have a mark behind each story."""
    stories = "\n<|endoftext|>\n".join(f"Once there was {i}.\n{part}" for i, part in enumerate(text.read_text().split("\n\n")))
    with hub("roneneldan/TinyStories", {"valid.txt": stories.encode(), "README.md": b""}) as (address, asked):
        words = "--text", "hf:roneneldan/TinyStories:valid.txt", "--steps", 2, "--length", 16
        done = launched(tmp_path, "small_llama.py", *words, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hub"))
    assert len(losses(done)) == 2 and any("valid.txt" in path for path in asked)


TINY: dict[str, list[Any]] = {
    "gpt2.py": ["--layers", 2],
    "deepseek_v2.py": ["--layers", 2, "--experts", 4, "--ep", 2],
    "grok1.py": ["--tp", 2],
}


@pytest.mark.parametrize("example", TINY)
def test_models_learn(tmp_path: Path, text: Path, example: str):
    falls(losses(launched(tmp_path, example, "--text", text, "--steps", 12, "--length", 32, *TINY[example])), 12)


def test_grok_1_in_stages_is_that_of_tensor_parallel_ranks(tmp_path: Path, text: Path):
    words = "--text", text, "--steps", 2, "--length", 16
    tensors, stages = (losses(launched(tmp_path, "grok1.py", *words, *more)) for more in (["--tp", 2], ["--pp", 2]))
    assert tensors == pytest.approx(stages, abs=2e-3)


def hugging_face(folder: Path, text: Path) -> Path:
    """A folder with a tiny Qwen3 of random values, and its tokenizer."""
    folder.mkdir()
    tokenizer = train_tokenizer([text.read_text()], 512)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = {"model_type": "qwen3", **sizes, **heads, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    random, tensors = np.random.default_rng(0), {}

    def matrix(name: str, *shape: int) -> None:
        values = random.standard_normal(shape) * 0.2 if len(shape) > 1 else np.ones(shape)
        tensors[f"model.{name}.weight"] = values.astype(np.float32)

    matrix("embed_tokens", sizes["vocab_size"], 64)
    matrix("norm", 64)
    for i in range(2):
        for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            matrix(f"layers.{i}.self_attn.{name}", rows, 64)
        for name, shape in (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96))):
            matrix(f"layers.{i}.mlp.{name}", *shape)
        for name, size in (("self_attn.q_norm", 16), ("self_attn.k_norm", 16), ("input_layernorm", 64)):
            matrix(f"layers.{i}.{name}", size)
        matrix(f"layers.{i}.post_attention_layernorm", 64)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_lora(tmp_path: Path, text: Path):
    words = "--model", hugging_face(tmp_path / "qwen3", text), "--text", text, "--save", tmp_path / "adapters", "--length", 32
    done = launched(tmp_path, "lora.py", *words, "--layers", "_proj$", "--steps", 15, "--rate", 0.02)
    falls(losses(done), 15)
    assert done.stdout.startswith("14 layers have adapters, of ")
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = launched(tmp_path, "lora.py", *words, "--layers", "query", "--steps", 1)
    assert again.returncode == 2 and "lora.py: no Linear layer has 'query' in its path" in again.stderr


@pytest.mark.parametrize(
    "example, words, text_of_it",
    [
        ("small_llama.py", ["--text", "nowhere.txt"], r"small_llama.py: nowhere.txt does not exist"),
        ("gpt2.py", ["--batch", 3], r"gpt2.py: a global batch of 3 cannot be split evenly over 2 ranks"),
        ("deepseek_v2.py", ["--experts", 3, "--ep", 2], r"deepseek_v2.py: 3 experts cannot be divided over ep_size=2 ranks: use "),
        ("grok1.py", ["--tp", 3], r"grok1.py: world size 2 is not divisible by pp \* tp = 1 \* 3 = 3; start "),
        ("lora.py", ["--model", "nowhere", "--text", "nowhere.txt"], r"lora.py: .*nowhere.*"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, example: str, words: list[Any], text_of_it: str):
    done = launched(tmp_path, example, *words)
    assert done.returncode == 2 and not done.stdout
    lines = [line for line in done.stderr.splitlines() if not line.startswith("bmtrain-ms: rank ")]  # the launcher says who ended
    if example == "grok1.py":  # a layout that cannot be: the ranks have not met, and each of them says so
        assert len(lines) == 2
        lines = list(dict.fromkeys(lines))
    assert len(lines) == 1 and re.match(text_of_it, lines[0]), done.stderr
