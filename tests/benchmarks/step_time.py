"""Step time against the same ranks without communication, and against PyTorch: `python -m tests.benchmarks.step_time`.

PyTorch is measured if the Python given with `--torch` (default: this one) can import it.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from typing import Any

from tests.benchmarks.harness import (
    PAGES,
    SIZES,
    Training,
    alone,
    environment,
    interleaved,
    launch,
    median_over_ranks,
    report,
    table,
    write_page,
)

CAUSES = (
    "What is left has three causes. Each operation of a step costs 0.15 to 0.25 ms in MindSpore's and our Python, forward and "
    "backward, which on S, whose step has some 75, is a twentieth of it; on M it is a fiftieth. A world of one rank gathers too: "
    "it copies its own parameters, twice a step. And MindSpore's threads give their core away at each of its operations, so where "
    "other programs want it, our steps are delayed more than PyTorch's: compare figures of a calm machine."
)


def run_rank(size: str, checkpoint: str, rounds: int) -> None:
    """All cases of a setting in one process, step by step in turn."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import World, use_world

    world = bms.init_distributed()
    worlds = {
        "compute only": (alone(), 3),
        "ZeRO-3": (World(world.engine, world.mesh), 3),
        "ZeRO-3, no prefetch": (World(world.engine, world.mesh, prefetch=0), 3),
        "ZeRO-2": (World(world.engine, world.mesh), 2),
    }
    if world.engine.size > 2:
        worlds = {name: worlds[name] for name in ("compute only", "ZeRO-3")}
    steps = {}
    for name, (here, level) in worlds.items():
        with use_world(here):
            steps[name] = Training(SIZES[size], checkpoint == "on", level).step
    report(interleaved(steps, rounds, 3, lambda: world.engine.barrier().wait()))


def has_torch(python: str) -> bool:
    """Whether that Python can import torch."""
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def free_port() -> str:
    """One on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main(rounds: int, python: str, settings: list[tuple[str, int]], remark: str) -> None:
    """Measure, plot, write the page; `remark`: of the machine meanwhile."""
    torch_too = has_torch(python)
    rows: list[list[Any]] = []
    bars: list[tuple[str, float, float]] = []  # setting, ours, FSDP2: over compute only
    lead: list[float] = []  # our tokens per second over FSDP2's
    alone_beside: list[float] = []  # our compute-only step over PyTorch's
    computing: list[float] = []  # our step over PyTorch's, both compute-only
    for size, ranks in settings:
        for checkpoint in ("off", "on") if ranks == 2 else ("off",):
            ours = median_over_ranks(launch("tests.benchmarks.step_time", ranks, size, checkpoint, str(rounds)))
            setting = [size, ranks, checkpoint]
            for name in ours:
                rate = SIZES[size].tokens * ranks / ours[name]
                ratio = ours[name] / ours["compute only"]
                rows.append([*setting, f"bmtrain_ms, {name}", f"{1e3 * ours[name]:.0f}", f"{ratio:.2f}", f"{rate:.0f}"])
            torch_ratio = 0.0
            if torch_too:
                words = ("tests.benchmarks.torch_llama", ranks, size, checkpoint, str(rounds), free_port())
                theirs = {k.split(",")[0]: v for k, v in median_over_ranks(launch(*words, python=python)).items()}
                torch_ratio = theirs["FSDP2"] / theirs["compute only"]
                lead.append(theirs["FSDP2"] / ours["ZeRO-3"])
                alone_beside.append(ours["compute only"] / theirs["compute only"])
                computing.append(ours["compute only"] / theirs["compute only"])
                for name, seconds in theirs.items():
                    rate = SIZES[size].tokens * ranks / seconds
                    ratio = seconds / theirs["compute only"]
                    rows.append([*setting, f"PyTorch, {name}", f"{1e3 * seconds:.0f}", f"{ratio:.2f}", f"{rate:.0f}"])
            bars.append((f"{size}, {ranks} ranks\ncheckpoint {checkpoint}", ours["ZeRO-3"] / ours["compute only"], torch_ratio))
            print(*rows[-6:], sep="\n", flush=True)
    plot(bars)
    result = f"**Result**: ZeRO-3 takes {min(b[1] for b in bars):.2f} to {max(b[1] for b in bars):.2f} times compute-only."
    if lead:
        result += (
            f" It trains {min(lead):.2f} to {max(lead):.2f} times FSDP2's tokens per second. Compute-only takes "
            f"{min(alone_beside):.2f} to {max(alone_beside):.2f} times PyTorch's compute-only step."
        )
    write_page(
        "step-time",
        "Step time",
        "Targets: computing without any communication takes at most 1.10 times PyTorch's step; a ZeRO-3 step takes at most 1.08 "
        "times the step of the same processes computing without communication; and it trains at least 1.25 times the tokens per "
        "second of PyTorch's FSDP2 over gloo in the same run.",
        result,
        *([remark] if remark else []),
        CAUSES,
        f"{environment()} `python -m tests.benchmarks.step_time --rounds {rounds}`",
        f"Median of {rounds} steps after 3 (forward, backward, AdamW), the cases in turn within one process group; mean over the "
        "ranks of each one's own time. *Compute only*: every process trains the whole model by itself, so it updates all "
        "parameters where a ZeRO rank updates its share: that is how a ratio can be below 1. One core per rank (half of one with "
        "four). PyTorch: the same model, fused AdamW, `fully_shard` per block, gloo.",
        table(["model", "ranks", "checkpoint", "case", "step, ms", "/ compute only", "tokens/s, all ranks"], rows),
        "![step time over compute only](step-time.png)",
    )


def plot(bars: list[tuple[str, float, float]]) -> None:
    """Ratios, ours beside FSDP2's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    places = range(len(bars))
    axes.bar([x - 0.2 for x in places], [b[1] for b in bars], 0.4, label="bmtrain_ms ZeRO-3")
    axes.bar([x + 0.2 for x in places], [b[2] for b in bars], 0.4, label="PyTorch FSDP2, gloo")
    axes.axhline(1.08, color="grey", linestyle=":", label="target")
    axes.set_xticks(list(places), [b[0] for b in bars])
    axes.set_ylabel("step / compute only")
    axes.legend()
    figure.savefig(PAGES / "step-time.png", dpi=100)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--rounds", type=int, default=10, help="steps per case")
        parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
        parser.add_argument("--settings", nargs="+", default=["S:2", "M:2", "S:4", "M:4"], help="model:ranks")
        parser.add_argument("--remark", default="", help="a sentence about the machine meanwhile, for the page")
        arguments = parser.parse_args()
        pairs = [(text.split(":")[0], int(text.split(":")[1])) for text in arguments.settings]
        main(arguments.rounds, arguments.torch, pairs, arguments.remark)
