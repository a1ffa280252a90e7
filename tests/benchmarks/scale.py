"""One rank of a world of 1 to 8192 ranks, and of one of three axes: our own time per block, and its memory.

`python -m tests.benchmarks.scale`
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from typing import Any, Iterator

from tests.benchmarks.harness import PAGES, environment, table, write_page

WORLDS = (1, 8, 64, 1024, 8192)
STAGES, PARTS = 8, 8  # of worlds of three axes
THREE = (64, 4096)  # ranks of these
BLOCKS, PARAMETERS, WIDTH, ROUNDS = 8, 9, 64, 40  # a Llama block has nine parameters
LIMIT_US = 300
LEFT = (
    "Nothing in it stands out: a step makes 80 tensors and 26 small operations of MindSpore's for each block, each of 3 to 15 µs, "
    "looks at shards and results for writes, and at random generators for recomputation. It is a hundredth of a "
    "step of model S."
)


class Stopwatch:
    """Seconds of this thread on a core, spent in some functions, without that spent in others which they call."""

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
        now = time.thread_time()  # whatever else the machine does
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
            for i in range(PARAMETERS):  # by columns, by rows, and the last one, as a norm, on all tensor-parallel ranks
                cut = i % 2 if i < PARAMETERS - 1 else -1
                setattr(self, f"w{i}", bms.DistributedParameter(bms.empty(WIDTH, WIDTH), tp_mode=cut >= 0, tp_split_dim=cut))

        def construct(self, x: Any) -> Any:
            for i in range(PARAMETERS):
                x = matmul(x, getattr(self, f"w{i}"))
            return x

    return Layer


def measure(
    Layer: Any, watch: Stopwatch, size: int, use_checkpoint: bool, tp: int = 1, pp: int = 1
) -> tuple[float, int, int, float]:
    """(our seconds per block and step, bytes of parameters and moments, messages and seconds to make the groups of a hierarchy)."""
    import mindspore as ms
    import numpy as np

    import bmtrain_ms as bms
    from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, World, use_world
    from bmtrain_ms.compat.runtime import from_host

    recording = RecordingEngine(SimulatedEngine(size // 2, size))
    data = size // (tp * pp)
    began = time.thread_time()
    World(recording, Mesh(size, size // 2, tp=tp, pp=pp, replica=data // min(data, 8)))
    making = time.thread_time() - began
    with use_world(World(SimulatedEngine(size // 2, size), Mesh(size, size // 2, tp=tp, pp=pp))):
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
    return statistics.median(taken), state, len(recording.events), making


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


GROUPS = ("messages for groups", "making groups, ms")


def told(found: tuple[float, int, int, float], parameters: float) -> list[Any]:
    """The rest of a row; `parameters`: how many whole ones' worth of a block a rank has."""
    seconds, state, messages, making = found
    formula = 3 * 4 * BLOCKS * parameters * WIDTH**2 / 1024
    return [f"{1e6 * seconds:.0f}", f"{state / 1024:.1f}", f"{formula:.1f}", messages, f"{1e3 * making:.0f}"]


def between(rows: list[list[Any]], whole: bool) -> tuple[str, str]:
    """The least and the most of our time, of worlds of one axis or of three."""
    times = sorted(float(row[2]) for row in rows if isinstance(row[0], int) is whole)
    return f"{times[0]:.0f}", f"{times[-1]:.0f}"


def main(remark: str) -> None:
    """Measure, plot, write the page; `remark`: of the machine meanwhile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    import bmtrain_ms as bms

    bms.init_distributed()
    Layer, watch = watched()
    rows: list[list[Any]] = []
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for use_checkpoint in (False, True):
        on = "on" if use_checkpoint else "off"
        results = [measure(Layer, watch, size, use_checkpoint) for size in WORLDS]
        for size, found in zip(WORLDS, results):
            rows.append([size, on, *told(found, PARAMETERS / size)])
        for size in THREE:
            found = measure(Layer, watch, size, use_checkpoint, PARTS, STAGES)
            data = size // (PARTS * STAGES)
            name = f"{size} = TP {PARTS} × PP {STAGES} × DP {data}"
            rows.append([name, on, *told(found, ((PARAMETERS - 1) / PARTS + 1) / data)])
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
        f"**Result**: {' to '.join(between(rows, whole=True))} µs, nearly the same for 1 and 8192 ranks: independent, but above "
        "the target. "
        + LEFT
        + f" On three axes {' to '.join(between(rows, whole=False))} µs, for 4096 ranks as for 64: a mean over "
        "tensor-parallel ranks of the parameter that all of these have is added.",
        f"{environment()} `taskset -c 0 python -m tests.benchmarks.scale` {remark}".rstrip(),
        "One process is the middle rank of a simulated world (`comm.SimulatedEngine`: every collective returns at once). A chain "
        f"of {BLOCKS} blocks of {PARAMETERS} parameters ({WIDTH}, {WIDTH}). *Our time* is what a step spends, on a core, in Blocks "
        "and in the functions of theirs that autograd calls, without the module inside, MindSpore's executor and the transport; it "
        f"includes making tensors and views. Median of {ROUNDS} steps. *Three axes*: of the nine parameters eight are cut over the "
        "tensor-parallel ranks; the chain is what one stage holds.",
        table(["ranks", "checkpoint", "our time, µs", "parameters and moments, KiB", "formula, KiB", *GROUPS], rows),
        "![our time per block, memory of a rank](scale.png)",
        "Memory stops falling as 1/N only where a parameter has fewer elements than there are ranks: a shard has one at least.",
    )


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
