"""Text, tokens and batches. No MindSpore here."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms import data
from bmtrain_ms.data import Batch, TokenSampler, unigram_entropy

# Sampler #


def windows(inputs: np.ndarray) -> list[int]:
    """Which windows these are; the tokens count up."""
    return (inputs[:, 0] // inputs.shape[1]).tolist()


def pair(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    return batch.ids, batch.targets


def test_batches_are_windows_and_their_shift():
    sampler = TokenSampler(np.arange(100), length=7, global_batch=4, seed=3)
    assert sampler.windows == 14  # 99 targets
    for step in range(20):
        batch = sampler.batch(step)
        inputs, targets = batch.ids, batch.targets
        assert inputs.shape == targets.shape == (4, 7) and inputs.dtype == targets.dtype == np.int32
        assert inputs.flags.c_contiguous and targets.flags.c_contiguous
        assert np.array_equal(inputs, inputs[:, :1] + np.arange(7)) and np.array_equal(targets, inputs + 1)
        assert not (inputs[:, 0] % 7).any() and targets.max() <= 99


@given(extra=st.integers(0, 40), length=st.integers(1, 9), batch=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_an_epoch_covers_each_window_once(extra, length, batch, seed):
    """Also where an epoch ends within a batch."""
    tokens = np.arange(batch * length + 1 + extra, dtype=np.uint16)
    sampler = TokenSampler(tokens, length, batch, seed)
    epochs = 3
    steps = -(-epochs * sampler.windows // batch)
    seen = [w for step in range(steps) for w in windows(sampler.batch(step).ids)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * sampler.windows : (epoch + 1) * sampler.windows]) == list(range(sampler.windows))


@pytest.mark.parametrize("name", ["targets", "weights", "documents"])
def test_arrays_of_a_batch_that_do_not_fit(name):
    arrays = {"ids": np.zeros((2, 3)), "targets": np.zeros((2, 3)), name: np.zeros((3, 2))}
    with pytest.raises(ValueError, match=rf"^{name} of a batch have the shape \(3, 2\), its ids \(2, 3\): make them alike$"):
        Batch(**arrays)


def test_a_batch_is_divided_before_it_is_told_of_its_step():
    """A piece would have the count of the step, and not its part of the rows."""
    ids = np.arange(12, dtype=np.int32).reshape(4, 3)
    batch = Batch(ids, ids)
    assert [piece.ids.tolist() for piece in batch.pieces(2)] == [ids[:2].tolist(), ids[2:].tolist()] and batch.pieces(4) == [batch]
    with pytest.raises(
        ValueError, match=r"divide a batch before it is told what its step has: share_step\(batch\.pieces\(rows\)\)"
    ):
        dataclasses.replace(batch, count=12.0).pieces(2)


def test_a_batch_is_a_function_of_the_step_alone():
    tokens = np.random.default_rng(0).integers(0, 50, 1000)
    sampler = TokenSampler(tokens, 8, 6, seed=1)
    in_order = [pair(sampler.batch(step)) for step in range(60)]
    fresh = TokenSampler(tokens, 8, 6, seed=1)
    for step in (59, 3, 30, 0, 59):
        assert all(np.array_equal(a, b) for a, b in zip(pair(fresh.batch(step)), in_order[step]))


def test_epochs_and_seeds_differ():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TokenSampler(np.arange(401), 4, 10, seed)
        return [w for step in range(10) for w in windows(sampler.batch(10 * epoch + step).ids)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert orders[0] != list(range(100))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_ranks_share_the_global_batch(ranks):
    sampler = TokenSampler(np.random.default_rng(0).integers(0, 999, 500), 5, 12)
    for step in (0, 7, 8):  # the epoch has 99 windows: step 8 crosses its end
        parts = [pair(sampler.batch(step, rank, ranks)) for rank in range(ranks)]
        assert all(x.shape == y.shape == (12 // ranks, 5) for x, y in parts)
        for joined, whole in zip(map(np.concatenate, zip(*parts)), pair(sampler.batch(step))):
            assert np.array_equal(joined, whole)


def test_just_enough_tokens():
    sampler = TokenSampler(np.arange(13), 4, 3)
    assert sorted(windows(sampler.batch(0).ids)) == [0, 1, 2]


@pytest.mark.parametrize(
    "tokens, length, batch, text",
    [
        (12, 4, 3, "12 tokens make 2 windows of 4, a step needs 3; use more text, a shorter length or a smaller batch"),
        (0, 4, 1, "0 tokens make 0 windows of 4, a step needs 1"),
        (100, 4, 0, "need length >= 1 and global_batch >= 1, not 4 and 0"),
        (100, 0, 1, "need length >= 1 and global_batch >= 1, not 0 and 1"),
    ],
)
def test_sampler_errors(tokens, length, batch, text):
    with pytest.raises(ValueError, match=text):
        TokenSampler(np.arange(tokens), length, batch)


def test_batch_that_ranks_cannot_share():
    sampler = TokenSampler(np.arange(100), 4, 6)
    with pytest.raises(ValueError, match="a global batch of 6 cannot be split evenly over 4 ranks"):
        sampler.batch(0, 0, 4)


# Entropy #


@pytest.mark.parametrize(
    "tokens, nats",
    [
        ([3, 3, 3], 0.0),
        ([0, 1], math.log(2)),
        ([5, 0, 9, 2], math.log(4)),
        ([0, 0, 0, 1], 2 * math.log(2) - 0.75 * math.log(3)),  # by hand: -(3/4 ln 3/4 + 1/4 ln 1/4)
    ],
    ids=["one", "two", "uniform", "skewed"],
)
def test_unigram_entropy(tokens, nats):
    assert unigram_entropy(np.array(tokens, np.int32)) == pytest.approx(nats, abs=1e-15)


# Text #


def test_read_text(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes("one\nstill one\n\nzwei, größer\n\n\n   \n\n三\n".encode())
    assert data.read_text(path) == ["one\nstill one", "zwei, größer", "三\n"]
    assert data.read_text(str(path)) == data.read_text(path)


def test_read_text_knows_other_line_ends(tmp_path: Path):
    (tmp_path / "dos").write_bytes(b"one\r\nline\r\n\r\ntwo")
    assert data.read_text(tmp_path / "dos") == ["one\nline", "two"]


def test_text_in_another_encoding(tmp_path: Path):
    path = tmp_path / "latin.txt"
    path.write_bytes("abc größe".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{path} is not UTF-8 text: byte 6 is 0xf6"):
        data.read_text(path)


@pytest.mark.parametrize("content", [b"", b"\n\n \t\n\n"], ids=["empty", "blank"])
def test_text_without_text(tmp_path: Path, content):
    path = tmp_path / "nothing.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} contains no text"):
        data.read_text(path)


def test_missing_text(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        data.read_text(tmp_path / "missing.txt")


def test_documentation_ships_with_python():
    documents = data.python_documentation()
    assert sum(map(len, documents)) > 300_000
    assert any("class definition" in d for d in documents)
    assert documents == data.python_documentation()


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=40), fraction=st.floats(0.02, 0.5))
def test_split_held_out(sizes, fraction):
    """Every document on one side, in order, about the fraction of the characters held out; where none fits, one is cut."""
    documents = [f"{i:04}" + "x" * size for i, size in enumerate(sizes)]
    training, held_out = data.split_held_out(documents, fraction)
    wanted = fraction * sum(map(len, documents))
    if len(training) + len(held_out) > len(documents):  # too little fitted
        (end,) = held_out
        place = next(i for i, (ours, theirs) in enumerate(zip(training, documents)) if ours != theirs)
        assert [*training[:place], training[place] + end, *training[place + 1 :]] == documents
        assert len(end) == max(1, min(int(wanted), len(documents[place]) - 1))
        fitting = [len(document) for document in documents if len(document) <= wanted]
        assert len(documents[place]) == max(map(len, documents)) if fitting else place == len(documents) - 1
        return
    assert sorted(training + held_out) == documents
    assert training == sorted(training) and held_out == sorted(held_out)
    size = sum(map(len, held_out))
    assert wanted / 2 <= size <= wanted
    assert all(size + len(document) > wanted for document in training)


def test_split_depends_on_the_texts_alone():
    documents = [f"document {i} " * (i % 7 + 1) for i in range(50)]
    training, held_out = data.split_held_out(documents, 0.2)
    assert sorted(data.split_held_out(documents[::-1], 0.2)[1]) == sorted(held_out)
    assert data.split_held_out(documents, 0.2) == (training, held_out)
    places = [documents.index(d) for d in held_out]
    assert min(places) < 15 and max(places) > 35  # from everywhere


# Tokenizer #

TEXT = ["the cat sat on the mat", "the dog sat on the log", "größer als 三"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    pytest.importorskip("tokenizers")
    return data.train_tokenizer(TEXT, 300)


def test_tokenizer(tokenizer):
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert 257 < tokenizer.get_vocab_size() <= 300  # the bytes, the end, and merges
    assert len(tokenizer.encode("the cat").ids) < len(b"the cat")


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(tokenizer, text):
    """Bytes are the alphabet: nothing is unknown."""
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_is_reproducible(tokenizer):
    assert data.train_tokenizer(TEXT, 300).to_str() == tokenizer.to_str()


def test_encode_ends_every_document(tokenizer):
    tokens = data.encode(tokenizer, ["the cat", "", "a log"])
    assert tokens.dtype == np.int32
    expected = [*tokenizer.encode("the cat").ids, 0, 0, *tokenizer.encode("a log").ids, 0]
    assert tokens.tolist() == expected


# What it is #


@pytest.mark.parametrize("place", [0, 1, 999, 1 << 20, -1])
def test_another_text_of_the_same_size_is_another(place):
    """Wherever it differs."""
    tokens = np.arange((1 << 20) + 1000, dtype=np.int32) % 50
    other = tokens.copy()
    other[place] += 1
    first, second = (TokenSampler(x, 10, 4).described for x in (tokens, other))
    assert {k: v for k, v in first.items() if k != "digest"} == {k: v for k, v in second.items() if k != "digest"}
    assert first["digest"] != second["digest"] and json.loads(json.dumps(first)) == first


def test_the_same_tokens_are_the_same_however_they_are_kept(tmp_path):
    tokens = np.arange(1000, dtype=np.int32)
    tokens.astype(np.uint16).tofile(tmp_path / "file")
    kept = [tokens, tokens.astype(np.int64), tokens[::-1].copy()[::-1], np.memmap(tmp_path / "file", np.uint16, "r")]
    assert len({TokenSampler(x, 10, 4).described["digest"] for x in kept}) == 1


def test_another_tokenizer_is_told(tmp_path):
    tokens = np.arange(100, dtype=np.int32)
    plain, first, same, second = (TokenSampler(tokens, 10, 4, tokenizer=x).described for x in (None, "a", "a", "b"))
    assert "tokenizer" not in plain and first == same != second
    tokenizer = data.train_tokenizer(["some text"], 260)
    known = TokenSampler(tokens, 10, 4, tokenizer=tokenizer).described
    assert known == TokenSampler(tokens, 10, 4, tokenizer=tokenizer.to_str()).described


# What a text may be like #


def tokenizer_with(*added: str) -> Any:
    """One that was not made here."""
    made = data.train_tokenizer(TEXT, 300)
    made.add_special_tokens(list(added))
    return type(made).from_str(made.to_str())


@pytest.mark.parametrize("special", ["<|endoftext|>", "<s>", "<|im_start|>", "[MASK]"])
def test_a_special_token_in_a_text_is_text(special):
    """A web page about language models must not end a document in its middle."""
    tokenizer = tokenizer_with("<s>", "<|im_start|>", "[MASK]")
    text = f"the cat{special} sat {special}"
    tokens = data.encode(tokenizer, [text, special])
    assert tokenizer.token_to_id(special) not in tokens[:-1][tokens[:-1] != 0] and (tokens == 0).sum() == 2
    assert tokenizer.decode(tokens.tolist()) == text + special  # `decode` leaves special tokens out
    assert tokenizer.encode(special).ids == [tokenizer.token_to_id(special)]  # as it was for whoever else uses it


def test_special_tokens_are_not_learnt_from_text():
    trained = data.train_tokenizer(["<|endoftext|>" * 50] * 20, 400)
    assert (data.encode(trained, ["a<|endoftext|>b"]) == 0).sum() == 1


def test_a_tokenizer_that_cannot_end_a_document():
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match=r"the tokenizer has no token <\|endoftext\|>, which ends a document"):
        data.encode(Tokenizer(models.BPE()), ["a"])


RUNS = {
    "genome": "ACGT",
    "Chinese": "天地玄黄宇宙洪荒日月盈昃辰宿列张",
    "digits": "0123456789",
    "rules": "-=~#",
    "blanks": " \t",
    "one": "a",
}


@pytest.mark.parametrize("kind", RUNS)
def test_no_word_is_longer_than_a_token_may_be(kind):
    """So the time to count pairs grows with the text, not with its square; nothing is lost."""
    draw = np.random.default_rng(0)
    text = "".join(draw.choice(list(RUNS[kind]), 20_000))
    trained = data.train_tokenizer([text], 600)
    words = trained.pre_tokenizer.pre_tokenize_str(text)
    assert max(end - start for _, (start, end) in words) == 32
    for whole in (text, f"x {text} y", text[:33], text[:32]):
        encoded = trained.encode(whole)
        assert trained.decode(encoded.ids) == whole
        assert max(end - start for start, end in encoded.offsets) <= 32


def test_a_million_characters_without_a_space():
    """An hour where words are not cut."""
    draw = np.random.default_rng(0)
    text = "".join(draw.choice(list("ACGT"), 1_000_000))
    trained = data.train_tokenizer([text], 300)
    assert trained.decode(data.encode(trained, [text]).tolist()) == text


@pytest.mark.parametrize("content", ["one", "one\n\ntwo"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, content):
    (tmp_path / "marked").write_text(content, encoding="utf-8-sig")
    (tmp_path / "plain").write_text(content, encoding="utf-8")
    assert data.read_text(tmp_path / "marked") == data.read_text(tmp_path / "plain")


def test_a_byte_order_mark_and_nothing_else(tmp_path: Path):
    (tmp_path / "marked").write_text("\n", encoding="utf-8-sig")
    with pytest.raises(ValueError, match="marked contains no text"):
        data.read_text(tmp_path / "marked")


@pytest.mark.parametrize(
    "content, text",
    [
        ("größe".encode("utf-16"), r"is UTF-16, by its byte-order mark; convert it first: iconv -f UTF-16 -t UTF-8"),
        (b"\xfe\xff\x00a", "is UTF-16, by its byte-order mark"),
        ("größe".encode("utf-32"), "is UTF-32, by its byte-order mark"),
        (b"\xef\xbb\xbfab\xff", r"is not UTF-8 text: byte 5 is 0xff"),
        (b"ab\x00c", "is not text: byte 2 is 0; it is a binary file, or UTF-16"),
        ("abc".encode("utf-16-le"), "is not text: byte 1 is 0"),
        (b"\xef\xbb\xbfab\x00c", "is not text: byte 5 is 0"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content, text):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.txt {text}"):
        data.read_text(tmp_path / "x.txt")


def test_a_text_at_home(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("one")
    assert data.read_text("~/x.txt") == data.read_text(Path("~/x.txt")) == ["one"]


@pytest.mark.parametrize("documents", [["Title", "x" * 10_000], ["x" * 10_000, "Title"], ["a", "x" * 10_000, "b"]])
def test_a_title_is_not_all_that_is_held_out(documents):
    """A text that is one long document behind a short one: the end of the long one is held out."""
    training, held_out = data.split_held_out(documents)
    assert 500 <= sum(map(len, held_out)) <= 1001
    assert sum(map(len, training + held_out)) == sum(map(len, documents)) and len(training) == len(documents)
