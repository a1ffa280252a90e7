"""Known ways to get parallel training wrong, each with a test of its number in the list that this project was made from.

Traps 5, 10 and 11 (balance losses and micro-batches, an expert without tokens, scores of groups) are in `unit/test_router.py`,
`unit/test_moe.py` and `unit/test_ops_experts.py`; 6 (an expert's gradient times ep) in `test_moe_ranks.py`; 8 (a bias that is added
once for each rank) in `test_tensor_parallel.py`. 18 and 19 are of context parallelism and Muon, which are not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.model_center import Stages
from bmtrain_ms.model_center.layer import RotaryEmbedding
from bmtrain_ms.model_center.model import Llama, LlamaConfig, Qwen3, Qwen3Config
from tests.helpers.layouts import EXPERTS, SIZES, VOCAB, Case, model_of, train, whole
from tests.ranks.test_layout_checkpoints import run
from tests.ranks.test_layouts import compare

Run = Callable[..., list[Any]]
SHARED = {"num_heads_kv": 2}  # heads of keys and values, which four ranks share


_alone: dict[str, dict[str, Any]] = {}


def one_rank(run_ranks: Run, steps: int, sizes: dict[str, Any] = SHARED) -> dict[str, Any]:
    key = f"{steps}{sizes}"
    if key not in _alone:
        (found,) = run_ranks(1, train, case=Case(), steps=steps, sizes=sizes)
        _alone[key] = {**found, **{name: whole([found[name]]) for name in ("first", "grads", "last")}}
    return _alone[key]


def gradients_are_right(run_ranks: Run, case: Case, *names: str) -> None:
    answers = run_ranks(case.ranks, train, case=case, steps=1, sizes=SHARED)
    found, expected = whole([answer["grads"] for answer in answers]), one_rank(run_ranks, 1)["grads"]
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5 * np.abs(expected[name]).max(), err_msg=name)


@pytest.mark.parametrize("case", [Case(tp=2), Case(tp=4)], ids=str)
def test_trap_1_gather_before_replicated_grad_times_tp(run_ranks: Run, case: Case):
    gradients_are_right(run_ranks, case, "model.norm.weight")


@pytest.mark.parametrize("case", [Case(tp=2), Case(tp=4)], ids=str)
def test_trap_2_sequence_parallel_norm_grad_not_summed(run_ranks: Run, case: Case):
    names = [f"model.layers.{i}.{name}_layernorm.weight" for i in range(2) for name in ("input", "post_attention")]
    gradients_are_right(run_ranks, case, *names)


def test_trap_3_replicas_of_keys_and_values_drift(run_ranks: Run):
    answers = run_ranks(4, train, case=Case(tp=4), steps=10, sizes=SHARED)
    last = whole([answer["last"] for answer in answers])  # which are the same on all ranks that have them
    for name in ("k_proj", "v_proj"):
        values = one_rank(run_ranks, 10)["last"][f"model.layers.1.self_attn.{name}.weight"]
        np.testing.assert_allclose(last[f"model.layers.1.self_attn.{name}.weight"], values, atol=1e-3 * np.abs(values).max())


def test_trap_4_pad_columns_in_the_sum_of_exponentials(run_ranks: Run):
    assert VOCAB % 4
    for answer in run_ranks(4, train, case=Case(tp=4), steps=1, sizes=SHARED):
        np.testing.assert_allclose(answer["losses"], one_rank(run_ranks, 1)["losses"], rtol=1e-6)


def test_trap_7_tied_grad_lost_under_zero(run_ranks: Run):
    sizes = {**SHARED, "tied": True}
    for case in (Case(tp=2, dp=2), Case(pp=2, dp=2, stages=Stages(micro_batches=2))):
        answers = run_ranks(4, train, case=case, steps=1, sizes=sizes)
        name, expected = "model.embed_tokens.weight", one_rank(run_ranks, 1, sizes)["grads"]
        found = whole([answer["grads"] for answer in answers])
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5 * np.abs(expected[name]).max())


NUMBERS = [
    Case(pp=4, stages=Stages("E|t|t|L", micro_batches=2)),  # fewer than stages
    Case(pp=2, stages=Stages(micro_batches=3)),
    Case(pp=2, stages=Stages("Et|t||L", chunks=2, micro_batches=2)),  # the next stage is the one before, too
]


@pytest.mark.parametrize("case", NUMBERS, ids=str)
def test_trap_9_numbers_of_micro_batches_and_stages(run_ranks: Run, case: Case):
    compare(run_ranks(case.ranks, train, case=case, steps=2, sizes=SHARED, timeout=300), one_rank(run_ranks, 2), 2e-5)


def test_trap_12_rope_half_split_or_interleaved(single_world: Any):
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    turned = RotaryEmbedding(4, 10.0)(Tensor(x.reshape(1, 3, 1, 4))).asnumpy().reshape(3, 4)
    for row, out, angle in zip(x, turned, np.arange(3)):
        for i, frequency in enumerate((1.0, 10.0**-0.5)):  # elements i and i + dim / 2 are a pair, not 2 i and 2 i + 1
            turn = np.exp(1j * angle * frequency) * complex(row[i], row[i + 2])
            np.testing.assert_allclose([out[i], out[i + 2]], [turn.real, turn.imag], rtol=1e-5, atol=1e-6)


def test_trap_13_head_dim_is_not_the_width_by_the_heads(single_world: Any):
    model = Qwen3(Qwen3Config(**SIZES, num_heads_kv=2))
    shapes = {p.name.removeprefix("model.layers.0.self_attn."): p.full_shape for p in model.get_parameters() if ".0.self" in p.name}
    assert SIZES["num_heads"] * SIZES["dim_head"] == 48 != SIZES["dim_model"] == 24
    assert shapes["q_proj.weight"] == (48, 24) and shapes["o_proj.weight"] == (24, 48)
    assert shapes["k_proj.weight"] == shapes["v_proj.weight"] == (8, 24)
    assert shapes["q_norm.weight"] == shapes["k_norm.weight"] == (4,)


@pytest.mark.parametrize(("saved", "what"), [(True, "1 missing in the file"), (False, "1 unexpected in the file")])
def test_trap_14_a_tied_file_and_an_untied_head_or_the_reverse(single_world: Any, tmp_path: Path, saved: bool, what: str):
    file = tmp_path / "model.safetensors"
    first, second = (Llama(LlamaConfig(**SIZES, tied=tied)) for tied in (saved, not saved))
    bms.init_parameters(first)
    bms.save(first, file)
    with pytest.raises(CheckpointError, match=rf"does not fit the model; {what}: lm_head.weight$"):
        bms.load(second, file)


def test_trap_15_a_vocabulary_that_ranks_do_not_divide_is_resumed(run_ranks: Run, tmp_path: Path):
    assert VOCAB % 2 and VOCAB % 4
    before = run_ranks(4, run, case=Case(tp=2, dp=2), folder=tmp_path / "cut", start=0, stop=2)
    after = run_ranks(4, run, case=Case(tp=4), folder=tmp_path / "cut", start=2, stop=4)
    np.testing.assert_allclose(
        before[0]["losses"] + after[0]["losses"],
        run_ranks(1, run, case=Case(), folder=tmp_path / "one", start=0, stop=4)[0]["losses"],
        rtol=2e-5,
    )


LAYOUTS = [Case(tp=2), Case(dp=2), Case(pp=2), Case(tp=2, dp=2, replica=2), Case(pp=2, tp=2), Case(pp=2, dp=2)]


def test_trap_16_clip_norm_is_that_of_any_layout(run_ranks: Run):
    for case in LAYOUTS:
        for answer in run_ranks(case.ranks, train, case=case, steps=1, sizes=SHARED):
            np.testing.assert_allclose(answer["norms"], one_rank(run_ranks, 1)["norms"], rtol=2e-5, err_msg=str(case))
    for case in (Case(dp=2, ep=2), Case(pp=2)):
        expected = one_rank(run_ranks, 1, EXPERTS)["norms"]
        for answer in run_ranks(case.ranks, train, case=case, steps=1, sizes=EXPERTS):
            np.testing.assert_allclose(answer["norms"], expected, rtol=2e-5, err_msg=f"experts, {case}")


FIFTY = [
    *((case, False) for case in (Case(tp=2), Case(pp=2), Case(pp=2, tp=2))),
    *((case, True) for case in (Case(dp=2, ep=2), Case(pp=2, dp=2, ep=2, stages=Stages([1, 2])))),
]


@pytest.mark.parametrize(("case", "experts"), FIFTY, ids=str)
def test_trap_17_losses_of_50_steps(run_ranks: Run, case: Case, experts: bool):
    sizes = EXPERTS if experts else SHARED
    losses = run_ranks(case.ranks, train, case=case, steps=50, sizes=sizes, timeout=300)[0]["losses"]
    expected = one_rank(run_ranks, 50, sizes)["losses"]
    np.testing.assert_allclose(losses[0], expected[0], rtol=2e-6)
    np.testing.assert_allclose(losses[-1], expected[-1], rtol=1e-3)


def saved(world: World, case: Case, file: Path) -> None:
    with use_world(case.world(world)):
        bms.save(model_of(case, SHARED), file)


def test_trap_20_a_file_has_the_rows_of_the_vocabulary(run_ranks: Run, tmp_path: Path):
    for case in (Case(tp=4), Case(tp=2, dp=2)):
        run_ranks(4, saved, case=case, file=tmp_path / "model.safetensors")
        file = load_file(tmp_path / "model.safetensors")
        assert file["model.embed_tokens.weight"].shape == file["lm_head.weight"].shape == (VOCAB, SIZES["dim_model"])
