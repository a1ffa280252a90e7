"""Attention by `flash_attention_score`, whose stand-in is held to its signature and its documentation."""

from __future__ import annotations

import inspect
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms import ops
from bmtrain_ms.model_center import Spread, spread
from bmtrain_ms.model_center.model import (
    DeepseekV2,
    DeepseekV2Config,
    Llama,
    LlamaConfig,
    Mistral,
    MistralConfig,
)
from bmtrain_ms.ops import fused
from bmtrain_ms_base.launchers import FUSED_ATTENTION
from tests.unit.test_ops import check, numbers

pytestmark = pytest.mark.usefixtures("rehearsed_world")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the operation was asked for, without tensors that are not masks."""
    found: list[dict[str, Any]] = []
    original = fused.stand_in

    def noted(*given: Any, **named: Any) -> Tensor:
        bound = inspect.signature(ms.ops.flash_attention_score).bind(*given, **named).arguments
        shapes = {name: tuple(bound.pop(name).shape) for name in ("query", "key", "value")}
        found.append({**bound, **shapes, **({"attn_mask": bound["attn_mask"].shape} if "attn_mask" in bound else {})})
        return original(*given, **named)

    monkeypatch.setattr(fused, "stand_in", noted)
    return found


def seen_by(allowed: np.ndarray, scale: float, repeats: int) -> Any:
    """The reference, of (batch or 1, queries, keys) bool."""
    allowed = np.tile(allowed, (1, repeats, 1))[:, None]

    def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        scores = np.where(allowed, scale * (q @ k.swapaxes(-1, -2)), -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v

    return reference


def half(*shape: int, seed: int = 0) -> np.ndarray:
    return numbers(*shape, seed=seed, dtype=np.float16)


def triangle(queries: int, keys: int) -> np.ndarray:
    return np.tril(np.ones((1, queries, keys), bool), keys - queries)


@pytest.mark.parametrize("dim, width", [(16, 16), (5, 5), (24, 24), (6, 4)], ids=str)
@pytest.mark.parametrize("queries, keys, repeats", [(5, 5, 1), (4, 4, 2), (3, 5, 2)], ids=str)
def test_what_is_not_later(calls: list[dict[str, Any]], queries: int, keys: int, repeats: int, dim: int, width: int):
    """Values and gradients; narrow heads and values get zeros, and the compressed mask is aligned to the last key."""
    tensors = half(2, 2, repeats * queries, dim), half(2, 2, keys, dim, seed=1), half(2, 2, keys, width, seed=2)
    seen = ops.Seen(queries, keys)
    check(lambda q, k, v: ops.attention(q, k, v, seen, 0.3), seen_by(triangle(queries, keys), 0.3, repeats), *tensors)
    wide = -(-dim // 16) * 16
    assert calls[0] == {
        "query": (2, 2 * repeats, queries, wide),
        "key": (2, 2, keys, wide),
        "value": (2, 2, keys, wide),
        "head_num": 2 * repeats,
        "attn_mask": (2048, 2048),
        "sparse_mode": 3,
        "scalar_value": 0.3,
        "input_layout": "BNSD",
    }


@pytest.mark.parametrize("seen", [None, ops.Seen(1, 4)], ids=["everything", "the last one"])
def test_one_query_needs_no_mask(calls: list[dict[str, Any]], seen: Any):
    tensors = half(1, 2, 3, 16), half(1, 2, 4, 16, seed=1), half(1, 2, 4, 16, seed=2)
    check(lambda q, k, v: ops.attention(q, k, v, seen), seen_by(np.ones((1, 1, 4), bool), 0.25, 3), *tensors)
    assert "attn_mask" not in calls[0] and "sparse_mode" not in calls[0] and calls[0]["scalar_value"] == 0.25


@pytest.mark.parametrize("repeats", [1, 2])
def test_packed_documents(calls: list[dict[str, Any]], repeats: int):
    """Cumulative ends without a leading 0, of all rows in one line: documents of 2, 3, then 4, then 1 tokens."""
    documents = np.array([[7, 7, 3, 3, 3], [0, 0, 0, 0, 7]])
    allowed = triangle(5, 5) & (documents[:, :, None] == documents[:, None])
    tensors = half(2, 2, repeats * 5, 5), half(2, 2, 5, 5, seed=1), half(2, 2, 5, 5, seed=2)
    seen = ops.Seen(5, 5, documents=documents)
    check(lambda q, k, v: ops.attention(q, k, v, seen, 0.3), seen_by(allowed, 0.3, repeats), *tensors)
    assert calls[0] == {
        "query": (10, 2 * repeats, 16),
        "key": (10, 2, 16),
        "value": (10, 2, 16),
        "head_num": 2 * repeats,
        "attn_mask": (2048, 2048),
        "actual_seq_qlen": (2, 5, 9, 10),
        "actual_seq_kvlen": (2, 5, 9, 10),
        "next_tokens": 0,
        "sparse_mode": 3,
        "scalar_value": 0.3,
        "input_layout": "TND",
    }


@pytest.mark.parametrize("kind", ["padding", "window", "documents in pieces", "too many documents"])
def test_other_masks_are_of_all_pairs(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, kind: str):
    """A query that is padding sees itself, where the plain form has it see everything alike: nobody reads either."""
    real = np.array([[False, True, True, True], [True] * 4]) if kind == "padding" else None
    documents = {"documents in pieces": np.array([[1, 2, 1, 1], [1] * 4]), "too many documents": np.array([[1, 1, 2, 2]] * 2)}.get(
        kind
    )
    monkeypatch.setattr(fused, "DOCUMENTS", 3)
    allowed = np.broadcast_to(triangle(4, 4), (2, 4, 4))
    allowed = allowed & np.triu(np.ones((4, 4), bool), -1) if kind == "window" else allowed
    allowed = allowed if documents is None else allowed & (documents[:, :, None] == documents[:, None])
    allowed = allowed if real is None else allowed & real[:, None] | np.eye(4, dtype=bool)
    tensors = half(2, 1, 8, 16), half(2, 1, 4, 16, seed=1), half(2, 1, 4, 16, seed=2)
    seen = ops.Seen(4, 4, real, documents, 2 if kind == "window" else None)
    check(lambda q, k, v: ops.attention(q, k, v, seen), seen_by(allowed, 0.25, 2), *tensors)
    shape = (4, 4) if kind == "window" else (2, 1, 4, 4)
    assert (calls[0]["attn_mask"], calls[0]["sparse_mode"], calls[0]["input_layout"]) == (shape, 1, "BNSD")


def test_where_it_has_no_form_the_plain_one_is_used(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    q = Tensor(half(1, 1, 4, 16))
    seen, single, wide = ops.Seen(4, 4), q.astype(ms.float32), Tensor(half(1, 1, 4, 528))
    ops.attention(single, single, single, seen)
    ops.attention(q, q, q, seen, softcap=3.0)
    ops.attention(q, q, q, seen.tensor())
    ops.attention(wide, wide, wide, seen)
    ops.attention(q, q, wide, seen)
    monkeypatch.setenv(FUSED_ATTENTION, "0")
    ops.attention(q, q, q, seen)
    assert calls == []
    monkeypatch.setenv(FUSED_ATTENTION, "no")
    with pytest.raises(ValueError, match="BMTRAIN_MS_FUSED_ATTENTION='no': write 0 for attention without"):
        ops.attention(q, q, q, seen)


def test_bfloat16(calls: list[dict[str, Any]]):
    q = Tensor(half(1, 2, 4, 16)).astype(ms.bfloat16)
    found = ops.attention(q, q, q, ops.Seen(4, 4))
    wide = q.astype(ms.float32).asnumpy().astype(np.float64)
    expected = seen_by(triangle(4, 4), 0.25, 1)(wide, wide, wide)
    assert len(calls) == 1 and found.dtype == ms.bfloat16
    np.testing.assert_allclose(found.astype(ms.float32).asnumpy(), expected, rtol=0, atol=2e-2)


def asked(**changed: Any) -> dict[str, Any]:
    x = Tensor(half(2, 2, 4, 16))
    mask = fused._triangle()
    given = {"query": x, "key": x, "value": x, "head_num": 2, "attn_mask": mask, "sparse_mode": 3, "input_layout": "BNSD"}
    return {**given, **changed}


def packed(**changed: Any) -> dict[str, Any]:
    x = Tensor(half(8, 2, 16))
    ends = {"actual_seq_qlen": (3, 8), "actual_seq_kvlen": (3, 8), "next_tokens": 0}
    return asked(query=x, key=x, value=x, input_layout="TND", **{**ends, **changed})


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: asked(input_layout="BSH"), "another layout"),
        (lambda: asked(query=Tensor(half(2, 2, 4, 16)).astype(ms.float32)), "types other than"),
        (lambda: asked(value=Tensor(half(2, 2, 4, 32))), "keys and values of different shapes"),
        (lambda: asked(head_num=4), "another head_num"),
        (lambda: asked(**dict.fromkeys(("key", "value"), Tensor(half(2, 3, 4, 16)))), "do not divide"),
        (lambda: asked(**dict.fromkeys(("query", "key", "value"), Tensor(half(2, 2, 4, 8)))), "no multiple of 16"),
        (lambda: asked(attn_mask=fused._triangle().astype(ms.float16)), "another type than bool"),
        (lambda: asked(attn_mask=None), "none in one"),
        (lambda: asked(sparse_mode=4), "another mode"),
        (lambda: asked(attn_mask=Tensor(np.zeros((2048, 2048), np.uint8))), "not the compressed triangle"),
        (lambda: asked(attn_mask=Tensor(np.zeros((1, 1, 4, 4), np.uint8)), sparse_mode=1), "not of all pairs"),
        (lambda: asked(actual_seq_qlen=(4,), actual_seq_kvlen=(4,)), "ends without packed rows"),
        (lambda: packed(actual_seq_qlen=(0, 3, 8), actual_seq_kvlen=(0, 3, 8)), "not those of all tokens"),
        (lambda: packed(actual_seq_qlen=(3, 7), actual_seq_kvlen=(3, 7)), "not those of all tokens"),
        (lambda: packed(actual_seq_kvlen=None), "ends without packed rows, or packed rows without"),
        (lambda: packed(next_tokens=5), "later tokens are seen"),
        (lambda: packed(sparse_mode=1), "without the compressed triangle"),
        (lambda: asked(keep_prob=0.5), "dropout"),
        (lambda: asked(prefix=(1, 2)), "not used here"),
    ],
)
def test_what_the_documentation_does_not_allow_is_refused(call: Any, told: str):
    with pytest.raises(ValueError, match=told):
        fused.stand_in(**call())


def test_the_stand_in_has_the_signature():
    with pytest.raises(TypeError, match="scale_value"):
        fused.stand_in(**asked(), scale_value=0.5)  # as the documentation calls it; it is `scalar_value`
    assert fused.stand_in(**asked()).shape == (2, 2, 4, 16) and fused.stand_in(**packed()).shape == (8, 2, 16)


@pytest.mark.parametrize("kind", ["plain", "padding", "documents", "window", "latent"])
def test_models_are_those_of_the_plain_form(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, kind: str):
    """Logits and gradients in float16, with and without recomputation."""
    ids = Tensor(np.random.default_rng(0).integers(0, 32, (2, 6)).astype(np.int32))
    marks = {
        "padding": {"padding": np.array([[False, False, True, True, True, True], [True] * 6])},
        "documents": {"documents": np.array([[0, 0, 0, 1, 1, 1], [5, 4, 4, 4, 4, 4]])},
    }.get(kind, {})
    real = marks.get("padding", np.ones((2, 6), bool))[..., None]
    sizes = {"vocab_size": 32, "dim_model": 32, "num_heads": 4, "num_layers": 2, "dtype": "float16"}
    latent = {"dim_ff": 48, "kv_rank": 16, "dim_nope": 16, "dim_rope": 8, "dim_value": 12, "first_dense": 2}
    found: list[list[np.ndarray]] = []
    for word in ("0", "1"):
        monkeypatch.setenv(FUSED_ATTENTION, word)
        if kind == "latent":
            model: Any = DeepseekV2(DeepseekV2Config(**sizes, **latent))
        elif kind == "window":
            model = Mistral(MistralConfig(**sizes, dim_ff=48, num_heads_kv=2, window=3))
        else:
            model = Llama(LlamaConfig(**sizes, dim_ff=48, num_heads_kv=2))
        model = spread(model, Spread(recompute=word == "1"))
        ms.set_seed(1)
        bms.init_parameters(model)

        def loss(model: Any = model) -> Tensor:
            return ((model(ids, **marks).astype(ms.float32) * Tensor(real.astype(np.float32))) ** 2).sum()

        assert calls == []
        value, grads = ms.value_and_grad(loss, None, model.trainable_params())()
        found.append([value.asnumpy(), *(g.astype(ms.float32).asnumpy() for g in grads)])
    assert len(calls) >= 4  # two layers, forward and again
    for plain, with_fused in zip(*found):
        np.testing.assert_allclose(with_fused, plain, rtol=0, atol=1e-2 * np.abs(plain).max())
