"""Tensor parallelism, pipelines and experts against the same work without communication, and against PyTorch's.

`python -m tests.benchmarks.parallel`; PyTorch is measured if the Python given with `--torch` (default: this one) can import it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tests.benchmarks.harness import (
    SIZES,
    Training,
    alone,
    environment,
    interleaved,
    launch,
    median_over_ranks,
    report,
    table,
    write_page,
)
from tests.benchmarks.mixture import EXPERTS, TOP
from tests.benchmarks.pipelines import bound, micro_batches
from tests.benchmarks.step_time import free_port, has_torch


def run_rank(size: str, checkpoint: str, rounds: int) -> None:
    """All cases of a setting in one process, step by step in turn."""
    import bmtrain_ms as bms
    from bmtrain_ms.comm import Mesh, SimulatedEngine, World, use_world

    world = bms.init_distributed()
    ranks, rank = world.everyone.size, world.mesh.rank
    mesh = Mesh(ranks, rank, tp=ranks)
    worlds = {
        "whole model, alone": alone(),
        "parts, no communication": World(SimulatedEngine(rank, ranks), mesh),
        "tensor and sequence parallel": World(world.everyone, mesh),
    }
    steps = {}
    for name, here in worlds.items():
        with use_world(here):
            steps[name] = Training(SIZES[size], checkpoint == "on").step
    report(interleaved(steps, rounds, 3, lambda: world.everyone.barrier().wait()))


Row = list[Any]
Section = tuple[str, list[str]]  # what is told of it in a sentence, and its paragraphs


def tensor(rounds: int, python: str | None, settings: list[tuple[str, int]]) -> Section:
    """Tensor parallelism, beside DTensor."""
    rows: list[Row] = []
    told: list[str] = []
    for size, ranks in settings:
        for checkpoint in ("off", "on"):
            ours = median_over_ranks(launch("tests.benchmarks.parallel", ranks, size, checkpoint, str(rounds)))
            parts, whole = ours["parts, no communication"], ours["whole model, alone"]
            parallel = ours["tensor and sequence parallel"]
            for name, seconds in ours.items():
                ratios = f"{seconds / parts:.2f}", f"{seconds / whole:.2f}"
                rows.append([size, ranks, checkpoint, f"bmtrain_ms, {name}", f"{1e3 * seconds:.0f}", *ratios])
            text = f"{size}, checkpoint {checkpoint}: {parallel / parts:.2f} times the parts alone"
            text += f", {parallel / whole:.2f} times one process"
            if python is not None:
                words = ("tests.benchmarks.torch_llama", ranks, size, checkpoint, str(rounds), free_port(), "tensor")
                theirs = {k.split(",")[0]: v for k, v in median_over_ranks(launch(*words, python=python)).items()}
                for name, seconds in theirs.items():
                    ratio = f"{seconds / theirs['compute only']:.2f}"
                    rows.append([size, ranks, checkpoint, f"PyTorch, {name}", f"{1e3 * seconds:.0f}", "", ratio])
                text += f" (DTensor: {theirs['DTensor'] / theirs['compute only']:.2f} times its own), "
                text += f"{theirs['DTensor'] / parallel:.2f} times DTensor's speed"
            told.append(text)
            print(text, flush=True)
    return ". ".join(told), [
        "## Tensor parallelism",
        "*Whole model, alone*: every process does all of it. *Parts, no communication*: collectives return at once, with copies of "
        "this rank's own data. PyTorch: the same model, fused AdamW, `parallelize_module` without sequence parallelism, which is "
        "the faster of the two there, gloo.",
        table(["model", "ranks", "checkpoint", "case", "step, ms", "/ parts alone", "/ whole model alone"], rows),
    ]


def pipelines(rounds: int, python: str | None, settings: list[tuple[str, int]]) -> Section:
    """1F1B against its own bound, beside PyTorch's."""
    rows: list[Row] = []
    told: list[str] = []
    for size, ranks in settings:
        m = micro_batches(ranks)
        found = launch("tests.benchmarks.pipelines", ranks, size, str(rounds), f"time:{ranks}")
        least = bound(ranks, m, found)
        cases = {"bmtrain_ms": [of_rank["steps"] for of_rank in found]}
        if python is not None:
            cases["PyTorch"] = launch("tests.benchmarks.torch_pipeline", ranks, size, str(rounds), free_port(), python=python)
        speed: dict[str, float] = {}
        for who, steps in cases.items():
            taken = median_over_ranks(steps)
            for name, seconds in taken.items():
                ratio = seconds / taken["whole model, alone"]
                rows.append([size, ranks, m, f"{who}, {name}", f"{1e3 * seconds:.0f}", f"{ratio:.2f}", ""])
            speed[who] = taken["stages, 1F1B"]
            if who == "bmtrain_ms":
                rows[-1][-1] = f"{speed[who] / least:.2f} of {1e3 * least:.0f}"
        ratio = speed["bmtrain_ms"] / median_over_ranks(cases["bmtrain_ms"])["whole model, alone"]
        told.append(f"{size}, {ranks} stages: {speed['bmtrain_ms'] / least:.2f} of the schedule's bound")
        over, message = median_over_ranks([of_rank["over a link"] for of_rank in found]), found[0]["message"]
        least = bound(ranks, m, found, message)
        for name, seconds in over.items():
            label = f"bmtrain_ms, {name}, {1e3 * message:.1f} ms a message"
            rows.append([size, ranks, m, label, f"{1e3 * seconds:.0f}", "", f"{seconds / least:.2f} of {1e3 * least:.0f}"])
            told[-1] += f" ({seconds / least:.2f} over a link)"
        told[-1] += f", {ratio:.2f} of one process's time"
        if "PyTorch" in speed:
            told[-1] += f", {speed['PyTorch'] / speed['bmtrain_ms']:.2f} times PyTorch's speed"
        print(told[-1], flush=True)
    return ". ".join(told), [
        "## Pipelines",
        "No recomputation, four micro-batches of one row for each stage. *Whole model, alone*: every process does the whole batch "
        "at once, all at the same time. *Bound*: the table's makespan if messages took no time and each stage's forward and "
        "backward what they take here, and what the slowest rank does before and after (the update). Four ranks share two cores: "
        "all they can win is what others are idle, and their stages' times contain that they wait for a core. PyTorch: "
        "`torch.distributed.pipelining.Schedule1F1B`, fused AdamW, gloo.",
        "*Over a link*: a message takes a quarter of a stage's forward pass, without using the CPU, from when its receiver waits "
        "for it; the bound is that of a link on which it sets out when it is sent.",
        "Where stages are behind PyTorch's, they compute longer, and do not wait: a micro-batch of one row has as many operations "
        "as a batch of many, each of which costs 0.15 to 0.25 ms in MindSpore's and our Python, forward and backward.",
        table(["model", "stages", "micro-batches", "case", "step, ms", "/ whole model alone", "/ bound, ms"], rows),
    ]


