"""`bmtrain-ms generate`: texts and conversations of a model in a folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import bmtrain_ms as bms
from bmtrain_ms.model_center import save_adapters
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn import add_lora
from bmtrain_ms_base.data.text import train_tokenizer
from bmtrain_ms_cli.main import main

TEXT = "the cat sat on the mat, and the dog sat on the log. " * 20
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], 300)
    bms.init_distributed(seed=3)
    model = Llama(
        LlamaConfig(vocab_size=tokenizer.get_vocab_size(), dim_model=16, num_heads=2, dim_ff=24, num_layers=1, init_std=0.5)
    )
    bms.init_parameters(model)
    model.save_pretrained(path)
    add_lora(model, "q_proj", rank=2)
    bms.init_parameters(model)
    save_adapters(model, path / "adapters")
    bms.shutdown()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}))
    return path


def said(capsys: pytest.CaptureFixture, folder: Path, *options: str) -> str:
    assert main(["generate", "--model", str(folder), "--max-new-tokens", "6", *options]) == 0
    return capsys.readouterr().out


def test_texts_are_continued(folder, capsys):
    first = said(capsys, folder, "--prompt", "the cat")
    assert first.startswith("the cat") and first.endswith("\n") and len(first) > len("the cat\n")
    both = said(capsys, folder, "--prompt", "the cat", "--prompt", "a dog")
    assert both.startswith(f"{first}\na dog")
    assert said(capsys, folder, "--prompt", "the cat", "--beams", "2").startswith("the cat")
    sampled = [said(capsys, folder, "--prompt", "the", "--temperature", "1", "--seed", s) for s in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    assert said(capsys, folder, "--prompt", "the cat", "--adapters", str(folder / "adapters")) == first  # B is zero


def test_a_conversation_goes_on_until_an_empty_line(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand you\n\nnot read\n"))
    assert said(capsys, folder, "--chat", "--system", "be short").count("\n") >= 2


@pytest.mark.parametrize(
    "options, text",
    [
        (["--prompt", "a", "--chat"], "give either --prompt TEXT, or --chat"),
        ([], "give either --prompt TEXT, or --chat"),
        (["--prompt", "a", "--system", "b"], "--system is for --chat"),
        (["--prompt", "a", "--top-p", "0"], "0 < top_p <= 1"),
        (["--prompt", "", "--temperature", "1"], "an empty prompt has no tokens to continue"),
        (["--prompt", "a", "--beams", "2", "--temperature", "1"], "leave the temperature at 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, options, text):
    assert main(["generate", "--model", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and error.startswith("bmtrain-ms: ")


def test_a_folder_without_a_model(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path / "x"), "--prompt", "a"]) == 2
    assert "there is no tokenizer" in capsys.readouterr().err
