"""Low-rank adapters: what is added, trained, merged and refused."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SimulatedEngine, World, use_world
from bmtrain_ms.compat.cells import parameter_table
from bmtrain_ms.compat.runtime import from_host, host_array
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.layer import KeyValueCache
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn import RouterConfig, add_lora, freeze, merge_lora, thaw
from tests.golden.models import FOLDER, batches, weight
from tests.unit.test_families import model_of

pytestmark = pytest.mark.usefixtures("single_world")
PARTS = ("lora_A", "lora_B")


def with_adapters() -> bms.nn.MoE:
    model = model_of("llama")
    add_lora(model, r"q_proj|v_proj|down_proj", rank=3, alpha=6)
    for p in model.get_parameters():
        if ".lora_" in p.name:
            p.copy_full(from_host(weight(p.name, p.full_shape)))
    return model


def test_loss_and_gradients_are_those_of_peft():
    """The golden file is PEFT's, of the same model and adapters."""
    model, right = with_adapters(), np.load(FOLDER / "lora.npz")
    ids = batches()["plain"]["ids"]
    targets = np.full(ids.shape, -100, np.int32)
    targets[:, :-1] = ids[:, 1:]
    np.testing.assert_allclose(model(Tensor(ids)).asnumpy(), right["logits"], atol=1e-4 * np.abs(right["logits"]).max())
    params = model.trainable_params()
    loss, grads = ms.value_and_grad(model.loss, None, params)(Tensor(ids), Tensor(targets))
    assert float(loss) == pytest.approx(float(right["loss"]), rel=1e-5)
    assert {p.name for p in params} == {name.removeprefix("grad:") for name in right.files if name.startswith("grad:")}
    for p, grad in zip(params, grads):
        expected = right[f"grad:{p.name}"]
        found = host_array(grad)[: expected.size].reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=p.name)


def test_adapters_start_with_nothing_and_are_all_that_is_trained():
    model = model_of("llama")
    ids = Tensor(batches()["plain"]["ids"])
    before = model(ids).asnumpy()
    paths = add_lora(model, "q_proj", rank=2)
    assert paths == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    adapters = [p for p in model.get_parameters() if ".lora_" in p.name]
    bms.init_parameters(model.model.layers[0].self_attn.q_proj.lora_A)
    assert np.array_equal(model(ids).asnumpy(), before)
    assert [p.name for p in model.trainable_params()] == [p.name for p in adapters] and len(adapters) == 4


def test_adapters_of_a_model_that_has_its_values_learn_at_once():
    """As when a model was loaded, which nobody initialises again; and their values are those that `init_parameters` draws."""
    model = model_of("llama")
    add_lora(model, "q_proj|down_proj", rank=2)
    values = {p.name: host_array(p).copy() for p in model.trainable_params()}
    assert all(found.any() == (".lora_A." in name) for name, found in values.items())
    spread(model)
    ids = Tensor(batches()["plain"]["ids"])
    params = model.trainable_params()
    _, grads = ms.value_and_grad(model.loss, None, params)(ids, ids)
    assert all(host_array(grad).any() == (".lora_B." in p.name) for p, grad in zip(params, grads))
    bms.init_parameters(model)
    assert all(np.array_equal(host_array(p), values[p.name]) for p in params)


@pytest.mark.parametrize(
    "case, pattern", [("llama", "lm_head"), ("deepseek_v2", "kv_b_proj"), ("deepseek_v2-lite", "_proj|lm_head")]
)
def test_layers_whose_weights_others_read_are_adapted_too(case: str, pattern: str):
    """The head makes a loss of its weight, and latent attention with a cache multiplies queries with one: as when merged."""
    model = model_of(case)
    add_lora(model, pattern, rank=3, alpha=6)
    for p in model.trainable_params():
        p.copy_full(from_host(weight(p.name, p.full_shape)))
    ids = Tensor(batches()["plain"]["ids"])

    def found() -> list[np.ndarray]:
        cache = KeyValueCache(ids.shape[1])
        parts = [model(ids[:, :4], None, cache), *(model(ids[:, t : t + 1], None, cache) for t in range(4, ids.shape[1]))]
        return [model.loss(ids, ids).asnumpy(), np.concatenate([x.asnumpy() for x in parts], 1), model(ids).asnumpy()]

    before = found()
    _, grads = ms.value_and_grad(model.loss, None, model.trainable_params())(ids, ids)
    assert all(host_array(grad).any() for grad in grads)
    merge_lora(model)
    for a, b in zip(before, found()):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("spreads", [False, True])
