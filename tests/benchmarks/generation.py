"""Greedy generation beside transformers: `python -m tests.benchmarks.generation --torch PYTHON [--rounds 5]`"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

from tests.benchmarks.harness import SIZES, Size, alone, environment, launch, report, table, write_page

MODULE = "tests.benchmarks.generation"
MODELS = ("tiny", "S")
PROMPTS = (64, 256, 1024)
BATCHES = (1, 4)
NEW = 64
Tokens = list[list[int]]
Timed = Callable[[Tokens, int], tuple[Tokens, list[float]]]  # prompts, new tokens -> tokens, and when each row of them was there


def make(folder: Path, size: Size) -> None:
    """A Llama of random values, so large that rounding chooses no token."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import use_world
    from bmtrain_ms.model_center.model import Llama, LlamaConfig

    sizes = {"vocab_size": size.vocab, "dim_model": size.dim, "num_heads": size.heads, "dim_ff": size.ff, "num_layers": size.layers}
    with use_world(alone()):
        model = Llama(LlamaConfig(**sizes, init_std=0.1))
        bms.init_parameters(model)
        model.save_pretrained(folder, proven=False)


def ours(folder: str) -> Timed:
    """`generate`, whose tokens are told one by one."""
    import bmtrain_ms as bms
    from bmtrain_ms.model_center import from_pretrained
    from bmtrain_ms.model_center.generation import generate

    bms.init_distributed()
    model = from_pretrained(folder)

    def timed(prompts: Tokens, new: int) -> tuple[Tokens, list[float]]:
        moments = [time.perf_counter()]
        tokens = generate(model, prompts, new, on_token=lambda _: moments.append(time.perf_counter()))
        return tokens, moments

    return timed


def theirs(folder: str) -> Timed:
    """`generate` of transformers, with its own choice of attention and cache."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    class Moments(BaseStreamer):
        """Is given the prompts first, then the tokens of every step."""

        def __init__(self) -> None:
            self.all: list[float] = []

        def put(self, value: Any) -> None:
            self.all.append(time.perf_counter())

        def end(self) -> None:
            pass

    def timed(prompts: Tokens, new: int) -> tuple[Tokens, list[float]]:
        ids, moments = torch.tensor(prompts), Moments()
        length, start = ids.shape[1], time.perf_counter()
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=moments, **settings)
        return out[:, length:].tolist(), [start, *moments.all[1:]]

    return timed


def run_rank(program: str, folder: str, vocab: str) -> None:
    """Every prompt and batch once, behind a short warm-up: seconds of the first token, of each further one, and the tokens."""
    import numpy as np

    timed = (ours if program == "bmtrain_ms" else theirs)(folder)
    found = {}
    for batch in BATCHES:
        for length in PROMPTS:
            prompts = np.random.default_rng([batch, length]).integers(3, int(vocab), (batch, length)).tolist()
            timed(prompts, 3)
            tokens, moments = timed(prompts, NEW)
            between = [b - a for a, b in zip(moments, moments[1:])]
            assert len(between) == NEW, f"{program} told of {len(between)} tokens, not of {NEW}"
            found[f"{batch} {length}"] = {"prefill": between[0], "decode": statistics.median(between[1:]), "tokens": tokens}
    report(found)


def measured(size: Size, torch: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Program -> batch and prompt -> medians over the rounds, in which the programs take turns."""
    programs = {"bmtrain_ms": sys.executable, "transformers": torch}
    found: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    with tempfile.TemporaryDirectory() as place:
        make(Path(place) / "model", size)
        for _ in range(rounds):
            for program, python in programs.items():
                found[program] += launch(MODULE, 1, program, f"{place}/model", str(size.vocab), python=python)
    settings = list(found["bmtrain_ms"][0])
    for key in settings:
        if len({str(result[key]["tokens"]) for results in found.values() for result in results}) > 1:
            raise SystemExit(f"the programs wrote other tokens than each other, of batch and prompt {key}: nothing is compared")
    return {
        program: {
            key: {part: statistics.median(result[key][part] for result in results) for part in ("prefill", "decode")}
            for key in settings
        }
        for program, results in found.items()
    }


def row_of(name: str, batch: int, length: int, found: dict[str, dict[str, dict[str, float]]]) -> list[Any]:
    """Tokens/s of ours and theirs, their ratio, and what a token costs against one behind the shortest prompt."""
    row: list[Any] = [name, batch, length]
    ours, theirs = (found[program][f"{batch} {length}"] for program in ("bmtrain_ms", "transformers"))
    for part, tokens in (("prefill", batch * length), ("decode", batch)):
        row += [f"{tokens / ours[part]:.0f}", f"{tokens / theirs[part]:.0f}", f"**{theirs[part] / ours[part]:.2f}**"]
    for settings in found.values():
        seconds, least = (settings[f"{batch} {prompt}"]["decode"] for prompt in (length, PROMPTS[0]))
        row.append(f"{1e3 * seconds:.2f} ({seconds / least:.2f})")
    return row


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", required=True, help="a Python that has PyTorch and transformers")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for name in MODELS:
        found = measured(replace(SIZES[name], length=PROMPTS[-1] + NEW), options.torch, options.rounds)
        rows += [row_of(name, batch, length, found) for batch in BATCHES for length in PROMPTS]
    ratios = {part: [float(row[column].strip("*")) for row in rows] for part, column in (("prefill", 5), ("decode", 8))}
    write_page(
        "generation",
        "Generation beside transformers",
        "(No target.) What a user of either waits for: the first token, and each further one.",
        "**Result**: "
        + ", ".join(f"{part} {min(x):.2f} to {max(x):.2f} times transformers' tokens/s" for part, x in ratios.items())
        + ".",
        f"{environment()} `python -m {MODULE} --torch PYTHON --rounds {options.rounds}`",
        f"Greedy, {NEW} new tokens behind prompts of random tokens, on one rank with all cores. Both programs read the same "
        "folder, and must write the same tokens. *Prefill*: tokens of the prompts per second until the first new one is there. "
        "*Decode*: new tokens of all rows per second, of the median step; *ms*: of such a step, and how many times that behind the "
        f"shortest prompt. Medians of {options.rounds} round(s), in which the programs take turns, each in a process of its own. "
        "Models: tiny (dim 64, 2 layers, vocabulary 512), and S as on the other pages; float32.",
        table(
            [
                "model",
                "rows",
                "prompt",
                *("prefill, tokens/s", "transformers", "ratio"),
                *("decode, tokens/s", "transformers", "ratio"),
                *("decode, ms", "transformers, ms"),
            ],
            rows,
        ),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(*sys.argv[2:])
    else:
        main()
