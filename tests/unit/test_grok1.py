"""Grok-1 against outputs of the released code, where these are at hand."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from bmtrain_ms.compat.runtime import host_array
from bmtrain_ms.model_center.layer import KeyValueCache
from bmtrain_ms.model_center.model import Grok1, Grok1Config
from tests.unit.test_families import of_files

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "grok1_tiny.npz"

pytestmark = [
    pytest.mark.usefixtures("single_world"),
    pytest.mark.skipif(not GOLDEN.exists(), reason="outputs of the released code are not beside the project"),
]

CONFIG = Grok1Config(
    vocab_size=128, dim_model=96, num_heads=6, num_heads_kv=2, dim_head=16, dim_ff=512, num_layers=3, num_experts=4
)
CASES = {"base": (1.0, 0.0), "cap": (8.0, 0.0), "pad": (1.0, 0.0), "full": (1.0, 0.001)}


def weights(factor: float, curve: float) -> dict[str, np.ndarray]:
    """By the formula that the golden vectors were made with: names sorted, a sine of the element's number."""
    shapes = {"model.embed_tokens.weight": (128, 96), "model.norm.scale": (96,)}
    for i in range(3):
        layer = f"model.layers.{i}"
        for name, rows in (("q", 96), ("k", 32), ("v", 32), ("o", 96)):
            shapes[f"{layer}.attn.{name}_proj.weight"] = (rows, 96)
        for e in range(4):
            for name, shape in (("linear", (512, 96)), ("linear_v", (512, 96)), ("linear_1", (96, 512))):
                shapes[f"{layer}.moe_block.experts.{e}.{name}.weight"] = shape
        shapes[f"{layer}.moe_block.gate.weight"] = (4, 96)
        for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            shapes[f"{layer}.{name}.scale"] = (96,)
    found = {}
    for n, name in enumerate(sorted(shapes)):
        i = np.arange(np.prod(shapes[name])).astype(np.float64)
        wave = np.sin((1.0 + 0.37 * n) + 0.7390851332 * i + curve * (i * i))
        values = 1.0 + 0.1 * wave if name.endswith("scale") else 0.08 * wave
        values = values.astype(np.float32).reshape(shapes[name])
        found[name] = values * np.float32(factor) if ".q_proj." in name or ".k_proj." in name else values
    return found


def model_of(case: str) -> Grok1:
    model, there = Grok1(CONFIG), weights(*CASES[case])
    for p in model.get_parameters():
        p.copy_full(Tensor(of_files(model, p.name, p.full_shape, lambda name, shape: there[name])))
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_release(case: str):
    """Within 2e-5: what rescaled weights of experts, or another GELU, change is 1e-4."""
    golden, model = np.load(GOLDEN), model_of(case)
    ids = golden[f"{case}_tokens"]
    real = ids != 0
    padding = None if real.all() else Tensor(real)
    there = np.ones(ids.shape, bool)
    there[~real] = False  # a query that is padding itself sees what it likes
    logits = model(Tensor(ids), padding).asnumpy()
    # positions of the release are not shifted by padding; angles are relative, so that only rounding differs
    np.testing.assert_allclose(logits[there], golden[f"{case}_logits"][there], rtol=0, atol=2e-5)
    targets = np.full(ids.shape, -100, np.int32)
    targets[:, :-1] = np.where(real[:, :-1] & real[:, 1:], ids[:, 1:], -100)
    params = model.trainable_params()
    loss, grads = ms.value_and_grad(model.loss, None, params)(Tensor(ids), Tensor(targets), padding)
    assert float(loss) == pytest.approx(float(golden[f"{case}_loss_f64"]), rel=1e-6)
    wanted = {name.split(":")[1]: golden[name] for name in golden.files if name.startswith(f"{case}_grad:")}
    seen = set()
    for p, grad in zip(params, grads):
        whole = host_array(grad)[: int(np.prod(p.full_shape))].reshape(p.full_shape)
        for piece in model.FAMILY.pieces(p.name, p.full_shape)[0]:
            if piece.name in wanted:
                seen.add(piece.name)
                right = wanted[piece.name]
                ours = whole[piece.ours].reshape(right.shape)
                np.testing.assert_allclose(ours, right, rtol=0, atol=5e-5 * np.abs(right).max(), err_msg=piece.name)
    assert len(seen) == len(wanted) >= (0 if case == "pad" else 4)


def test_experts_and_their_weights_are_those_of_the_release():
    golden, model = np.load(GOLDEN), model_of("base")
    choices = []
    gate = next(iter(model.model.layers)).mlp.gate
    construct = gate.construct
    gate.construct = lambda *args: choices.append(construct(*args)) or choices[-1]
    model(Tensor(golden["base_tokens"]))
    assert np.array_equal(choices[0].experts.reshape(2, 24, 2), golden["base_route_index"])
    np.testing.assert_allclose(host_array(choices[0].weights).reshape(2, 24, 2), golden["base_route_weight"], atol=1e-6)


def test_decoding_is_the_whole_row():
    golden, model = np.load(GOLDEN), model_of("full")
    ids, cache = Tensor(golden["full_tokens"]), KeyValueCache(24)
    parts = [model(ids[:, :10], None, cache), *(model(ids[:, t : t + 1], None, cache) for t in range(10, 24))]
    np.testing.assert_allclose(np.concatenate([x.asnumpy() for x in parts], 1), golden["full_logits"], rtol=0, atol=2e-5)
