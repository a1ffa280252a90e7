"""Overlap on a simulated fabric: `python -m tests.benchmarks.overlap`. Writes a trace to runs/overlap-trace.json, too."""

from __future__ import annotations

import statistics
from typing import Any, Sequence

from tests.benchmarks.harness import PAGES, ROOT, SIZES, Training, environment, interleaved, table, write_page

RANKS, ROUNDS = 8, 10
FACTORS = (0.5, 1.0, 2.0)
LIMIT = 1.05
HEAD = "all_gather (lm_head.weight)"  # the output projection's
WAITED: dict[str, float] = {}  # milliseconds in the steps of the picture's setting


def world(bandwidth: float | None, prefetch: int, trace: Any = None) -> Any:
    """One rank of a simulated world, whose link has that many bytes per second."""
    from bmtrain_ms.comm import FabricEngine, Mesh, RecordingEngine, SimulatedEngine, TracingEngine, World

    engine: Any = SimulatedEngine(0, RANKS)
    if bandwidth is None:
        engine = RecordingEngine(engine)
    else:
        engine = FabricEngine(engine, 0.0, bandwidth)
    if trace is not None:
        engine = TracingEngine(engine, trace)
    return World(engine, Mesh(RANKS, 0), prefetch=prefetch, trace=trace)


def measure(size: str, use_checkpoint: bool, factors: Sequence[float] = FACTORS) -> list[list[Any]]:
    """A row for each factor."""
    from bmtrain_ms.comm import SimulatedEngine, Trace, use_world, write_trace

    alone = world(None, 1)
    with use_world(alone):
        training, beside = (Training(SIZES[size], use_checkpoint) for _ in range(2))
    # in turn with others, as later: a step that finds its own values in the cache is a tenth faster
    steps = {"compute": training.step, **{str(i): beside.step for i in range(3)}}
    compute = statistics.median(interleaved(steps, ROUNDS, 3, lambda: None)["compute"])
    alone.engine.events.clear()
    training.step()
    moved = [event for event in alone.engine.events if event.received]
    total = sum(event.received for event in moved)
    exposed = ("model.embed_tokens.weight", "model.layers.0")  # nothing can be computed before they are there, nor after
    ends = 2 * sum(event.received for event in moved if event.op == "reduce_scatter" and event.label in exposed)
    del training, beside, steps
    rows = []
    for factor in factors:
        bandwidth = total / (factor * compute)
        trace = Trace() if (size, use_checkpoint, factor) == ("S", True, 1.0) else None
        worlds = {
            "compute": world(None, 1),
            "1": world(bandwidth, 1, trace),
            "2": world(bandwidth, 2),
            "0": world(bandwidth, 0),
        }
        steps = {}
        for name, here in worlds.items():
            with use_world(here):
                steps[name] = Training(SIZES[size], use_checkpoint).step
        taken = {name: statistics.median(t) for name, t in interleaved(steps, ROUNDS, 3, lambda: None).items()}
        now, communication, unavoidable = taken["compute"], total / bandwidth, ends / bandwidth
        target = max(now, communication + unavoidable)
        least = unavoidable + max(now, communication - unavoidable)
        rows.append(
            [
                size,
                "on" if use_checkpoint else "off",
                factor,
                *(f"{1e3 * x:.0f}" for x in (now, communication, unavoidable)),
                *(f"{1e3 * taken[name]:.0f}" for name in "012"),
                f"{taken['0'] / (now + communication):.2f}",
                *(f"{taken[name] / target:.2f}" for name in "12"),
                *(f"{taken[name] / least:.2f}" for name in "12"),
            ]
        )
        print(rows[-1], flush=True)
        if trace is not None:
            WAITED.update(waits(trace), beyond=1e3 * (taken["1"] - least))
            timeline(trace)
            (ROOT / "runs").mkdir(exist_ok=True)
            write_trace(ROOT / "runs" / "overlap-trace.json", trace, SimulatedEngine(0, 1))
    return rows


