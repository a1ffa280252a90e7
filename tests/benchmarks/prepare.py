"""How fast `prepare` is beside the tokenizer alone and `datasets.map`, and how much memory it takes:
`python -m tests.benchmarks.prepare`

Speed is tokens per second of processor time, which other work on the machine changes little: of `tokenizers` with all texts in
memory, and of `prepare` and `datasets.map`, all of their processes together and their start included. By the clock it is said too.
Memory is what all processes together have resident, looked at some twenty times a second.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Sequence

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

from bmtrain_ms_base.data import IndexedFile, python_documentation, train_tokenizer
from tests.benchmarks.harness import descendants, environment, table, write_page
from tests.helpers.ranks import ROOT

SHARE, FLAT = 0.80, 1.10  # wanted: of the tokenizer's speed; of the memory for the small text at most, for the large one
BATCH = 200  # texts that are given to the tokenizer at a time where it is alone
ALONE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
start, clock, tokens = time.process_time(), time.perf_counter(), 0
for i in range(0, len(texts), int(sys.argv[3])):
    tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts[i : i + int(sys.argv[3])]))
print(json.dumps([tokens, time.process_time() - start, time.perf_counter() - clock]))
"""
DATASETS = """
import json, sys
from datasets import disable_progress_bars, load_dataset
from tokenizers import Tokenizer
disable_progress_bars()
tokenizer = Tokenizer.from_file(sys.argv[1])
def encode(rows):
    return {"ids": [encoding.ids for encoding in tokenizer.encode_batch_fast(rows["text"])]}
rows = load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[3])
rows = rows.map(encode, batched=True, num_proc=int(sys.argv[4]), remove_columns=rows.column_names)
print(json.dumps(len(rows)))
"""


