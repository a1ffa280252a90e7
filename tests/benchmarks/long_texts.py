"""Memory of a step on one long sequence, and on packed documents: `python -m tests.benchmarks.long_texts`"""

from __future__ import annotations

import sys
import time
from typing import Any

from tests.benchmarks.harness import environment, launch, peak_mib, report, table, write_page

LENGTHS = (2048, 4096, 8192, 16384)
SIZES = {"vocab_size": 8192, "dim_model": 256, "num_heads": 4, "dim_ff": 688, "num_layers": 2}
LIMIT_MIB = 1024


def run_rank(length: str, documents: str) -> None:
    """One step of a recomputed model on a sequence; reports (MiB above weights, gradients and moments, seconds)."""
    import numpy as np
    from mindspore import Tensor

    import bmtrain_ms as bms
    from bmtrain_ms.model_center import spread
    from bmtrain_ms.model_center.model import Llama, LlamaConfig

    bms.init_distributed()
    model = spread(Llama(LlamaConfig(**SIZES)))
    bms.init_parameters(model)
    manager = bms.optim.OptimManager()
    manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-4))

    def step(tokens: int) -> None:
        ids = Tensor(np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, tokens)).astype(np.int32))
        numbers = Tensor((np.arange(tokens)[None] // 1000).astype(np.int32)) if documents == "packed" else None
        manager.zero_grad()
        manager.backward(model.loss, ids, ids, None, numbers)
        manager.step()

    step(64)  # whatever is made once
    before, start = peak_mib(), time.perf_counter()
    step(int(length))
    report([peak_mib() - before, time.perf_counter() - start])


def main() -> None:
    """Measure and write the page."""
    rows: list[list[Any]] = []
    for documents in ("one", "packed"):
        for length in LENGTHS:
            (found,) = launch("tests.benchmarks.long_texts", 1, str(length), documents)
            pairs = 4 * SIZES["num_heads"] * length**2 / 2**20
            rows.append([length, documents, f"{found[0]:.0f}", f"{pairs:.0f}", f"{found[1]:.1f}"])
            print(rows[-1], flush=True)
    most = max(float(row[2]) for row in rows)
    write_page(
        "long-texts",
        "Memory of long texts",
        f"Target: a step on one sequence of {LENGTHS[-1]} tokens takes at most {LIMIT_MIB} MiB beyond weights, gradients and "
        "moments.",
        f"**Result**: {most:.0f} MiB at most.",
        f"{environment()} `python -m tests.benchmarks.long_texts`",
        "A Llama of 2 layers, dim 256, 4 heads, vocabulary 8192, float32, its layers recomputed; one process, one step: peak "
        "of resident memory above that of a step on 64 tokens. *Packed*: documents of 1000 tokens in the sequence. *All pairs*: "
        "what float32 scores of one layer would take.",
        table(["tokens", "documents", "MiB", "all pairs, MiB", "s"], rows),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(*sys.argv[2:])
    else:
        main()
