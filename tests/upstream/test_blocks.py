"""BMTrain's tests of a single Block or list of them: what it returns, what is trained, how often it runs."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms import inspect
from bmtrain_ms.comm import World, use_world
from tests.helpers.models import WIDTH, Dense, full, recorded, share

ROWS = 8


def x_of(seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(ROWS, WIDTH).astype(np.float32)


class Linear(Dense):
    """`Dense` that counts its calls and may take more arguments."""

    def __init__(self, width: int = WIDTH, out: int = WIDTH):
        super().__init__(width, out, ms.float32)
        self.calls = 0

    def construct(self, x: Tensor, *others: Tensor) -> Tensor:
        self.calls += 1
        y = super().construct(x)
        return y + others[0] if others else y


# test_different_output_shape #


class Returns(Linear):
    def __init__(self, make: Callable[[Tensor], Any]):
        super().__init__()
        self.make = make

    def construct(self, x: Tensor) -> Any:
        return self.make(super().construct(x))


class ReturnsAlone(bms.DistributedModule):
    """As upstream: without parameters."""

    def __init__(self, make: Callable[[Tensor], Any]):
        super().__init__()
        self.make = make

    def construct(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.usefixtures("single_world")
@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize(
    ("make", "length"),
    [(lambda y: y, None), (lambda y: (y,), 1), (lambda y: (y, y * 2), 2), (lambda y: [y * i for i in range(10)], 10)],
)
@pytest.mark.parametrize("inner", [Returns, ReturnsAlone])
def test_different_output_shape(inner: Any, make: Callable, length: int | None, use_checkpoint: bool):
    """The same type with and without gradients; and every output's values, and its gradient, are its own."""
    block = bms.Block(inner(make), use_checkpoint)
    bms.init_parameters(block)
    seen = []

    def forward(x: Tensor) -> Tensor:
        out = block(x)
        seen.append(out)
        return sum((i + 1) * y.sum() for i, y in enumerate((out,) if length is None else out))

    x = Tensor(x_of())
    loss, grad = ms.value_and_grad(forward)(x)
    np.testing.assert_allclose(forward(x).asnumpy(), loss.asnumpy(), rtol=1e-6)
    for out in seen:
        assert isinstance(out, Tensor) if length is None else type(out) is tuple and len(out) == length
    bare = ms.grad(lambda x: block(x).sum() if length is None else block(x)[1 if length == 10 else 0].sum())(x)
    factor = {None: 1, 1: 1, 2: 1 + 4, 10: sum(i * (i + 1) for i in range(10))}[length]
    np.testing.assert_allclose(grad.asnumpy(), factor * bare.asnumpy(), rtol=1e-4, atol=1e-4)


# test_requires_grad, test_requires_grad_multi_gpu #


def toggle(world: World) -> None:
    """Flags change between steps; with a further argument that needs no gradient."""
    with use_world(recorded(world)) as here:
        blocks = bms.TransformerBlockList([Linear(), Linear()])
        bms.init_parameters(blocks)
        everything = list(blocks.get_parameters())
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer(everything, lr=0.0))
        x, other = Tensor(share(here, x_of())), Tensor(share(here, x_of(1)))

        def step() -> dict[str, np.ndarray | None]:
            manager.zero_grad()
            manager.backward(lambda: (blocks(x, other) ** 2).mean())
            grads = {p.name: manager.grad(p) for p in everything}
            return {name: None if g is None else full(here, p, g) for p, (name, g) in zip(everything, grads.items())}

        def table() -> dict[str, str]:
            lines = inspect.format_summary(inspect.inspect_model(blocks, "*")).splitlines()[1:]
            return {p.name: line for p, line in zip(everything, lines)}

        reference, lines = step(), table()
        assert all(np.abs(g).max() > 0 for g in reference.values())
        first = blocks[0].inner
        for frozen in (["weight"], ["weight", "bias"], ["bias"], []):
            for name in ("weight", "bias"):
                first.parameter(name).requires_grad = name not in frozen
            grads, now = step(), table()
            for name, grad in grads.items():
                if name in {f"0.{n}" for n in frozen}:
                    assert grad is None and now[name].split()[-2:] == ["0.0000", "0.0000"]
                else:
                    np.testing.assert_array_equal(grad, reference[name], err_msg=f"{name} with {frozen} frozen")
                    assert now[name] == lines[name]
        by_other = ms.grad(lambda other: (blocks(x, other) ** 2).mean())(other)
        assert np.abs(by_other.asnumpy()).max() > 0


def test_requires_grad(single_world: World):
    toggle(single_world)


