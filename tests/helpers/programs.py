"""Little programs as users write them, run on sharded Blocks and on an unsharded twin; gradients and values must be equal.

A program is a list of steps: `("write", layer, way)`, `("freeze", layer)`, `("thaw", layer)`, `("evaluate", uses)` and
`("train", uses, ...)`, which adds up the gradients of several losses. `uses` say what happens to the hidden states one after the
other: `("block", layer)`, `("both", layer)` (a Block that also returns its input), `("outside", layer)` (the gathered weight),
`("prompt", layer)` (a plain Parameter goes straight into the Block), `("captured", layer)` (the Block uses a Parameter that nobody
gave it), `("shared", layer)` (it gathers another layer's parameter itself), `("penalty", layer)` (on the shard), `("cell", layer)`
(the shard goes through a Cell with a `bprop` of the user's), `("cube", _)` (of the plain Parameter).
"""

from __future__ import annotations

import itertools
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.compat.autograd import no_grad
from bmtrain_ms.compat.runtime import from_host
from tests.helpers.models import recorded

LAYERS, WIDTH = 3, 5
MODES = tuple(itertools.product((True, False), (3, 2), (0, 1, 2)))  # use_checkpoint, zero_level, prefetch
WAYS = ("assign", "set_data", "copy_full", "setitem", "assign_value", "assign_add")


def _start(seed: int, *shape: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 0.5).astype(np.float32)


class Layer(bms.DistributedModule):
    """tanh(x W + b), and ways to be used differently."""

    def __init__(self, i: int, owner: Any):
        super().__init__()
        self.weight = bms.DistributedParameter(_start(i, WIDTH, WIDTH))
        self.bias = bms.DistributedParameter(_start(10 + i, 1, WIDTH))
        self.__dict__["owner"] = owner  # not a child: what is used of it nobody gave to the Block

    def construct(self, x: Tensor, how: str = "block") -> Any:
        y = ops.tanh(ops.matmul(x, self.weight) + self.bias)
        if how == "captured":
            return y * self.owner.prompt.sum()
        if how == "shared":
            return y + ops.matmul(y, self.owner.adapter())
        return (y, x) if how == "both" else y


class Square(nn.Cell):
    """x², with a derivative of its own."""

    def construct(self, x: Tensor) -> Tensor:
        return x * x

    def bprop(self, x: Tensor, out: Tensor, grad: Tensor) -> tuple[Tensor]:
        return (2.0 * x * grad,)


class Ours:
    """Sharded."""

    def __init__(self, use_checkpoint: bool, zero_level: int):
        self.blocks = [bms.Block(Layer(i, self), use_checkpoint, zero_level) for i in range(LAYERS)]
        self.chain = bms.TransformerBlockList(self.blocks)
        self.prompt = Parameter(Tensor(_start(20, 2, WIDTH)), name="prompt")
        self.shared = bms.DistributedParameter(_start(21, WIDTH, WIDTH), name="shared")
        self.layers = [(block.inner.parameter("weight"), block.inner.parameter("bias")) for block in self.blocks]

    def adapter(self) -> Tensor:
        return self.shared.gather()

    def full(self, layer: int) -> Tensor:
        return self.layers[layer][0].gather()


class TwinLayer(nn.Cell):
    """`Layer` of plain Parameters."""

    def __init__(self, i: int, owner: Any):
        super().__init__()
        self.weight = Parameter(Tensor(_start(i, WIDTH, WIDTH)), name=f"{i}.weight")
        self.bias = Parameter(Tensor(_start(10 + i, 1, WIDTH)), name=f"{i}.bias")
        self.__dict__["owner"] = owner

    construct = Layer.construct


