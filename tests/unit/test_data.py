"""Text, tokens and batches. No MindSpore here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms import data
from bmtrain_ms.data import TokenSampler, unigram_entropy

# Sampler #


def windows(inputs: np.ndarray) -> list[int]:
    """Which windows these are; the tokens count up."""
    return (inputs[:, 0] // inputs.shape[1]).tolist()


def test_batches_are_windows_and_their_shift():
    sampler = TokenSampler(np.arange(100), length=7, global_batch=4, seed=3)
    assert sampler.windows == 14  # 99 targets
    for step in range(20):
        inputs, targets = sampler.batch(step)
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
    seen = [w for step in range(steps) for w in windows(sampler.batch(step)[0])]
    for epoch in range(epochs):
        assert sorted(seen[epoch * sampler.windows : (epoch + 1) * sampler.windows]) == list(range(sampler.windows))


def test_a_batch_is_a_function_of_the_step_alone():
    tokens = np.random.default_rng(0).integers(0, 50, 1000)
    sampler = TokenSampler(tokens, 8, 6, seed=1)
    in_order = [sampler.batch(step) for step in range(60)]
    fresh = TokenSampler(tokens, 8, 6, seed=1)
    for step in (59, 3, 30, 0, 59):
        assert all(np.array_equal(a, b) for a, b in zip(fresh.batch(step), in_order[step]))


def test_epochs_and_seeds_differ():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TokenSampler(np.arange(401), 4, 10, seed)
        return [w for step in range(10) for w in windows(sampler.batch(10 * epoch + step)[0])]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert orders[0] != list(range(100))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_ranks_share_the_global_batch(ranks):
    sampler = TokenSampler(np.random.default_rng(0).integers(0, 999, 500), 5, 12)
    for step in (0, 7, 8):  # the epoch has 99 windows: step 8 crosses its end
        parts = [sampler.batch(step, rank, ranks) for rank in range(ranks)]
        assert all(x.shape == y.shape == (12 // ranks, 5) for x, y in parts)
        for joined, whole in zip(map(np.concatenate, zip(*parts)), sampler.batch(step)):
            assert np.array_equal(joined, whole)


def test_just_enough_tokens():
    sampler = TokenSampler(np.arange(13), 4, 3)
    assert sorted(windows(sampler.batch(0)[0])) == [0, 1, 2]


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
    """Every document on one side, in order, about the fraction of the characters held out; a short text is cut."""
    documents = [f"{i:04}" + "x" * size for i, size in enumerate(sizes)]
    training, held_out = data.split_held_out(documents, fraction)
    wanted = fraction * sum(map(len, documents))
    if len(training) + len(held_out) > len(documents):  # nothing fitted
        assert min(map(len, documents)) > wanted
        assert len(held_out) == 1 and [*training[:-1], training[-1] + held_out[0]] == documents
        assert len(held_out[0]) == max(1, min(int(wanted), len(documents[-1]) - 1))
        return
    assert sorted(training + held_out) == documents
    assert training == sorted(training) and held_out == sorted(held_out)
    size = sum(map(len, held_out))
    assert 0 < size <= wanted
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


def test_end_of_text_in_the_text_is_the_token(tokenizer):
    """As everywhere with such tokenizers; a user who does not trust the text removes it."""
    assert data.encode(tokenizer, ["<|endoftext|>"]).tolist() == [0, 0]


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
