"""Families of models compute what others' code computes: logits and all gradients."""

from __future__ import annotations

import re
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from bmtrain_ms.compat.runtime import host_array
from bmtrain_ms.model_center import parameter_count
from bmtrain_ms.model_center.layer import KeyValueCache
from bmtrain_ms.model_center.model import FAMILIES, CausalLM, MiniCPM3
from tests.golden.models import _LLAMA, CASES, FOLDER, batches, counted, weight

pytestmark = pytest.mark.usefixtures("single_world")


def config_of(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """As a `config.json` has it."""
    if kind == "granite":  # under MiniCPM's names
        names = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
        rest = {name: value for name, value in fields.items() if name not in names}
        return {**rest, "model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8}
    return {**fields, "model_type": kind}


def model_of(case: str, dtype: str = "float32") -> CausalLM:
    """The family's model, with the weights that its names in files say."""
    config = config_of(*CASES[case])
    family = next(f for f in FAMILIES if config["model_type"] in f.FAMILY.model_types)
    model = family(family.CONFIG(**{**family.FAMILY.read(config), "dtype": dtype}))
    for p in model.get_parameters():
        p.copy_full(Tensor(of_files(model, p.name, p.full_shape, weight), p.dtype))
    return model


def of_files(model: CausalLM, name: str, shape: tuple[int, ...], read: Any) -> np.ndarray:
    """A tensor of ours, put together from those of files: `read(name, shape)`."""
    out = np.zeros(shape, np.float32)
    for piece in model.FAMILY.pieces(name, shape)[0]:
        part = read(piece.name, piece.shape)[piece.theirs]
        out[piece.ours] = (part.swapaxes(-1, -2) if piece.transposed else part).reshape(out[piece.ours].shape)
    return out


def logits_of(model: CausalLM, batch: dict[str, np.ndarray]) -> np.ndarray:
    marks = {name: Tensor(batch[name]) for name in ("padding", "documents") if name in batch}
    return model(Tensor(batch["ids"]), **marks).astype(ms.float32).asnumpy()


@pytest.mark.parametrize("dtype, close", [("float32", 1e-4), ("float16", 1e-2)])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, dtype: str, close: float):
    """Of rows, of more positions than a model was first trained on, of padding on either side, and of packed documents."""
    model, right = model_of(case, dtype), np.load(FOLDER / f"{case}.npz")
    for name, batch in batches().items():
        expected = right[f"logits:{name}"]
        there = counted(batch)
        off = np.abs(logits_of(model, batch) - expected)[there].max(-1) / np.abs(expected).max()
        # in float16 a token whose experts are nearly as good as others may get those
        most = 0.9 if dtype == "float16" and any("experts" in p.name for p in model.get_parameters()) else 1.0
        assert (off <= close).mean() >= most, (name, off)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_transformers(case: str):
    model, right = model_of(case), np.load(FOLDER / f"{case}.npz")
    ids = batches()["plain"]["ids"]
    targets = np.full(ids.shape, -100, np.int32)
    targets[:, :-1] = ids[:, 1:]
    params = model.trainable_params()
    loss, grads = ms.value_and_grad(model.loss, None, params)(Tensor(ids), Tensor(targets))
    assert float(loss) == pytest.approx(float(right["loss"]), rel=1e-5)
    seen = set()
    for p, grad in zip(params, grads):

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            seen.add(f"grad:{name}")
            assert right[f"grad:{name}"].shape == shape
            return right[f"grad:{name}"]

        expected = of_files(model, p.name, p.full_shape, read)
        close = 1e-4 * np.abs(expected).max()
        found = host_array(grad)[: expected.size].reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=max(close, 1e-7), err_msg=p.name)
    assert seen == {name for name in right.files if name.startswith("grad:")}


@pytest.mark.parametrize("case", CASES)
def test_decoding_with_a_cache_is_the_whole_row(case: str):
    model = model_of(case)
    ids = Tensor(batches()["plain"]["ids"])
    whole, cache = model(ids).asnumpy(), KeyValueCache(ids.shape[1])
    parts = [model(ids[:, :4], None, cache), *(model(ids[:, t : t + 1], None, cache) for t in range(4, ids.shape[1]))]
    if case in ("llama-dynamic", "llama-longrope"):  # frequencies change while the text grows; keys stay as they were
        assert np.isfinite(np.concatenate([x.asnumpy() for x in parts], 1)).all()
        return
    np.testing.assert_allclose(np.concatenate([x.asnumpy() for x in parts], 1), whole, rtol=0, atol=2e-5 * np.abs(whole).max())


