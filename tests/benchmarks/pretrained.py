"""Loading and saving a folder of Hugging Face's: `python -m tests.benchmarks.pretrained --torch PYTHON [--gigabytes 4]`"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import environment, launch, report, table, write_page

MODULE, ROUNDS = "tests.benchmarks.pretrained", 3
LAYER, TABLES = 4 * 2048**2 + 3 * 2048 * 5632, 2 * 32000 * 2048  # elements


def make(folder: Path, gigabytes: float) -> None:
    """A Llama in bfloat16 of about that size, of any values."""
    import numpy as np

    from bmtrain_ms.comm import Mesh, SingleEngine, World, use_world
    from bmtrain_ms.model_center.model import Llama, LlamaConfig
    from bmtrain_ms.model_center.pretrained.writing import Target

    layers = max(1, round((gigabytes * 1e9 / 2 - TABLES) / LAYER))
    config = LlamaConfig(dim_model=2048, num_heads=16, dim_ff=5632, num_layers=layers, dtype="bfloat16")
    with use_world(World(SingleEngine(), Mesh(1, 0))):
        shapes = {p.name: (p.dtype, p.layout.whole) for p in Llama(config).get_parameters()}
    target, random = Target(folder, shapes, Llama.FAMILY.pieces), np.random.default_rng(0)
    for name, (_, shape) in shapes.items():
        count = math.prod(shape)
        for start in range(0, count, 1 << 21):
            values = random.standard_normal(min(1 << 21, count - start), np.float32) / 64
            target.write(name, start, values)
    target.commit()
    (folder / "config.json").write_text(json.dumps(Llama.FAMILY.write(config)))


def rank(folder: str, out: str) -> None:
    """Load, the first time with an eye on memory, and save."""
    import gc

    import bmtrain_ms as bms
    from bmtrain_ms.model_center import Spread, from_pretrained
    from bmtrain_ms_base.memory import reset_peak_memory, resident_memory

    bms.init_distributed()
    seconds, model = [], None
    memory = 0
    for number in range(ROUNDS):
        model = None
        gc.collect()
        bms.synchronize()
        reset_peak_memory()
        before, start = resident_memory()[0], time.perf_counter()
        model = from_pretrained(folder, Spread())
        bms.synchronize()
        seconds.append(time.perf_counter() - start)
        memory = memory if number else resident_memory()[1] - before
    assert model is not None
    share = sum(p.shard_length * p.itemsize for p in model.get_parameters())
    start = time.perf_counter()
    model.save_pretrained(out, proven=False)
    report({"load": statistics.median(seconds), "save": time.perf_counter() - start, "memory": memory, "share": share})


def of_transformers(folder: str) -> None:
    """`from_pretrained`, and then a look at every value: what it returns may be a view of a file that nobody has read yet."""
    import torch
    from transformers import AutoModelForCausalLM

    returned, read = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        returned.append(time.perf_counter() - start)
        for p in model.parameters():
            p.detach().view(torch.int16).max()
        read.append(time.perf_counter() - start)
        del model
    report({"returned": statistics.median(returned), "read": statistics.median(read)})


def copied(folder: Path) -> float:
    """Seconds of `cp -r`, whose bytes stay in the page cache."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(folder), str(folder.with_name("copy"))], check=True)
        taken.append(time.perf_counter() - start)
        subprocess.run(["rm", "-r", str(folder.with_name("copy"))], check=True)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", help="a Python that has PyTorch and transformers")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    options = parser.parse_args()
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        make(folder, options.gigabytes)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        copy = copied(folder)
        over = {}
        for ranks in (1, 2, 4):
            results = launch(MODULE, ranks, str(folder), str(Path(place) / "out"))
            load, save = (max(r[name] for r in results) for name in ("load", "save"))
            over[ranks] = max(r["memory"] - r["share"] for r in results) / 2**20
            share = results[0]["share"] / 2**20
            speeds = [f"{size / load:.2f}", f"{copy / load:.2f}", f"{size / save:.2f}"]
            rows.append([f"bmtrain_ms, {ranks} rank(s)", *speeds, f"{share:.0f}", f"**{over[ranks]:+.0f}**"])
        if options.torch:
            (found,) = launch(MODULE, 1, "transformers", str(folder), python=options.torch)
            for name, text in (("returned", "as it returns"), ("read", "and every value looked at")):
                speeds = [f"{size / found[name]:.2f}", f"{copy / found[name]:.2f}"]
                rows.append([f"transformers.from_pretrained, {text}", *speeds, "–", "–", "–"])
    write_page(
        "pretrained",
        "Folders of Hugging Face's",
        "Target: while a model of 4 GB is loaded on 4 ranks, each has at most its share of it and 64 MiB more.",
        f"**Result**: with {size:.1f} GB, the share and " + ", ".join(f"{x:.0f} MiB on {n} rank(s)" for n, x in over.items()) + ".",
        f"{environment()} `python -m {MODULE} --torch PYTHON --gigabytes {options.gigabytes:g}`",
        f"A Llama in bfloat16, {size:.2f} GB, in the page cache; medians of {ROUNDS} loads, one save. Memory is that of a process: "
        "the largest resident set while the first load was under way, less what was resident before; of the rank that needed most. "
        f"`cp -r`, whose copy stays in the page cache: {size / copy:.2f} GB/s. Saving brings the files to the disk, `cp` does not.",
        table(["", "load, GB/s", "/ cp", "save, GB/s", "share, MiB", "memory beyond it, MiB"], rows),
    )


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] != ["rank"]:
        main()
    elif words[1] == "transformers":
        of_transformers(words[2])
    else:
        rank(words[1], words[2])
