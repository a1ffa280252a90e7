"""Tokenizers of folders and files, asked in one way. No MindSpore here."""

from __future__ import annotations

import base64
import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms_base.data import DataError, train_tokenizer
from bmtrain_ms_base.data.tokenizing import TokenizerError, load_tokenizer

TEXT = ["the cat sat on the mat", "the dog sat on the log", "größer als 三"] * 5


def hugging_face(folder: Path, config: Any = None, special: tuple[str, ...] = (), template: str = "") -> str:
    """A folder of Hugging Face's."""
    from tokenizers import processors

    made = train_tokenizer(TEXT, 300)
    made.add_special_tokens(list(special))
    if template:
        known = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def sentencepiece(folder: Path) -> str:
    """A bare `tokenizer.model`."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "tokenizer"), vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    (folder / "tokenizer.vocab").unlink()
    return str(folder / "tokenizer.model")


def tiktoken(path: Path, merges: tuple[bytes, ...] = (b"th", b"the")) -> str:
    """tiktoken's lines."""
    tokens = [*(bytes([i]) for i in range(256)), *merges]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return str(path)


def test_a_folder_of_hugging_face(tmp_path):
    tokenizer = load_tokenizer(hugging_face(tmp_path))
    plain = train_tokenizer(TEXT, 300)
    assert tokenizer.encode(TEXT) == [plain.encode(text).ids for text in TEXT]
    assert tokenizer.encode([""]) == [[]] and tokenizer.end == 0
    assert tokenizer.vocab_size == plain.get_vocab_size()
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).digest == tokenizer.digest


