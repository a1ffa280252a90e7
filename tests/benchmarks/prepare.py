"""How fast `prepare` is beside the tokenizer alone, and how much memory it takes: `python -m tests.benchmarks.prepare`

Tokens per second of processor time, which other work on the machine changes little: of `tokenizers` with all texts in memory, and
of `prepare`, all of its processes together and their start included. Tokens/s by the clock are printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

from bmtrain_ms_base.data import python_documentation, train_tokenizer


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, nargs=2, default=(20, 200), help="sizes of the small and the large text")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(python_documentation(), 16000)
        tokenizer.save(str(folder / "tokenizer.json"))
        small, large = (write(folder / f"{mib}.jsonl", mib << 20) for mib in options.mib)
        alone = max(tokenizer_alone(tokenizer, small) for _ in range(options.repeat))
        print(f"tokenizers alone: {alone:,.0f} tokens per second of processor time", flush=True)
        for workers in options.workers:
            rates = [prepared(folder, small, workers)[:2] for _ in range(options.repeat)]
            best, clock = (max(column) for column in zip(*rates))
            print(f"prepare, {workers} workers: {best:,.0f}, {best / alone:.0%} of that; {clock:,.0f} by the clock", flush=True)
        for path in (small, large):
            memory = prepared(folder, path, 2)[2]
            print(f"{path.stat().st_size >> 20} MiB of text, 2 workers: {memory >> 20} MiB resident at most", flush=True)


def write(path: Path, size: int) -> Path:
    """Paragraphs of the help texts in any order."""
    draw = np.random.default_rng(0)
    parts = [part for text in python_documentation() for part in text.split("\n\n") if len(part) > 40]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            chosen = draw.integers(0, len(parts), int(draw.integers(2, 20)))
            file.write(json.dumps({"text": "\n\n".join(parts[i] for i in chosen)}) + "\n")
    return path


def tokenizer_alone(tokenizer: object, path: Path) -> float:
    """Tokens per second of processor time, in batches as `prepare` makes them."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    start, tokens = time.process_time(), 0
    for i in range(0, len(texts), 200):
        tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts[i : i + 200]))  # type: ignore[attr-defined]
    return tokens / (time.process_time() - start)


def prepared(folder: Path, path: Path, workers: int) -> tuple[float, float, int]:
    """Tokens per second of processor time and of the clock, and bytes of memory of all processes together, at most."""
    words = ["prepare", "--input", str(path), "--output-prefix", str(folder / "out"), "--overwrite", "--log-interval", str(10**9)]
    words += ["--tokenizer-name-or-path", str(folder / "tokenizer.json"), "--workers", str(workers)]
    start, used, most = time.perf_counter(), processor_time(), 0
    with subprocess.Popen([sys.executable, "-m", "bmtrain_ms_cli", *words], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, sum(map(resident, [process.pid, *children(process.pid)])))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        output = process.stdout.read() if process.stdout else ""
    tokens = int(output.split(" documents, ")[1].split()[0].replace(",", ""))
    return tokens / (processor_time() - used), tokens / seconds, most


def processor_time() -> float:
    """Seconds that processes which have ended, and those that they had started, have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def resident(pid: int) -> int:
    """Bytes of memory of its own."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    main()
