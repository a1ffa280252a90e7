"""Does float16 with dynamic loss scaling get where float32 gets? The demo's model, on 2 CPU ranks.

python -m tests.benchmarks.mixed_precision
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.harness import environment, table, write_page


def demo(steps: int, out: Path, *options: str) -> tuple[float, list[dict]]:
    """Held-out loss at the end, and the log."""
    command = [sys.executable, "-m", "bmtrain_ms_cli", "demo", "--ranks", "2", "--steps", str(steps), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"held-out loss ([0-9.]+) nats", done.stdout)
    return float(found[-1]), [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reference, _ = demo(steps, Path(folder) / "fp32")
        rows.append(["float32", "–", f"{reference:.4f}", "–", "–", "–"])
        worst = 0.0
        for scale in (2**10, 2**24):
            loss, log = demo(steps, Path(folder) / f"fp16-{scale}", "--fp16", "--loss-scale", str(scale))
            skipped = [record["step"] for record in log if record["skipped"]]
            worst = max(worst, abs(loss / reference - 1))
            rows.append(
                [
                    "float16, float32 masters",
                    f"2^{scale.bit_length() - 1}",
                    f"{loss:.4f}",
                    f"{100 * (loss / reference - 1):+.3f} %",
                    f"{len(skipped)} (the last at step {skipped[-1]})" if skipped else "0",
                    f"{log[-1]['loss_scale']:g}",
                ]
            )
    write_page(
        "mixed-precision",
        "float16 with dynamic loss scaling",
        "Target: the demo's model in float16 reaches the float32 loss within 1 %, from any initial loss scale.",
        f"**Result**: within {100 * worst:.3f} %.",
        f"{environment()} `python -m tests.benchmarks.mixed_precision --steps {steps}`",
        f"`bmtrain-ms demo` on 2 ranks, {steps} steps.",
        table(["parameters", "initial scale", "held-out loss", "against float32", "skipped steps", "last scale"], rows),
    )


if __name__ == "__main__":
    main()
