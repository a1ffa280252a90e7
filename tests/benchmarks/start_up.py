"""Import and start-up: `python -m tests.benchmarks.start_up`"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import PAGES, SIZES, Training, environment, report, table, write_page
from tests.benchmarks.plain import unshard
from tests.helpers.ranks import ROOT

ROUNDS = 7
IMPORTS = """
import time
start = time.perf_counter()
import mindspore
middle = time.perf_counter()
import bmtrain_ms
print(middle - start, time.perf_counter() - middle)
"""


def first_step(size: str, plain: bool) -> None:
    """Make the model, make a step, say when."""
    import bmtrain_ms as bms

    bms.init_distributed()
    Training(SIZES[size], False, 3, change=unshard if plain else None).step()
    report(time.time())


def seconds_to_first_step(command: list[str], ranks: int) -> float:
    """From the launch to the end of the last rank's first step."""
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "GLOG_v": "3",
            "BENCHMARK_RESULTS": folder,
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        }
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        start = time.time()
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)
        return max(json.loads(path.read_text()) for path in Path(folder).iterdir()) - start


def main(size: str) -> None:
    """Measure, plot, write the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiles what it installs; a checkout is compiled by its first import
    imports = []
    for _ in range(ROUNDS):
        output = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout
        imports.append([float(x) for x in output.split()[-2:]])
    mindspore, ours = (statistics.median(column) for column in zip(*imports))
    script = [str(Path(__file__)), "rank", size]
    commands = {
        "plain MindSpore, 1 process": (1, [sys.executable, *script, "plain"]),
        "bmtrain-ms launch, 1 rank": (1, [sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", "1", *script, "zero"]),
        "bmtrain-ms launch, 2 ranks": (2, [sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", "2", *script, "zero"]),
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, (ranks, command) in commands.items():
            taken[name].append(seconds_to_first_step(command, ranks))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    plain = medians["plain MindSpore, 1 process"]
    rows: list[list[Any]] = [[name, f"{value:.2f}", f"{value / plain:.2f}"] for name, value in medians.items()]
    figure, axes = pyplot.subplots(figsize=(8, 2.5), layout="constrained")
    axes.barh(list(medians)[::-1], list(medians.values())[::-1])
    axes.axvline(1.5 * plain, color="grey", linestyle=":", label="target for 2 ranks")
    axes.set_xlabel("seconds from the launch to the end of the first step")
    axes.legend()
    figure.savefig(PAGES / "start-up.png", dpi=100)
    write_page(
        "start-up",
        "Import and start-up",
        "Target: importing `bmtrain_ms` adds at most 100 ms to importing MindSpore; two ranks have finished their first step of "
        "model S within 1.5 times what one process of plain MindSpore needs.",
        f"**Result**: {1e3 * ours:.0f} ms; {medians['bmtrain-ms launch, 2 ranks'] / plain:.2f} times.",
        f"{environment()} `python -m tests.benchmarks.start_up`",
        f"Medians of {ROUNDS}, in turn. `import mindspore`: {1e3 * mindspore:.0f} ms; `import bmtrain_ms` after it: "
        f"**{1e3 * ours:.0f} ms**.",
        table(["case", "launch to end of first step, s", "/ plain"], rows),
        "![start-up](start-up.png)",
        "*Plain*: the same layers on plain parameters in one process that has all cores.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        first_step(sys.argv[2], sys.argv[3] == "plain")
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "S")
