"""Memory bandwidth of the Adam step on CPU, beside a plain copy, MindSpore's and PyTorch's; and how offloading overlaps.

python -m tests.benchmarks.adam --torch /path/to/python/with/torch
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from typing import Any, Callable

from tests.benchmarks.harness import SIZES, environment, interleaved, launch, report, table, write_page

BYTES = 28  # an element: 16 read (p, m, v, g), 12 written; as many for a 16-bit one, whose master is p: 14 and 14
LARGE, ROUNDS = 1 << 24, 9


def shapes(case: str) -> list[tuple[int, ...]]:
    """Of the parameters: two large ones, or those of a model."""
    if case not in SIZES:
        return [(LARGE,)] * 2
    size = SIZES[case]
    block = [(size.dim, size.dim)] * 4 + [(size.ff, size.dim)] * 3 + [(size.dim,)] * 2
    return [(size.vocab, size.dim), *block * size.layers, (size.dim,), (size.vocab, size.dim)]


def copying(elements: int, threads: int) -> Callable[[], None]:
    """A copy of so many float32 values by so many threads."""
    import numpy as np

    source, target = np.ones(elements, np.float32), np.zeros(elements, np.float32)
    part = -(-elements // threads)
    pieces = [slice(i, i + part) for i in range(0, elements, part)]

    def copy() -> None:
        workers = [threading.Thread(target=np.copyto, args=(target[x], source[x])) for x in pieces]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return copy


def rank(case: str, threads: int) -> None:
    """One process on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import mindspore as ms
    import numpy as np
    from mindspore import Parameter, Tensor, nn

    import bmtrain_ms as bms
    from bmtrain_ms.compat.runtime import from_host

    bms.init_distributed()
    random = np.random.default_rng(0)
    values = [random.standard_normal(shape, np.float32) for shape in shapes(case)]
    elements = sum(x.size for x in values)
    dtype = {"bfloat16": ms.bfloat16, "float16": ms.float16}.get(case, ms.float32)
    ours = [bms.DistributedParameter(from_host(x).astype(dtype), name=f"ours{i}") for i, x in enumerate(values)]
    theirs = [Parameter(Tensor(x), name=f"theirs{i}") for i, x in enumerate(values)]
    arrays = [random.standard_normal(x.size, np.float32) for x in values]
    grads = [from_host(x).astype(dtype) for x in arrays]
    shaped = tuple(from_host(g.reshape(x.shape)) for g, x in zip(arrays, values))
    adam = bms.optim.AdamOptimizer(ours, weight_decay=0.1)
    native = nn.AdamWeightDecay(theirs, learning_rate=1e-3, weight_decay=0.1)
    steps: dict[str, Callable[[], None]] = {
        "copy": copying(elements, threads),
        "AdamOptimizer": lambda: adam(grads),
    }
    if dtype == ms.float32:
        steps["nn.AdamWeightDecay"] = lambda: (native(shaped), theirs[-1].asnumpy()[:1])
    taken = interleaved(steps, ROUNDS, 3, lambda: None)
    report({name: BYTES / 28 * elements / statistics.median(seconds) for name, seconds in taken.items()})


