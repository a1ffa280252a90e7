"""Step time against the same ranks without communication, and against PyTorch: `python -m tests.benchmarks.step_time`."""

from __future__ import annotations

import sys

from tests.benchmarks.harness import SIZES, Training, alone, interleaved, launch, median_over_ranks, report


def run_rank(size: str, rounds: int) -> None:
    """All cases in one process, step by step in turn."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import World, use_world

    world = bms.init_distributed()
    cases = {}
    for checkpoint in (False, True):
        suffix = ", checkpoint" if checkpoint else ""
        for name, here, level in (
            ("compute only", alone(), 3),
            ("ZeRO-3", world, 3),
            ("ZeRO-3, no prefetch", World(world.engine, world.mesh, prefetch=0), 3),
            ("ZeRO-2", World(world.engine, world.mesh), 2),
        ):
            with use_world(here):
                cases[name + suffix] = Training(SIZES[size], checkpoint, level).step
    report(interleaved(cases, rounds, 3, lambda: world.engine.barrier().wait()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], int(sys.argv[3]))
    else:
        size, ranks, rounds = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        medians = median_over_ranks(launch("tests.benchmarks.step_time", ranks, size, rounds))
        for name, seconds in medians.items():
            base = medians["compute only" + (", checkpoint" if "checkpoint" in name else "")]
            print(f"{name:32s} {1e3 * seconds:8.1f} ms  {seconds / base:.3f}  {SIZES[size].tokens * ranks / seconds:.0f} tok/s")
