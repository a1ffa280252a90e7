"""What it costs that nothing goes wrong in silence: a step with and without looking, `python -m tests.benchmarks.guards`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
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


class Stopwatch:
    """Seconds inside of what looks, of this process; what it calls of its own kind counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def run(*given: Any, **named: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return run


def inside(step: Callable[[], None], rounds: int) -> list[float]:
    """Of each step the seconds in which it looked."""
    from bmtrain_ms.zero.group import Gathered
    from bmtrain_ms.zero.replay import Replay

    looks = {Gathered: ("written", "verify", "verify_again")}
    looks[Replay] = ("__init__", "given", "inputs_differ", "flags_differ", "ended", "differs")
    watch, found = Stopwatch(), []
    with contextlib.ExitStack() as stack:
        for kind, names in looks.items():
            for name in names:
                stack.enter_context(mock.patch.object(kind, name, watch.around(getattr(kind, name))))
        for _ in range(rounds):
            watch.seconds = 0.0
            step()
            found.append(watch.seconds)
    return found


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
    taken = interleaved({"looking": step, "blind": without_looking(step)}, rounds, 3, lambda: world.engine.barrier().wait())
    report({**taken, "inside": inside(step, rounds)})


def main(rounds: int, settings: list[tuple[str, int]]) -> None:
    """Measure and write the page."""
    rows: list[list[Any]] = []
    ratios: list[float] = []
    for size, ranks in settings:
        for checkpoint in ("off", "on"):
            found = median_over_ranks(launch("tests.benchmarks.guards", ranks, size, checkpoint, str(rounds)))
            ratios.append(1.0 + found["inside"] / found["blind"])
            by_clock = f"{found['looking'] / found['blind']:.3f}"
            times = (f"{1e3 * found[name]:.{digits}f}" for name, digits in (("looking", 0), ("blind", 0), ("inside", 1)))
            rows.append([size, ranks, checkpoint, *times, f"{ratios[-1]:.3f}", by_clock])
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
        "mean over the ranks of each one's own time. One core per rank. *Inside*: the time in the functions that look, by a watch "
        "around them; *ratio*: that and a blind step, over a blind step. *By the clock*: a step that looks over a blind one, which "
        "from run to run differs by 0.02 on such a machine.",
        table(["model", "ranks", "checkpoint", "looking, ms", "blind, ms", "inside, ms", "ratio", "by the clock"], rows),
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
