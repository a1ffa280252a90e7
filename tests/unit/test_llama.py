"""Configuration and shape of the model, and that it learns."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.model_center.layer import Attention, LayerNorm, RotaryEmbedding
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn.functional import cross_entropy
from bmtrain_ms.optim import AdamOptimizer, OptimManager

SIZES = {"vocab_size": 37, "dim_model": 24, "num_heads": 4, "num_heads_kv": 2, "dim_ff": 40, "num_layers": 2}


def test_config_fills_in_checks_and_survives_json(tmp_path):
    config = LlamaConfig(**SIZES)
    assert config.dim_head == 6 and LlamaConfig(dim_model=64, num_heads=2).num_heads_kv == 2
    assert config.dtype == ms.float32 and LlamaConfig(half=True).dtype == ms.float16
    config.to_json_file(tmp_path / "config.json")
    assert LlamaConfig.from_json_file(tmp_path / "config.json") == config
    with pytest.raises(ValueError, match="dim_model=25 is not a multiple of num_heads=4; set dim_head"):
        LlamaConfig(dim_model=25, num_heads=4)
    with pytest.raises(ValueError, match="num_layers must be at least 1, not 0"):
        LlamaConfig(num_layers=0)
    with pytest.raises(ValueError, match=r"unknown fields of LlamaConfig: \['depth'\]"):
        LlamaConfig.from_dict({"depth": 3})


def test_layers_refuse_what_does_not_fit(single_world):
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_heads_kv=3"):
        Attention(8, 4, 2, 3)
    with pytest.raises(ValueError, match="needs an even dim_head, not 3"):
        RotaryEmbedding(3)


def test_layer_norm_layer(single_world):
    layer = LayerNorm(5)
    bms.init_parameters(layer)
    x = np.random.RandomState(0).randn(3, 5).astype(np.float32)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), expected, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_shapes_names_and_learning(single_world, tied, half):
    model = Llama(LlamaConfig(**SIZES, tied=tied, half=half))
    bms.init_parameters(model)
    names = [p.name for p in model.get_parameters()]
    assert len(names) == len(set(names)) == 2 * 9 + 2 + (not tied)
    assert "encoder.layers.1.attention.project_q.weight" in names
    optimizer = AdamOptimizer(model.trainable_params(), lr=1e-2)
    manager = OptimManager(loss_scale=128.0 if half else None)
    manager.add_optimizer(optimizer)
    ids = Tensor(np.tile(np.arange(10, dtype=np.int32), (2, 1)))
    assert model(ids).shape == (2, 10, 37)
    losses = []
    for _ in range(25):
        manager.zero_grad()
        loss = manager.backward(lambda: cross_entropy(model(ids)[:, :-1].reshape(-1, 37), ids[:, 1:].reshape(-1)))
        losses.append(loss.asnumpy().item())
        assert manager.step()
    assert abs(losses[0] - np.log(37)) < 0.1 and losses[-1] < 0.3


def test_the_future_is_not_seen(single_world):
    model = Llama(LlamaConfig(**SIZES, init_std=0.3))
    bms.init_parameters(model)
    ids = np.random.RandomState(0).randint(0, 37, (1, 8)).astype(np.int32)
    before = model(Tensor(ids)).asnumpy()
    ids[0, 5] = (ids[0, 5] + 1) % 37
    after = model(Tensor(ids)).asnumpy()
    np.testing.assert_array_equal(after[0, :5], before[0, :5])
    assert np.abs(after[0, 5:] - before[0, 5:]).max() > 1e-3


# Against the formulas in float64 #


def rms_norm(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w


def rotated(x):
    """x (batch, length, heads, dim), halves paired."""
    length, dim = x.shape[1], x.shape[3]
    angles = np.outer(np.arange(length), 100.0 ** (-np.arange(0, dim, 2) / dim))[None, :, None]
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1)


def reference(params, config, ids):
    """Logits of Llama as in the papers; every query head with its own copy of keys and values."""
    batch, length = ids.shape
    causal = np.where(np.tril(np.ones((length, length))), 0.0, -np.inf)
    hidden = params["input_embedding.weight"][ids]
    for i in range(config.num_layers):
        layer = {n.split(f"layers.{i}.", 1)[1]: p for n, p in params.items() if f"layers.{i}." in n}
        x = rms_norm(hidden, layer["attention_norm.weight"])
        q, k, v = ((x @ layer[f"attention.project_{n}.weight"].T).reshape(batch, length, -1, config.dim_head) for n in "qkv")
        repeats = config.num_heads // config.num_heads_kv
        q, k, v = rotated(q), np.repeat(rotated(k), repeats, 2), np.repeat(v, repeats, 2)
        scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(config.dim_head) + causal)
        mixed = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
        hidden = hidden + mixed.reshape(batch, length, -1) @ layer["attention.attention_out.weight"].T
        x = rms_norm(hidden, layer["ffn_norm.weight"])
        gate = x @ layer["ffn.w_gated.weight"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (x @ layer["ffn.w_in.weight"].T)) @ layer["ffn.w_out.weight"].T
    head = params.get("output_projection.weight", params["input_embedding.weight"])
    return rms_norm(hidden, params["encoder.output_norm.weight"]) @ head.T


def loss_of(logits, targets):
    wide = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return wide.mean()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("use_checkpoint", [True, False], ids=["recomputed", "kept"])
def test_logits_and_gradients_are_the_formulas(single_world, tied, use_checkpoint):
    """Gradients by the directional derivative along a random direction of every parameter."""
    config = LlamaConfig(**SIZES, dim_head=8, rope_base=100.0, init_std=0.2, tied=tied, use_checkpoint=use_checkpoint)
    model = Llama(config)
    bms.init_parameters(model)
    random = np.random.default_rng(0)
    for p in model.get_parameters():
        if "norm" in p.name:
            p.copy_full(random.uniform(0.5, 1.5, p.full_shape).astype(np.float32))
    ids, targets = random.integers(0, 37, (2, 2, 7)).astype(np.int32)
    params = {p.name: p.asnumpy().reshape(p.full_shape).astype(np.float64) for p in model.get_parameters()}
    expected = reference(params, config, ids)
    np.testing.assert_allclose(model(Tensor(ids)).asnumpy(), expected, atol=2e-5 * np.abs(expected).max())

    def forward():
        return cross_entropy(model(Tensor(ids)).reshape(-1, 37), Tensor(targets.reshape(-1)))

    value, grads = ms.value_and_grad(forward, None, model.trainable_params())()
    assert value.asnumpy().item() == pytest.approx(loss_of(expected, targets), rel=1e-5)
    assert len(grads) == len(params)
    for p, grad in zip(model.trainable_params(), grads):
        kept = params[p.name]
        direction = random.standard_normal(p.full_shape)
        params[p.name] = kept + 1e-5 * direction
        above = loss_of(reference(params, config, ids), targets)
        params[p.name] = kept - 1e-5 * direction
        slope = (above - loss_of(reference(params, config, ids), targets)) / 2e-5
        params[p.name] = kept
        assert (grad.asnumpy().reshape(p.full_shape) * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-6), p.name


def test_a_tied_model_has_one_table(single_world):
    """Its gradient is the sum of both uses."""
    model = Llama(LlamaConfig(**SIZES, tied=True))
    bms.init_parameters(model)
    assert model.output_projection is None
    assert [p.full_shape for p in model.get_parameters() if 37 in p.full_shape] == [(37, 24)]
    ids = Tensor(np.array([[1, 2]], np.int32))
    grad = ms.grad(lambda: model(ids)[0, :, 30].sum(), None, model.trainable_params()[:1])()[0].asnumpy().reshape(37, 24)
    used = np.flatnonzero(np.abs(grad).sum(1)).tolist()
    assert used == [1, 2, 30]  # read as input, and as the output's row


def test_padding_on_the_left_changes_nothing(single_world):
    model = Llama(LlamaConfig(**SIZES, init_std=0.3))
    bms.init_parameters(model)
    ids = np.random.RandomState(0).randint(0, 37, (1, 4)).astype(np.int32)
    alone = model(Tensor(ids)).asnumpy()
    padded = np.concatenate([np.full((1, 3), 9, np.int32), ids], 1)
    seen = np.array([[False] * 3 + [True] * 4])
    out = model(Tensor(padded), Tensor(seen)).asnumpy()
    np.testing.assert_allclose(out[:, 3:], alone, atol=1e-5 * np.abs(alone).max())
    assert np.isfinite(out).all()
    assert np.abs(model(Tensor(padded)).asnumpy()[:, 3:] - alone).max() > 1e-2  # without the mask it does


def test_config_sizes():
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_heads_kv=3"):
        LlamaConfig(dim_model=8, num_heads=4, num_heads_kv=3)
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_heads_kv=-2"):
        LlamaConfig(dim_model=8, num_heads=4, num_heads_kv=-2)
    with pytest.raises(ValueError, match="dim_head must be positive and even, not 3: rotary embedding turns pairs"):
        LlamaConfig(dim_model=6, num_heads=2)
    with pytest.raises(ValueError, match="dim_head must be positive and even, not -2"):
        LlamaConfig(dim_head=-2)
    for name in ("vocab_size", "dim_model", "num_heads", "dim_ff"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not -1"):
            LlamaConfig(**{name: -1})
    with pytest.raises(ValueError, match="num_heads must be at least 1, not 0"):
        LlamaConfig(num_heads=0)
    with pytest.raises(ValueError, match="zero_level must be 2 or 3, not 1"):
        LlamaConfig(zero_level=1)


def test_config_of_all_fields_survives_a_dict():
    config = LlamaConfig(5, 4, 2, 1, 8, 3, 2, 1e-3, 50.0, 0.1, True, True, False, 2)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert list(config.to_dict().values()) == [5, 4, 2, 1, 8, 3, 2, 1e-3, 50.0, 0.1, True, True, False, 2]
