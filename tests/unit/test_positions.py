"""Who sees whom, at which position, and what is kept of it."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.compat.device import Device
from bmtrain_ms.model_center import Spread, spread
from bmtrain_ms.model_center.layer import KeyValueCache, Positions, RotaryEmbedding
from bmtrain_ms.model_center.model import Llama, LlamaConfig, Mistral, MistralConfig
from bmtrain_ms.nn.functional import cross_entropy

SIZES = {"vocab_size": 37, "dim_model": 24, "num_heads": 4, "num_heads_kv": 2, "dim_ff": 40, "num_layers": 2}

pytestmark = pytest.mark.usefixtures("single_world")


def seen(positions: Positions, heads: int = 1, repeats: int = 1, window: Any = None) -> np.ndarray:
    """(batch, queries, keys) bool, after it was seen that all heads are alike."""
    told, before = positions.within(window), positions.offset
    if window is not None and window < before + positions.length:
        before = min(before, window - 1)  # what a cache keeps
    keys = before + positions.length
    if told is None:
        return np.ones((positions.batch, positions.length, keys), bool)
    mask = told.tensor(repeats).asnumpy()
    for rows in (slice(0, 1), slice(positions.length // 2, positions.length), slice(0, positions.length)):  # a block at a time
        first, last, allowed = told.block(rows)
        if window is not None:  # nothing that no query sees
            assert last - first <= rows.stop - rows.start + window - 1
        whole = np.zeros((mask.shape[0], rows.stop - rows.start, keys), bool)
        causal = np.tril(np.ones((positions.length, keys), bool), before)[None, rows, first:last]
        whole[:, :, first:last] = causal if allowed is None else allowed
        np.testing.assert_array_equal(whole, mask[:, 0, rows] == 0)
    every = np.broadcast_to(mask, (positions.batch, heads, repeats * positions.length, keys))
    values = every.reshape(positions.batch, heads * repeats, positions.length, keys)
    assert ((values == 0) | (values <= -1e30)).all() and np.isfinite(values).all()
    assert (values == values[:, :1]).all()
    return values[:, 0] == 0


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    offset=st.integers(0, 4),
    heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    padded=st.booleans(),
    window=st.none() | st.integers(1, 12),
    draw=st.randoms(use_true_random=False),
)
def test_the_mask_is_the_definition(batch, length, offset, heads, repeats, padded, window, draw):
    keys = offset + length
    real = np.array([[draw.random() < 0.6 for _ in range(keys)] for _ in range(batch)])
    positions = Positions(batch, length, offset, Tensor(real) if padded else None)
    expected = np.arange(keys)[None, None] <= offset + np.arange(length)[None, :, None]
    if window is not None:
        expected = expected & (np.arange(keys)[None, None] > offset + np.arange(length)[None, :, None] - window)
    expected = np.broadcast_to(expected & (real[:, None] if padded else True), (batch, length, keys))
    if window is not None and window < keys:
        expected = expected[:, :, max(0, offset - window + 1) :]  # which a cache keeps
    np.testing.assert_array_equal(seen(positions, heads, repeats, window), expected)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 9), repeats=st.integers(1, 2), draw=st.randoms(use_true_random=False))
def test_documents_see_themselves_and_count_from_zero(batch, length, repeats, draw):
    documents = np.array([[draw.randint(0, 3) for _ in range(length)] for _ in range(batch)], np.int32)
    real = np.array([[draw.random() < 0.7 for _ in range(length)] for _ in range(batch)])
    positions = Positions(batch, length, padding=real, documents=Tensor(documents))
    allowed = np.tril(documents[:, :, None] == documents[:, None, :])
    np.testing.assert_array_equal(seen(positions, 2, repeats), allowed & real[:, None, :])
    near = np.triu(np.ones((length, length), bool), -1)  # of a window of 2
    np.testing.assert_array_equal(seen(positions, 2, repeats, 2), allowed & real[:, None, :] & near)
    cos, sin = positions.angles(RotaryEmbedding(4, base=100.0))
    angles = (allowed.sum(-1) - 1)[:, None, :, None] * 100.0 ** (-np.arange(0, 4, 2) / 4)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)


def test_what_all_layers_need_is_made_once():
    rotary = RotaryEmbedding(6)
    positions = Positions(2, 5, documents=np.zeros((2, 5), int))
    assert positions.seen is positions.seen and positions.seen.tensor(2) is positions.seen.tensor(2)
    assert positions.angles(rotary) is positions.angles(rotary)
    assert positions.angles(rotary) is not positions.angles(RotaryEmbedding(6))
    assert Positions(2, 5).seen.causal and not positions.seen.causal
    assert Positions(2, 1, 4).seen is None and Positions(2, 1, 4).within(5) is None
    assert positions.within(3) is positions.within(3) is not positions.seen and positions.within(5) is positions.seen


@pytest.mark.parametrize(
    "arguments, text",
    [
        (
            {"padding": np.ones((2, 4), bool)},
            r"^padding has the shape \(2, 4\), not \(2, 5\): one entry per token",
        ),
        ({"offset": 2, "padding": np.ones((2, 5), bool)}, r"padding has the shape \(2, 5\), not \(2, 7\)"),
        ({"documents": np.ones(10, int)}, r"documents has the shape \(10,\), not \(2, 5\)"),
        ({"offset": 1, "documents": np.ones((2, 5), int)}, "documents behind 1 tokens of a cache: packed rows are for training"),
    ],
)
def test_marks_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        Positions(2, 5, **arguments)


# Packed rows #

LENGTHS = ((3, 4, 2), (9,), (1, 8))


@pytest.mark.parametrize("how", [Spread(), Spread(recompute=False), None], ids=["recomputed", "kept", "plain"])
def test_packed_rows_are_their_documents_alone(how):
    """Logits and gradients."""
    model = Llama(LlamaConfig(**SIZES, init_std=0.3))
    if how is not None:
        spread(model, how)
    bms.init_parameters(model)
    ids, targets = np.random.default_rng(0).integers(0, 37, (2, len(LENGTHS), 9)).astype(np.int32)
    numbers = np.array([np.repeat(np.arange(len(lengths)), lengths) for lengths in LENGTHS], np.int32)
    parts = [(row, slice(end - n, end)) for row, lengths in enumerate(LENGTHS) for n, end in zip(lengths, np.cumsum(lengths))]

    def loss_of(logits: Tensor, wanted: np.ndarray) -> Tensor:
        return cross_entropy(logits.reshape(-1, 37), Tensor(wanted.reshape(-1))) * float(wanted.size)

    def packed() -> Tensor:
        return loss_of(model(Tensor(ids), documents=Tensor(numbers)), targets)

    def alone() -> Tensor:
        losses = [loss_of(model(Tensor(ids[row : row + 1, part])), targets[row, part]) for row, part in parts]
        return sum(losses[1:], losses[0])

    logits = model(Tensor(ids), documents=Tensor(numbers)).asnumpy()
    for row, part in parts:
        expected = model(Tensor(ids[row : row + 1, part])).asnumpy()
        np.testing.assert_allclose(logits[row : row + 1, part], expected, atol=1e-5 * np.abs(expected).max())
    params = model.trainable_params()
    (loss, grads), (expected_loss, expected) = (ms.value_and_grad(f, None, params)() for f in (packed, alone))
    assert loss.asnumpy().item() == pytest.approx(expected_loss.asnumpy().item(), rel=1e-5)
    for p, a, b in zip(params, grads, expected):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), atol=1e-5 * np.abs(b.asnumpy()).max(), err_msg=p.name)
    assert np.abs(model(Tensor(ids)).asnumpy() - logits).max() > 1e-2  # without the marks they are others


def test_documents_and_a_cache_do_not_go_together():
    model = Llama(LlamaConfig(**SIZES))
    ids = Tensor(np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match="a cache is for generation: leave one of them out"):
        model(ids, cache=KeyValueCache(3), documents=ids)


# The cache #


@pytest.fixture(params=["CPU", "Ascend"])
def _device(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a device, here done on the CPU."""
    monkeypatch.setattr(Device, "chosen", Device(request.param))


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5), batch=st.integers(1, 2), heads=st.integers(1, 2))
def test_the_cache_returns_what_was_put_in(dtype, lengths, batch, heads):
    random = np.random.default_rng(0)
    kept = KeyValueCache(sum(lengths))
    parts = [tuple(random.standard_normal((batch, heads, n, d)).astype(dtype) for d in (3, 5)) for n in lengths]
    for i, new in enumerate(parts):
        for number in (0, 1):
            assert kept.layer(number).length == sum(lengths[:i]) and kept.length in (0, sum(lengths[:i]))
            got = kept.layer(number).update(*(Tensor(x) for x in new))
            for j in range(2):
                np.testing.assert_array_equal(got[j].asnumpy(), np.concatenate([p[j] for p in parts[: i + 1]], 2))
    assert kept.length == sum(lengths)


