"""One rank of a world of 1 to 8192 ranks: our own time per block, and its memory. `python -m tests.benchmarks.scale`"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from typing import Any, Iterator

from tests.benchmarks.harness import PAGES, environment, table, write_page

WORLDS = (1, 8, 64, 1024, 8192)
BLOCKS, PARAMETERS, WIDTH, ROUNDS = 8, 9, 64, 40  # a Llama block has nine parameters
LIMIT_US = 300
LEFT = (
    "Nothing in it stands out: a step makes 80 tensors and 26 small operations of MindSpore's for each block, each of 3 to 15 µs, "
    "looks at shards and results for writes, and keeps the state of random generators for recomputation. It is a hundredth of a "
    "step of model S."
)


class Stopwatch:
    """Time spent in some functions, without that spent in others which they call."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stack: list[bool] = []
        self._since = 0.0

    @contextlib.contextmanager
    def running(self, ours: bool) -> Iterator[None]:
        """Run (`ours`) or hold inside the `with` statement."""
        self._switch()
        self._stack.append(ours)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack and self._stack[-1]:
            self.seconds += now - self._since
        self._since = now

    def watch(self, owner: Any, name: str, ours: bool) -> None:
        """Count a method as ours, or not."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running(ours):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def layer_class() -> Any:
    """A module of as many parameters as a Llama block has."""
    from mindspore import nn, ops

    import bmtrain_ms as bms

    matmul = ops.MatMul(transpose_b=True)

    class Layer(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            for i in range(PARAMETERS):
                setattr(self, f"w{i}", bms.DistributedParameter(bms.empty(WIDTH, WIDTH)))

        def construct(self, x: Any) -> Any:
            for i in range(PARAMETERS):
                x = matmul(x, getattr(self, f"w{i}"))
            return x

    return Layer


def measure(Layer: Any, watch: Stopwatch, size: int, use_checkpoint: bool) -> tuple[float, int, int]:
    """(our seconds per block and step, bytes of parameters and moments, messages to make the groups of a hierarchy)."""
    import mindspore as ms
    import numpy as np

    import bmtrain_ms as bms
    from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, World, use_world
    from bmtrain_ms.compat.runtime import from_host

    recording = RecordingEngine(SimulatedEngine(size // 2, size))
    World(recording, Mesh(size, size // 2, replica=size // min(size, 8)))
    with use_world(World(SimulatedEngine(size // 2, size), Mesh(size, size // 2))):
        chain = bms.TransformerBlockList(bms.Block(Layer(), use_checkpoint) for _ in range(BLOCKS))
        wanted = chain.trainable_params()
        step = ms.value_and_grad(lambda x: chain(x).sum(), None, wanted)
        optimizer = bms.optim.AdamOptimizer(wanted)
        state = sum(t.nbytes for p in wanted for t in (p, *optimizer.state_of(p).values()))
        x = from_host(np.ones((1, WIDTH), np.float32))
        taken = []
        for i in range(ROUNDS + 5):
            watch.seconds = 0.0
            step(x)
            if i >= 5:
                taken.append(watch.seconds / BLOCKS)
    return statistics.median(taken), state, len(recording.events)


def watched() -> tuple[Any, Stopwatch]:
    """Ours: Blocks and what autograd calls of them. Not ours: the module inside, MindSpore's executor, the transport."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import SimulatedEngine
    from bmtrain_ms.compat import autograd
    from bmtrain_ms.zero import context

    Layer, watch = layer_class(), Stopwatch()
    watch.watch(bms.Block, "construct", True)
    watch.watch(autograd._Op, "bprop", True)
    watch.watch(context.ZeroContext, "end_of_backward", True)
    watch.watch(Layer, "construct", False)
    for name in ("all_gather", "reduce_scatter"):
        watch.watch(SimulatedEngine, name, False)
    for name in ("call_custom_bprop", "new_graph", "end_graph", "grad", "sync"):
        watch.watch(autograd.PyNativeExecutor, name, False)
    return Layer, watch


def main() -> None:
    """Measure, plot, write the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    import bmtrain_ms as bms

    bms.init_distributed()
    Layer, watch = watched()
    rows: list[list[Any]] = []
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for use_checkpoint in (False, True):
        results = [measure(Layer, watch, size, use_checkpoint) for size in WORLDS]
        for size, (seconds, state, messages) in zip(WORLDS, results):
            formula = 3 * 4 * BLOCKS * PARAMETERS * WIDTH**2 / size / 1024
            on = "on" if use_checkpoint else "off"
            rows.append([size, on, f"{1e6 * seconds:.0f}", f"{state / 1024:.1f}", f"{formula:.1f}", messages])
        left.plot(WORLDS, [1e6 * r[0] for r in results], "o-", label=f"checkpoint {'on' if use_checkpoint else 'off'}")
    left.axhline(LIMIT_US, color="grey", linestyle=":", label="target")
    left.set(xscale="log", xlabel="ranks", ylabel="our time per block and step, µs", ylim=(0, None))
    left.legend()
    right.plot(WORLDS, [r[1] / 1024 for r in results], "o-")
    right.set(xscale="log", yscale="log", xlabel="ranks", ylabel="parameters and moments of a rank, KiB")
    figure.savefig(PAGES / "scale.png", dpi=100)
    write_page(
        "scale",
        "Worlds of 1 to 8192 ranks",
        f"Target: our Python costs at most {LIMIT_US} µs per block and step, whatever the number of ranks; a rank's memory falls "
        "as 1/N; making groups takes O(1) messages.",
        f"**Result**: {min(float(r[2]) for r in rows):.0f} to {max(float(r[2]) for r in rows):.0f} µs, nearly the same for 1 and "
        "8192 ranks: independent, but above the target. " + LEFT,
        f"{environment()} `taskset -c 0 python -m tests.benchmarks.scale`",
        "One process is the middle rank of a simulated world (`comm.SimulatedEngine`: every collective returns at once). A chain "
        f"of {BLOCKS} blocks of {PARAMETERS} parameters ({WIDTH}, {WIDTH}). *Our time* is what a step spends in Blocks and "
        "in the functions of theirs that autograd calls, without the module inside, MindSpore's executor and the transport; it "
        f"includes making tensors and views. Median of {ROUNDS} steps.",
        table(["ranks", "checkpoint", "our time, µs", "parameters and moments, KiB", "formula, KiB", "messages for groups"], rows),
        "![our time per block, memory of a rank](scale.png)",
        "Memory stops falling as 1/N only where a parameter has fewer elements than there are ranks: a shard has one at least.",
    )


if __name__ == "__main__":
    main()
