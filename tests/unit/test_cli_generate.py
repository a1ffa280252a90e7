"""`bmtrain-ms generate`: texts and conversations of a model in a folder."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import safetensors.numpy

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


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_ends_a_conversation_in_one_line(folder, capsys, monkeypatch, errors):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"h\xff\n"), encoding="utf-8", errors=errors))
    assert refused(capsys, folder, "--chat") == "bmtrain-ms: a line of the conversation must be UTF-8\n"


def refused(capsys: pytest.CaptureFixture, folder: Path, *options: str) -> str:
    """What is said of it: one line, of a command that writes nothing else and ends with 2."""
    try:
        code = main(["generate", "--model", str(folder), *options])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    assert code == 2 and told.err.count("\n") == 1 and told.err.startswith("bmtrain-ms") and not told.out
    return told.err


@pytest.mark.parametrize(
    "options, text",
    [
        (["--prompt", "a", "--chat"], "give either --prompt TEXT, or --chat"),
        ([], "give either --prompt TEXT, or --chat"),
        (["--prompt", "a", "--system", "b"], "--system is for --chat"),
        (["--prompt", "a", "--top-p", "0"], "--top-p: must be above 0 and at most 1, not 0 "),
        (["--prompt", "a", "--top-p", "2"], "--top-p: must be above 0 and at most 1, not 2 "),
        (["--prompt", "a", "--top-k", "-1"], "--top-k: must be at least 0, not -1 "),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: must be at least 0, not -1 "),
        (["--prompt", "a", "--temperature", "inf"], "--temperature: must be finite, not inf "),
        (["--prompt", "a", "--min-p", "2"], "--min-p: must be at least 0 and at most 1, not 2 "),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty: must be above 0, not 0 "),
        (["--prompt", "a", "--stop", ""], "--stop: must be a text that is not empty"),
        (["--prompt", "a\udcff"], "--prompt: must be UTF-8, not 'a\\udcff'"),
        (["--prompt", "", "--temperature", "1"], "an empty prompt has no tokens to continue"),
        (
            ["--prompt", "a", "--beams", "2", "--temperature", "1"],
            "--beams 2 takes the most likely text: leave the temperature at 0",
        ),
        (
            ["--prompt", "a", "--adapters", "nowhere"],
            "--adapters nowhere: there is no such folder; give one that bmtrain-ms finetune",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, monkeypatch, options, text):
    monkeypatch.setattr(bms, "init_distributed", None)  # all of it is seen before
    assert text in refused(capsys, folder, *options)


def copied(folder: Path, to: Path, file: str, **changes: object) -> Path:
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
    return to


def test_an_error_comes_before_the_prompt_is_shown(folder, tmp_path, capsys):
    """And has the file, the field and the value."""
    wrong = copied(folder, tmp_path / "x", "config.json", rms_norm_eps="x")
    assert f"{wrong / 'config.json'}: rms_norm_eps must be a number, not 'x'" in refused(capsys, wrong, "--prompt", "abc")
    small = copied(folder, tmp_path / "y", "generation_config.json", eos_token_id="x")
    text = f"{small / 'generation_config.json'}: eos_token_id must be a token's number, or a list of some, not 'x'"
    assert text in refused(capsys, small, "--prompt", "abc")
    (small / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read: " in refused(capsys, small, "--prompt", "abc")
    (small / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json is damaged: it is not an object" in refused(capsys, small, "--prompt", "abc")


def test_logits_that_are_not_finite_are_told_in_one_line(folder, tmp_path, capsys):
    path = shutil.copytree(folder, tmp_path / "x") / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * np.nan}, path)
    assert "the logits for new token 0 are not finite" in refused(capsys, path.parent, "--prompt", "abc")


def test_a_tokenizer_without_a_template(folder, tmp_path, capsys):
    bare = copied(folder, tmp_path / "x", "tokenizer_config.json", chat_template=None)
    assert "has no chat template: --chat needs one, as tokenizer_config.json's chat_template" in refused(capsys, bare, "--chat")


def test_an_error_after_some_tokens_begins_a_line(folder, capsys, monkeypatch):
    def fail(*_: object, on_token: Callable[[np.ndarray], None], **__: object) -> None:
        on_token(np.array([70]))
        raise FloatingPointError("not finite")

    monkeypatch.setattr("bmtrain_ms.model_center.generation.generate", fail)
    assert main(["generate", "--model", str(folder), "--prompt", "abc"]) == 2
    told = capsys.readouterr()
    assert told.out.startswith("abc") and told.out.endswith("\n") and told.err == "bmtrain-ms: not finite\n"


def test_a_folder_without_a_model(folder, tmp_path, capsys):
    text = "; give one of Hugging Face's: config.json, weights, tokenizer"
    assert f"--model {tmp_path / 'x'}: there is no such folder{text}" in refused(capsys, tmp_path / "x", "--prompt", "a")
    assert f"--model {tmp_path}: the folder has no config.json{text}" in refused(capsys, tmp_path, "--prompt", "a")
    text = f"--adapters {tmp_path}: the folder has no adapter_config.json; give one that bmtrain-ms finetune"
    assert text in refused(capsys, folder, "--prompt", "a", "--adapters", str(tmp_path))