@pytest.mark.usefixtures("_device")
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=12), window=st.integers(1, 6), turns=st.booleans())
def test_a_window_keeps_what_is_seen_and_no_more(lengths, window, turns):
    """Memory for two windows, whatever the length; rows are reordered in between (beams)."""
    random = np.random.default_rng(0)
    kept, all_of_it = KeyValueCache(sum(lengths)), np.zeros((2, 1, 0, 3), np.float32)
    for n in lengths:
        new = random.standard_normal((2, 1, n, 3)).astype(np.float32)
        before = all_of_it.shape[2]
        all_of_it = np.concatenate((all_of_it, new), 2)
        (got,) = kept.layer(0).update(Tensor(new), window=window)
        np.testing.assert_array_equal(got.asnumpy(), all_of_it[:, :, max(0, before - window + 1) :])
        if turns:
            kept.reorder(np.array([1, 0]))
            all_of_it = all_of_it[::-1]
    assert kept.length == sum(lengths)
    assert kept.layer(0)._buffers[0]._shape[2] == min(sum(lengths), 2 * window)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_behind_a_window_are_those_of_one_pass(padded):
    """Step by step and in pieces, far beyond the window."""
    model = Mistral(MistralConfig(**SIZES, window=3))
    bms.init_parameters(model)
    ids = np.random.default_rng(0).integers(0, 37, (2, 12)).astype(np.int32)
    real = np.ones((2, 12), bool)
    real[0, :4] = not padded
    whole = model(Tensor(ids), padding=Tensor(real) if padded else None).asnumpy()
    for pieces in ([1] * 12, [5, 1, 1, 1, 4], [2, 9, 1]):
        kept, start, parts = KeyValueCache(12), 0, []
        for n in pieces:
            stop = start + n
            marks = Tensor(real[:, :stop]) if padded else None
            parts.append(model(Tensor(ids[:, start:stop]), padding=marks, cache=kept).asnumpy())
            start = stop
        found = np.concatenate(parts, 1)
        np.testing.assert_allclose(found[real], whole[real], rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.usefixtures("_device")
def test_the_cache_refuses_what_does_not_fit():
    kept = KeyValueCache(4)
    assert kept.length == 0
    x = Tensor(np.ones((2, 1, 3, 5), np.float32))
    kept.layer(0).update(x, x)
    text = r"^a KeyValueCache of capacity 4 that holds 3 positions has no room for 3 more: KeyValueCache\(6\) has$"
    with pytest.raises(ValueError, match=text):
        kept.layer(0).update(x, x)
    one = Tensor(np.ones((1, 1, 1, 5), np.float32))
    with pytest.raises(ValueError, match=r"begun with \(batch, heads, dim\) \(2, 1, 5\), and this pass has \(1, 1, 5\)"):
        kept.layer(0).update(one, one)
    assert kept.length == 3
    with pytest.raises(ValueError, match="capacity must be at least 1, not 0"):
        KeyValueCache(0)


@pytest.mark.parametrize("how", [Spread(), Spread(recompute=False), None], ids=["recomputed", "kept", "plain"])
def test_no_gradient_goes_through_a_cache(how):
    model = Llama(LlamaConfig(**SIZES))
    if how is not None:
        spread(model, how)
    bms.init_parameters(model)
    ids = Tensor(np.zeros((1, 3), np.int32))
    with pytest.raises(RuntimeError, match="no gradient goes through a KeyValueCache: leave it out where gradients are taken"):
        ms.value_and_grad(lambda: model(ids, cache=KeyValueCache(3)).sum(), None, model.trainable_params())()
    assert model(ids, cache=KeyValueCache(3)).shape == (1, 3, 37)
