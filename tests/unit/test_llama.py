"""Configuration and shape of the model, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.model_center import Spread, spread
from bmtrain_ms.model_center.layer import Attention, LayerNorm, RopeScaling, RotaryEmbedding
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn.functional import cross_entropy
from bmtrain_ms.optim import AdamOptimizer, OptimManager

SIZES = {"vocab_size": 37, "dim_model": 24, "num_heads": 4, "num_heads_kv": 2, "dim_ff": 40, "num_layers": 2}


def test_config_fills_in_checks_and_survives_json(tmp_path):
    config = LlamaConfig(**SIZES)
    assert config.dim_head == 6 and LlamaConfig(dim_model=64, num_heads=2).num_heads_kv == 2
    config.to_json_file(tmp_path / "config.json")
    assert LlamaConfig.from_json_file(tmp_path / "config.json") == config
    with pytest.raises(ValueError, match="dim_model=25 is not a multiple of num_heads=4; set dim_head"):
        LlamaConfig(dim_model=25, num_heads=4)
    with pytest.raises(ValueError, match="num_layers must be at least 1, not 0"):
        LlamaConfig(num_layers=0)
    with pytest.raises(ValueError, match=r"unknown fields of LlamaConfig: \['depth'\]"):
        LlamaConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, not 'fp16'"):
        LlamaConfig(dtype="fp16")


@pytest.mark.parametrize("half", [True, False])
def test_config_files_of_earlier_releases_are_read(half):
    before = {**LlamaConfig(**SIZES).to_dict(), "half": half, "use_checkpoint": False, "zero_level": 2}
    del before["dtype"]
    assert LlamaConfig.from_dict(before) == LlamaConfig(**SIZES, dtype="float16" if half else "float32")
    assert len(before) == 18  # the caller's dict stays as it was


@pytest.mark.parametrize(
    "field, advice",
    [
        ("half", 'write dtype="float16" for float16 parameters'),
        ("use_checkpoint", r"write spread\(model, Spread\(recompute=\.\.\.\)\)"),
        ("zero_level", r"write spread\(model, Spread\(zero_level=\.\.\.\)\)"),
    ],
)
def test_fields_that_have_gone_say_what_to_write(field, advice):
    arguments: dict[str, Any] = {**SIZES, field: True}
    with pytest.raises(TypeError, match=f"^{field} is no longer a field of LlamaConfig, which holds sizes: {advice}$"):
        LlamaConfig(**arguments)


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
    model = spread(Llama(LlamaConfig(**SIZES, tied=tied, dtype="float16" if half else "float32")))
    bms.init_parameters(model)
    names = [p.name for p in model.get_parameters()]
    assert len(names) == len(set(names)) == 2 * 9 + 2 + (not tied)
    assert names == [path for path, _ in model.parameters_and_names()]
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parameters_are_of_the_configured_dtype(single_world, dtype):
    model = Llama(LlamaConfig(**SIZES, dtype=dtype))
    assert {p.dtype for p in model.get_parameters()} == {getattr(ms, dtype)}


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
    hidden = params["model.embed_tokens.weight"][ids]
    for i in range(config.num_layers):
        layer = {n.split(f"layers.{i}.", 1)[1]: p for n, p in params.items() if f"layers.{i}." in n}
        x = rms_norm(hidden, layer["input_layernorm.weight"])
        q, k, v = ((x @ layer[f"self_attn.{n}_proj.weight"].T).reshape(batch, length, -1, config.dim_head) for n in "qkv")
        repeats = config.num_heads // config.num_heads_kv
        q, k, v = rotated(q), np.repeat(rotated(k), repeats, 2), np.repeat(v, repeats, 2)
        scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(config.dim_head) + causal)
        mixed = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
        hidden = hidden + mixed.reshape(batch, length, -1) @ layer["self_attn.o_proj.weight"].T
        x = rms_norm(hidden, layer["post_attention_layernorm.weight"])
        gate = x @ layer["mlp.gate_proj.weight"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (x @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    head = params.get("lm_head.weight", params["model.embed_tokens.weight"])
    return rms_norm(hidden, params["model.norm.weight"]) @ head.T


def loss_of(logits, targets):
    wide = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return wide.mean()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("how", [Spread(), Spread(recompute=False), None], ids=["recomputed", "kept", "plain"])
def test_logits_and_gradients_are_the_formulas(single_world, tied, how):
    """Gradients by the directional derivative along a random direction of every parameter."""
    config = LlamaConfig(**SIZES, dim_head=8, rope_base=100.0, init_std=0.2, tied=tied)
    model = Llama(config) if how is None else spread(Llama(config), how)
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
    model = spread(Llama(LlamaConfig(**SIZES, tied=True)))
    bms.init_parameters(model)
    assert model.lm_head is None
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


def test_config_of_all_fields_survives_a_dict():
    scaling = RopeScaling("longrope", original=8, longest=32, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4)
    config = LlamaConfig(5, 4, 2, 1, 8, 3, 2, 1e-3, 50.0, 0.1, "bfloat16", True, scaling, 0.3, True, True)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == copy.deepcopy(config) == config
    values = list(config.to_dict().values())
    assert values == [5, 4, 2, 1, 8, 3, 2, 1e-3, 50.0, 0.1, "bfloat16", True, dataclasses.asdict(scaling), 0.3, True, True]
    assert dataclasses.replace(config, tied=False).tied is False


# Hugging Face's names #

GOLDEN = {
    "untied": [
        [-1.84628, -1.54211, -1.03676, -0.39615, 0.29614, 0.94979, 1.47954, 1.81627, 1.91604, 1.76585, 1.38529],
        [0.14294, -0.50541, -1.08782, -1.52831, -1.76942, -1.77969, -1.55779, -1.13265, -0.55975, 0.08618, 0.72086],
        [0.50357, 0.20316, -0.12375, -0.43452, -0.6886, -0.85285, -0.90583, -0.84064, -0.66578, -0.40406, -0.08963],
        [0.26393, -0.40953, -1.02956, -1.51527, -1.8033, -1.85607, -1.6667, -1.25989, -0.68871, -0.02769, 0.63695],
        [0.59651, 0.28327, -0.06693, -0.4084, -0.69658, -0.89389, -0.97459, -0.92814, -0.7606, -0.49384, -0.16265],
    ],
    "tied": [
        [1.1161, 1.30396, 1.3217, 1.16702, 0.86009, 0.44095, -0.03572, -0.50772, -0.91349, -1.20009, -1.33012],
        [1.89097, 1.78379, 1.44391, 0.91564, 0.26793, -0.41474, -1.04331, -1.53576, -1.82786, -1.88149, -1.68967],
        [0.72238, 1.02295, 1.19006, 1.20192, 1.05698, 0.77414, 0.39031, -0.04444, -0.4734, -0.84059, -1.09812],
        [1.89809, 1.802, 1.47081, 0.94775, 0.30105, -0.38494, -1.0207, -1.5233, -1.82717, -1.89267, -1.71125],
        [0.1583, 0.52313, 0.81971, 1.00935, 1.06732, 0.98604, 0.77612, 0.46495, 0.09312, -0.29085, -0.63688],
    ],
}
LAYER = "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"


def names_of(layers: int, tied: bool) -> list[str]:
    """What transformers' LlamaForCausalLM calls its parameters."""
    inner = [*LAYER.split(), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    cells = [f"model.layers.{i}.{name}" for i in range(layers) for name in inner]
    return sorted(f"{cell}.weight" for cell in [*cells, "model.embed_tokens", "model.norm", *([] if tied else ["lm_head"])])


@pytest.mark.parametrize("kind", GOLDEN)
def test_names_and_logits_are_those_of_transformers(single_world, tmp_path, kind):
    """Golden logits of transformers 4.46.3 (PyTorch 2.5.1), of the weights made here:

    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=100.0, tie_word_embeddings=tied))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    model.eval()(torch.tensor([[3, 1, 4, 1, 5]])).logits

    What `bms.save` writes of such models `LlamaForCausalLM.from_pretrained` read there, with nothing missing or unexpected, and
    its logits were these models' to 2e-6.
    """
    config = LlamaConfig(11, 16, 4, 2, dim_ff=20, num_layers=2, rope_base=100.0, tied=kind == "tied")
    model = spread(Llama(config))
    shapes = {p.name: p.full_shape for p in model.get_parameters()}
    assert sorted(shapes) == names_of(2, config.tied)
    weights = {}
    for i, name in enumerate(sorted(shapes)):
        wave = 0.3 * np.sin((i + 1) * 0.37 * np.arange(np.prod(shapes[name]), dtype=np.float64))
        weights[name] = (wave + ("norm" in name)).astype(np.float32).reshape(shapes[name])
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    bms.load(model, tmp_path / "model.safetensors")
    logits = model(Tensor(np.array([[3, 1, 4, 1, 5]], np.int32))).asnumpy()
    np.testing.assert_allclose(logits[0], GOLDEN[kind], atol=2e-5)
    bms.save(model, tmp_path / "again.safetensors")
    again = safetensors.numpy.load_file(tmp_path / "again.safetensors")
    np.testing.assert_equal(again, weights)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_in_files_of_earlier_releases(single_world, tied):
    model = Llama(LlamaConfig(**{**SIZES, "num_layers": 12}, tied=tied))
    earlier = {model.earlier_name(p.name) for p in model.get_parameters()}
    inner = ["attention_norm", "ffn_norm", "ffn.w_gated", "ffn.w_in", "ffn.w_out"]
    inner += [f"attention.{name}" for name in ("project_q", "project_k", "project_v", "attention_out")]
    expected = {f"encoder.layers.{i}.{name}.weight" for i in range(12) for name in inner}
    expected |= {"input_embedding.weight", "encoder.output_norm.weight"} | (set() if tied else {"output_projection.weight"})
    assert earlier == expected
    assert model.earlier_name("steps") == "steps"


def test_weights_that_differ_from_step_to_step_are_no_news(single_world, capfd):
    """Of graphs that differ MindSpore 2.5 prints the stack where that was recorded; and the weight is what gradients are multiplied
    with."""
    model = spread(Llama(LlamaConfig(vocab_size=11, dim_model=8, num_heads=2, dim_ff=12, num_layers=1)))
    bms.init_parameters(model)
    ids, params = Tensor(np.array([[1, 2, 3]], np.int32)), model.trainable_params()
    found = []
    for weight in (1.0, 0.5, 0.25, 2.0):
        value, grads = ms.value_and_grad(lambda weight=weight: model.loss(ids, ids, weight=weight), None, params)()
        found.append([x.asnumpy() / weight for x in (value, *grads)])
    for one, other in zip(found[0], found[-1]):
        np.testing.assert_array_equal(one, other)
    assert "File" not in capfd.readouterr().err