def memory(settings: list[tuple[str, int]]) -> Section:
    """What stages keep of micro-batches, against the formula."""
    rows: list[Row] = []
    for size, ranks in settings:
        m, one = micro_batches(ranks), 4 * SIZES[size].length * SIZES[size].dim / 1024
        found = launch("tests.benchmarks.pipelines", ranks, size, "0", f"memory:{ranks}")
        for of_rank in sorted(found, key=lambda x: x["rank"]):
            rank, layers = of_rank["rank"], of_rank["layers"]
            inputs = layers + (rank == ranks - 1)  # the head has one, too
            for schedule, kept in (("1f1b", min(m, ranks - rank)), ("gpipe", m)):
                sizes = f"{of_rank[schedule] / 1024:.0f}", f"{kept * inputs * one:.0f}"
                rows.append([size, f"{rank} of {ranks}", schedule, kept, layers, *sizes])
    same = all(row[-1] == row[-2] for row in rows)
    return f"Stages keep {'exactly' if same else 'not'} what the formula says", [
        "## Memory of stages",
        "With recomputation: bytes of layers' inputs (and the head's, on the last stage) that a stage keeps for backward passes, "
        "at most. *Formula*: 1F1B keeps them of min(m, p - rank) micro-batches, GPipe of all m, each tokens * dim * 4 bytes.",
        table(["model", "stage", "schedule", "micro-batches kept", "layers", "kept, KiB", "formula, KiB"], rows),
    ]


