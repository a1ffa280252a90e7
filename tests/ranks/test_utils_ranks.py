"""Printing, losses, results and config of several ranks."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world

pytestmark = pytest.mark.ranks

Run = Callable[..., list[Any]]


def printed(world: World) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bms.print_rank("of 0", world.engine.rank)
        bms.print_rank("of 1", world.engine.rank, rank=1)
        bms.print_block("all")
        bms.see_memory("memory of 0")
    return out.getvalue()


def test_who_prints(run_ranks: Run):
    first, second = run_ranks(2, printed)
    block = f"{'=' * 27} all {'=' * 28}\n"
    assert first.startswith(f"of 0 0\n{block}{'=' * 23} memory of 0 {'=' * 24}\nresident : ")
    assert second == f"of 1 1\n{block}"


# sum_loss #


def mean_loss(world: World) -> tuple[float, float, tuple[int, ...]]:
    """Of x^2 with x = 1, 2, ..."""
    with use_world(world):
        value, grad = ms.value_and_grad(lambda x: bms.sum_loss(x * x))(Tensor(np.float32(world.engine.rank + 1)))
    return float(value.asnumpy()), float(grad.asnumpy()), value.shape


@pytest.mark.parametrize("ranks", [2, 3])
def test_sum_loss_is_the_mean(run_ranks: Run, ranks: int):
    """The gradient is that of all ranks' losses together: see `distributed`."""
    squares = [(r + 1) ** 2 for r in range(ranks)]
    for rank, (value, grad, shape) in enumerate(run_ranks(ranks, mean_loss)):
        assert shape == () and value == pytest.approx(sum(squares) / ranks, rel=1e-6)
        assert grad == pytest.approx(2 * (rank + 1), rel=1e-6)


def group_loss(world: World) -> float:
    engine = world.engine.subgroup([world.engine.rank])
    with use_world(world):
        return float(bms.sum_loss(Tensor(np.float32(world.engine.rank)), engine).asnumpy())


def test_sum_loss_of_a_group(run_ranks: Run):
    assert run_ranks(2, group_loss) == [0.0, 1.0]


# gather_result #


def gather_chunks(world: World) -> list[str]:
    """Upstream's test_synchronize: what each rank has of a tensor rebuilds the tensor; of slices too. Returns what differs."""
    ranks, rank, wrong = world.engine.size, world.engine.rank, []
    with use_world(world):
        for name in ("float32", "float16", "bfloat16", "float64", "int32", "int64", "uint8", "bool_"):
            dtype = getattr(ms, name)
            values = np.random.default_rng(0).integers(0, 100, (ranks * 4, 6)).astype(np.float32)
            whole = Tensor(values % 2 if name == "bool_" else values).astype(dtype)
            own = whole[rank * 4 : rank * 4 + 4]
            for what, part in {
                "rows": lambda x: x,
                "slices": lambda x: x[:2, 1:4],
                "columns": lambda x: x[:, ::2],
                "transposed": lambda x: x.swapaxes(0, 1),
            }.items():
                gathered = bms.gather_result(part(own))
                parts = [part(whole.asnumpy()[r * 4 : r * 4 + 4]) for r in range(ranks)]
                if gathered.dtype != dtype or not np.array_equal(gathered.asnumpy(), np.concatenate(parts)):
                    wrong.append(f"{what} of {name}")
        if bms.gather_result(Tensor(np.float32(rank))).asnumpy().tolist() != list(range(ranks)):
            wrong.append("scalars")
        if bms.gather_result(Tensor(np.zeros((0, 3), np.float32))).shape != (0, 3):
            wrong.append("no rows")
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_gather_result_rebuilds_the_tensor(run_ranks: Run, ranks: int):
    assert run_ranks(ranks, gather_chunks) == [[]] * ranks


def gather_unequal(world: World, arrays: list[np.ndarray]) -> tuple[str, list[float]]:
    """The error, and a gather afterwards: the ranks are still in step."""
    rank = world.engine.rank
    with use_world(world):
        with pytest.raises(ValueError) as info:
            bms.gather_result(Tensor(arrays[rank]))
        return str(info.value), bms.gather_result(Tensor(np.array([rank], np.float32))).asnumpy().tolist()


FLOAT = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    "arrays, text",
    [
        ([FLOAT, FLOAT[:1]], "(2, 3) float32 on rank 0, (1, 3) float32 on rank 1"),
        ([FLOAT, FLOAT.reshape(3, 2)], "(2, 3) float32 on rank 0, (3, 2) float32 on rank 1"),
        ([FLOAT, FLOAT.astype(np.int32)], "(2, 3) float32 on rank 0, (2, 3) int32 on rank 1"),
        ([FLOAT, FLOAT, FLOAT[0]], "(2, 3) float32 on rank 0, (2, 3) float32 on rank 1, (3,) float32 on rank 2"),
    ],
    ids=["rows", "shape", "type", "dims"],
)
def test_unequal_results_are_an_error_on_every_rank(run_ranks: Run, arrays: list[np.ndarray], text: str):
    """Upstream waits for ever, or returns garbage."""
    ranks = len(arrays)
    expected = (
        f"gather_result needs the same shape and type on every rank, not {text}; pad dim 0, or use store.allgather_objects",
        [float(r) for r in range(ranks)],
    )
    assert run_ranks(ranks, gather_unequal, arrays=arrays) == [expected] * ranks


# config #


def read_config(world: World) -> dict[str, Any]:
    with use_world(world):
        plain = {name: value for name, value in bms.config.items() if isinstance(value, (bool, int))}
        engines = {name: (bms.config[name].rank, bms.config[name].size) for name in ("comm", "zero_comm", "tp_zero_comm")}
    return {**plain, **engines}


def test_config_of_two_ranks(run_ranks: Run):
    for rank, config in enumerate(run_ranks(2, read_config)):
        assert config.pop("initialized") is True and config.pop("pipe_enabled") is False
        ranks = {"rank", "local_rank", "zero_rank", "tp_zero_rank"}
        sizes = {"world_size", "local_size", "zero_size", "tp_zero_size"}
        none = {"tp_rank": 0, "tp_size": 1, "pipe_rank": 0, "pipe_size": 1, "micros": 1}
        engines = dict.fromkeys(("comm", "zero_comm", "tp_zero_comm"), (rank, 2))
        assert config == {**dict.fromkeys(ranks, rank), **dict.fromkeys(sizes, 2), **none, **engines}
