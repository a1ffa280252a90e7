"""Small things, on one rank: what is printed to the letter, numbers by formula, parameters each once."""

from __future__ import annotations

import io
import mmap
import re
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.comm import SingleEngine, world
from bmtrain_ms.utils import AverageRecorder, round_up
from bmtrain_ms.zero import context_of
from tests.helpers.models import Dense, Residual

MIB = 1 << 20


@given(st.integers(-(1 << 70), 1 << 70), st.integers(1, 1 << 40))
def test_round_up(x: int, d: int):
    rounded = round_up(x, d)
    assert rounded % d == 0 and 0 <= rounded - x < d


# Printing #


def test_print_rank_before_and_after_init(capsys):
    bms.print_rank("a", 1, sep="-", end="!\n")
    bms.print_rank("not here", rank=1)
    assert capsys.readouterr().out == "a-1!\n"


@pytest.mark.parametrize(
    "title, content, text",
    [
        ("Title", None, "========================== Title ===========================\n"),
        ("Even", "x\ny", "=========================== Even ===========================\nx\ny\n"),
        ("", "", "=============================  =============================\n\n"),
        ("t" * 58, None, " " + "t" * 58 + " \n"),
        ("t" * 70, None, " " + "t" * 70 + " \n"),
    ],
    ids=["odd", "even", "empty", "just", "long"],
)
def test_print_block(capsys, title, content, text):
    bms.print_block(title, content)
    assert capsys.readouterr().out == text
    file = io.StringIO()
    bms.print_block(title, content, file)
    assert file.getvalue() == text and not capsys.readouterr().out
    assert len(text.split("\n")[0]) == max(60, len(title) + 2)


def test_print_dict(capsys):
    bms.print_dict("Values", {"a": 1, "longer": [2], 3: None})
    line = "========================== Values ==========================\n"
    assert capsys.readouterr().out == line + "a      : 1\nlonger : [2]\n3      : None\n"
    file = io.StringIO()
    bms.print_dict("Values", {}, file=file)
    assert file.getvalue() == line + "\n" and not capsys.readouterr().out


# Memory #


def lines(text: str) -> dict[str, float]:
    """Of the block that see_memory prints, without its title."""
    found = [re.fullmatch(r"(.*?) *: (-?[0-9]+\.[0-9]) MiB", line) for line in text.splitlines()[1:]]
    assert all(found)
    return {match[1]: float(match[2]) for match in found if match}


def test_see_memory_before_init(capsys):
    bms.shutdown()
    numbers = bms.see_memory("before", detail=True)
    text = capsys.readouterr().out
    assert list(numbers) == ["resident", "most"] and 0 < numbers["resident"] <= numbers["most"]
    assert text.splitlines()[0] == "========================== before =========================="
    assert lines(text) == {name: pytest.approx(value, abs=0.051) for name, value in numbers.items()}


def test_see_memory_starts_a_new_peak(single_world):
    bms.see_memory("warm up")
    before = bms.see_memory("before")["resident"]
    with mmap.mmap(-1, 64 * MIB) as memory:  # and not malloc, which may have as much left over, resident already
        for _ in range(64):
            memory.write(b"1" * MIB)
    used = bms.see_memory("used")
    assert used["most"] - before == pytest.approx(64, abs=4) and used["resident"] - before < 4
    assert bms.see_memory("after")["most"] - before < 4


def test_see_memory_in_detail(single_world, capsys):
    """Of parameters gathered by a Block; the peak of these starts anew as well, whether it is shown or not."""
    width = 256
    block = bms.Block(Residual(width=width, inner=width))
    bms.init_parameters(block)
    x = Tensor(np.ones((2, width), np.float32))
    bms.see_memory("new peak")
    ms.grad(lambda x: block(x).sum(), None, block.trainable_params())(x)
    numbers = bms.see_memory("detail", detail=True)
    full = 4 * (2 * width * width + 2 * width + 2) / MIB
    assert numbers["most gathered"] == pytest.approx(full, rel=0.01) and numbers["gathered"] == 0.0
    assert bms.see_memory("again", detail=True)["most gathered"] == 0.0
    printed = capsys.readouterr().out.splitlines()
    assert lines("\n".join(printed[-10:-5])) == {name: pytest.approx(value, abs=0.051) for name, value in numbers.items()}
    assert context_of(world()).pipeline.meter.peak == 0


# AverageRecorder #


