"""Micro-batches whose forward and backward passes are interleaved, as pipeline stages do it."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.compat.autograd import Recorded, record
from bmtrain_ms.zero import Pass, context_of

WIDTH, BLOCKS = 5, 3


class Layer(bms.DistributedModule):
    """tanh(x W), W not a multiple of the ranks."""

    def __init__(self, i: int):
        super().__init__()
        values = np.random.default_rng(i).standard_normal((WIDTH, WIDTH)).astype(np.float32)
        self.weight = bms.DistributedParameter(values * np.float32(0.5), name=f"{i}.weight")

    def construct(self, x: Tensor) -> Tensor:
        return ops.tanh(ops.matmul(x, self.weight))


def schedule(forwards: int, choices: list[int], youngest_first: bool) -> list[tuple[str, int]]:
    """A valid order of F and B of so many micro-batches; `choices` decide where there are several possibilities."""
    order: list[tuple[str, int]] = []
    begun, under_way = 0, []
    for choice in [*choices, *([1] * 2 * forwards)]:
        if begun < forwards and (not under_way or choice % 3):
            order.append(("F", begun))
            under_way.append(begun)
            begun += 1
        elif under_way:
            order.append(("B", under_way.pop(-1 if youngest_first else choice % len(under_way))))
    while under_way:
        order.append(("B", under_way.pop()))
    return order


def gradients(world: World, order: list[tuple[str, int]], use_checkpoint: bool, zero_level: int, prefetch: int) -> dict[str, Any]:
    """Of each micro-batch, taken in that order; and as `value_and_grad` gives them one by one. And what is gathered at the end."""
    with use_world(World(world.everyone, world.mesh, prefetch=prefetch)) as here:
        blocks = [bms.Block(Layer(i), use_checkpoint, zero_level) for i in range(BLOCKS)]
        params = [p for block in blocks for p in block.trainable_params()]
        batches = {
            i: Tensor(np.random.default_rng([i, here.everyone.rank]).standard_normal((2, WIDTH)).astype(np.float32))
            for _, i in order
        }
        ones = (Tensor(np.ones((2, WIDTH), np.float32)),)

        def run(x: Tensor) -> tuple[Tensor]:
            for block in blocks:
                x = block(x)
            return (x,)

        one_by_one = {}
        for i, x in batches.items():
            _, (of_input, of_params) = ms.value_and_grad(lambda x: run(x)[0].sum(), 0, params)(x)
            one_by_one[i] = [g.asnumpy() for g in (of_input, *of_params)]
        context, passes = context_of(here), {i: Pass() for i in batches}
        recorded: dict[int, Recorded] = {}
        interleaved = {}
        for what, i in order:
            with context.within(passes[i]):
                if what == "F":
                    recorded[i] = record(run, [batches[i]])
                else:
                    interleaved[i] = [g.asnumpy() for g in recorded.pop(i).pull(ones, params)]
        return {"one by one": one_by_one, "interleaved": interleaved, "gathered": context.pipeline.meter.current}


def equal(found: dict[str, Any]) -> bool:
    """Whether both ways gave the same bits, and nothing is left gathered."""
    pairs = [(found["one by one"][i], grads) for i, grads in found["interleaved"].items()]
    return found["gathered"] == 0 and all(np.array_equal(a, b) for one, other in pairs for a, b in zip(one, other))