def test_tokens_around_each_text(tmp_path):
    """As the file's template says, and as some classes' settings say instead."""
    names = ("<s>", "</s>")
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    bare = load_tokenizer(hugging_face(tmp_path, None, names)).encode(["the cat"])[0]
    cases: list[tuple[str, dict[str, Any], bool, bool]] = [
        ("<s> $A", tokens, True, False),
        ("<s> $A </s>", {}, True, True),
        ("$A", {**tokens, "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, True, False),
        ("<s> $A", {**tokens, "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True}, False, True),
        ("$A", {**tokens, "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, False, False),
    ]
    for template, config, front, behind in cases:
        made = load_tokenizer(hugging_face(tmp_path, config, names, template))
        bos, end = bare[:0], 0
        if front:
            bos = made.encode(["x"])[0][:1]
        found = made.encode(["the cat"])[0]
        assert found[len(bos) : len(bos) + len(bare)] == bare and len(found) == len(bare) + front + behind
        if config:
            assert made.end not in (None, end)  # </s>
        if behind:
            assert found[-1] == load_tokenizer(str(tmp_path), end="</s>").end


def test_a_token_that_a_config_says_is_null_is_not_the_word_none(tmp_path):
    """Which most vocabularies have."""
    names = ("None", "<s>", "</s>")
    bare = load_tokenizer(hugging_face(tmp_path, None, names)).encode(["the cat"])[0]
    for given in ({"bos_token": None, "eos_token": None}, {}):
        config = {**given, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}
        assert load_tokenizer(hugging_face(tmp_path, config, names)).encode(["the cat"])[0] == bare
        assert len(load_tokenizer(hugging_face(tmp_path, config, names, "<s> $A")).encode(["the cat"])[0]) == len(bare) + 1
        config = {**config, "add_bos_token": False}
        assert load_tokenizer(hugging_face(tmp_path, config, names, "<s> $A")).encode(["the cat"])[0] == bare


def test_special_tokens_in_a_text(tmp_path):
    path = hugging_face(tmp_path)
    assert 0 not in load_tokenizer(path).encode(["a<|endoftext|>b"])[0]
    assert 0 in load_tokenizer(path, special=True).encode(["a<|endoftext|>b"])[0]
    assert load_tokenizer(path).digest != load_tokenizer(path, special=True).digest


def test_which_token_ends_a_document(tmp_path):
    path = hugging_face(tmp_path, {"eos_token": {"content": "<end>", "special": True}}, ("<end>", "<other>"))
    ends = [load_tokenizer(path, end=end).end for end in (None, "<other>", "<|endoftext|>")]
    assert len(set(ends)) == 3 and ends[2] == 0
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert load_tokenizer(path).end == ends[0]
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has no token nope, which is to end documents"):
        load_tokenizer(path, end="nope")


def test_a_bare_sentencepiece_model(tmp_path):
    import sentencepiece as library

    path = sentencepiece(tmp_path)
    plain = library.SentencePieceProcessor(model_file=path)
    for given in (path, str(tmp_path)):
        tokenizer = load_tokenizer(given)
        assert tokenizer.encode(TEXT) == plain.encode(TEXT)  # nothing in front
        assert (tokenizer.vocab_size, tokenizer.end) == (plain.vocab_size(), plain.eos_id())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    assert load_tokenizer(path).encode(["the"]) == [[plain.bos_id(), *plain.encode("the")]]
    assert plain.eos_id() not in load_tokenizer(path).encode(["a</s>b"])[0]
    with pytest.raises(TokenizerError, match="sentencepiece never finds special tokens in a text"):
        load_tokenizer(path, special=True)


def test_files_of_tiktoken(tmp_path):
    tokenizer = load_tokenizer(tiktoken(tmp_path / "qwen.tiktoken"))
    assert tokenizer.encode(["the 12"]) == [[257, 32, 49, 50]] and tokenizer.end == 258
    assert tokenizer.vocab_size == 258 + 208
    assert 258 not in tokenizer.encode(["<|endoftext|>"])[0]
    assert load_tokenizer(str(tmp_path), special=True).encode(["<|endoftext|>"]) == [[258]]
    with pytest.raises(TokenizerError, match=r"x\.tiktoken does not say how words are cut: --tiktoken-pattern, one of gpt2"):
        load_tokenizer(tiktoken(tmp_path / "x.tiktoken"))
    assert load_tokenizer(str(tmp_path / "x.tiktoken"), pattern="gpt2").vocab_size == 259
    (tmp_path / "llama").mkdir()
    path = tiktoken(tmp_path / "llama" / "tokenizer.model")  # as Llama 3 calls it
    (tmp_path / "llama" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<e>", "added_tokens_decoder": {"300": {"content": "<e>"}}})
    )
    assert load_tokenizer(str(tmp_path / "llama"), pattern="llama3").end == 300
    Path(path).write_bytes(b"!!! 3\n")
    with pytest.raises(TokenizerError, match="is not one of tiktoken's files, lines of base64 and a number"):
        load_tokenizer(path, pattern="llama3")


def test_gpt2s_two_files(tmp_path):
    plain = json.loads(train_tokenizer(TEXT, 300).to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(plain["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in plain["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode(["the cat"]) == [train_tokenizer(TEXT, 300).encode("the cat").ids]
    given = load_tokenizer(str(tmp_path / "vocab.json"), "gpt2", merges=str(tmp_path / "merges.txt"))
    assert given.digest == tokenizer.digest


def test_the_null_tokenizer():
    tokenizer = load_tokenizer("10", "null")
    assert tokenizer.encode(["1 2", " 9 "]) == [[1, 2], [9]]
    assert (tokenizer.vocab_size, tokenizer.end) == (11, 10)
    for text, match in (("a", "reads numbers only"), ("10", "reads numbers below 10 only")):
        with pytest.raises(TokenizerError, match=match):
            tokenizer.encode([text])
    for size in ("", "0", "-1", "2147483648", "99999999999999999999999", "9" * 5000, "²", "٣"):
        with pytest.raises(
            TokenizerError, match=r"takes how many ids there are \(--vocab-size\), up to 2,147,483,647, not '.{,40}'$"
        ):
            load_tokenizer(size, "null")
    assert load_tokenizer("2147483647", "null").encode(["2147483646"]) == [[2147483646]]


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match=r"^/dev/null is neither a file nor a folder: name a tokenizer's$"):
        load_tokenizer("/dev/null")
    with pytest.raises(TokenizerError, match=r"there is no tokenizer .*nowhere; a name on a hub is written hf:owner/name"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(TokenizerError, match=r"has no tokenizer; what is known is tokenizer\.json, tokenizer\.model, "):
        load_tokenizer(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(TokenizerError, match=rf"{name} cannot be read as"):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(TokenizerError, match="has no tokenizer of kind tiktoken"):
        load_tokenizer(str(tmp_path), "tiktoken")
    for text in ("{", "[" * 100000):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is no JSON"):
            load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is damaged: it is not an object"):
        load_tokenizer(str(tmp_path))


def test_added_tokens_that_are_none(tmp_path):
    path = tiktoken(tmp_path / "qwen.tiktoken")
    for damage in ([], {"x": "a"}, {"300": {"content": {}}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": damage}))
        with pytest.raises(TokenizerError, match=r"added_tokens_decoder in the config beside .*qwen\.tiktoken is damaged"):
            load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", ""])
def test_files_that_may_not_be_read(tmp_path, monkeypatch, name):
    """As for a user: who runs the tests may read everything."""
    hugging_face(tmp_path, {})
    calls: dict[str, Any] = {"": (Path, "iterdir"), "tokenizer_config.json": (builtins, "open")}
    where, call = calls.get(name, (os, "stat"))
    real: Any = getattr(where, call)

    def refuse(given: Any, *more: Any, **rest: Any) -> Any:
        if str(given) == str(tmp_path / name):
            raise PermissionError(13, "Permission denied", str(given))
        return real(given, *more, **rest)

    given = tmp_path if call != "stat" else tmp_path / name
    monkeypatch.setattr(where, call, refuse)
    with pytest.raises(DataError, match=r"cannot be (read|looked for): .*Permission denied"):
        load_tokenizer(str(given))