class Twin:
    """Nothing of bmtrain_ms in it."""

    def __init__(self) -> None:
        self.blocks = [TwinLayer(i, self) for i in range(LAYERS)]
        self.chain = self._chain
        self.prompt = Parameter(Tensor(_start(20, 2, WIDTH)), name="prompt")
        self.shared = Parameter(Tensor(_start(21, WIDTH, WIDTH)), name="shared")
        self.layers = [(block.weight, block.bias) for block in self.blocks]

    def _chain(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def adapter(self) -> Tensor:
        return self.shared

    def full(self, layer: int) -> Tensor:
        return self.layers[layer][0]


def run_uses(model: Any, x: Tensor, uses: Any) -> Tensor:
    """The loss."""
    extra = Tensor(np.zeros((), np.float32))
    for what, layer in uses:
        if what in ("block", "captured", "shared"):
            x = model.blocks[layer](x, what)
        elif what == "chain":
            x = model.chain(x)
        elif what == "both":
            x, before = model.blocks[layer](x, "both")
            x = x + 0.5 * before
        elif what == "outside":
            x = ops.matmul(x, model.full(layer))
        elif what == "prompt":
            x = x + model.blocks[layer](model.prompt).mean()
        elif what == "penalty":  # a sum, so it takes no part of the mean over ranks
            extra = extra + 0.1 * sum((p**2).sum() for p in model.layers[layer])
        elif what == "cell":
            extra = extra + 0.1 * Square()(model.layers[layer][0]).sum()
        elif what == "cube":
            extra = extra + (model.prompt**3).sum()
    return (x**2).mean() + extra


def write(p: Parameter, way: str, value: float) -> None:
    """Give every element the value."""
    new = ops.full_like(p, value)
    if way == "assign":
        ops.assign(p, new)
    elif way == "set_data":
        p.set_data(new)
    elif way == "setitem":
        p[:] = new
    elif way == "assign_value":
        p.assign_value(new)
    elif way == "assign_add":
        ops.assign_add(p, new - p)
    elif isinstance(p, bms.DistributedParameter):
        p.copy_full(np.full(p.full_shape, value, np.float32))
    else:
        p.set_data(new)


def run_program(world: World, program: list, modes: Any = MODES) -> int:
    """Run it in every mode; raises AssertionError where anything differs from the twin. Returns how many values were compared."""
    compared = 0
    for use_checkpoint, zero_level, prefetch in modes:
        with use_world(recorded(world, prefetch)) as here:
            compared += _Run(here, Ours(use_checkpoint, zero_level), Twin()).all(program, f"{use_checkpoint, zero_level, prefetch}")
    return compared


class _Run:
    def __init__(self, world: World, ours: Ours, twin: Twin):
        self.world, self.ours, self.twin = world, ours, twin
        self.frozen: set[int] = set()
        self.x = Tensor(_start(100 + world.engine.rank, 4, WIDTH))
        self.compared, self.writes = 0, 0

    def all(self, program: list, mode: str) -> int:
        for number, (what, *rest) in enumerate(program):
            where = f"{mode}: step {number}, {what} {rest}"
            if what == "write":
                self.writes += 1
                value = 0.1 + 0.05 * self.writes
                for p in (self.ours.layers[rest[0]][0], self.twin.layers[rest[0]][0]):
                    write(p, rest[1], value)
            elif what in ("freeze", "thaw"):
                for model in (self.ours, self.twin):
                    for p in model.layers[rest[0]]:
                        p.requires_grad = what == "thaw"
                (self.frozen.add if what == "freeze" else self.frozen.discard)(rest[0])
            elif what == "evaluate":
                with no_grad():
                    a, b = (
                        run_uses(m, self.x, [u for u in rest[0] if u[0] not in ("penalty", "cell")]) for m in (self.ours, self.twin)
                    )
                self._compare(a.asnumpy(), b.asnumpy(), where)
            else:
                self._train(rest, where)
        return self.compared

    def _parameters(self, model: Any) -> list[Parameter]:
        layers = [p for i, pair in enumerate(model.layers) if i not in self.frozen for p in pair]
        return [*layers, model.prompt, model.shared]

    def _train(self, losses: Any, where: str) -> None:
        sums: list[list[np.ndarray]] = []
        for model in (self.ours, self.twin):
            params, total = self._parameters(model), None
            for uses in losses:
                grads = ms.value_and_grad(lambda x: run_uses(model, x, uses), None, params)(self.x)[1]  # noqa: B023
                found = [g.asnumpy().astype(np.float64) for g in grads]
                total = found if total is None else [a + b for a, b in zip(total, found)]
            sums.append(total)
        for p, q, a, b in zip(self._parameters(self.ours), self._parameters(self.twin), *sums):
            whole = isinstance(p, bms.DistributedParameter)
            mean = self.world.engine.all_reduce([from_host(b.astype(np.float32))], "mean").wait()[0].asnumpy()
            if whole:
                start, stop = p.owned
                assert not a[stop - start :].any(), f"{where}: padding of {p.name}"
                self._compare(a[: stop - start], mean.reshape(-1)[start:stop], f"{where}: {q.name}")
            else:
                self._compare(a, b, f"{where}: {q.name}")

    def _compare(self, a: np.ndarray, b: np.ndarray, where: str) -> None:
        self.compared += 1
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=f"rank {self.world.engine.rank}, {where}")
