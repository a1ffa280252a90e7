"""A layer of experts for `tests.benchmarks.parallel`: beside a dense one of the same active size; messages behind computation."""

from __future__ import annotations

import statistics
import sys
from typing import Any, Callable

from tests.benchmarks.harness import SIZES, alone, interleaved, report

EXPERTS, TOP = 8, 2


def layer(kind: str, size: Any, world: Any, shared: str = "") -> Callable[[], None]:
    """A function that makes one forward and backward pass of a layer (`dense` or `experts`) in a world.

    `shared`: with a shared expert, of `halves`, or as a `whole`.
    """
    import mindspore as ms
    import numpy as np

    import bmtrain_ms as bms
    from bmtrain_ms.comm import use_world
    from bmtrain_ms.compat.runtime import from_host
    from bmtrain_ms.model_center.layer import FeedForward
    from bmtrain_ms.nn import MoE

    class Whole(FeedForward):
        """One that is called as a whole."""

        def construct(self, hidden: Any) -> Any:
            return super().construct(hidden)

    with use_world(world):
        if kind == "dense":
            inner: Any = FeedForward(size.dim, TOP * size.ff)
        else:
            beside = {"": None, "halves": FeedForward, "whole": Whole}[shared]
            beside = beside and beside(size.dim, size.ff)
            inner = MoE(size.dim, size.ff, EXPERTS, TOP, shared=beside)
        bms.init_parameters(inner)
        block = bms.Block(inner, use_checkpoint=False, zero_level=2)
        x = from_host(np.random.default_rng(0).standard_normal((size.tokens, size.dim)).astype(np.float32))
        run = ms.value_and_grad(lambda x: (block(x) ** 2).mean(), 0, block.trainable_params())

    def step() -> None:
        with use_world(world):
            run(x)

    return step


def run_rank(size: str, rounds: int) -> None:
    """A dense layer, experts on each rank alone, and divided over the ranks."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import Mesh, World

    world = bms.init_distributed()
    ranks = world.everyone.size
    divided = World(world.everyone, Mesh(ranks, world.mesh.rank, ep=ranks))
    cases = {
        "dense": layer("dense", SIZES[size], alone()),
        "EP 1": layer("experts", SIZES[size], alone()),
        f"EP {ranks}": layer("experts", SIZES[size], divided),
    }
    report(interleaved(cases, rounds, 3, lambda: world.everyone.barrier().wait()))


def hidden(size: str, rounds: int) -> None:
    """On a simulated link on which tokens travel as long as the shared expert computes, there and back, forward and backward: a
    pass without a link (`free`), with one, with one where the shared expert cannot be taken apart (`whole`), and what its messages
    take. Parameters take no time, those of the shared expert neither: they have nothing to do with tokens."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import FabricEngine, Mesh, RecordingEngine, SimulatedEngine, World

    class TokenFabric(FabricEngine):
        """A link that only tokens travel on."""

        def _around(self, op: str, label: str, tensors: Any, received: int, work: Any) -> Any:
            return super()._around(op, label, tensors, received, work) if op == "all_to_all" else work

        def _rewrap(self, inner: Any) -> Any:
            return TokenFabric(inner, self.latency, self.bandwidth, self._link_free)

    bms.init_distributed()
    mesh, recording = Mesh(2, 0, ep=2), RecordingEngine(SimulatedEngine(0, 2))
    layer("experts", SIZES[size], World(recording, mesh), shared="halves")()
    moved = sum(event.received for event in recording.events if event.op == "all_to_all")
    half = layer("dense", SIZES[size], alone())  # as long as two shared ones
    link = statistics.median(interleaved({"half": half}, rounds, 3, lambda: None)["half"]) / TOP
    worlds = {
        "free": World(SimulatedEngine(0, 2), mesh),
        "link": World(TokenFabric(SimulatedEngine(0, 2), 0.0, moved / link), mesh),
        "whole": World(TokenFabric(SimulatedEngine(0, 2), 0.0, moved / link), mesh),
    }
    kinds = {name: "whole" if name == "whole" else "halves" for name in worlds}
    steps = {name: layer("experts", SIZES[size], world, shared=kinds[name]) for name, world in worlds.items()}
    taken = {name: statistics.median(times) for name, times in interleaved(steps, rounds, 3, lambda: None).items()}
    report({**taken, "messages": link})


if __name__ == "__main__":
    (hidden if sys.argv[4:] == ["link"] else run_rank)(sys.argv[2], int(sys.argv[3]))