def torch_rank(case: str, threads: int) -> None:
    """The same in PyTorch."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import torch

    torch.set_num_threads(threads)
    params = [torch.nn.Parameter(torch.randn(*shape)) for shape in shapes(case)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=True)
    elements = sum(p.numel() for p in params)
    steps = {"copy": copying(elements, threads), "torch": optimizer.step}
    taken = interleaved(steps, ROUNDS, 3, lambda: None)
    report({name: elements / statistics.median(seconds) for name, seconds in taken.items()})


def offload_rank(case: str) -> None:
    """Offloaded Adam with a link that takes as long as the arithmetic, each way: seconds of a step, and of its parts alone."""
    import numpy as np

    import bmtrain_ms as bms
    from bmtrain_ms.compat.runtime import from_host, host_array
    from bmtrain_ms.optim.offload import Transfer

    bms.init_distributed()
    params = [bms.DistributedParameter(bms.empty(1 << 20), name=f"p{i}") for i in range(16)]
    grads = [from_host(np.ones(p.full_size, np.float32)) for p in params]

    class Link(Transfer):
        seconds = 0.0

        def __init__(self) -> None:
            self.shares_memory = False

        def fetch(self, grad: Any) -> Any:
            time.sleep(self.seconds)
            return host_array(grad)

        def store(self, p: Any, array: Any) -> None:
            time.sleep(self.seconds)

    link = Link()
    adam = bms.optim.AdamOffloadOptimizer(params, transfer=link)

    def median() -> float:
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            adam(grads)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    median()
    arithmetic = median()
    link.seconds = arithmetic / len(params)
    report({"arithmetic": arithmetic, "with the link": median(), "one after the other": 3 * arithmetic})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", help="a Python that has PyTorch")
    options = parser.parse_args()
    rows, cores = [], len(os.sched_getaffinity(0))
    best = {}
    for case in ("large", "M", "S", "bfloat16", "float16"):
        for threads in sorted({1, cores}):
            rates = launch("tests.benchmarks.adam", 1, case, str(threads))[0]
            gigabytes = {name: rate * (8 if name == "copy" else BYTES) / 1e9 for name, rate in rates.items()}
            share = {name: value / gigabytes["copy"] for name, value in gigabytes.items()}
            torch_share = "–"
            if options.torch and case not in ("bfloat16", "float16"):
                theirs = launch("tests.benchmarks.adam", 1, "torch", case, str(threads), python=options.torch)[0]
                torch_share = f"{theirs['torch'] * BYTES / (theirs['copy'] * 8):.2f}"
            best[case, threads] = share["AdamOptimizer"]
            ours = f"**{share['AdamOptimizer']:.2f}**"
            native = f"{share['nn.AdamWeightDecay']:.2f}" if "nn.AdamWeightDecay" in share else "–"
            rows.append([case, threads, f"{gigabytes['copy']:.1f}", ours, native, torch_share])
    offload = launch("tests.benchmarks.adam", 1, "offload")[0]
    ratio = offload["with the link"] / offload["arithmetic"]
    met = min(best[case, threads] for case in ("large", "M", "S") for threads in (1, cores)) >= 0.6
    write_page(
        "adam",
        "The Adam step on CPU",
        "Target: memory-bound, at least 0.60 of the bandwidth of a copy; an element is 16 bytes read and 12 written.",
        f"**Result** ({'met' if met else 'missed'}): "
        + "; ".join(f"{case}: {best[case, 1]:.2f} on one core, {best[case, cores]:.2f} on {cores}" for case in ("large", "M", "S"))
        + ".",
        f"{environment()} `python -m tests.benchmarks.adam --torch PYTHON`",
        "Shares of the bandwidth of a plain copy (8 bytes an element) on as many cores, in turn in the same process; medians "
        f"of {ROUNDS}. *large*: two parameters of {LARGE:,} elements; *M*, *S*: the parameters of those models; *bfloat16*, "
        "*float16*: as *large*, with float32 masters, which the others do not keep.",
        table(["parameters", "cores", "copy, GB/s", "AdamOptimizer", "mindspore.nn.AdamWeightDecay", "torch fused AdamW"], rows),
        "The loops are compiled at a process's first step, which takes half a second; the compiler stays, with 140 MiB.",
        "Offloaded Adam, 16 parameters of 1 Mi elements, over a simulated link that needs as long as the arithmetic for the "
        f"gradients, and again for the parameters: a step takes {ratio:.2f} times the arithmetic alone; in turn it would be 3.00.",
    )


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] != ["rank"]:
        main()
    elif words[1] == "torch":
        torch_rank(words[2], int(words[3]))
    elif words[1] == "offload":
        offload_rank(words[1])
    else:
        rank(words[1], int(words[2]))
