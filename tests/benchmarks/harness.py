"""What the benchmark scripts share: the models of every figure, launching ranks, and writing pages."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

from tests.helpers.ranks import ROOT, mpiexec

PAGES = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True)
class Size:
    """A plain Llama decoder: RMSNorm, rotary embedding, SwiGLU, causal attention; float32, untied."""

    dim: int
    layers: int
    heads: int
    ff: int
    vocab: int
    length: int
    batch: int  # per rank

    @property
    def tokens(self) -> int:
        """Per rank and step."""
        return self.length * self.batch


SIZES = {
    "tiny": Size(64, 2, 2, 172, 512, 32, 2),  # to try the scripts
    "S": Size(256, 4, 4, 688, 8192, 128, 4),
    "M": Size(512, 8, 8, 1376, 16384, 256, 2),
}


class Training:
    """A model of the given size, AdamW and random tokens, in the current world.

    `change`: applied to the model first. Over tensor-parallel ranks the loss is the model's own.
    """

    def __init__(self, size: Size, use_checkpoint: bool, zero_level: int = 3, change: Callable[[Any], Any] | None = None):
        import numpy as np

        import bmtrain_ms as bms
        from bmtrain_ms.comm.world import world
        from bmtrain_ms.compat.runtime import from_host
        from bmtrain_ms.model_center import Spread, spread
        from bmtrain_ms.model_center.model import Llama, LlamaConfig
        from bmtrain_ms.nn.functional import cross_entropy

        self.world = world()
        config = LlamaConfig(
            vocab_size=size.vocab,
            dim_model=size.dim,
            num_heads=size.heads,
            dim_ff=size.ff,
            num_layers=size.layers,
        )
        self.model = spread(Llama(config), Spread(use_checkpoint, zero_level))
        bms.init_parameters(self.model)
        if change is not None:
            self.model = change(self.model)
        self.model.set_train(True)
        self.manager = bms.optim.OptimManager()
        self.manager.add_optimizer(bms.optim.AdamOptimizer(self.model.trainable_params(), lr=1e-4, weight_decay=0.1))
        draws = np.random.default_rng([self.world.mesh.dp_rank, 1])
        tokens = draws.integers(0, size.vocab, (2, size.batch, size.length)).astype(np.int32)
        ids, targets = from_host(tokens[0]), from_host(tokens[1].reshape(-1))

        def loss() -> Any:
            if self.world.mesh.tp > 1:
                return self.model.loss(ids, targets.reshape(size.batch, size.length))
            return cross_entropy(self.model(ids).reshape(size.tokens, size.vocab), targets)

        self._loss = loss

    def step(self) -> None:
        """Forward, backward, update."""
        self.manager.zero_grad()
        self.manager.backward(self._loss)
        self.manager.step()


def alone() -> Any:
    """A world of this process only: ranks that compute at the same time without communication."""
    from bmtrain_ms.comm import Mesh, SingleEngine, World

    return World(SingleEngine(), Mesh(1, 0))


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def descendants(pid: int) -> list[int]:
    """A process, and those that it and they have started."""
    found = [pid]
    for parent in found:  # which grows
        for thread in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in thread.read_text().split()]
            except OSError:  # it has ended
                continue
    return found


def report(value: Any) -> None:
    """What a rank found, for `launch`."""
    (Path(os.environ["BENCHMARK_RESULTS"]) / f"{os.getpid()}.json").write_text(json.dumps(value))


def launch(
    module: str, ranks: int, *arguments: str, python: str = sys.executable, timeout: float = 1800, **variables: str
) -> list[Any]:
    """Start ranks of `python -m module rank ARGUMENTS`; what they reported, in no particular order."""
    cores = len(os.sched_getaffinity(0))
    env = {**os.environ, "GLOG_v": "3", "OMP_NUM_THREADS": str(max(1, cores // ranks)), **variables}
    command = [python, "-m", module, "rank", *arguments]
    if ranks > 1:
        command = [mpiexec(), "-n", str(ranks), *command]
    with tempfile.TemporaryDirectory() as folder:
        env["BENCHMARK_RESULTS"] = folder
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}")
        return [json.loads(path.read_text()) for path in Path(folder).iterdir()]


def interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, warm_up: int, barrier: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each step of each case, one after the other in every round, so that all see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warm_up + rounds):
        for name, step in steps.items():
            barrier()
            start = time.perf_counter()
            step()
            if i >= warm_up:
                taken[name].append(time.perf_counter() - start)
    return taken


def median_over_ranks(results: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """Median over the steps of the mean over the ranks."""
    return {name: statistics.median(statistics.mean(column) for column in zip(*(r[name] for r in results))) for name in results[0]}


def environment() -> str:
    """Date, machine and versions, as a sentence."""
    import mindspore
    import numpy

    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({cpu or platform.machine()}), Python {platform.python_version()}, "
        f"MindSpore {mindspore.__version__}, NumPy {numpy.__version__}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def write_page(name: str, title: str, *paragraphs: str) -> None:
    """docs/benchmarks/NAME.md, and the same on standard output."""
    text = "\n\n".join([f"# {title}", *paragraphs]) + "\n"
    (PAGES / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