def experts(rounds: int, settings: list[tuple[str, int]]) -> Section:
    """Experts beside a dense layer, and messages behind a shared one."""
    rows: list[Row] = []
    told: list[str] = []
    for size, ranks in settings:
        taken = median_over_ranks(launch("tests.benchmarks.mixture", ranks, size, str(rounds)))
        for name, seconds in taken.items():
            rows.append([size, name, f"{1e3 * seconds:.1f}", f"{seconds / taken['dense']:.2f}"])
        (found,) = launch("tests.benchmarks.mixture", 1, size, str(rounds), "link")
        link = found["messages"]
        text = f"EP 2, shared expert, messages of {1e3 * link:.1f} ms"
        rows.append([size, "EP 2, shared expert, no link", f"{1e3 * found['free']:.1f}", ""])
        rows.append([size, text, f"{1e3 * found['link']:.1f}", ""])
        rows.append([size, f"{text}, called as a whole", f"{1e3 * found['whole']:.1f}", ""])
        told.append(
            f"{size}: experts take {taken['EP 1'] / taken['dense']:.2f} times the dense layer's time on one rank, "
            f"{taken[f'EP {ranks}'] / taken['dense']:.2f} divided over {ranks}; of messages that take as long as a shared expert "
            f"computes {1 - max(0.0, found['link'] - found['free']) / link:.0%} are hidden"
        )
        print(told[-1], flush=True)
    return ". ".join(told), [
        "## Experts",
        f"Forward and backward of one layer, top {TOP} of {EXPERTS}, random tokens, beside a dense layer of the same active size "
        f"({TOP} times the inner dim), on every rank. Last rows: on a simulated link between two ranks, on which a pass's tokens "
        "travel as long as a shared expert computes: there behind its first half, back behind its second, and their gradients "
        "likewise; one that is called as a whole is computed on the way there, and the way back has nothing to hide behind.",
        table(["model", "case", "pass, ms", "/ dense"], rows),
    ]


def main(rounds: int, python: str, settings: dict[str, list[tuple[str, int]]], remark: str) -> None:
    """Measure and write the page; `remark`: of the machine meanwhile."""
    torch = python if has_torch(python) else None
    sections = [
        tensor(rounds, torch, settings["tensor"]),
        pipelines(rounds, torch, settings["pipelines"]),
        memory(settings["pipelines"]),
        experts(rounds, settings["experts"]),
    ]
    write_page(
        "parallel",
        "Tensor parallelism, pipelines, experts",
        "Targets: two tensor-parallel ranks (with sequence parallelism) take at most 1.25 times as long as the same two processes "
        "computing their halves without communication on model M, and are ahead of PyTorch's DTensor; stages within 1.10 times "
        "the schedule's own bound, and ahead of PyTorch's; a stage's memory is that of the micro-batches that it keeps; an expert "
        "layer with top 2 of 8 within 1.5 times the dense layer of the same active size, its messages behind shared experts.",
        "**Result**: " + ". ".join(told for told, _ in sections if told) + ".",
        f"{environment()} `python -m tests.benchmarks.parallel --rounds {rounds}` {remark}".rstrip(),
        f"Median of {rounds} steps after 3 (forward, backward, AdamW), the cases in turn within one process group; mean over the "
        "ranks. One core per rank, where there are as many.",
        *(paragraph for _, paragraphs in sections for paragraph in paragraphs),
    )


def pairs(texts: list[str]) -> list[tuple[str, int]]:
    """Of `model:ranks`."""
    return [(text.split(":")[0], int(text.split(":")[1])) for text in texts]


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--rounds", type=int, default=10, help="steps per case")
        parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
        parser.add_argument("--settings", nargs="+", default=["S:2", "M:2"], help="model:ranks of tensor parallelism")
        parser.add_argument("--pipelines", nargs="+", default=["S:2", "S:4"], help="model:stages")
        parser.add_argument("--experts", nargs="+", default=["S:2"], help="model:ranks")
        parser.add_argument("--remark", default="", help="what the page says of the machine")
        given = parser.parse_args()
        chosen = {"tensor": pairs(given.settings), "pipelines": pairs(given.pipelines), "experts": pairs(given.experts)}
        main(given.rounds, given.torch, chosen, given.remark)
