"""All ranks of a pipeline in one process: what one sends, another finds in a queue."""

from __future__ import annotations

from collections import deque
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SimulatedEngine, SingleEngine, Work, World, use_world
from bmtrain_ms.comm.engine import Buffer, Done, Engine
from bmtrain_ms.compat.runtime import from_host
from bmtrain_ms.parallel import Segment, Stage
from bmtrain_ms.parallel.stage import Run, lines_of
from bmtrain_ms.zero import context_of
from bmtrain_ms_base.schedule import RECEIVE, Schedule
from bmtrain_ms_base.stages import divide
from tests.helpers.passes import WIDTH, Layer

ROWS = 2


class LoopBack(SimulatedEngine):
    """A rank of several in this process."""

    def __init__(self, rank: int, size: int, queues: dict[tuple[int, int], deque]):
        super().__init__(rank, size)
        self._queues = queues

    def send(self, tensors: Sequence[Buffer], dst: int, label: str = "") -> Work:
        self._queues.setdefault((self.rank, dst), deque()).append([from_host(x.asnumpy().copy()) for x in tensors])
        return Done([])

    def recv(self, like: Sequence[Tensor], src: int, label: str = "") -> Work:
        found = self._queues[src, self.rank].popleft()
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in like], label
        return Done(found)

    def subgroup(self, ranks: Sequence[int]) -> Engine:
        return self if len(ranks) > 1 else SingleEngine(self.clock)

    def waits(self, src: int) -> bool:
        """Whether there is nothing from that rank."""
        return not self._queues.get((src, self.rank))


Make = Callable[[int], Any]


class Pipeline:
    """A chain of layers with the loss (y * target).sum() behind it, over p ranks with v chunks each."""

    def __init__(self, table: Schedule, layers: int, recompute: Callable[[int], bool], make: Make = Layer, seed: int = 0):
        self.table, queues = table, {}
        self.worlds = [World(LoopBack(r, table.p, queues), Mesh(table.p, r, pp=table.p), seed=seed) for r in range(table.p)]
        n = table.p * table.v
        self.plan = divide(layers, table.p, table.v, [layers // n] * (n - 1) + [layers - layers // n * (n - 1)])
        self.stages, self.params = [], []
        for world in self.worlds:
            with use_world(world):
                chunks, params = [], []
                for part in self.plan[world.mesh.pp_rank :: table.p]:
                    blocks = [bms.Block(make(i), use_checkpoint=False, zero_level=2).set_train() for i in part.layers]
                    segments = [segment(i, block, recompute(i)) for i, block in zip(part.layers, blocks)]
                    params += [p for block in blocks for p in block.trainable_params()]
                    chunks.append([*segments, *([Segment("loss", loss, [], layers, False)] if part.head else [])])
                self.stages.append(Stage(chunks, layers + 1, lambda _: from_host(np.zeros((ROWS, WIDTH), np.float32)), world))
                self.params.append(params)

    def run(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[float], dict[str, np.ndarray]]:
        """Losses, and gradients by name."""
        one = from_host(np.ones(1, np.float32))
        runs = [Run(s, self.table, batches, {id(p): p for p in ps}, one) for s, ps in zip(self.stages, self.params)]
        left = [deque(line) for line in lines_of(self.table, 2.0)]
        try:
            while any(left):
                before = sum(map(len, left))
                for rank, line in enumerate(left):
                    while line and not self._waits(rank, line[0]):
                        with use_world(self.worlds[rank]):
                            runs[rank].step(line.popleft())
                assert sum(map(len, left)) < before, "nobody can go on"
        finally:
            for run in runs:
                run.end()
        grads = {p.name: run.sums[id(p)].asnumpy() for run, ps in zip(runs, self.params) for p in ps}
        return [x.asnumpy().item() for x in runs[-1].losses()], grads

    @property
    def gathered(self) -> int:
        """Bytes of gathered copies that are there."""
        return sum(context_of(world).pipeline.meter.current for world in self.worlds)

    def _waits(self, rank: int, action: Any) -> bool:
        engine = self.worlds[rank].everyone
        return action.kind in RECEIVE.values() and isinstance(engine, LoopBack) and engine.waits(self.table.peer(rank, action))


def segment(i: int, block: Any, recompute: bool) -> Segment:
    """A layer; the first one takes the micro-batch's own rows."""
    return Segment(f"layer {i}", lambda x, batch: block(batch[0] if x is None else x), [block], i, recompute)


def loss(x: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (x * batch[1]).sum().reshape(1)


def batches_of(m: int) -> list[tuple[Tensor, Tensor]]:
    random = np.random.default_rng(m)
    return [tuple(Tensor(random.standard_normal((ROWS, WIDTH)).astype(np.float32)) for _ in range(2)) for _ in range(m)]


def at_once(layers: int, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, and gradients of their sum, of plain MindSpore."""
    weights = [
        ms.Parameter(Layer(i).parameter("weight").asnumpy().reshape(WIDTH, WIDTH), name=f"{i}.weight") for i in range(layers)
    ]

    def run(x: Tensor, target: Tensor) -> Tensor:
        for weight in weights:
            x = ops.tanh(ops.matmul(x, weight))
        return (x * target).sum()

    losses, total = [], dict.fromkeys([w.name for w in weights], 0.0)
    for batch in batches:
        value, grads = ms.value_and_grad(run, None, weights)(*batch)
        losses.append(value.asnumpy().item())
        total = {w.name: total[w.name] + g.asnumpy() for w, g in zip(weights, grads)}
    return losses, {name: np.asarray(g).reshape(-1) for name, g in total.items()}
