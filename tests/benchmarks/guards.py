"""What it costs that nothing goes wrong in silence: a step with and without looking, `python -m tests.benchmarks.guards`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any, Callable, Iterator
from unittest import mock

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


@contextlib.contextmanager
def blind() -> Iterator[None]:
    """Nobody compares parameters with what was gathered, or recomputation with forward."""
    from bmtrain_ms.zero import replay
    from bmtrain_ms.zero.group import Gathered
    from bmtrain_ms.zero.pipeline import GatherPipeline

    def no_replay(self: Any, draws: Any, looks: bool) -> None:
        self._draws, self._looks, self._start, self._generators = draws, False, (draws.count, draws.records), None

    def not_kept(self: Any, outputs: Any, flags: list[bool]) -> None:
        self._flags = flags

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Gathered, "verify", lambda self: None))
        stack.enter_context(mock.patch.object(Gathered, "verify_again", lambda self, before: None))
        stack.enter_context(mock.patch.object(GatherPipeline, "_written_anywhere", staticmethod(lambda gathered: False)))
        stack.enter_context(mock.patch.object(replay.Replay, "__init__", no_replay))
        stack.enter_context(mock.patch.object(replay.Replay, "ended", not_kept))
        yield


def without_looking(step: Callable[[], None]) -> Callable[[], None]:
    """The same step, blind."""

    def run() -> None:
        with blind():
            step()

    return run


MADE_OF = (
    "What it is made of: at the end of a forward pass a rank reads its shards and its own piece of the gathered copy, at the end "
    "of a backward pass its shards once more, three times its share of the parameters in a step; where a Block is recomputed also "
    "its inputs and results, twice. The Python around that is 20 µs each time for nine parameters, and 4 µs a Block for the "
    "states of random generators."
)


def run_rank(size: str, checkpoint: str, rounds: int) -> None:
    """Both cases in one process, step by step in turn."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import World, use_world

    world = bms.init_distributed()
    here = World(world.engine, world.mesh) if world.engine.size > 1 else alone()
    with use_world(here):
        step = Training(SIZES[size], checkpoint == "on").step
    report(interleaved({"looking": step, "blind": without_looking(step)}, rounds, 3, lambda: world.engine.barrier().wait()))


def main(rounds: int, settings: list[tuple[str, int]]) -> None:
    """Measure and write the page."""
    rows: list[list[Any]] = []
    ratios: list[float] = []
    for size, ranks in settings:
        for checkpoint in ("off", "on"):
            found = median_over_ranks(launch("tests.benchmarks.guards", ranks, size, checkpoint, str(rounds)))
            ratios.append(found["looking"] / found["blind"])
            rows.append(
                [size, ranks, checkpoint, *(f"{1e3 * found[name]:.0f}" for name in ("looking", "blind")), f"{ratios[-1]:.3f}"]
            )
            print(*rows[-1], flush=True)
    write_page(
        "guards",
        "What looking costs",
        "Target: a ZeRO-3 step in which parameters are compared with what was gathered, and recomputation with its forward pass, "
        "takes at most 1.01 times a step that does not look, where nobody writes in place.",
        f"**Result**: {min(ratios):.3f} to {max(ratios):.3f} times.",
        MADE_OF,
        f"{environment()} `python -m tests.benchmarks.guards --rounds {rounds}`",
        f"Median of {rounds} steps after 3 (forward, backward, AdamW), with and without looking in turn within one process group; "
        "mean over the ranks of each one's own time. One core per rank.",
        table(["model", "ranks", "checkpoint", "looking, ms", "blind, ms", "ratio"], rows),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--rounds", type=int, default=20, help="steps per case")
        parser.add_argument("--settings", nargs="+", default=["S:2", "M:2"], help="model:ranks")
        arguments = parser.parse_args()
        main(arguments.rounds, [(text.split(":")[0], int(text.split(":")[1])) for text in arguments.settings])
