"""The models of the benchmarks in PyTorch, alone, and with FSDP2 or DTensor over gloo; one rank of `step_time` or `parallel`."""

from __future__ import annotations

import os
import sys
from typing import Any, Callable

from tests.benchmarks.harness import SIZES, Size, interleaved, report


def build(size: Size, use_checkpoint: bool) -> Any:
    """A plain Llama decoder, matmul and softmax attention, as `model_center.model.Llama` computes it."""
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    head = size.dim // size.heads

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size.dim))

        def forward(self, x: Any) -> Any:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = Norm(), Norm()
            self.q, self.k, self.v, self.o = (nn.Linear(size.dim, size.dim, bias=False) for _ in range(4))
            self.gate, self.up = (nn.Linear(size.dim, size.ff, bias=False) for _ in range(2))
            self.down = nn.Linear(size.ff, size.dim, bias=False)

        def forward(self, x: Any, cos: Any, sin: Any, mask: Any) -> Any:
            y = self.norm1(x)
            q, k, v = (f(y).view(size.batch, size.length, -1, head).transpose(1, 2) for f in (self.q, self.k, self.v))
            q, k = (t * cos + torch.cat((-t[..., head // 2 :], t[..., : head // 2]), -1) * sin for t in (q, k))
            weights = torch.softmax(q @ k.transpose(-1, -2) * head**-0.5 + mask, -1)
            x = x + self.o((weights @ v).transpose(1, 2).reshape(size.batch, size.length, -1))
            y = self.norm2(x)
            return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(size.vocab, size.dim)
            self.blocks = nn.ModuleList(Block() for _ in range(size.layers))
            self.norm = Norm()
            self.head = nn.Linear(size.dim, size.vocab, bias=False)
            frequency = 10000.0 ** (-torch.arange(0, head, 2) / head)
            angles = torch.outer(torch.arange(size.length), frequency).repeat(1, 2)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
            self.register_buffer("mask", torch.full((size.length, size.length), -1e30).triu(1))

        def forward(self, ids: Any) -> Any:
            x = self.embedding(ids)
            for block in self.blocks:
                if use_checkpoint:
                    x = checkpoint(block, x, self.cos, self.sin, self.mask, use_reentrant=False)
                else:
                    x = block(x, self.cos, self.sin, self.mask)
            return self.head(self.norm(x))

    return Llama()


def divide(model: Any) -> None:
    """Tensor parallelism of PyTorch's own over all ranks, by DTensor."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(len(model.blocks)):
        plan.update({f"blocks.{i}.{name}": ColwiseParallel() for name in ("q", "k", "v", "gate", "up")})
        plan.update({f"blocks.{i}.{name}": RowwiseParallel() for name in ("o", "down")})
    parallelize_module(model, mesh, plan)


def training(size: Size, use_checkpoint: bool, shard: bool, rank: int, tensor: bool = False) -> Callable[[], None]:
    """A function that makes one step; `shard`: with FSDP2; `tensor`: divided, where all ranks get the batch of `rank`."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = build(size, use_checkpoint)
    if shard:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if tensor:
        divide(model)
    # the fused kernel takes no mixture of DTensors and plain ones, which are the norms
    kinds = [[p for p in model.parameters() if hasattr(p, "placements") == divided] for divided in (False, True)]
    optimizers = [torch.optim.AdamW(kind, lr=1e-4, weight_decay=0.1, fused=True) for kind in kinds if kind]
    generator = torch.Generator().manual_seed(rank)
    ids, targets = torch.randint(0, size.vocab, (2, size.batch, size.length), generator=generator)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids).view(size.tokens, size.vocab), targets.reshape(-1))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def run_rank(size: str, checkpoint: str, rounds: int, port: str, parallel: str = "sharded") -> None:
    """The two cases of a setting, step by step in turn."""
    import torch

    rank, ranks = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    start = rank * share % len(cores)
    os.sched_setaffinity(0, cores[start : start + share])
    torch.set_num_threads(share)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    suffix = ", checkpoint" if checkpoint == "on" else ""
    cases = {"compute only" + suffix: training(SIZES[size], checkpoint == "on", False, rank)}
    if parallel == "tensor":
        cases["DTensor" + suffix] = training(SIZES[size], checkpoint == "on", False, 0, tensor=True)
    else:
        cases["FSDP2" + suffix] = training(SIZES[size], checkpoint == "on", True, rank)
    report(interleaved(cases, rounds, 3, torch.distributed.barrier))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank(sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
