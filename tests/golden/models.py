"""Tiny models that others' code has too: their configs, their weights and what they are given; without MindSpore or PyTorch."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
VOCAB = 31

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 10}
_LATENT = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "first_k_dense_replace": 1,
}

_SCALED = {  # MiniCPM3's
    **_LLAMA,
    **{
        name: _LATENT[name]
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_key_value_heads")
    },
    "rms_norm_eps": 1e-2,  # not that of the latent vectors' norms
    "tie_word_embeddings": True,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 8,
}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {**_LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **more}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", _rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=2.0)),
    "llama-llama3": (
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=8)),
    "llama-longrope": (
        "llama",
        {
            **_rope("longrope", factor=2.0, short_factor=[1.0, 1.5], long_factor=[2.0, 5.0], original_max_position_embeddings=8),
            "original_max_position_embeddings": 8,
        },
    ),
    # MiniCPM is not in transformers; Granite computes the same: the multipliers have other names
    "minicpm": (
        "granite",
        {
            **_LLAMA,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 2**0.5,
            "logits_scaling": 16 / 8,
            "attention_multiplier": 0.5,
        },
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 4}),
    "mistral-full": ("mistral", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2-window": (
        "qwen2",
        {**_LLAMA, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3-window": (
        "qwen3",
        {
            **_LLAMA,
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3_moe-window": (
        "qwen3_moe",
        {**_LLAMA, **_EXPERTS, "head_dim": 6, "num_experts": 4, "use_sliding_window": True, "sliding_window": 3},
    ),
    "mixtral-window": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 6}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_LLAMA, **_EXPERTS, "head_dim": 6, "num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "qwen3_moe-raw": ("qwen3_moe", {**_LLAMA, **_EXPERTS, "head_dim": 6, "num_experts": 4, "norm_topk_prob": False}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2-lite": (
        "deepseek_v2",
        {**_LATENT, "rms_norm_eps": 1e-2, "q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **_LATENT,
            "q_lora_rank": 6,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek_v2-yarn": (  # scores are scaled by the stretch, too
        "deepseek_v2",
        {
            **_LATENT,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
    ),
    "minicpm3": (
        "minicpm3",
        {
            **_SCALED,
            "q_lora_rank": 6,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 5.0],
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings": 16,
        },
    ),
    "minicpm3-plain": ("minicpm3", {**_SCALED, "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": False}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_inner": 24, "n_positions": 32, "n_ctx": 32},
    ),
}


PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
NEW_TOKENS = 8
SEARCHES: dict[str, dict[str, Any]] = {  # what `generate` is told, under our names
    "greedy": {},
    "greedy-ending": {"eos_id": 7},
    "greedy-penalty": {"repetition_penalty": 1.4, "eos_id": 7},
    "beams": {"num_beams": 3, "eos_id": 7},
    "beams-several": {"num_beams": 4, "num_return_sequences": 3, "eos_id": [7, 11], "length_penalty": 0.4},
    "beams-penalty": {"num_beams": 2, "repetition_penalty": 1.4},
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor, float32, of its name in a file of Hugging Face's."""
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = random.standard_normal(shape)
    norm = "norm" in name or ".ln_" in name
    return ((1.0 if norm and name.endswith("weight") else 0.0) + (0.1 if norm else 0.3) * values).astype(np.float32)


def batches() -> dict[str, dict[str, np.ndarray]]:
    """What models are given: `ids` (batch, length), and maybe `padding` (False where a token is padding), `documents`."""
    random = np.random.default_rng(11)

    def ids(batch: int, length: int) -> np.ndarray:
        return random.integers(0, VOCAB, (batch, length)).astype(np.int32)

    left, right = np.ones((2, 9), bool), np.ones((2, 9), bool)
    left[0, :4] = right[1, 6:] = False
    documents = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2, 2, 2]])
    return {
        "plain": {"ids": ids(2, 9)},
        "long": {"ids": ids(1, 23)},
        "left": {"ids": ids(2, 9), "padding": left},
        "right": {"ids": ids(2, 9), "padding": right},
        "packed": {"ids": ids(2, 9), "documents": documents},
    }


def counted(batch: dict[str, np.ndarray]) -> np.ndarray:
    """(batch, length) bool: the targets of `plain` that count, and tokens elsewhere."""
    return batch.get("padding", np.ones(batch["ids"].shape, bool))
