"""How fast the ranks talk to each other (BMTrain: `benchmark`), with warm-up, medians, and a plot.

bmtrain-ms launch -n 2 -m bmtrain_ms.benchmark --plot collectives.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import numpy as np
from mindspore import Tensor

from .comm import CommError, Engine, init_distributed, is_initialized
from .comm import world as current_world
from .comm.agreement import reduce_numbers
from .compat.runtime import from_host

SIZES = tuple(1 << n for n in range(10, 27, 2))  # bytes: 1 KiB to 64 MiB


@dataclass(frozen=True)
class Result:
    """The measurement of one collective at one size.

    Attributes:
        name: of the collective.
        nbytes: what each rank passes to all_gather, gets from reduce_scatter, or sends.
        seconds: the median over the repetitions of the slowest rank's time.
        gib_per_second: received by each rank, by the least-volume algorithm.
    """

    name: str
    nbytes: int
    seconds: float
    gib_per_second: float


def all_gather(sizes: Sequence[int] = SIZES, repeats: int = 9, warm_up: int = 3) -> list[Result]:
    """Measure; rank 0 prints a table. All ranks call it."""
    engine = current_world().everyone
    issue = lambda x: engine.all_gather([x], label="benchmark")  # noqa: E731
    return _measure("all_gather", issue, sizes, repeats, warm_up, 1, engine.size - 1)


def reduce_scatter(sizes: Sequence[int] = SIZES, repeats: int = 9, warm_up: int = 3) -> list[Result]:
    """Measure; rank 0 prints a table. All ranks call it."""
    engine = current_world().everyone
    issue = lambda x: engine.reduce_scatter([x], label="benchmark")  # noqa: E731
    return _measure("reduce_scatter", issue, sizes, repeats, warm_up, engine.size, engine.size - 1)


def send_recv(sizes: Sequence[int] = SIZES, repeats: int = 9, warm_up: int = 3) -> list[Result]:
    """Measure messages from rank 0 to 1, 2 to 3 and so on; an odd last rank waits. Rank 0 prints a table. All ranks call it.

    Raises:
        ValueError: there is one rank only.
    """
    engine = current_world().everyone
    if engine.size == 1:
        raise ValueError("send_recv needs two ranks: bmtrain-ms launch -n 2 ...")
    peer = engine.rank ^ 1

    def issue(x: Tensor) -> Any:
        if peer >= engine.size:
            return None
        return engine.recv([x], peer, "benchmark") if engine.rank % 2 else engine.send([x], peer, "benchmark")

    return _measure("send_recv", issue, sizes, repeats, warm_up, 1, 1)


def plot(results: Sequence[Result], path: str) -> None:
    """Draw bandwidth over size as PNG, a line for each collective.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(r.name for r in results):
        mine = [r for r in results if r.name == name]
        axes.plot([r.nbytes for r in mine], [r.gib_per_second for r in mine], "o-", label=name)
    axes.set(xlabel="bytes per rank", ylabel="received, GiB/s per rank", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def format_results(results: Sequence[Result]) -> str:
    """The results as a table, a line each, below a heading."""
    lines = [f"{'collective':<16}{'bytes':>12}{'ms':>12}{'GiB/s':>10}"]
    lines += [f"{r.name:<16}{r.nbytes:>12}{r.seconds * 1e3:>12.3f}{r.gib_per_second:>10.2f}" for r in results]
    return "\n".join(lines)


def _measure(
    name: str, issue: Callable[[Tensor], Any], sizes: Sequence[int], repeats: int, warm_up: int, passed: int, received: int
) -> list[Result]:
    """`passed`, `received`: by each rank, in multiples of the size."""
    engine, results = current_world().everyone, []
    for nbytes in sizes:
        x, seconds = from_host(np.zeros(passed * nbytes // 2, np.float16)), []
        for i in range(warm_up + repeats):
            engine.barrier("benchmark").wait()
            start = time.perf_counter()
            work = issue(x)
            if work is not None:
                work.wait()
            if i >= warm_up:
                seconds.append(time.perf_counter() - start)
        median = statistics.median(_slowest(seconds, engine))
        results.append(Result(name, nbytes, median, received * nbytes / median / 2**30))
    if current_world().everyone.rank == 0:
        sys.stdout.write(format_results(results) + "\n")
    return results


def _slowest(seconds: list[float], engine: Engine) -> list[float]:
    return reduce_numbers(engine, seconds, "benchmark", np.float64, "max").tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser("bmtrain_ms.benchmark", description="Measure the collectives between the ranks of this job.")
    parser.add_argument("--max-bytes", type=int, default=SIZES[-1], help="largest size, of each rank (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--plot", metavar="PNG", help="draw the results")
    options = parser.parse_args(arguments)
    sizes = [n for n in SIZES if n <= options.max_bytes]
    if not sizes or options.repeats < 1:
        parser.error(f"--max-bytes must be at least {SIZES[0]} and --repeats at least 1")
    if not is_initialized():
        init_distributed()
    results: list[Result] = []
    for measure in (all_gather, reduce_scatter, send_recv):
        try:
            results += measure(sizes, options.repeats)
        except (ValueError, CommError) as error:
            sys.stderr.write(f"{measure.__name__}: not measured: {error}\n")
    if options.plot and current_world().everyone.rank == 0:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
