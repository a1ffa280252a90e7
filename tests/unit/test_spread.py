"""Plain models, and what spreading them changes."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, World, use_world
from bmtrain_ms.compat.cells import child_table, parameter_table
from bmtrain_ms.model_center import Spread, spread
from bmtrain_ms.model_center.layer import Encoder, Linear, Positions, RMSNorm, RotaryEmbedding, TransformerBlock
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn.functional import cross_entropy
from tests.helpers.adapters import adapted

SIZES = {"vocab_size": 37, "dim_model": 24, "num_heads": 4, "num_heads_kv": 2, "dim_ff": 40, "num_layers": 2}


def initialised(**options: Any) -> Llama:
    model = Llama(LlamaConfig(**SIZES, init_std=0.2, **options))
    bms.init_parameters(model)
    return model


def test_spreading_wraps_the_layers_and_leaves_names_and_values(single_world):
    model = initialised()
    before = {p.name: (p, p.asnumpy().tobytes()) for p in model.get_parameters()}
    assert spread(model, Spread(recompute=False, zero_level=2)) is model
    assert [(block.use_checkpoint, block.zero_level) for block in model.model.layers] == [(False, 2)] * 2
    assert all(isinstance(block, bms.Block) for block in model.model.layers)
    after = dict(model.parameters_and_names())
    assert list(after) == list(before) == [p.name for p in after.values()]
    for name, (p, values) in before.items():
        assert after[name] is p and p.asnumpy().tobytes() == values


def test_initial_values_do_not_depend_on_when_a_model_is_spread(single_world):
    late = spread(initialised())
    early = spread(Llama(late.config))
    bms.init_parameters(early)
    for a, b in zip(late.get_parameters(), early.get_parameters()):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy())


def test_a_model_inside_another_cell_is_spread_with_it(single_world):
    class Both(nn.Cell):
        def __init__(self):
            super().__init__()
            self.first, self.second = Llama(LlamaConfig(**SIZES)), Llama(LlamaConfig(**SIZES))

    both = Both()
    names = [p.name for p in both.get_parameters()]
    assert names[0] == "first.model.embed_tokens.weight"
    spread(both)
    assert [p.name for p in both.get_parameters()] == names
    assert all(isinstance(block, bms.Block) for llama in (both.first, both.second) for block in llama.model.layers)


def test_an_encoder_without_embedding_takes_hidden_states(single_world):
    rotary = RotaryEmbedding(6)
    encoder = Encoder((TransformerBlock(24, 40, 4, 6, rotary=rotary) for _ in range(2)), RMSNorm(24))
    bms.init_parameters(encoder)
    x = Tensor(np.random.default_rng(0).standard_normal((10, 24)).astype(np.float32))
    before = encoder(x, Positions(2, 5)).asnumpy()
    np.testing.assert_array_equal(spread(encoder)(x, Positions(2, 5)).asnumpy(), before)


def test_what_cannot_be_spread(single_world):
    model = spread(initialised())
    with pytest.raises(ValueError, match="this Llama has been spread already: a model is spread once"):
        spread(model)
    others: list[Any] = [nn.Dense(2, 2), bms.TransformerBlockList([Linear(2, 2)]), None]
    for other in others:
        with pytest.raises(TypeError, match=f"an Encoder in it, and {type(other).__name__} has none: use BMTrainModelWrapper"):
            spread(other)
    with pytest.raises(ValueError, match="zero_level must be 2 or 3, not 1"):
        Spread(zero_level=1)


# Other cells in a plain model #


def gradients(model: Llama) -> tuple[float, dict[str, np.ndarray]]:
    """The loss, and full gradients by name."""
    ids, params = Tensor(np.random.default_rng(0).integers(0, 37, (2, 6)).astype(np.int32)), model.trainable_params()

    def forward() -> Tensor:
        return cross_entropy(model(ids)[:, :-1].reshape(-1, 37), ids[:, 1:].reshape(-1))

    loss, grads = ms.value_and_grad(forward, None, params)()
    return loss.asnumpy().item(), {p.name: g.asnumpy().reshape(p.full_shape) for p, g in zip(params, grads)}


@pytest.mark.parametrize("how", [Spread(), Spread(recompute=False)], ids=["recomputed", "kept"])
def test_adapters_are_put_in_before_and_trained(single_world, how):
    """Against a plain model with the adapters multiplied into its weights, and the chain rule."""
    model = spread(adapted(LlamaConfig(**SIZES, init_std=0.2)), how)
    bms.init_parameters(model)
    names = [p.name for p in model.get_parameters()]
    assert len(set(names)) == len(names) == 2 * (9 + 4) + 3
    assert "model.layers.1.self_attn.q_proj.linear.weight" in names and "model.layers.0.mlp.down_proj.up.weight" in names
    values = {p.name: p.asnumpy().reshape(p.full_shape).astype(np.float64) for p in model.get_parameters()}
    twin = Llama(model.config)
    for p in twin.get_parameters():
        cell = p.name.removesuffix(".weight")
        if p.name not in values:
            values[p.name] = values[f"{cell}.linear.weight"] + values[f"{cell}.up.weight"] @ values[f"{cell}.down.weight"]
        p.copy_full(values[p.name].astype(np.float32))
    (loss, grads), (expected_loss, expected) = gradients(model), gradients(twin)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert len(grads) == len(names) - 4  # those that are adapted are frozen
    for name, grad in grads.items():
        cell, _, part = name.removesuffix(".weight").rpartition(".")
        if part == "up":
            other = expected[f"{cell}.weight"] @ values[f"{cell}.down.weight"].T
        elif part == "down":
            other = values[f"{cell}.up.weight"].T @ expected[f"{cell}.weight"]
        else:
            other = expected[name]
        np.testing.assert_allclose(grad, other, atol=2e-5 * np.abs(other).max() + 1e-7, err_msg=name)


def test_nothing_of_another_model_is_gathered_ahead_in_evaluation():
    """It may be gone the next time, which is for each rank's garbage collector to say: ranks would not gather the same."""
    engine = RecordingEngine(SimulatedEngine(0, 2))
    ids = Tensor(np.zeros((1, 3), np.int32))
    with use_world(World(engine, Mesh(2, 0))):
        first, second = (spread(Llama(LlamaConfig(**SIZES))) for _ in range(2))
        seen = []
        for model in (first, second, first, second, first):
            engine.events.clear()
            model(ids)
            seen.append([event.label for event in engine.events if event.op == "all_gather"])
        assert sorted(seen[0]) == sorted(seen[2]) == sorted(seen[4]) and sorted(seen[1]) == sorted(seen[3])


@pytest.mark.parametrize(("left", "right"), [("q_proj", "o_proj"), ("o_proj", "q_proj")])
def test_a_parameter_that_would_be_divided_in_two_ways_is_refused(single_world, left: str, right: str):
    with use_world(World(SimulatedEngine(0, 2), Mesh(2, 0, tp=2), seed=3)):
        model = Llama(LlamaConfig(**SIZES))
        attention = model.model.layers[0].self_attn
        parameter_table(child_table(attention)[left])["weight"] = parameter_table(child_table(attention)[right])["weight"]
        with pytest.raises(
            ValueError, match=r"is in two layers that tensor .* dim 0 in 2 and dim 1 in 2: give each its own, or use"
        ):
            spread(model)
        model = Llama(LlamaConfig(**SIZES))
        parameter_table(model)["extra"] = parameter_table(model.model.layers[1].self_attn.q_proj)["weight"]
        with pytest.raises(
            ValueError, match=r"extra is the parameter \S+ of a layer that is divided .*, and Llama is not: give each"
        ):
            spread(model)
