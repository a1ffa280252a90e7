"""Step time, memory and start-up of the demo's model: `python -m tests.benchmarks.demo_model` from the project's root.

Prints the tables of a page in `docs/benchmarks/`. Every figure is taken in one run, the cases interleaved round by round, because
the machine may be shared: compare ratios, not absolute times. Run as `... rank CASE` this file is one rank of a case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.ranks import ROOT, mpiexec

STEPS, WARM_UP = 10, 3
LENGTH, BATCH_PER_RANK, VOCAB = 128, 4, 2048

# name -> (ranks, communicate, prefetch)
CASES = {
    "1 rank": (1, True, 1),
    "2 ranks, compute only": (2, False, 1),
    "2 ranks, ZeRO-3, prefetch": (2, True, 1),
    "2 ranks, ZeRO-3, no prefetch": (2, True, 0),
}


def run_rank(case: str, start: float, use_checkpoint: bool) -> None:
    """Train the demo's model on random tokens; rank 0 prints a JSON line."""
    import numpy as np

    import bmtrain_ms as bms
    from bmtrain_ms.comm import Mesh, SingleEngine, World, use_world
    from bmtrain_ms.model_center import Spread, spread
    from bmtrain_ms.model_center.model import Llama, LlamaConfig
    from tests.helpers.trainers import pretrainer

    _, communicate, prefetch = CASES[case]
    world = bms.init_distributed(prefetch=prefetch)
    outer = world.engine
    # "compute only": as many processes at the same time, each a world of its own with the whole model
    alone = World(SingleEngine(), Mesh(1, 0), prefetch=prefetch)
    with use_world(world if communicate else alone) as here:
        config = LlamaConfig(vocab_size=VOCAB, dim_model=192, num_heads=4, num_heads_kv=2, dim_ff=512, num_layers=4)
        model = spread(Llama(config), Spread(use_checkpoint))
        bms.init_parameters(model)
        tokens = np.random.RandomState(0).randint(0, VOCAB, 50_000).astype(np.int32)
        sampler = bms.data.TokenSampler(tokens, LENGTH, BATCH_PER_RANK * here.engine.size)
        trainer = pretrainer(model, sampler, steps=1000)
        times, first = [], 0.0
        for _ in range(WARM_UP + STEPS):
            outer.barrier().wait()
            begin = time.perf_counter()
            trainer.train_step()
            times.append(time.perf_counter() - begin)
            first = first or time.time() - start
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        report = {
            "step_ms": 1e3 * statistics.median(times[WARM_UP:]),
            "peak_mib": int(status["VmHWM"].split()[0]) / 1024,
            "first_step_s": first,
            "parameters": sum(p.full_size for p in model.get_parameters()),
        }
        if outer.rank == 0:
            print("RESULT " + json.dumps(report), flush=True)


def measure(case: str, use_checkpoint: bool) -> dict[str, float]:
    """One launch of a case."""
    ranks = CASES[case][0]
    env = {**os.environ, "GLOG_v": "3", "OMP_NUM_THREADS": "1" if ranks > 1 else str(os.cpu_count())}
    command = [sys.executable, "-m", "tests.benchmarks.demo_model", "rank", case, str(time.time()), str(int(use_checkpoint))]
    if ranks > 1:
        command = [mpiexec(), "-n", str(ranks), *command]
    output = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True, timeout=600).stdout
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def main(rounds: int, checkpoint: str) -> None:
    """All cases, interleaved; prints Markdown."""
    import mindspore
    import numpy

    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    versions = f"MindSpore {mindspore.__version__}, NumPy {numpy.__version__}"
    command = f"`python -m tests.benchmarks.demo_model --rounds {rounds} --checkpoint {checkpoint}`"
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, {versions}. {command}.\n")
    for use_checkpoint in {"on": (True,), "off": (False,), "both": (True, False)}[checkpoint]:
        results: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(rounds):
            for case in CASES:
                results[case].append(measure(case, use_checkpoint))
        medians = {case: {key: statistics.median(r[key] for r in taken) for key in taken[0]} for case, taken in results.items()}
        compute = medians["2 ranks, compute only"]["step_ms"]
        parameters = medians["1 rank"]["parameters"] / 1e6
        print(f"### Checkpoint {'on' if use_checkpoint else 'off'}, {parameters:.2f} M parameters\n")
        print("| case | step, ms | / compute only | peak RSS per rank, MiB | launch to end of first step, s |")
        print("| --- | --- | --- | --- | --- |")
        for case, m in medians.items():
            ratio = m["step_ms"] / compute
            print(f"| {case} | {m['step_ms']:.0f} | {ratio:.2f} | {m['peak_mib']:.0f} | {m['first_step_s']:.1f} |")
        print(flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", nargs="?", choices=("rank",))
    parser.add_argument("case", nargs="?")
    parser.add_argument("start", nargs="?", type=float)
    parser.add_argument("checkpoint", nargs="?", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="launches per case")
    parser.add_argument("--checkpoint", dest="blocks", choices=("on", "off", "both"), default="both")
    arguments = parser.parse_args()
    if arguments.mode == "rank":
        run_rank(arguments.case, arguments.start, bool(arguments.checkpoint))
    else:
        main(arguments.rounds, arguments.blocks)