@dataclass(frozen=True)
class Run:
    """What one run took: `tokens` made, `processor` and `clock` seconds, `resident` bytes of all processes together at most."""

    tokens: int
    processor: float
    clock: float
    resident: int

    @property
    def speed(self) -> float:
        """Tokens per second of processor time."""
        return self.tokens / self.processor

    @property
    def by_the_clock(self) -> float:
        """Tokens per second."""
        return self.tokens / self.clock


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, nargs=2, default=(100, 2048), help="sizes of the small and the large text")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2), help="1 first, as speeds are compared with it")
    parser.add_argument("--repeat", type=int, default=3, help="runs with the small text; the large one is prepared once")
    parser.add_argument(
        "--datasets", metavar="PYTHON", help="one that has `datasets` and `tokenizers`; default: this one, if it has"
    )
    parser.add_argument("--no-page", action="store_true", help="print what is found, and leave docs/ as it is")
    options = parser.parse_args()
    if options.workers[0] != 1 or options.repeat < 1 or min(options.mib) < 1:
        parser.error("--workers has to begin with 1, and sizes and repetitions are at least 1")
    datasets = options.datasets or (sys.executable if importlib.util.find_spec("datasets") else None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(python_documentation(), 16000).save(str(folder / "tokenizer.json"))
        small, large = (write(folder / f"{mib}.jsonl", mib << 20) for mib in options.mib)
        found = repeated(folder, small, options.workers, options.repeat, datasets)
        in_large = prepared(folder, large, options.workers[-1])
    fastest = max(run.speed for run in found["tokenizers"])
    rows = []
    for case, runs in found.items():
        speed, clock, most = best(runs)
        rows.append([case, f"{speed / 1e3:,.0f}", f"{clock / 1e3:,.0f}", f"{speed / fastest:.0%}", f"{most >> 20}" if most else ""])
    told = texts(options, found, in_large)
    if options.no_page:
        print("\n".join([*told, table(HEADER, rows)]))
    else:
        write_page("prepare", "Text to tokens", *told, table(HEADER, rows))


HEADER = ["case", "k tokens per second of processor time", "by the clock", "of the tokenizer's", "MiB resident"]


def best(runs: Sequence[Run]) -> tuple[float, float, int]:
    """The highest of both speeds, as whatever else the machine does makes them lower, and the most memory."""
    return max(run.speed for run in runs), max(run.by_the_clock for run in runs), max(run.resident for run in runs)


def texts(options: argparse.Namespace, found: dict[str, list[Run]], large: Run) -> list[str]:
    """The page's paragraphs."""
    of_workers = {number: best(found[f"prepare --workers {number}"]) for number in options.workers}
    share = min(speed for speed, *_ in of_workers.values()) / best(found["tokenizers"])[0]
    one, last = of_workers[1], of_workers[options.workers[-1]]
    growth = [f"{clock / one[1]:.2f} times as many tokens by {n} workers" for n, (_, clock, _) in of_workers.items() if n > 1]
    given = f"--mib {options.mib[0]} {options.mib[1]} --workers {' '.join(map(str, options.workers))} --repeat {options.repeat}"
    given += " --datasets PYTHON" if options.datasets else ""
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return [
        f"Target: {SHARE:.0%} of what `tokenizers` alone makes of texts in memory, for each core; as many times the tokens as "
        f"workers, as far as there are cores; memory that does not grow with the text (at most {FLAT:g} times).",
        f"**Result**: {share:.0%}; by the clock {' and '.join(growth) or 'one worker only'}, of processor time "
        f"{last[0] / one[0]:.2f} times; {large.resident / last[2]:.2f} times the memory for {options.mib[1]:,} MiB of text "
        f"({large.resident >> 20} MiB) as for {options.mib[0]:,} MiB ({last[2] >> 20} MiB).",
        f"{environment()[:-1]}, tokenizers {version('tokenizers')}; load of the machine at the end {load}. "
        f"`python -m tests.benchmarks.prepare {given}`",
        f"{options.mib[0]:,} MiB of paragraphs of Python's help texts in any order, {found['tokenizers'][0].tokens:,} tokens of a "
        f"vocabulary of 16,000. The best of {options.repeat} runs, in turn; all processes together, their start included. "
        "`datasets.map` makes a table of the same ids, of which somebody has to make files yet.",
    ]


def repeated(folder: Path, path: Path, workers: Sequence[int], repeat: int, datasets: str | None) -> dict[str, list[Run]]:
    """Every case, one after the other in each round, so that all see the same machine."""
    cases: dict[str, Callable[[], Run]] = {"tokenizers": lambda: alone(folder, path)}
    for number in workers:
        cases[f"prepare --workers {number}"] = lambda number=number: prepared(folder, path, number)
    for number in workers if datasets else ():
        cases[f"datasets.map, num_proc={number}"] = lambda number=number: mapped(folder, path, number, datasets)
    found: dict[str, list[Run]] = {case: [] for case in cases}
    for _ in range(repeat):
        for case, run in cases.items():
            found[case].append(run())
            print(f"{case}: {found[case][-1]}", file=sys.stderr, flush=True)
    tokens = {case: {run.tokens for run in runs} for case, runs in found.items()}
    if len(set.union(*tokens.values())) > 1:
        raise SystemExit(f"not all make the same tokens: {tokens}")
    return found


def write(path: Path, size: int) -> Path:
    """Paragraphs of the help texts in any order."""
    draw = np.random.default_rng(0)
    parts = [part for text in python_documentation() for part in text.split("\n\n") if len(part) > 40]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            chosen = draw.integers(0, len(parts), int(draw.integers(2, 20)))
            file.write(json.dumps({"text": "\n\n".join(parts[i] for i in chosen)}) + "\n")
    return path


def alone(folder: Path, path: Path) -> Run:
    """The tokenizer, in a process of its own, without its start."""
    command = [sys.executable, "-c", ALONE, str(folder / "tokenizer.json"), str(path), str(BATCH)]
    tokens, processor, clock = json.loads(watched(command)[0].splitlines()[-1])
    return Run(tokens, processor, clock, 0)


def prepared(folder: Path, path: Path, workers: int) -> Run:
    """The command, as a user gives it."""
    words = ["prepare", "--input", str(path), "--output-prefix", str(folder / "out"), "--overwrite", "--log-interval", str(10**9)]
    words += ["--tokenizer-name-or-path", str(folder / "tokenizer.json"), "--workers", str(workers)]
    _, processor, clock, resident = watched([sys.executable, "-m", "bmtrain_ms_cli", *words])
    with IndexedFile(folder / "out_text_document") as file:
        return Run(file.tokens, processor, clock, resident)


def mapped(folder: Path, path: Path, workers: int, python: str) -> Run:
    """`datasets.map` of the same text by the same tokenizer; how many tokens that are is known from the others."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        command = [python, "-c", DATASETS, str(folder / "tokenizer.json"), str(path), cache, str(workers)]
        output, processor, clock, resident = watched(command)
    with IndexedFile(folder / "out_text_document") as file, open(path, "rb") as lines:
        if json.loads(output.splitlines()[-1]) != sum(1 for _ in lines):
            raise SystemExit(f"datasets.map has left out rows: {output}")
        return Run(file.tokens, processor, clock, resident)


def watched(command: list[str]) -> tuple[str, float, float, int]:
    """Run it to its end: its output, seconds of processor time and of the clock, and bytes resident at most."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    start, used, most = time.perf_counter(), processor_time(), 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True, env=env)
        while process.poll() is None:
            most = max(most, sum(map(resident, descendants(process.pid))))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{errors.read()[-4000:]}")
        return output.read(), processor_time() - used, seconds, most


def processor_time() -> float:
    """Seconds that processes which have ended, and those that they had started, have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident(pid: int) -> int:
    """Bytes that a process has in memory."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has ended
        return 0


if __name__ == "__main__":
    main()
