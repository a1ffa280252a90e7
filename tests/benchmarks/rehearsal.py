"""How long the rehearsal of the Grok-1 40B recipe takes, how much memory, and what its gradients' reduces hide behind:
`python -m tests.benchmarks.rehearsal`

Memory is what all of its processes together have, memory that several share counted once (PSS), looked at twice a second.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Sequence

from tests.benchmarks.harness import PAGES, ROOT, descendants, environment, table, write_page

RECIPE = ROOT / "docs" / "recipes" / "grok1_40b"
TRACED = ("--ranks=2", "--layout.tp=1", "--layout.pp=1", "--layout.ep=1", "--model.dim_model=256", "--model.dim_ff=512")
TRACED += ("--model.dim_head=32", "--data.shared_storage=true", "--train.steps=4", "--save.every=100", "--batch.micro=4")
SAID = re.compile(r"--- (\d+) s: (.*)")


def main() -> None:
    """Rehearse, trace, write the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, found = rehearsed(folder / "run")
        trace = traced(folder / "run" / "host0")
    share, reduces = hidden(trace)
    timeline(trace)
    seconds = rows[-1][1]
    most = max(int(row[3]) for row in rows if row[3] != "")
    write_page(
        "rehearsal",
        "The Grok-1 40B recipe, rehearsed",
        "From a parquet file to a model that writes: `docs/recipes/grok1_40b/rehearse.sh`, with tiny widths, on TP 4 x PP "
        "2 x EP 2, two hosts that share nothing, killed in mid-run, gone on with on another layout. (No target but that "
        "it ends as it should.)",
        f"**Result**: {seconds} s, {most:,} MiB at most. Beside one rank that never stopped: {'; '.join(found)}.",
        f"{environment()} `python -m tests.benchmarks.rehearsal`",
        table(["part", "ends after, s", "takes, s", "MiB at most"], rows),
        "16 ranks share the cores of one machine, so that this says nothing of a device's speed. A rank takes some 200 "
        "MiB before it has a model.",
        "## Reduces behind the backward pass (`--overlap-grad-reduce`)",
        f"The same model, wider (dim 256), on 2 data ranks: {share:.0%} of the time of the last step's {reduces} reduces "
        "of gradients lies behind computation of the same rank's Blocks. The rest is the last reduces of a step, behind "
        "which nothing is left to compute, and those of what is outside of Blocks. `--log.trace FILE` writes the same for "
        "any run.",
        "![timeline of a step](rehearsal.png)",
    )


def rehearsed(folder: Path) -> tuple[list[list[Any]], list[str]]:
    """A row for each part of the script, and what it found at its end."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    command = ["bash", str(RECIPE / "rehearse.sh"), str(folder)]
    log = folder.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    peaks: list[int] = []
    while process.poll() is None:
        parts = len(SAID.findall(log.read_text()))
        peaks += [0] * (parts - len(peaks))
        if peaks:
            peaks[-1] = max(peaks[-1], sum(map(proportional, descendants(process.pid))) >> 20)
        time.sleep(0.5)
    text = log.read_text()
    print(text, flush=True)
    if process.returncode:
        raise SystemExit(f"rehearse.sh ended with {process.returncode}")
    said = [(int(at), what) for at, what in SAID.findall(text)]
    rows = [
        [what, following, following - at, peaks[i] if i < len(peaks) else ""]
        for i, ((at, what), (following, _)) in enumerate(zip(said, said[1:]))
    ]
    return rows, [line for line in text.splitlines() if "differs by" in line]


def proportional(pid: int) -> int:
    """Bytes that a process has in memory, of what several have their share."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


def traced(folder: Path) -> list[dict[str, Any]]:
    """What rank 0 of two computed and moved in its last step."""
    command = [sys.executable, "-m", "bmtrain_ms_cli", "pretrain", str(RECIPE / "small.toml"), *TRACED]
    command += ["--out=runs/traced", "--log.trace=trace.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    last = max(span["args"]["step"] for span in spans if span["name"].startswith("reduce_scatter"))
    return [span for span in spans if span["args"]["step"] == last]


def hidden(spans: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """How much of the reduces' time lies behind computation, and how many there are."""
    reduces = [span for span in spans if span["name"].startswith("reduce_scatter")]
    computed = merged([(span["ts"], span["ts"] + span["dur"]) for span in spans if span["cat"] == "compute"])
    within = total = 0.0
    for start, end in merged([(span["ts"], span["ts"] + span["dur"]) for span in reduces]):
        total += end - start
        within += sum(max(0.0, min(end, b) - max(start, a)) for a, b in computed)
    return within / total, len(reduces)


def merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time without what is in two spans."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        before: tuple[float, float] | None = found[-1] if found else None
        if before is not None and start <= before[1]:
            found[-1] = (before[0], max(before[1], end))
        else:
            found.append((start, end))
    return found


def timeline(spans: Sequence[dict[str, Any]]) -> None:
    """A picture of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start = min(span["ts"] for span in spans)
    figure, axes = pyplot.subplots(figsize=(12, 3), layout="constrained")
    colours = {"gather": "tab:blue", "compute": "tab:green", "reduce": "tab:orange"}
    for i, (track, colour) in enumerate(colours.items()):
        bars = [((s["ts"] - start) / 1e3, s["dur"] / 1e3) for s in spans if s["cat"] == track]
        axes.broken_barh(bars, (i - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.5)
    axes.set_yticks(range(3), list(colours))
    axes.set_xlabel("ms; rank 0 of 2, one step")
    figure.savefig(PAGES / "rehearsal.png", dpi=100)


if __name__ == "__main__":
    main()