@pytest.mark.ranks
def test_requires_grad_multi_gpu(run_ranks: Callable[..., list[Any]]):
    run_ranks(2, toggle)


# test_dropout #


@pytest.mark.usefixtures("single_world")
def test_dropout():
    class Drops(bms.DistributedModule):
        def __init__(self):
            super().__init__()
            self.drop = bms.nn.Dropout(0.3)

        def construct(self, x: Tensor) -> Tensor:
            return self.drop(x)

    blocks = bms.TransformerBlockList(Drops() for _ in range(5))
    bms.init_parameters(blocks)
    x = Tensor(np.ones((50, WIDTH), np.float32))
    blocks.set_train()
    y = blocks(x).asnumpy()
    assert abs((y == 0).mean() - (1 - 0.7**5)) < 0.1
    np.testing.assert_allclose(y[y != 0], 0.7**-5, rtol=1e-5)
    grad = ms.grad(lambda x: blocks(x).sum())(x).asnumpy()
    assert grad.min() == 0
    np.testing.assert_allclose(grad[grad != 0], 0.7**-5, rtol=1e-5)
    blocks.set_train(False)
    np.testing.assert_array_equal(blocks(x).asnumpy(), x.asnumpy())


# test_no_grad #


@pytest.mark.usefixtures("single_world")
@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
def test_no_grad(use_checkpoint: bool, as_list: bool):
    """Frozen Blocks run once; trained ones twice, and without checkpointing once (upstream: the first one twice all the same)."""
    cells = [Linear() for _ in range(3)]
    blocks = bms.TransformerBlockList([bms.Block(c, use_checkpoint) for c in cells])
    bms.init_parameters(blocks)
    x = Tensor(x_of())

    def forward(x: Tensor) -> Tensor:
        if as_list:
            return (blocks(x) ** 2).mean()
        for block in blocks:
            x = block(x)
        return (x**2).mean()

    twice = 2 if use_checkpoint else 1
    for frozen, calls in (([], [twice] * 3), ([0, 1], [1, 1, twice]), ([1], [twice] * 3), ([0, 1, 2], [1, 1, 1])):
        for i, cell in enumerate(cells):
            cell.calls = 0
            for p in cell.get_parameters():
                p.requires_grad = i not in frozen
        params = blocks.trainable_params()
        grads = ms.grad(forward, None, params)(x) if params else [] * bool(forward(x))
        assert [cell.calls for cell in cells] == calls, f"{frozen} frozen"
        assert len(grads) == 3 * (3 - len(frozen)) and all(np.abs(g.asnumpy()).max() > 0 for g in grads)


@pytest.mark.usefixtures("single_world")
def test_no_grad_same_module_twice():
    raw = Linear()
    blocks = bms.TransformerBlockList([raw, raw])
    assert blocks[0] is not blocks[1] and blocks[0].inner is blocks[1].inner
    block = bms.Block(Linear())
    with pytest.raises(AssertionError, match="the same Block appears twice"):
        bms.TransformerBlockList([block, block])


# grad_accu #


class TwoBlocks(nn.Cell):
    """Without a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b = bms.Block(Linear()), bms.Block(Linear())

    def construct(self, x: Tensor) -> Tensor:
        return self.b(ops.tanh(self.a(x)))


class Plain(nn.Cell):
    """Without Blocks."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Linear(), Linear()

    construct = TwoBlocks.construct


def accumulate(world: World) -> None:
    for make in (Plain, TwoBlocks, lambda: bms.TransformerBlockList([Linear(), Linear()])):
        with use_world(recorded(world)) as here:
            model = make()
            bms.init_parameters(model)
            manager = bms.optim.OptimManager(loss_scale=4.0)
            manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
            x, y = (Tensor(share(here, x_of(seed))) for seed in (0, 1))

            def gradients(*batches: Tensor, model=model, manager=manager, here=here) -> dict[str, np.ndarray]:
                manager.zero_grad()
                for batch in batches:
                    manager.backward(lambda: (model(batch) ** 2).mean())  # noqa: B023
                return {p.name: full(here, p, manager.grad(p)).copy() for p in model.trainable_params()}

            once, twice, other, both = gradients(x), gradients(x, x), gradients(y), gradients(x, y)
            assert len(once) == 6
            for name, grad in once.items():
                assert np.abs(grad).max() > 0
                np.testing.assert_array_equal(twice[name], 2 * grad, err_msg=name)
                np.testing.assert_array_equal(both[name], grad + other[name], err_msg=name)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_grad_accu(run_ranks: Callable[..., list[Any]], ranks: int):
    run_ranks(ranks, accumulate)
