"""A model whose layers are in a PipelineTransformerBlockList, its head and loss behind it; and one training of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, World, use_world
from bmtrain_ms.compat.runtime import from_host
from bmtrain_ms.zero import context_of
from tests.helpers.layouts import parts

VOCAB, WIDTH, LENGTH, ROWS = 13, 6, 4, 12  # rows of all ranks together


@dataclass(frozen=True)
class Chain:
    """How many ranks, micro-batches and layers; whether layers compute again; what is frozen: beginnings of names; whether layers
    are tensor-parallel ones, on any number of ranks."""

    pp: int = 1
    dp: int = 1
    micro_batches: int | None = None
    layers: int = 5
    recompute: bool = True
    replica: int = 1
    frozen: tuple[str, ...] = ()
    drop: float = 0.0
    tp: int = 1
    parallel: bool = False

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.tp

    def world(self, world: World) -> World:
        mesh = Mesh(self.ranks, world.mesh.rank, tp=self.tp, pp=self.pp, replica=self.replica)
        return World(world.everyone, mesh, seed=5, micro_batches=self.micro_batches)


def parameter(*shape: int, std: float = 0.4) -> bms.DistributedParameter:
    start = bms.ParameterInitializer(bms.init.normal_, 0.0, std)
    return bms.DistributedParameter(bms.empty(*shape), init_method=start)


class Layer(bms.DistributedModule):
    """tanh(x W + b + mask) + scale * x; what has no row for each row is `scale`."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = parameter(WIDTH, WIDTH), parameter(WIDTH)
        self.drop = bms.nn.Dropout(drop)

    def construct(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        y = ops.matmul(x, self.parameter_of("weight")) + self.parameter_of("bias") + mask
        return self.drop(ops.tanh(y)) + scale * x

    def parameter_of(self, name: str) -> Tensor:
        return getattr(self, name)


class Parallel(bms.DistributedModule):
    """The same with two tensor-parallel layers, between which ranks have parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = bms.nn.ColumnParallelLinear(WIDTH, 8, gather_input=False)
        self.down = bms.nn.RowParallelLinear(8, WIDTH, all_reduce_output=True)

    def construct(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        y = self.down(ops.tanh(self.up((x + mask).reshape(-1, WIDTH))))
        return y.reshape(x.shape) + scale * x


class Model(bms.DistributedModule):
    """Embedding, layers, head and loss; returns the mean loss of the rows given."""

    def __init__(self, chain: Chain, hidden: bool = False) -> None:
        super().__init__()
        self.table, self.head, self.scale, self.mask = (
            parameter(VOCAB, WIDTH),
            parameter(WIDTH, VOCAB),
            parameter(1),
            parameter(WIDTH),
        )
        layers = [Parallel() if chain.parallel else Layer(chain.drop) for _ in range(chain.layers)]
        blocks = [bms.Block(layer, use_checkpoint=chain.recompute, mode="PIPE") for layer in layers]
        self.layers = bms.PipelineTransformerBlockList(blocks)
        self.hidden = hidden

    def construct(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = ops.gather(self.table, ids.reshape(-1), 0).reshape(*ids.shape, WIDTH)
        mask = ops.tanh(x) * self.mask  # has a row for each row, and a gradient
        if self.hidden:
            x, states = self.layers(x, mask, self.scale, return_hidden_states=True)
            weights = from_host(np.linspace(0.1, 1.0, states.shape[0]).astype(np.float32).reshape(-1, 1, 1, 1))
            extra = (states * states * weights).sum() * (1.0 / ids.size)
        else:
            x, extra = self.layers(x, mask, scale=self.scale), 0.0
        logits = ops.matmul(x.reshape(-1, WIDTH), self.head)
        return bms.nn.functional.cross_entropy(logits, targets.reshape(-1)) + extra


def rows_of(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Part `rank` of a step's ids and targets."""
    random = np.random.default_rng([3, step])
    ids = random.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    mine = ids[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
    return Tensor(np.ascontiguousarray(mine[:, :-1])), Tensor(np.ascontiguousarray(mine[:, 1:]))


def train(world: World, chain: Chain, steps: int, hidden: bool = False) -> dict[str, Any]:
    """Initial values, losses, norms, the first step's gradients, and the values after the last, in parts."""
    with use_world(chain.world(world)) as here:
        model = Model(chain, hidden)
        bms.init_parameters(model)
        model.set_train()
        for p in model.get_parameters():
            p.requires_grad = not p.name.startswith(chain.frozen) if chain.frozen else True
        params = model.trainable_params()
        first = parts({p.name: (p.layout, p) for p in params})
        manager = bms.optim.OptimManager()
        optimizer = bms.optim.AdamOptimizer(params, lr=1e-2, weight_decay=0.01)
        manager.add_optimizer(optimizer)
        losses, norms, grads = [], [], {}
        for step in range(steps):
            manager.zero_grad()
            batch = rows_of(step, context_of(here).data_rank, context_of(here).data_ranks)
            losses.append(bms.sum_loss(manager.backward(model, *batch)).asnumpy().item())
            if not step:
                grads = parts({p.name: (p.layout, manager.grad(p) * (1.0 / manager.grads_scale)) for p in params})
            norms.append(manager.clip_grad_norm(optimizer.param_groups, 1.0))
            manager.step()
        return {
            "first": first,
            "losses": losses,
            "norms": norms,
            "grads": grads,
            "last": parts({p.name: (p.layout, p) for p in params}),
            "memory": context_of(here).pipeline.meter.current,
            "evaluated": bms.sum_loss(model(*rows_of(99, context_of(here).data_rank, context_of(here).data_ranks)))
            .asnumpy()
            .item(),
        }