def result(rows: list[list[Any]]) -> str:
    """What the rows say, in a sentence."""

    def span(factor: float, column: int) -> str:
        found = sorted(float(row[column]) for row in rows if row[2] == factor)
        return f"{found[0]:.2f} to {found[-1]:.2f}"

    said = [f"{span(f, 10)} ({span(f, 11)}) where communication takes {f} times as long as computation" for f in FACTORS]
    whole = sorted(float(row[9]) for row in rows)
    cause = (
        "Where communication is half of computation the bound, computation alone, cannot be reached: the first gather and the last "
        f"reduce stay. Of the {WAITED['beyond']:.0f} ms beyond the least possible of the picture's setting {WAITED['waited']:.0f} "
        "are spent in forward, waiting for the output projection, which is as large as 2.7 blocks; until it is there the link was "
        f"idle for {WAITED['idle']:.1f} ms, so gathering it earlier would gain no more than that. What would help is to compute "
        "with its parts as they arrive, which is not done."
    )
    return (
        f"**Result**: of the target's bound a step takes, with one block gathered ahead, the default (with two), "
        f"{'; '.join(said)}. Without prefetch it takes {whole[0]:.2f} to {whole[-1]:.2f} of the sum. {cause}"
    )


def waits(trace: Any) -> dict[str, float]:
    """How long the output projection is waited for in forward, and how long the link was idle until it was there; medians."""
    found: dict[str, list[float]] = {"waited": [], "idle": []}
    for step in sorted({span.step for span in trace.spans})[-ROUNDS - 1 : -1]:
        spans = [span for span in trace.spans if span.step == step]
        head = next(span for span in spans if span.name == HEAD)
        computed = max(span.end for span in spans if span.track == "compute" and span.end < head.end)
        before = sorted((s.start, s.end) for s in spans if s.track == "gather" and s.end <= head.end)
        found["waited"].append(head.end - computed)
        found["idle"].append(sum(behind[0] - ahead[1] for ahead, behind in zip(before, before[1:])))
    return {name: 1e3 * statistics.median(values) for name, values in found.items()}


def timeline(trace: Any) -> None:
    """A picture of the last step of a trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = max(span.step for span in trace.spans if span.track == "gather")
    start, end = (min(s.start for s in trace.spans if s.step == step and s.track == "gather") for step in (last - 1, last))
    spans = [span for span in trace.spans if start <= span.start < end]
    figure, axes = pyplot.subplots(figsize=(12, 3), layout="constrained")
    colours = {"gather": "tab:blue", "compute": "tab:green", "reduce": "tab:orange"}
    for i, (track, colour) in enumerate(colours.items()):
        bars = [(1e3 * (s.start - start), 1e3 * (s.end - s.start)) for s in spans if s.track == track]
        axes.broken_barh(bars, (i - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.5)
    axes.set_yticks(range(3), list(colours))
    axes.set_xlabel("ms; model S, checkpointed, communication as long as computation")
    figure.savefig(PAGES / "overlap.png", dpi=100)


def main() -> None:
    """Measure, plot, write the page."""
    import bmtrain_ms as bms

    bms.init_distributed()
    rows = [row for setting in (("S", False), ("S", True), ("M", False, (1.0,))) for row in measure(*setting)]
    write_page(
        "overlap",
        "Overlap on a simulated fabric",
        f"Target: where communication is as long as computation, a step takes at most {LIMIT} max(computation, communication + the "
        "first gather and the last reduce), which nothing can hide; without prefetch it takes their sum.",
        result(rows),
        f"{environment()} `taskset -c 0 python -m tests.benchmarks.overlap`",
        f"One rank of a simulated world of {RANKS} (`comm.SimulatedEngine`), whose link delays completion without using the CPU "
        f"(`comm.FabricEngine`), so that communication takes a given multiple of computation. Median of {ROUNDS} steps after 3, "
        "cases in turn; milliseconds.",
        table(
            [
                "model",
                "checkpoint",
                "communication / computation",
                "computation",
                "communication",
                "first and last",
                "step, prefetch 0",
                "prefetch 1",
                "prefetch 2",
                "0 / sum",
                "1 / target's bound",
                "2 / target's bound",
                "1 / least possible",
                "2 / least possible",
            ],
            rows,
        ),
        "*First and last*: the embedding and the first block, which have to arrive before anything can be computed, and whose "
        "gradients can only leave when everything has been. *Target's bound*: max(computation, communication + first and last). "
        "*Least possible*: first and last + max(computation, the rest of the communication).",
        "![timeline of a step](overlap.png)",
        "Green: computation inside blocks; what lies between is the embedding, the output projection, the loss and the update. The "
        "same as a trace for chrome://tracing or ui.perfetto.dev: `init_distributed(trace=True)` and `comm.write_trace`, or "
        "`bmtrain-ms demo --trace FILE`.",
    )


if __name__ == "__main__":
    main()
