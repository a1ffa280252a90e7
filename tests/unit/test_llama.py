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