def read(model: str, **fields: Any) -> Any:
    family = next(f for f in FAMILIES if f.__name__ == model)
    return family.CONFIG(**family.FAMILY.read({**_LLAMA, "model_type": family.FAMILY.model_types[0], **fields}))


@pytest.mark.parametrize(
    "model, fields, window, full",
    [
        ("Mistral", {"sliding_window": 7}, 7, ()),
        ("Mistral", {"sliding_window": None}, 0, ()),
        ("Mistral", {}, 4096, ()),  # what transformers takes where nothing is said
        ("Mixtral", {}, 0, ()),
        ("Mixtral", {"sliding_window": 7}, 7, ()),
        ("Qwen2", {"sliding_window": 7, "max_window_layers": 1, "use_sliding_window": False}, 0, ()),
        ("Qwen2", {"sliding_window": 7, "max_window_layers": 1}, 0, ()),
        ("Qwen2", {"sliding_window": 7, "max_window_layers": 1, "use_sliding_window": True}, 7, (0,)),
        ("Qwen2", {"sliding_window": 7, "max_window_layers": 9, "use_sliding_window": True}, 7, (0, 1)),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096, ()),
        ("Qwen3", {"sliding_window": None, "layer_types": ["full_attention"] * 2}, 0, ()),
        (
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
            7,
            (1,),
        ),
        ("Qwen3Moe", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, 7, ()),
    ],
)
def test_windows_of_configs(model: str, fields: dict[str, Any], window: int, full: tuple[int, ...]):
    config = read(model, **fields)
    assert (config.window, config.full_layers) == (window, full)
    family = next(f for f in FAMILIES if f.__name__ == model)
    assert family.CONFIG(**family.FAMILY.read(family.FAMILY.write(config))) == config
    assert [config.window_of(n) for n in range(2)] == [None if not window or n in full else window for n in range(2)]


