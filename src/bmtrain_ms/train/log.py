"""The log of a run, one line of JSON per step, and a picture of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL log, without a last line that was cut when the run was killed.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def readable_lines(log: Path) -> list[dict[str, Any]]:
    """The records that are there. A power loss leaves zeros for what was not written; that must not keep a run from going on."""
    records, damaged = [], 0
    for line in log.read_bytes().split(b"\n"):
        try:
            record = json.loads(line) if line else None
        except ValueError:  # of UnicodeDecodeError and JSONDecodeError too
            record = line
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif record is not None:
            damaged += 1
    if damaged:
        sys.stderr.write(f"WARNING: {log} has {damaged} damaged line(s), which are left out\n")
    return records


def plot_log(log: str | Path, picture: str | Path, held_out: dict[int, float], unigram: float) -> bool:
    """Draw the loss curve as PNG; False, with a note on stderr, where matplotlib is not installed.

    Args:
        log: JSONL log.
        picture: PNG to write.
        held_out: step -> loss on held-out text.
        unigram: entropy to compare with.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        sys.stderr.write("no loss curve: matplotlib is not installed (pip install matplotlib)\n")
        return False
    records = read_log(log)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1, label="training")
    axes.plot(list(held_out), list(held_out.values()), "o-", label="held out")
    axes.axhline(unigram, color="grey", linestyle=":", label="unigram entropy of the held-out text")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return True
