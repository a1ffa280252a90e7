"""Tensor parallelism against the same halves without communication, and against PyTorch's: `python -m tests.benchmarks.parallel`.

PyTorch is measured if the Python given with `--torch` (default: this one) can import it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tests.benchmarks.harness import (
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
from tests.benchmarks.step_time import free_port, has_torch


def run_rank(size: str, checkpoint: str, rounds: int) -> None:
    """All cases of a setting in one process, step by step in turn."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import Mesh, SimulatedEngine, World, use_world

    world = bms.init_distributed()
    ranks, rank = world.everyone.size, world.mesh.rank
    mesh = Mesh(ranks, rank, tp=ranks)
    worlds = {
        "whole model, alone": alone(),
        "parts, no communication": World(SimulatedEngine(rank, ranks), mesh),
        "tensor and sequence parallel": World(world.everyone, mesh),
    }
    steps = {}
    for name, here in worlds.items():
        with use_world(here):
            steps[name] = Training(SIZES[size], checkpoint == "on").step
    report(interleaved(steps, rounds, 3, lambda: world.everyone.barrier().wait()))


def main(rounds: int, python: str, settings: list[tuple[str, int]]) -> None:
    """Measure and write the page."""
    torch_too = has_torch(python)
    rows: list[list[Any]] = []
    told: list[str] = []
    for size, ranks in settings:
        for checkpoint in ("off", "on"):
            words = ("tests.benchmarks.parallel", ranks, size, checkpoint, str(rounds))
            ours = median_over_ranks(launch(*words))
            parts, whole = ours["parts, no communication"], ours["whole model, alone"]
            parallel = ours["tensor and sequence parallel"]
            for name, seconds in ours.items():
                ratios = f"{seconds / parts:.2f}", f"{seconds / whole:.2f}"
                rows.append([size, ranks, checkpoint, f"bmtrain_ms, {name}", f"{1e3 * seconds:.0f}", *ratios])
            text = (
                f"{size}, checkpoint {checkpoint}: {parallel / parts:.2f} times the parts alone, {parallel / whole:.2f} times one "
            )
            text += "process"
            if torch_too:
                words = ("tests.benchmarks.torch_llama", ranks, size, checkpoint, str(rounds), free_port(), "tensor")
                theirs = {k.split(",")[0]: v for k, v in median_over_ranks(launch(*words, python=python)).items()}
                for name, seconds in theirs.items():
                    case = f"PyTorch, {name}"
                    rows.append(
                        [size, ranks, checkpoint, case, f"{1e3 * seconds:.0f}", "", f"{seconds / theirs['compute only']:.2f}"]
                    )
                text += f" (DTensor: {theirs['DTensor'] / theirs['compute only']:.2f} times its own), "
                text += f"{theirs['DTensor'] / parallel:.2f} times DTensor's speed"
            told.append(text)
            print(text, flush=True)
    write_page(
        "parallel",
        "Tensor parallelism",
        "Target: two tensor-parallel ranks (with sequence parallelism) take at most 1.25 times as long as the same two processes "
        "computing their halves without communication on model M, and are ahead of PyTorch's DTensor.",
        "**Result**: " + ". ".join(told) + ".",
        f"{environment()} `python -m tests.benchmarks.parallel --rounds {rounds}`",
        f"Median of {rounds} steps after 3 (forward, backward, AdamW), the cases in turn within one process group; mean over the "
        "ranks. One core per rank. *Whole model, alone*: every process does all of it. *Parts, no communication*: collectives "
        "return at once, with copies of this rank's own data. PyTorch: the same model, fused AdamW, `parallelize_module` without "
        "sequence parallelism, which is the faster of the two there, gloo.",
        table(["model", "ranks", "checkpoint", "case", "step, ms", "/ parts alone", "/ whole model alone"], rows),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--rounds", type=int, default=10, help="steps per case")
        parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
        parser.add_argument("--settings", nargs="+", default=["S:2", "M:2"], help="model:ranks")
        arguments = parser.parse_args()
        pairs = [(text.split(":")[0], int(text.split(":")[1])) for text in arguments.settings]
        main(arguments.rounds, arguments.torch, pairs)
