"""One function of our Blocks and of ordinary Cells: the loss and every gradient must be those of the Cells."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import World

WIDTH, LAYERS = 5, 3
BLOCKS = [(True, 3), (True, 2), (False, 3), (False, 2)]  # use_checkpoint, zero_level


def start(seed: int, *shape: int) -> np.ndarray:
    """Values to begin with."""
    return (np.random.default_rng(seed).normal(size=shape) * 0.5).astype(np.float32)


def plain_layer(self: Any, x: Tensor) -> Tensor:
    """tanh(x W + b)."""
    return ops.tanh(ops.matmul(x, self.weight) + self.bias)


class Sharded(bms.DistributedModule):
    """A layer of ours, of a chain `owner`, that calls `function(self, ...)`."""

    def __init__(self, i: int, owner: Twin, function: Callable[..., Any]):
        super().__init__()
        self.weight = bms.DistributedParameter(start(i, WIDTH, WIDTH), name=f"{i}.weight")
        self.bias = bms.DistributedParameter(start(10 + i, 1, WIDTH), name=f"{i}.bias")
        vars(self).update(owner=owner, function=function, place=i)

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Ordinary(nn.Cell):
    """The same as a Cell with Parameters."""

    def __init__(self, i: int, owner: Twin, function: Callable[..., Any]):
        super().__init__()
        self.weight = Parameter(Tensor(start(i, WIDTH, WIDTH)), name=f"{i}.weight")
        self.bias = Parameter(Tensor(start(10 + i, 1, WIDTH)), name=f"{i}.bias")
        vars(self).update(owner=owner, function=function, place=i)

    construct = Sharded.construct


class Twin:
    """A few layers, a shared parameter, and what a test hangs on it.

    Attributes:
        blocks: what is called; `params`: what gradients are taken of; `ours`: whether it is of Blocks.
    """

    def __init__(self, function: Callable[..., Any] = plain_layer, block: tuple[bool, int] | None = None):
        self.ours = block is not None
        kind: Any = Sharded if self.ours else Ordinary
        self.inner = [kind(i, self, function) for i in range(LAYERS)]
        self.blocks: list[Any] = self.inner if block is None else [bms.Block(layer, *block) for layer in self.inner]
        shared = start(21, WIDTH, WIDTH)
        self.shared = bms.DistributedParameter(shared, name="shared") if self.ours else Parameter(Tensor(shared), name="shared")
        self.prompt = Parameter(Tensor(start(20, 2, WIDTH)), name="prompt")
        of_layers = [getattr(layer, "parameter", layer.__getattr__)(name) for layer in self.inner for name in ("weight", "bias")]
        self.params = [*of_layers, self.shared, self.prompt]

    def chain(self, x: Tensor) -> Tensor:
        """All layers, one behind the other."""
        for block in self.blocks:
            x = block(x)
        return x


Run = Callable[[Twin, Tensor], Tensor]  # the loss of a step


def steps(twin: Twin, run: Run, count: int, world: World | None = None) -> list[list[np.ndarray]]:
    """[loss, gradients of whole parameters ...] of each step; over the ranks of `world` their mean."""
    found = []
    for i in range(count):
        x = Tensor(start(100 + i, 4, WIDTH))
        vars(twin)["step"] = i
        loss, grads = ms.value_and_grad(lambda x: run(twin, x), None, twin.params)(x)
        found.append([loss.asnumpy(), *(_whole(p, g, world) for p, g in zip(twin.params, grads))])
    return found


def _whole(p: Any, grad: Tensor, world: World | None) -> np.ndarray:
    if not isinstance(p, bms.DistributedParameter):
        return grad.asnumpy()
    full = grad if world is None else world.everyone.all_gather([grad]).wait()[0]
    return full.asnumpy()[: p.full_size].reshape(p.full_shape)


def compare(run: Run, function: Callable[..., Any] = plain_layer, block: tuple[bool, int] = (True, 3), count: int = 2) -> None:
    """Ours against the ordinary one."""
    ours, theirs = steps(Twin(function, block), run, count), steps(Twin(function), run, count)
    for mine, right in zip(ours, theirs):
        for a, b in zip(mine, right):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def squared(x: Tensor) -> Tensor:
    """A loss."""
    return (x**2).mean()


def chained(*more: Callable[[Twin], Tensor]) -> Run:
    """The loss of the chain and of `more`."""

    def run(twin: Twin, x: Tensor) -> Tensor:
        return sum((f(twin) for f in more), squared(twin.chain(x)))  # type: ignore[arg-type]

    return run


def outputs(twin: Twin, x: Tensor) -> Sequence[Any]:
    """What each layer returns, given what the one before returned first."""
    found = []
    for block in twin.blocks:
        out = block(x)
        found.append(out)
        x = out[0] if isinstance(out, tuple) else out
    return found
