"""Any layout, one result: every family of models, on two ranks, has the values, losses, gradients and updates of one rank."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from bmtrain_ms.comm import World
from tests.helpers.layouts import Case, train, whole
from tests.ranks.test_layouts import compare

STEPS = 2
_MOE = {"num_experts": 4, "top_k": 2, "balance": "sequence", "balance_coef": 0.05}
_LATENT = {"kv_rank": 8, "dim_nope": 6, "dim_rope": 4, "dim_value": 5, "dim_expert": 10, "num_experts": 8, "top_k": 3}
_MLA = ("kv_rank", "dim_nope", "dim_rope", "dim_value")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "Llama", "num_heads_kv": 2, "attention_bias": True, "mlp_bias": True},
    "minicpm": {"family": "MiniCPM", "dim_model_base": 8},
    "mistral": {"family": "Mistral", "num_heads_kv": 2, "window": 3},
    "qwen2": {"family": "Qwen2", "num_heads_kv": 1, "window": 2, "full_layers": (0,)},
    "qwen3": {"family": "Qwen3", "num_heads_kv": 2, "dim_head": 6},
    "mixtral": {"family": "Mixtral", "num_heads_kv": 2, **_MOE},
    "grok1": {"family": "Grok1", "num_heads_kv": 2, **_MOE},
    "deepseek_v2": {"family": "DeepseekV2", **_LATENT, "q_rank": 6, "groups": 4, "keep_groups": 2, "routed_scale": 2.0},
    "deepseek_v2-lite": {"family": "DeepseekV2", **_LATENT, "balance": "sequence", "balance_coef": 0.05},
    "minicpm3": {"family": "MiniCPM3", "dim_model_base": 8, **{name: _LATENT[name] for name in _MLA}, "q_rank": 6},
    "gpt2": {"family": "GPT2", "max_positions": 8},
}
CASES = [Case(dp=2), Case(tp=2), Case(pp=2), Case(dp=2, ep=2)]


def trained(world: World, case: Case) -> dict[str, dict[str, Any]]:
    names = [name for name, sizes in FAMILIES.items() if case.ep == 1 or "num_experts" in sizes]
    return {name: train(world, case, STEPS, FAMILIES[name]) for name in names}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_is_that_of_one_rank(run_ranks: Callable[..., list[Any]], case: Case):
    answers, (alone,) = run_ranks(case.ranks, trained, case=case), run_ranks(1, trained, case=Case())
    for name in answers[0]:
        right = {**alone[name], **{part: whole([alone[name][part]]) for part in ("first", "grads", "last")}}
        compare([answer[name] for answer in answers], right, 2e-5)
