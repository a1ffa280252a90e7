"""One rank of a pipeline for `tests.benchmarks.parallel`: steps, and memory of stages."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from typing import Any, Callable, Iterator, Sequence
from unittest import mock

from tests.benchmarks.harness import SIZES, Size, alone, interleaved, report


def micro_batches(stages: int) -> int:
    """Of a step; each of one row."""
    return 4 * stages


class Piped:
    """A model, AdamW and random rows, in the current world; `number` of them in a step."""

    def __init__(self, size: Size, number: int, schedule: str | None = None, recompute: bool = False):
        import numpy as np

        import bmtrain_ms as bms
        from bmtrain_ms.comm.world import world
        from bmtrain_ms.compat.runtime import from_host
        from bmtrain_ms.model_center import Spread, Stages, spread
        from bmtrain_ms.model_center.model import Llama, LlamaConfig

        config = LlamaConfig(
            vocab_size=size.vocab, dim_model=size.dim, num_heads=size.heads, dim_ff=size.ff, num_layers=size.layers
        )
        self.world = world()
        stages = Stages(schedule=schedule, micro_batches=number) if self.world.mesh.pp > 1 else None
        self.model = spread(Llama(config), Spread(recompute, 2), stages)
        bms.init_parameters(self.model)
        self.model.set_train(True)
        self.manager = bms.optim.OptimManager()
        self.manager.add_optimizer(bms.optim.AdamOptimizer(self.model.trainable_params(), lr=1e-4, weight_decay=0.1))
        tokens = np.random.default_rng(1).integers(0, size.vocab, (2, number, size.length)).astype(np.int32)
        self.rows = [from_host(x) for x in tokens]

    def step(self) -> None:
        """Forward, backward, update."""
        from bmtrain_ms.comm import use_world

        with use_world(self.world):
            self.manager.zero_grad()
            self.manager.backward(self.model.loss, *self.rows)
            self.manager.step()


@contextlib.contextmanager
def timed(found: dict[str, list[float]]) -> Iterator[None]:
    """Inside the `with` statement, for each step: the mean seconds of a micro-batch's `forward` and `backward`, and what the step
    takes `outside` of its schedule."""
    from bmtrain_ms.parallel.stage import Run

    taken: dict[str, list[float]] = {}

    def around(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def run(*given: Any) -> None:
            start = time.perf_counter()
            original(*given)
            taken.setdefault(name, []).append(time.perf_counter() - start)

        return run

    original = Piped.step

    def step(piped: Piped) -> None:
        taken.clear()
        start = time.perf_counter()
        original(piped)
        outside = time.perf_counter() - start - sum(taken["schedule"])
        for name in ("forward", "backward"):
            found.setdefault(name, []).append(statistics.mean(taken[name]))
        found.setdefault("outside", []).append(outside)

    with contextlib.ExitStack() as stack:
        for name, method in {"forward": "_forward", "backward": "_backward", "schedule": "to_end"}.items():
            stack.enter_context(mock.patch.object(Run, method, around(name, getattr(Run, method))))
        stack.enter_context(mock.patch.object(Piped, "step", step))
        yield


def linked(engine: Any, seconds: float) -> Any:
    """The engine, with a link between stages on which a message takes so many seconds, without using the CPU. It sets out when its
    receiver waits for it: on a real one it may be there by then."""
    from bmtrain_ms.comm import Work
    from bmtrain_ms.comm.wrappers import Around

    class Late(Work):
        def __init__(self, inner: Work):
            self._inner, self._waited, self.outputs = inner, False, inner.outputs

        def done(self) -> bool:
            return self._waited

        def wait(self) -> list[Any]:
            outputs = self._inner.wait()
            time.sleep(0.0 if self._waited else seconds)
            self._waited = True
            return outputs

    class Link(Around):
        def _around(self, op: str, label: str, tensors: Any, received: int, work: Work) -> Work:
            return Late(work) if op == "recv" else work

        def _rewrap(self, inner: Any) -> Any:
            return Link(inner)

    return Link(engine)


def bound(stages: int, m: int, ranks: Sequence[dict[str, Any]], message: float = 0.0) -> float:
    """Seconds of a step in which messages take no time, or so much, and each stage what it takes here: 1F1B's table with those
    times, and what the slowest rank does outside of it."""
    from bmtrain_ms_base.schedule import schedule
    from bmtrain_ms_base.simulation import simulate

    by_rank = sorted(ranks, key=lambda found: found["rank"])
    forward, backward = ([found[name] for found in by_rank] for name in ("forward", "backward"))
    alone = simulate(schedule("1f1b", stages, m), forward=forward, backward=backward, messages="buffered", transfer=message)
    return alone.makespan + max(found["outside"] for found in by_rank)


@contextlib.contextmanager
def noted(most: list[int]) -> Iterator[None]:
    """Inside the `with` statement `most[0]` becomes the largest number of bytes that segments keep of micro-batches at once."""
    from bmtrain_ms.parallel.stage import Run

    original = Run.step

    def step(run: Any, action: Any) -> None:
        original(run, action)
        kept = [x.nbytes for visits in run.visits.values() for visit in visits for x in visit._inputs]
        most[0] = max(most[0], sum(kept))

    Run.step = step
    try:
        yield
    finally:
        Run.step = original


def run_rank(size: str, rounds: int, what: str) -> None:
    """`time`: steps of the whole model on each rank, and of its stages; `memory`: what stages keep, by schedule."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import World, use_world
    from bmtrain_ms.comm.agreement import reduce_numbers

    stages = int(what.split(":")[1])
    world, m = bms.init_distributed(pipe_size=stages), micro_batches(stages)
    if what.startswith("time"):
        with use_world(alone()):
            whole = Piped(SIZES[size], m)
        piped = Piped(SIZES[size], m)
        parts: dict[str, list[float]] = {}
        cases = {"whole model, alone": whole.step, "stages, 1F1B": lambda: piped.step()}

        def barrier() -> None:
            world.everyone.barrier().wait()

        taken = interleaved(cases, rounds, 3, barrier)
        with timed(parts):
            interleaved({"timed": lambda: piped.step()}, rounds, 1, barrier)
        found: dict[str, Any] = {name: statistics.median(x[1:]) for name, x in parts.items()}
        message = reduce_numbers(world.everyone, [found["forward"]], "seconds", op="mean").item() / 4
        with use_world(World(linked(world.everyone, message), world.mesh, micro_batches=m)):
            over_link = Piped(SIZES[size], m)
        over = interleaved({"stages over a link, 1F1B": over_link.step}, rounds, 1, barrier)
        report({"rank": world.mesh.rank, "steps": taken, "over a link": over, "message": message, **found})
        return
    found = {"rank": world.mesh.rank}
    for schedule in ("1f1b", "gpipe"):
        piped, most = Piped(SIZES[size], m, schedule, recompute=True), [0]
        with noted(most):
            piped.step()
        found[schedule], found["layers"] = most[0], len(list(piped.model.model.layers))
    report(found)


if __name__ == "__main__":
    run_rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
