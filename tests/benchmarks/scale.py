"""One rank of a world of 1 to 8192 ranks: our own time per block, and its memory. `python -m tests.benchmarks.scale`"""

from __future__ import annotations

import statistics
import time
from typing import Any

from tests.benchmarks.harness import PAGES, environment, table, write_page

WORLDS = (1, 8, 64, 1024, 8192)
BLOCKS, WIDTH, ROUNDS = 8, 64, 30
LIMIT_US = 300


class Plain:
    """What a block computes, without any of bmtrain_ms around it."""

    def __init__(self, module: Any, tensors: Any):
        self.module, self.tensors = module, tensors


def step_seconds(use_block: bool, size: int, use_checkpoint: bool) -> tuple[float, float, int]:
    """(median seconds of forward and backward, persistent bytes of parameters and moments, messages of group construction)."""
    import mindspore as ms
    import numpy as np
    from mindspore import nn, ops

    import bmtrain_ms as bms
    from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, World, make_hierarchy, use_world
    from bmtrain_ms.compat.runtime import from_host

    matmul = ops.MatMul(transpose_b=True)

    class Layer(nn.Cell):
        """Nine parameters, as many as a Llama block has."""

        def __init__(self) -> None:
            super().__init__()
            for i in range(9):
                shape = (WIDTH, WIDTH)
                value = bms.DistributedParameter(bms.empty(*shape)) if use_block else from_host(np.zeros(shape, np.float32))
                setattr(self, f"w{i}", value)

        def construct(self, x: Any) -> Any:
            for i in range(9):
                x = matmul(x, getattr(self, f"w{i}"))
            return x

    recording = RecordingEngine(SimulatedEngine(size // 2, size))
    hierarchy = make_hierarchy(recording, 8) if size > 8 else None
    messages = len(recording.events)
    del hierarchy
    with use_world(World(SimulatedEngine(size // 2, size), Mesh(size, size // 2))):
        layers = [Layer() for _ in range(BLOCKS)]
        x = from_host(np.ones((1, WIDTH), np.float32))
        if use_block:
            chain = bms.TransformerBlockList(bms.Block(layer, use_checkpoint) for layer in layers)
            wanted = chain.trainable_params()
            step = ms.value_and_grad(lambda x: chain(x).sum(), None, wanted)
            optimizer = bms.optim.AdamOptimizer(wanted)
            state = sum(t.nbytes for p in wanted for t in (p, *optimizer.state_of(p).values()))
        else:
            weights = [getattr(layer, f"w{i}") for layer in layers for i in range(9)]

            def run(x: Any, *weights: Any) -> Any:
                for layer in range(BLOCKS):
                    for w in weights[9 * layer : 9 * layer + 9]:
                        x = matmul(x, w)
                return x.sum()

            again = 1 + use_checkpoint  # recomputation is the user's work, not ours
            step_once = ms.value_and_grad(run, tuple(range(1, 1 + len(weights))))
            forward_only = [lambda: run(x, *weights)] * (again - 1)

            def step(x: Any) -> Any:
                for extra in forward_only:
                    extra()
                return step_once(x, *weights)

            state = 0
        taken = []
        for i in range(ROUNDS + 5):
            start = time.perf_counter()
            step(x)
            if i >= 5:
                taken.append(time.perf_counter() - start)
    return statistics.median(taken), state, messages


def main() -> None:
    """Measure, plot, write the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    import bmtrain_ms as bms

    bms.init_distributed()
    rows, per_block = [], {}
    for use_checkpoint in (False, True):
        plain, _, _ = step_seconds(False, 1, use_checkpoint)
        for size in WORLDS:
            seconds, state, messages = step_seconds(True, size, use_checkpoint)
            microseconds = (seconds - plain) / BLOCKS * 1e6
            per_block.setdefault(use_checkpoint, []).append((microseconds, state))
            kind = "on" if use_checkpoint else "off"
            rows.append(
                [
                    size,
                    kind,
                    f"{microseconds:.0f}",
                    f"{state / 1024:.1f}",
                    f"{16 * 9 * WIDTH**2 / size / 1024 * BLOCKS * 3 / 4:.1f}",
                    messages,
                ]
            )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for use_checkpoint, values in per_block.items():
        left.plot(WORLDS, [v[0] for v in values], "o-", label=f"checkpoint {'on' if use_checkpoint else 'off'}")
    left.axhline(LIMIT_US, color="grey", linestyle=":", label="target")
    left.set(xscale="log", xlabel="ranks", ylabel="our time per block and step, µs", ylim=(0, None))
    left.legend()
    right.plot(WORLDS, [v[1] / 1024 for v in per_block[True]], "o-")
    right.set(xscale="log", yscale="log", xlabel="ranks", ylabel="parameters and moments of a rank, KiB")
    figure.savefig(PAGES / "scale.png", dpi=100)
    write_page(
        "scale",
        "Worlds of 1 to 8192 ranks",
        f"Target: our Python costs at most {LIMIT_US} µs per block and step, whatever the number of ranks; a rank's memory falls as "
        "1/N; making groups takes O(1) messages.",
        f"{environment()} `python -m tests.benchmarks.scale`",
        f"One process is the middle rank of a simulated world (`comm.SimulatedEngine`: every collective returns at once). A chain of "
        f"{BLOCKS} blocks of nine ({WIDTH}, {WIDTH}) parameters; *our time* is the median of {ROUNDS} steps (forward, backward), less "
        "the same products on plain tensors without bmtrain_ms, per block. It includes the copies of the simulated gathers, "
        "147 KiB a block.",
        table(["ranks", "checkpoint", "our time, µs", "parameters and moments, KiB", "formula, KiB", "messages for groups"], rows),
        "![our time per block, memory of a rank](scale.png)",
        "The memory stops falling as 1/N only where a parameter has fewer elements than there are ranks: each shard has one at least.",
    )


if __name__ == "__main__":
    main()