@given(st.floats(0.0, 0.999), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_the_average_has_no_bias(alpha: float, values: list[float]):
    """Sum of alpha^(n-i) v_i, divided by the sum of the weights."""
    recorder = AverageRecorder(alpha)
    for n, value in enumerate(values):
        recorder.record(value)
        weights = alpha ** np.arange(n, -1, -1.0)
        expected = float(weights @ np.array(values[: n + 1])) / weights.sum()
        assert recorder.value == pytest.approx(expected, rel=1e-6, abs=max(1e-6 * max(map(abs, values)), 1e-300))


def test_the_average_of_a_constant_is_the_constant():
    recorder = AverageRecorder()
    assert recorder.value == 0.0
    for _ in range(5):
        recorder.record(3)
        assert recorder.value == pytest.approx(3.0)


def test_the_average_with_a_start():
    """BMTrain's formula: (alpha^n start + (1 - alpha) sum alpha^(n-i) v_i) / (1 - alpha^n)."""
    recorder = AverageRecorder(0.5, start_value=4.0)
    assert recorder.value == 4.0
    recorder.record(1.0)
    assert recorder.value == (0.5 * 4 + 0.5 * 1) / 0.5
    recorder.record(2.0)
    assert recorder.value == (0.25 * 4 + 0.25 * 1 + 0.5 * 2) / 0.75


def test_the_average_accepts_what_is_a_number():
    recorder = AverageRecorder(0.0)
    recorder.record(np.float32(2.5))
    assert recorder.value == 2.5 and type(recorder.value) is float


@pytest.mark.parametrize("alpha", [1.0, -0.1, float("nan")])
def test_alpha_is_checked(alpha: float):
    with pytest.raises(ValueError, match=rf"alpha must be in \[0, 1\), not {alpha}"):
        AverageRecorder(alpha)


# Collectives on one rank; tests/ranks/test_utils_ranks.py has more #


def test_sum_loss_is_the_loss_on_one_rank(single_world):
    value, grad = ms.value_and_grad(lambda x: bms.sum_loss(x * x))(Tensor(3.0))
    assert value.shape == () and float(value.asnumpy()) == 9.0 and float(grad.asnumpy()) == 6.0


def test_gather_result_on_one_rank(single_world):
    x = Tensor(np.arange(6, dtype=np.int32).reshape(2, 3))
    gathered = bms.gather_result(x)
    assert gathered.dtype == ms.int32 and np.array_equal(gathered.asnumpy(), x.asnumpy())
    assert bms.gather_result(Tensor(2.0)).asnumpy().tolist() == [2.0]


def test_wait_loader_has_nothing_to_wait_for_on_cpu(single_world):
    assert bms.wait_loader() is None


# grouped_parameters #


class Grouped(nn.Cell):
    """Blocks, a tie, a plain Parameter, a missing bias; groups `special` and None."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = bms.TransformerBlockList([bms.Block(Residual()), Residual()])
        self.head, self.twin = Dense(7, 5, ms.float32), Dense(7, 5, ms.float32)
        self.twin.weight = self.head.parameter("weight")
        self.linear = bms.nn.Linear(3, 2, bias=False)
        self.special = bms.DistributedParameter(bms.empty(4), group="special")
        self.plain = Parameter(Tensor(np.zeros(2, np.float32)), name="plain")


def test_each_parameter_once_in_its_group(single_world):
    """BMTrain lists parameters inside of Blocks twice, and None for a bias that is not there."""
    model = Grouped()
    groups = dict(bms.grouped_parameters(model))
    assert set(groups) == {None, "special"} and groups["special"] == [model.special]
    listed = [id(p) for params in groups.values() for p in params]
    assert len(listed) == len(set(listed)) == 2 * 6 + 3 + 2 + 1 + 1 + 1
    assert set(listed) == {id(p) for p in model.get_parameters()}
    assert [len(params) for _, params in bms.grouped_parameters(model.layers[0])] == [6]


def test_groups_are_what_an_optimizer_takes(single_world):
    model = Grouped()
    groups = [{"params": params, "lr": 0.5 if name else 0.1} for name, params in bms.grouped_parameters(model)]
    optimizer = bms.optim.AdamOptimizer(groups)
    assert sorted((group["lr"], len(group["params"])) for group in optimizer.param_groups) == [(0.1, 19), (0.5, 1)]


# config #


def test_config_of_one_rank(single_world):
    expected: dict[str, Any] = {
        "initialized": True,
        "rank": 0,
        "world_size": 1,
        "local_rank": 0,
        "local_size": 1,
        "zero_rank": 0,
        "zero_size": 1,
        "tp_zero_rank": 0,
        "tp_zero_size": 1,
        "tp_rank": 0,
        "tp_size": 1,
        "pipe_rank": 0,
        "pipe_size": 1,
        "pipe_enabled": False,
        "micros": 1,
    }
    engines = {"comm", "zero_comm", "tp_zero_comm", "tp_comm", "pipe_comm", "pp_zero_comm", "pp_tp_zero_comm"}
    assert set(bms.config) == {*expected, *engines, "topology"} and len(bms.config) == 23
    assert {name: bms.config[name] for name in expected} == expected
    assert all(isinstance(bms.config[name], SingleEngine) for name in engines)
    assert bms.config["topology"] is world().mesh
    assert dict(bms.config)["rank"] == 0 and "comm" in bms.config


def test_config_before_init():
    bms.shutdown()
    assert (bms.config["initialized"], bms.config["rank"], bms.config["world_size"]) == (False, 0, 1)
    assert "comm" in bms.config and "calc_stream" not in bms.config
    with pytest.raises(RuntimeError, match="bmtrain_ms is not initialised"):
        bms.config["comm"]


def test_config_cannot_be_written_to(single_world):
    with pytest.raises(TypeError, match="does not support item assignment"):
        bms.config["rank"] = 3  # pyright: ignore
    with pytest.raises(TypeError, match="does not support item deletion"):
        del bms.config["rank"]  # pyright: ignore
    assert not hasattr(bms.config, "update")


def test_config_says_what_it_has():
    with pytest.raises(KeyError) as info:
        bms.config["calc_stream"]
    (text,) = info.value.args
    assert text.startswith("bmtrain_ms has no config['calc_stream']: it has initialized, rank, world_size, local_rank, ")
    assert text.endswith("Streams and events do not exist in it")
    assert bms.config.get("load_stream", 5) == 5