@pytest.mark.parametrize(
    "model, fields, text",
    [
        ("Llama", {"sliding_window": 7}, r"sliding_window=7 \(not known here\)"),
        ("Qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types has 'sliding_attention', and sliding_window, or use_sl"),
        (
            "Qwen2",
            {"use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types has 1 entries, and num_hidden_layers says 2",
        ),
        (
            "Mistral",
            {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]},
            "which all layers of",
        ),
        (
            "Qwen3",
            {"layer_types": ["chunked_attention"] * 2},
            r"layer_types=\['chunked_attention'\] \(computed here: 'full_attention'",
        ),
        ("Mistral", {"sliding_window": -1}, "window must be at least 0, not -1"),
    ],
)
def test_windows_that_are_not_computed(model: str, fields: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        read(model, **fields)


def test_windows_that_a_config_cannot_say():
    mistral = next(f for f in FAMILIES if f.__name__ == "Mistral")
    with pytest.raises(ValueError, match=r"full_layers=\(1,\) cannot be said in this family's config.json"):
        mistral.FAMILY.write(mistral.CONFIG(num_layers=2, full_layers=(1,)))
    with pytest.raises(ValueError, match=r"full_layers=\(2,\) names a layer that there is not: num_layers=2"):
        mistral.CONFIG(num_layers=2, full_layers=(2,))


def test_what_null_means_in_minicpm3():
    config = read("MiniCPM3", q_lora_rank=None, scale_depth=None, dim_model_base=None, v_head_dim=None, num_key_value_heads=4)
    assert (config.q_rank, config.scale_depth, config.dim_model_base, config.dim_value) == (None, 2**0.5, 16, 4)
    assert read("MiniCPM3").q_rank == 768 and MiniCPM3.FAMILY.write(config)["num_key_value_heads"] == 4


def test_a_config_that_cannot_be_computed_is_named():
    llama = next(f for f in FAMILIES if f.__name__ == "Llama").FAMILY
    config = {**config_of(*CASES["llama"]), "hidden_act": "relu", "sparse_attention": {"block": 4}, "eos_token_id": 2}
    with pytest.raises(
        ValueError, match=r"^this llama cannot be computed as its config says: .*hidden_act='relu' \(computed here: 'silu'\)"
    ) as e:
        llama.read(config)
    assert "sparse_attention={'block': 4} (not known here)" in str(e.value) and "eos_token_id" not in str(e.value)
    with pytest.raises(ValueError, match="model_type is 'gemma', not 'llama'"):
        llama.read({"model_type": "gemma"})
    with pytest.warns(UserWarning, match=re.escape("not used: attention_dropout=0.1; a model here has no dropout")):
        llama.read({**config_of(*CASES["llama"]), "attention_dropout": 0.1})


@pytest.mark.parametrize("case", CASES)
def test_configs_are_written_as_they_are_read(case: str):
    config = config_of(*CASES[case])
    family = next(f for f in FAMILIES if config["model_type"] in f.FAMILY.model_types)
    ours = family.CONFIG(**family.FAMILY.read(config))
    assert family.CONFIG(**family.FAMILY.read(family.FAMILY.write(ours))) == ours


# Sizes #

_QWEN3 = {"vocab_size": 151936, "dim_head": 128, "num_heads_kv": 8, "tied": True}
_LITE = {"dim_model": 2048, "num_layers": 27, "num_heads": 16, "dim_ff": 10944}
_MINICPM = {"vocab_size": 73448, "num_heads_kv": 2}
SIZES = [  # family, config, all parameters, those that a token uses
    ("Llama", {"vocab_size": 128256, "dim_model": 4096, "num_heads_kv": 8, "dim_ff": 14336}, 8_030_261_248, None),
    (
        "Llama",
        {"vocab_size": 128256, "dim_model": 2048, "num_heads_kv": 8, "dim_ff": 8192, "num_layers": 16, "tied": True},
        1_235_814_400,
        None,
    ),
    (
        "Llama",  # MiniCPM5-1B
        {
            "vocab_size": 130560,
            "dim_model": 1536,
            "num_heads": 16,
            "num_heads_kv": 2,
            "dim_head": 128,
            "dim_ff": 4608,
            "num_layers": 24,
        },
        1_080_632_832,
        None,
    ),
    ("MiniCPM", {"vocab_size": 122753, "dim_model": 2304, "num_heads": 36, "dim_ff": 5760, "num_layers": 40}, 2_724_880_896, None),
    ("MiniCPM", {**_MINICPM, "dim_model": 1024, "num_heads": 16, "dim_ff": 4096, "num_layers": 24}, 433_873_920, None),
    ("MiniCPM", {**_MINICPM, "dim_model": 4096, "dim_ff": 16384}, 7_884_410_880, None),
    ("MiniCPM", {**_MINICPM, "dim_model": 4096, "dim_ff": 16384, "tied": False}, 8_185_253_888, None),
    ("MiniCPM3", {}, 4_073_875_968, None),
    (
        "Qwen2",
        {
            "vocab_size": 151936,
            "dim_model": 896,
            "num_heads": 14,
            "num_heads_kv": 2,
            "dim_ff": 4864,
            "num_layers": 24,
            "tied": True,
        },
        494_032_768,
        None,
    ),
    ("Qwen3", {**_QWEN3, "dim_model": 1024, "num_heads": 16, "dim_ff": 3072, "num_layers": 28}, 596_049_920, None),
    ("Qwen3", {**_QWEN3, "dim_model": 2560, "num_heads": 32, "dim_ff": 9728, "num_layers": 36}, 4_022_468_096, None),
    (
        "Qwen3",
        {**_QWEN3, "dim_model": 4096, "num_heads": 32, "dim_ff": 12288, "num_layers": 36, "tied": False},
        8_190_735_360,
        None,
    ),
    (
        "Qwen3Moe",
        {"vocab_size": 151936, "dim_model": 2048, "num_heads": 32, "num_heads_kv": 4, "num_layers": 48},
        30_532_122_624,
        3_353_032_704,
    ),
    ("DeepseekV2", _LITE, 15_706_484_224, 2_661_150_208),
    ("Grok1", {}, 315_684_820_992, None),
    ("Grok1", {"num_layers": 8, "tied": False}, 40_970_557_440, None),
    ("GPT2", {}, 124_439_808, None),
]


@pytest.mark.parametrize("family, sizes, total, active", SIZES, ids=lambda x: f"{x:_}" if isinstance(x, int) else None)
def test_numbers_of_parameters_that_users_know(family: str, sizes: dict[str, Any], total: int, active: int | None):
    model = next(f for f in FAMILIES if f.__name__ == family)
    config = model.CONFIG(**sizes)
    assert parameter_count(model, config) == total
    if active is not None:
        assert parameter_count(model, config, active=True) == active
