"""What an Ascend user runs, rehearsed: tests of other files on ranks that compute as on devices (`BMTRAIN_MS_REHEARSE`).

Any test can be rehearsed by hand: `BMTRAIN_MS_REHEARSE=1 pytest tests/ranks/test_padding.py`. These are the ones that CI does.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Callable

import pytest

from bmtrain_ms.comm import World
from bmtrain_ms.compat.device import on_host, rehearsed
from tests.helpers.checkpoints import Layout
from tests.helpers.layouts import KEPT, PIPELINES, Case
from tests.ranks import (
    test_checkpoint_ranks,
    test_checkpointer_ranks,
    test_data_ranks,
    test_distributed,
    test_family_ranks,
    test_layouts,
    test_llama_ranks,
    test_optim_offload_ranks,
    test_optim_ranks,
    test_parity,
    test_pipeline_ranks,
    test_pretrained_ranks,
    test_tensor_parallel,
    test_unequal_targets,
    test_wrapper_ranks,
)
from tests.ranks import test_pipeline_list as pipeline_list

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def run_ranks(rehearsing_ranks: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    return rehearsing_ranks


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training that other files follow for longer: ranks that rehearse take their time."""
    monkeypatch.setattr(test_layouts, "STEPS", 3)


@pytest.fixture
def single_world(rehearsed_world: World) -> World:
    return rehearsed_world


def again(test: Callable[..., None], **cases: list[Any]) -> Callable[..., None]:
    """The same test, with these values of its parameters; those of `a, b` are under the name `a_b`."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        test(**arguments)

    marks = []
    for mark in getattr(test, "pytestmark", []):
        named = mark.args[0] if mark.name == "parametrize" else ()
        key = "_".join(named.replace(",", " ").split() if isinstance(named, str) else named)
        marks.append(pytest.mark.parametrize(named, cases.pop(key)).mark if key in cases else mark)
    assert not cases, "the test has no such parameter"
    run.pytestmark = marks  # type: ignore[attr-defined]
    return run


def how(world: World) -> tuple[str, bool, bool, bool]:
    return world.everyone.name, world.everyone.lands_in_place, on_host(), rehearsed()


@pytest.mark.parametrize("ranks", [1, 2])
def test_these_ranks_rehearse(run_ranks, ranks):
    assert run_ranks(ranks, how) == [("rehearsed", False, False, True)] * ranks


twins = test_parity.twins
test_parity_with_the_unsharded_twin = again(test_parity.test_parity_with_the_unsharded_twin, ranks=[1, 2])

trained = test_llama_ranks.trained
test_float16_with_scaling = again(test_llama_ranks.test_half_with_loss_scale)
test_masters = again(test_optim_ranks.test_adamw_over_shards, ranks=[1, 2], half_scale=[(True, 64.0)])
OVERFLOWS = {"ranks_name_element_owner": [(1, "prime", 0, 0), (2, "prime", 6, 1)], "half_bad": [(True, math.inf)]}
test_overflows = again(test_optim_ranks.test_all_ranks_skip_alike, **OVERFLOWS)

test_offload = again(test_optim_offload_ranks.test_the_bits_of_adam, ranks=[1, 2], dtype=["fp32", "fp16"])
test_offload_deltas = again(test_optim_offload_ranks.test_deltas_are_those_of_all_ranks, ranks=[1, 2])

RESUMED = [(Layout(), {}), (Layout(half=True, offload=True), {"overflow_at": 2})]
test_sharded_checkpoints = again(test_checkpointer_ranks.test_resumed_training_is_bit_equal, ranks=[1, 2], layout_options=RESUMED)
test_whole_files = again(test_checkpoint_ranks.test_the_file_does_not_depend_on_the_ranks, most=[2], pieces=[True])

FOLDERS = [test_pretrained_ranks.CASES[1], test_pretrained_ranks.CASES[4]]  # ZeRO and GPT-2; stages and tied
test_folders = again(test_pretrained_ranks.test_any_layout_reads_and_writes_what_one_rank_does, case_family=FOLDERS)

test_llama_and_generation = again(test_llama_ranks.test_two_ranks_train_as_one, options=[{}, {"tied": True}])

on_two_ranks = test_wrapper_ranks.on_two_ranks
test_wrapper = again(test_wrapper_ranks.test_training_equals_the_unwrapped_twin_s, ranks=[1, 2], name=["encoder"])

COLUMNS, ROWS = [(True, True, True), (False, False, False)], [(True, False), (False, True)]
test_columns = again(test_tensor_parallel.test_column_parallel, tp=[2], gather_input_gather_output_bias=COLUMNS)
test_rows = again(test_tensor_parallel.test_trap_8_row_bias_added_tp_times, tp=[2], split_input_all_reduce_output=ROWS)
test_vocabulary = again(test_tensor_parallel.test_vocabulary_parallel_embedding_and_loss, tp=[2], scatter=[True, False])

test_pipeline = again(test_distributed.test_send_and_recv_are_a_pipeline, ranks=[2])
STAGED = [
    PIPELINES[[str(case) for case in PIPELINES].index(name)]
    for name in ("pp2-kept-micro_batches=3", "pp2-chunks=2-micro_batches=4")
]
test_stages = again(test_pipeline_ranks.test_training_in_stages_is_that_of_one_rank, case=STAGED)
test_pipeline_list = again(
    pipeline_list.test_training_is_that_of_one_rank_over_all_rows,
    chain=[chain for chain in pipeline_list.CHAINS if chain.pp == 2 and chain.dp == 1],
)
test_activations = again(test_distributed.test_activations_of_any_shape_and_type)

test_layouts_of_tensors = again(test_layouts.test_training_is_that_of_one_rank, case=[Case(tp=2, how=KEPT)])
test_layouts_of_experts = again(test_layouts.test_training_of_experts_is_that_of_one_rank, case=[Case(dp=2, ep=2)])
test_families = again(test_family_ranks.test_every_family_is_that_of_one_rank, case=[Case(tp=2), Case(dp=2, ep=2)])

test_targets_in_unequal_numbers = again(test_unequal_targets.test_the_loss_is_the_mean_over_all_ranks_targets, case=[Case(dp=2)])

hosts = test_data_ranks.hosts
test_conversations_on_hosts = again(test_data_ranks.test_conversations)
