"""The models of the benchmarks in stages of PyTorch's own, 1F1B over gloo; one rank of `tests.benchmarks.parallel`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any, Callable

from tests.benchmarks.harness import SIZES, Size, interleaved, report
from tests.benchmarks.pipelines import micro_batches
from tests.benchmarks.torch_llama import build


def loss_of(logits: Any, targets: Any) -> Any:
    """The mean over the tokens."""
    import torch

    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def part_of(model: Any, rank: int, stages: int) -> Any:
    """A module of one stage's layers, as even as can be."""
    from torch import nn

    n = len(model.blocks)
    ends = [sum(n // stages + (s < n % stages) for s in range(i)) for i in range(stages + 1)]

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = model.embedding if rank == 0 else None
            self.blocks = nn.ModuleList(model.blocks[ends[rank] : ends[rank + 1]])
            self.norm, self.head = (model.norm, model.head) if rank == stages - 1 else (None, None)
            for name in ("cos", "sin", "mask"):
                self.register_buffer(name, getattr(model, name))

        def forward(self, x: Any) -> Any:
            x = x if self.embedding is None else self.embedding(x)
            for block in self.blocks:
                x = block(x, self.cos, self.sin, self.mask)
            return x if self.head is None else self.head(self.norm(x))

    return Part()


def training(size: Size, number: int, rank: int, stages: int) -> Callable[[], None]:
    """A function that makes one step; of all layers where there is one stage."""
    import torch

    torch.manual_seed(0)
    ids, targets = torch.randint(0, size.vocab, (2, number, size.length))
    model = build(replace(size, batch=1 if stages > 1 else number), use_checkpoint=False)
    module = part_of(model, rank, stages) if stages > 1 else model
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    if stages > 1:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        stage = PipelineStage(module, rank, stages, torch.device("cpu"))
        schedule = Schedule1F1B(stage, number, loss_fn=loss_of)

    def step() -> None:
        optimizer.zero_grad()
        if stages == 1:
            loss_of(module(ids), targets).backward()
        else:
            schedule.step(*([ids] if rank == 0 else []), **({"target": targets, "losses": []} if rank == stages - 1 else {}))
        optimizer.step()

    return step


def run_rank(size: str, rounds: int, port: str) -> None:
    """The whole model on each rank, and its stages, step by step in turn."""
    import torch

    rank, ranks = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    start = rank * share % len(cores)
    os.sched_setaffinity(0, cores[start : start + share])
    torch.set_num_threads(share)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    m = micro_batches(ranks)
    cases = {"whole model, alone": training(SIZES[size], m, rank, 1), "stages, 1F1B": training(SIZES[size], m, rank, ranks)}
    report(interleaved(cases, rounds, 3, torch.distributed.barrier))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