def test_merged_it_is_a_plain_model(spreads: bool):
    model = with_adapters()
    if spreads:
        spread(model)
    ids = Tensor(batches()["plain"]["ids"])
    before, names = model(ids).asnumpy(), [p.name for p in model_of("llama").get_parameters()]
    assert merge_lora(model) == 6 and merge_lora(model) == 0
    assert [p.name for p in model.get_parameters()] == names
    np.testing.assert_allclose(model(ids).asnumpy(), before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("first", ["adapters", "spread"])
def test_spread_and_trained(first: str):
    plain, blocks = with_adapters(), with_adapters() if first == "adapters" else model_of("llama")
    spread(blocks)
    if first == "spread":
        kept = {p.name: p for p in blocks.get_parameters()}
        blocks(Tensor(batches()["plain"]["ids"]))  # which has Blocks gather what they were made of
        add_lora(blocks, r"q_proj|v_proj|down_proj", rank=3, alpha=6)
        assert all(p is kept[p.name] for p in blocks.get_parameters() if p.name in kept)
        for p in blocks.trainable_params():
            p.copy_full(from_host(weight(p.name, p.full_shape)))
    ids = Tensor(batches()["plain"]["ids"])
    found = [ms.value_and_grad(m.loss, None, m.trainable_params())(ids, ids) for m in (plain, blocks)]
    assert float(found[0][0]) == float(found[1][0])
    assert len(found[0][1]) == len(found[1][1]) == 12
    for a, b in zip(found[0][1], found[1][1]):
        np.testing.assert_allclose(host_array(a), host_array(b), rtol=1e-5, atol=1e-7)


def test_freezing_by_name():
    model = model_of("qwen3_moe")
    assert all(".mlp.experts." in name for name in freeze(model, r"\.experts\."))
    assert not any(".experts." in p.name for p in model.trainable_params())
    freeze(model)
    assert not model.trainable_params()
    assert [p.name for p in model.trainable_params()] == [] and thaw(model, "lm_head") == ["lm_head.weight"]
    with pytest.raises(ValueError, match="no parameter of this Qwen3Moe has 'lm_hed' in its name"):
        thaw(model, "lm_hed")


def test_thawing_leaves_alone_what_was_never_trained():
    """Running means, and biases that a rule of its own moves; what `requires_grad` has frozen is thawed, where it is sharded."""
    norms = nn.SequentialCell(nn.BatchNorm1d(4), nn.Dense(4, 2))
    norms[1].bias.requires_grad = False
    moe = bms.nn.MoE(8, 8, 8, 2, RouterConfig("sigmoid", True, 2.5, groups=2, keep_groups=1, group_score="two_best", bias=True))
    table = bms.nn.Linear(2, 2)
    table.parameter("bias").requires_grad = False
    for model in (norms, moe, table):
        trained = [p.name for p in model.trainable_params()]
        freeze(model)
        freeze(model)
        assert not model.trainable_params()
        assert thaw(model) == [p.name for p in model.trainable_params()] == trained
    assert thaw(bms.nn.Linear(2, 2)) == ["weight", "bias"]
    for p in moe.get_parameters():
        p.requires_grad = False
    assert len(thaw(moe)) == len(list(moe.get_parameters())) - 1
    with pytest.raises(
        ValueError, match=r"no parameter of this MoE with 'correction' in its name was ever trained: set its requires"
    ):
        thaw(moe, "correction")


def test_merged_and_thawed_the_model_is_trained_as_before():
    model = model_of("llama")
    trained = [p.name for p in model.trainable_params()]
    add_lora(model, "q_proj", rank=2)
    merge_lora(model)
    thaw(model)
    assert [p.name for p in model.trainable_params()] == trained


def shared(how: str) -> Any:
    """A model of which a layer's weight is in two places."""
    if how == "one layer, two names":
        model = nn.Cell()
        model.a = bms.nn.Linear(4, 4)
        model.b = model.a
        return model
    model = model_of("llama")
    first, second = list(model.model.layers)[:2]
    if how == "one Block twice":
        model.model.layers = nn.CellList([first, first])
    if how == "one weight in two layers":
        parameter_table(second.self_attn.q_proj)["weight"] = parameter_table(first.self_attn.q_proj)["weight"]
    if how == "a table":
        parameter_table(model.lm_head)["weight"] = parameter_table(model.model.embed_tokens)["weight"]
    return model


@pytest.mark.parametrize(
    "how, pattern, told",
    [
        ("one layer, two names", "a|b", "a and b"),
        ("one layer, two names", "b", "a and b"),
        ("one Block twice", "q_proj", r"model.layers.0.self_attn.q_proj and model.layers.1.self_attn.q_proj"),
        ("one weight in two layers", r"1.self_attn", r"model.layers.0.self_attn.q_proj and model.layers.1.self_attn.q_proj"),
        ("a table", "lm_head", "model.embed_tokens and lm_head"),
    ],
)
def test_a_weight_in_two_places_is_given_no_adapter(how: str, pattern: str, told: str):
    model = shared(how)
    before = [(id(p), p.name, p.requires_grad) for p in model.get_parameters()]
    with pytest.raises(
        ValueError, match=rf"^{told} have one weight, which an adapter would be merged into for both: use a pattern"
    ):
        add_lora(model, pattern, rank=2)
    assert [(id(p), p.name, p.requires_grad) for p in model.get_parameters()] == before


def test_other_layers_of_a_model_that_shares_some_are_adapted():
    assert add_lora(shared("a table"), "0.self_attn.q_proj") == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("what", ["layer", "parameters"])
def test_an_adapted_layer_in_two_places_is_merged_once(what: str):
    model = with_adapters()
    first, second = (layer.self_attn for layer in list(model.model.layers)[:2])
    if what == "layer":
        second.q_proj = first.q_proj
    else:  # as when it was divided over tensor-parallel ranks
        for own, others in ((first.q_proj, second.q_proj), *((getattr(first.q_proj, x), getattr(second.q_proj, x)) for x in PARTS)):
            parameter_table(others)["weight"] = parameter_table(own)["weight"]
    ids = Tensor(batches()["plain"]["ids"])
    before = model(ids).asnumpy()
    assert merge_lora(model) == 5
    np.testing.assert_allclose(model(ids).asnumpy(), before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert (first.q_proj is second.q_proj) == (what == "layer") and not any(".lora_" in p.name for p in model.get_parameters())


def test_a_merge_that_would_change_another_place_is_refused():
    model = with_adapters()
    first, second = (layer.self_attn for layer in list(model.model.layers)[:2])
    parameter_table(second.q_proj)["weight"] = parameter_table(first.q_proj)["weight"]
    ids = Tensor(batches()["plain"]["ids"])
    before = model(ids).asnumpy()
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj and model.layers.1.self_attn.q_proj have one weight, and not one ad"
    ):
        merge_lora(model)
    assert (model(ids).asnumpy() == before).all()


def test_adapted_layers_are_not_looked_into_and_keep_their_adapters():
    model = model_of("llama")
    add_lora(model, "q_proj", rank=2)
    before = [(id(p), p.name, p.requires_grad) for p in model.get_parameters()]
    for pattern in ("q_proj|v_proj", "q_proj", "lora"):
        with pytest.raises(
            ValueError, match=r"^model.layers.0.self_attn.q_proj has an adapter already: use a |^no Linear layer has 'lora'"
        ):
            add_lora(model, pattern, rank=2)
    assert [(id(p), p.name, p.requires_grad) for p in model.get_parameters()] == before
    add_lora(model, "v_proj", rank=3)
    assert len(model.trainable_params()) == 8 and merge_lora(model) == 4


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_loss_of_an_adapted_head_is_made_in_pieces(rows: int):
    model = model_of("llama")
    add_lora(model, "lm_head", rank=3, alpha=6)
    params, ids = model.trainable_params(), Tensor(batches()["plain"]["ids"])
    for p in params:
        p.copy_full(from_host(weight(p.name, p.full_shape)))
    right = ms.value_and_grad(model.loss, None, params)(ids, ids)
    found = ms.value_and_grad(lambda x: model.loss(x, x, rows=rows), None, params)(ids)
    assert float(found[0]) == pytest.approx(float(right[0]), rel=1e-5)
    for a, b in zip(found[1], right[1]):
        np.testing.assert_allclose(host_array(a), host_array(b), rtol=0, atol=1e-5 * np.abs(host_array(b)).max())
    with pytest.raises(ValueError, match="rows must be at least 1, not 0"):
        model.loss(ids, ids, rows=0)


def test_what_is_refused():
    model = model_of("llama")
    with pytest.raises(
        ValueError, match=r"no Linear layer has 'query' in its path; the last parts .*: down_proj, gate_proj, k_proj, lm_head"
    ):
        add_lora(model, "query")
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        add_lora(model, "q_proj", rank=0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), not 1.0"):
        add_lora(model, "q_proj", dropout=1.0)
    layers = bms.PipelineTransformerBlockList([bms.nn.Linear(4, 4)])
    with pytest.raises(ValueError, match=r"in a PipelineTransformerBlockList cannot be given adapters: give them to the layers it"):
        add_lora(layers, "0")


def test_dropout_is_for_one_tensor_parallel_rank():
    model = model_of("llama")
    add_lora(model, "q_proj|o_proj", rank=2, dropout=0.1)
    attention = model.model.layers[0].self_attn
    for divided in (lambda: attention.q_proj.as_column(False, None), attention.o_proj.as_row):
        with pytest.raises(ValueError, match=r"_proj.weight has an adapter with dropout=0.1, .* use dropout=0"):
            divided()


def test_dropout_over_tensor_parallel_ranks_is_refused_before_anything_changes():
    with use_world(World(SimulatedEngine(0, 2), Mesh(2, 0, tp=2))):
        model = spread(Llama(LlamaConfig(vocab_size=16, dim_model=8, num_heads=2, dim_ff=16, num_layers=1)))
        trained = [p.name for p in model.trainable_params()]
        with pytest.raises(ValueError, match=r"q_proj.weight has an adapter with dropout=0.1, .* use dropout=0"):
            add_lora(model, "q_proj", dropout=0.1)
        assert [p.name for p in model.trainable_params()] == trained
