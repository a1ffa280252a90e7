"""Tensor-parallel layers: for each combination of arguments results and all gradients are those of one rank."""

from __future__ import annotations

import itertools
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, World, use_world
from bmtrain_ms.distributed import parallel_linear_cross_entropy
from bmtrain_ms_base.layout import part_of

Run = Callable[..., list[Any]]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def start(seed: int, *shape: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 0.5).astype(np.float32)


def rows_of(world: World, array: np.ndarray) -> np.ndarray:
    """This rank's part of dim 0."""
    size = len(array) // world.along("tp").size
    return array[world.mesh.tp_rank * size :][:size]


def summed(world: World, grad: np.ndarray) -> np.ndarray:
    """Gradients of copies of one input, each rank's its part: their sum."""
    return world.along("tp").all_reduce([Tensor(grad)]).wait()[0].asnumpy()


def gathered(world: World, array: np.ndarray, dim: int) -> np.ndarray:
    size = world.along("tp").size
    parts = world.along("tp").all_gather([Tensor(np.ascontiguousarray(array))]).wait()[0].asnumpy().reshape(size, *array.shape)
    return np.concatenate(list(parts), dim)


def whole_gradients(world: World, layer: Any, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each parameter, put together from the ranks' parts; ranks that have the same one agree to the last bit."""
    found = {}
    for name, grad in grads.items():
        p = layer.parameter(name)
        local = world.along("shard").all_gather([Tensor(grad)]).wait()[0].asnumpy()[: p.full_size].reshape(p.full_shape)
        out = np.full(p.layout.whole, np.nan, np.float32)
        largest = max(np.prod([s.stop - s.start for s in boxes_of(p, world, i)], dtype=int) for i in range(world.mesh.tp))
        padded = np.zeros(largest, np.float32)
        padded[: local.size] = local.reshape(-1)
        for i, row in enumerate(world.along("tp").all_gather([Tensor(padded)]).wait()[0].asnumpy().reshape(world.mesh.tp, -1)):
            box = boxes_of(p, world, i)
            values = row[: out[box].size].reshape(out[box].shape)
            assert np.isnan(out[box]).all() or np.array_equal(out[box], values)
            out[box] = values
        found[name] = out
    return found


def boxes_of(p: Any, world: World, tp_rank: int) -> tuple[slice, ...]:
    box = [slice(0, n) for n in p.layout.whole]
    if p.tp_parts > 1:
        dim = p.layout.splits[0].dim
        box[dim] = slice(*part_of(p.layout.whole[dim], tp_rank * p.tp_parts // world.mesh.tp, p.tp_parts))
    return tuple(box)


def run_column(world: World, **options: Any) -> None:
    tp, rows, in_size, out_size = world.everyone.size, 12, 5, options.pop("out_size")
    weigh = start(3, rows, out_size)
    x, w, b = start(0, rows, in_size), start(1, out_size, in_size), start(2, out_size)
    with use_world(World(RecordingEngine(world.everyone), Mesh(tp, world.mesh.rank, tp=tp))) as here:
        layer = bms.nn.ColumnParallelLinear(in_size, out_size, **options)
        layer.parameter("weight").copy_full(w)
        params = [layer.parameter("weight")]
        if options.get("bias", True):
            layer.parameter("bias").copy_full(b)
            params.append(layer.parameter("bias"))
        else:
            b = b * 0
        gather_input, gather_output = options.get("gather_input", True), options.get("gather_output", False)
        first, stop = part_of(out_size, here.mesh.tp_rank, tp)
        columns = slice(None) if gather_output else slice(first, stop)
        mine = rows_of(here, x) if gather_input else x
        # where every rank has all of the output, each has the loss: their mean is it; else each adds its part
        share = 1.0 if gather_output else float(tp)
        outputs = []

        def loss(x: Tensor) -> Tensor:
            y = layer(x)
            outputs.append(y.asnumpy())
            return (ops.tanh(y) * Tensor(np.ascontiguousarray(weigh[:, columns]))).sum() * share

        _, (x_grad, grads) = ms.value_and_grad(loss, 0, params)(Tensor(mine))
        y = x @ w.T + b
        np.testing.assert_allclose(outputs[0], y[:, columns], **CLOSE)
        y_grad = (1 - np.tanh(y) ** 2) * weigh
        found = x_grad.asnumpy() / tp  # of the sum over the ranks of their losses
        found = gathered(here, found, 0) if gather_input else summed(here, found)
        np.testing.assert_allclose(found, y_grad @ w, **CLOSE)
        whole = whole_gradients(here, layer, {p.name.split(".")[-1]: g.asnumpy() for p, g in zip(params, grads)})
        np.testing.assert_allclose(whole["weight"], y_grad.T @ x, **CLOSE)
        if "bias" in whole:
            np.testing.assert_allclose(whole["bias"], y_grad.sum(0), **CLOSE)
        np.testing.assert_array_equal(layer.parameter("weight").gather_all().asnumpy(), w)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize(("gather_input", "gather_output", "bias"), list(itertools.product([True, False], repeat=3)))
def test_column_parallel(run_ranks: Run, tp: int, gather_input: bool, gather_output: bool, bias: bool):
    for chunks, out_size in ((None, 6), (1, 7), (2, 6), (3, 8)):
        options = {"gather_input": gather_input, "gather_output": gather_output, "bias": bias}
        run_ranks(tp, run_column, out_size=out_size, async_gather_chunks=chunks, **options)


def run_row(world: World, **options: Any) -> None:
    tp, rows, in_size, out_size = world.everyone.size, 12, options.pop("in_size"), 5
    weigh = start(3, rows, out_size)
    x, w, b = start(0, rows, in_size), start(1, out_size, in_size), start(2, out_size)
    with use_world(World(world.everyone, Mesh(tp, world.mesh.rank, tp=tp))) as here:
        layer = bms.nn.RowParallelLinear(in_size, out_size, **options)
        layer.parameter("weight").copy_full(w)
        layer.parameter("bias").copy_full(b)
        params = [layer.parameter("weight"), layer.parameter("bias")]
        split, reduced = options.get("split_input", False), options.get("all_reduce_output", False)
        first, stop = part_of(in_size, here.mesh.tp_rank, tp)
        mine = rows_of(here, x) if split else np.ascontiguousarray(x[:, first:stop])
        own = weigh if reduced else rows_of(here, weigh)
        outputs = []

        def loss(x: Tensor) -> Tensor:
            y = layer(x)
            outputs.append(y.asnumpy())
            return (ops.tanh(y) * Tensor(own)).sum() * (1.0 if reduced else float(tp))

        _, (x_grad, grads) = ms.value_and_grad(loss, 0, params)(Tensor(mine))
        y = x @ w.T + b
        np.testing.assert_allclose(outputs[0], y if reduced else rows_of(here, y), **CLOSE)
        y_grad = (1 - np.tanh(y) ** 2) * weigh
        right = y_grad @ w
        np.testing.assert_allclose(x_grad.asnumpy() / tp, rows_of(here, right) if split else right[:, first:stop], **CLOSE)
        whole = whole_gradients(here, layer, {p.name.split(".")[-1]: g.asnumpy() for p, g in zip(params, grads)})
        np.testing.assert_allclose(whole["weight"], y_grad.T @ x, **CLOSE)
        np.testing.assert_allclose(whole["bias"], y_grad.sum(0), **CLOSE)  # added once, not by each rank


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize(("split_input", "all_reduce_output"), list(itertools.product([True, False], repeat=2)))
def test_trap_8_row_bias_added_tp_times(run_ranks: Run, tp: int, split_input: bool, all_reduce_output: bool):
    for chunks, in_size in ((None, 6), (2, 6), (3, 6 if split_input else 8)):
        run_ranks(tp, run_row, in_size=in_size, async_chunks=chunks, split_input=split_input, all_reduce_output=all_reduce_output)


def run_vocabulary(world: World, vocab: int, scatter: bool, smoothing: float, reduction: str, linear: bool) -> None:
    """Look-up, tied projection and loss against one float64 model."""
    tp, rows, dim = world.everyone.size, 12, 4
    ids = np.random.default_rng(5).integers(0, vocab, rows).astype(np.int32)
    targets = np.random.default_rng(6).integers(0, vocab, rows).astype(np.int32)
    targets[[1, 7]] = -100
    table = start(1, vocab, dim)
    with use_world(World(world.everyone, Mesh(tp, world.mesh.rank, tp=tp))) as here:
        layer = bms.nn.VPEmbedding(vocab, dim, ms.float32, scatter_output=scatter)
        p = layer.parameter("weight")
        p.copy_full(table)
        options = {"reduction": reduction, "label_smoothing": smoothing}
        cell = bms.loss.FusedCrossEntropy(parallel=True, classes=vocab, **options)

        def loss() -> Tensor:
            hidden = ops.tanh(layer(Tensor(ids)))
            if linear:
                if scatter:
                    hidden = bms.distributed.all_gather(hidden, here.along("tp")).reshape(rows, dim)
                found = parallel_linear_cross_entropy(
                    hidden, layer.weight, Tensor(targets), here.along("tp"), vocab, rows=5, **options
                )
            else:
                found = cell(layer.projection(hidden, gather_input=scatter), Tensor(targets))
            return (found * Tensor(start(8, rows))).sum() if reduction == "none" else found

        value, (grad,) = ms.value_and_grad(loss, None, [p])()
        whole = whole_gradients(here, layer, {"weight": grad.asnumpy()})["weight"]

    with use_world(World(bms.comm.SingleEngine(), Mesh(1, 0))):
        weight = Tensor(table)

        def right(weight: Tensor) -> Tensor:
            hidden = ops.tanh(bms.nn.functional.embedding(Tensor(ids), weight))
            found = bms.nn.functional.cross_entropy(bms.nn.functional.linear(hidden, weight), Tensor(targets), **options)
            return (found * Tensor(start(8, rows))).sum() if reduction == "none" else found

        expected, expected_grad = ms.value_and_grad(right)(weight)
    np.testing.assert_allclose(value.asnumpy(), expected.asnumpy(), rtol=1e-5)
    np.testing.assert_allclose(whole, expected_grad.asnumpy(), **CLOSE)


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("scatter", [True, False])
def test_vocabulary_parallel_embedding_and_loss(run_ranks: Run, tp: int, scatter: bool):
    for vocab, smoothing, reduction in ((12, 0.0, "mean"), (13, 0.1, "sum"), (17, 0.2, "none"), (tp, 0.0, "mean")):
        for linear in (False, True):
            options = {"smoothing": smoothing, "reduction": reduction, "linear": linear}
            run_ranks(tp, run_vocabulary, vocab=vocab, scatter=scatter, **options)


def golden(world: World) -> tuple[float, np.ndarray]:
    logits = np.array([[0.5, -1.0, 2.0, 0.0, 1.5, -0.5]], np.float32)
    with use_world(World(world.everyone, Mesh(2, world.mesh.rank, tp=2))):
        own = np.ascontiguousarray(logits[:, 3 * world.mesh.rank :][:, :3])
        cell = bms.loss.FusedCrossEntropy(parallel=True)
        loss, grad = ms.value_and_grad(lambda x: cell(x, Tensor(np.array([2], np.int32))))(Tensor(own))
        return loss.asnumpy().item(), grad.asnumpy() / 2  # of the sum of two losses


def test_golden_numbers_of_the_vocabulary_parallel_loss(run_ranks: Run):
    """Computed by hand for six logits on two ranks."""
    answers = run_ranks(2, golden)
    assert [loss for loss, _ in answers] == pytest.approx([0.74044488] * 2, abs=1e-6)
    grad = np.concatenate([grad for _, grad in answers], 1)[0]
    assert grad == pytest.approx([0.106411, 0.023744, -0.523098, 0.064542, 0.289256, 0.039146], abs=1e-6)


def shared_heads(world: World, parts: int, dp: int) -> None:
    """A column-parallel layer with fewer parts than ranks: neighbours compute with one part, each for its own use."""
    size = world.everyone.size
    tp = size // dp
    x, w = start(0, 6, 5), start(1, 4 * parts, 5)
    with use_world(World(world.everyone, Mesh(size, world.mesh.rank, tp=tp))) as here:
        layer = bms.nn.ColumnParallelLinear(5, 4 * parts, bias=False, gather_input=False, parts=parts)
        p = layer.parameter("weight")
        p.copy_full(w)
        part = here.mesh.tp_rank * parts // tp
        weigh = start(10 + here.mesh.tp_rank, 6, 4) * (1 + here.mesh.dp_rank)
        _, (grad,) = ms.value_and_grad(lambda x: (layer(x) * Tensor(weigh)).sum() * float(tp), None, [p])(Tensor(x))
        whole = whole_gradients(here, layer, {"weight": grad.asnumpy()})["weight"]
        assert p.layout.box[0] == slice(4 * part, 4 * part + 4)
        right = np.zeros_like(w)
        for rank in range(tp):
            first = 4 * (rank * parts // tp)
            right[first : first + 4] += start(10 + rank, 6, 4).T @ x * np.mean([1 + i for i in range(dp)])
        np.testing.assert_allclose(whole, right, **CLOSE)


@pytest.mark.parametrize(("tp", "parts", "dp"), [(2, 1, 1), (4, 2, 1), (4, 1, 1), (2, 1, 2)])
def test_heads_that_several_ranks_share(run_ranks: Run, tp: int, parts: int, dp: int):
    run_ranks(tp * dp, shared_heads, parts=parts, dp=dp)
