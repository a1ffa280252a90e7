"""Peak memory per rank on model M: `python -m tests.benchmarks.memory`"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from tests.benchmarks.harness import PAGES, SIZES, Training, environment, launch, peak_mib, report, table, write_page
from tests.benchmarks.plain import unshard

CASES = {  # name -> (ranks, ZeRO level or 0 for unsharded, checkpoint)
    "unsharded": (1, 0, False),
    "ZeRO-3, 2 ranks": (2, 3, False),
    "ZeRO-3, 4 ranks": (4, 3, False),
    "ZeRO-2, 2 ranks": (2, 2, False),
    "ZeRO-3, 2 ranks, checkpoint": (2, 3, True),
}


def run_rank(size: str, case: str) -> None:
    """Three steps; reports (peak, of which before the model was made), MiB."""
    import bmtrain_ms as bms

    _, level, use_checkpoint = CASES[case]
    bms.init_distributed()
    before = peak_mib()
    training = Training(SIZES[size], use_checkpoint, level or 3, change=None if level else unshard)
    for _ in range(3):
        training.step()
    report([peak_mib(), before])


def main(size: str) -> None:
    """Measure, plot, write the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {}
    for case, (ranks, _, _) in CASES.items():
        results = launch("tests.benchmarks.memory", ranks, size, case)
        found[case] = [max(r[0] for r in results), statistics.mean(r[1] for r in results)]
    base = found["unsharded"][0]
    rows: list[list[Any]] = [
        [case, f"{peak:.0f}", f"{before:.0f}", f"{peak - before:.0f}", f"{peak - base:+.0f}"]
        for case, (peak, before) in found.items()
    ]
    figure, axes = pyplot.subplots(figsize=(9, 3.5), layout="constrained")
    names = list(found)[::-1]
    axes.barh(names, [found[n][0] for n in names], color="tab:blue", label="peak")
    axes.barh(names, [found[n][1] for n in names], color="lightgrey", label="before the model is made")
    axes.axvline(base, color="grey", linestyle=":")
    axes.set_xlabel("MiB resident, the largest of the ranks")
    axes.legend()
    figure.savefig(PAGES / "memory.png", dpi=100)
    write_page(
        "memory",
        "Memory per rank",
        "Target: the peak of resident memory at 2 ranks lies below that of one unsharded process (PyTorch's FSDP2, FSDP1 and "
        "DeepSpeed were measured at 200 to 580 MiB above theirs).",
        f"**Result**: ZeRO-3 at 2 ranks {found['ZeRO-3, 2 ranks'][0] - base:+.0f} MiB, at 4 ranks "
        f"{found['ZeRO-3, 4 ranks'][0] - base:+.0f} MiB.",
        f"{environment()} `python -m tests.benchmarks.memory`",
        f"Model {size}, three training steps. *Unsharded*: the same layers on plain parameters, without the ZeRO engine. A process "
        "that has imported MindSpore and joined the others holds what the third column says. Of the model: "
        "140 MiB of the compiler of Adam's loops, in every case.",
        table(["case", "peak, MiB", "before the model", "of the model", "against unsharded"], rows),
        "![peak memory](memory.png)",
        "Checked by tests, not here (`tests/ranks/test_memory.py`, `tests/unit/test_zero_collectives.py`): stored bytes are at "
        "most 1.02 times the formula; gathered parameters never exceed 1 + prefetch blocks, full gradients two blocks; a whole "
        "run (construct, initialise, train, evaluate, save, load) of four ranks works under a limit (`RLIMIT_DATA`) that leaves a "
        "tenth of the model beyond what a rank stores; 200 steps leave the memory flat. The limit itself cannot be a tenth of the "
        "model: four ranks have to store a quarter each.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3])
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "M")
