"""One table of layouts, and one training that every one of them must repeat: initial values to the bit, the rest to rounding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, SingleEngine, World, use_world
from bmtrain_ms.model_center import Spread, Stages, spread
from bmtrain_ms.model_center.model import FAMILIES, CausalLM
from bmtrain_ms.parallel import Scheduled
from bmtrain_ms_base.layout import Layout

BATCH, LENGTH, VOCAB = 4, 6, 37


@dataclass(frozen=True)
class Case:
    """How many ranks stand on each axis, and how the model is spread over them."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1
    replica: int = 1
    how: Spread = field(default_factory=Spread)
    stages: Stages | None = None

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        axes = [f"{name}{n}" for name in ("pp", "dp", "tp", "ep", "replica") if (n := getattr(self, name)) > 1]
        kept = "" if self.how.recompute else "-kept"
        level = "" if self.how.zero_level == 3 else "-zero2"
        how = self.stages and {name: x for name, x in vars(self.stages).items() if x not in (None, 1, "all")}
        return "-".join(axes or ["one"]) + kept + level + "".join(f"-{name}={x}" for name, x in (how or {}).items())

    def world(self, world: World, **options: Any) -> World:
        mesh = Mesh(self.ranks, world.mesh.rank, tp=self.tp, pp=self.pp, replica=self.replica, ep=self.ep)
        return World(world.everyone, mesh, seed=5, **options)


KEPT, ZERO2 = Spread(recompute=False), Spread(zero_level=2)
LAYOUTS = [
    Case(tp=2),
    Case(tp=2, how=KEPT),
    Case(tp=3, how=ZERO2),
    Case(tp=4),
    Case(dp=2),
    Case(tp=2, dp=2),
    Case(tp=2, dp=2, how=KEPT),
    Case(tp=2, dp=2, replica=2, how=Spread(False, 2)),
]

PIPELINES = [
    Case(pp=2),
    Case(pp=2, how=KEPT, stages=Stages(micro_batches=3)),  # no multiple of the stages, and of unequal sizes
    Case(pp=2, how=ZERO2, stages=Stages([1, 4], micro_batches=4)),
    Case(pp=3, stages=Stages("E|tttt|tL", micro_batches=1)),
    Case(pp=4, how=KEPT, stages=Stages(micro_batches=2)),  # fewer than stages
    Case(pp=2, stages=Stages(chunks=2, micro_batches=4)),
    Case(pp=2, how=KEPT, stages=Stages([1, 2, 0, 2], chunks=2, micro_batches=4, group=4)),
    Case(pp=2, stages=Stages(schedule="gpipe", micro_batches=4)),
    Case(pp=1, stages=Stages(chunks=2, micro_batches=3)),
    Case(pp=2, tp=2, stages=Stages(micro_batches=3)),
    Case(pp=2, tp=2, how=KEPT),
    Case(pp=2, dp=2),
    Case(pp=2, dp=2, replica=2, how=Spread(False, 2)),
]

# heads that 2, 3 and 4 ranks divide, two of keys and values, a vocabulary and tokens that they do not all divide
SIZES = {
    "vocab_size": VOCAB,
    "dim_model": 24,
    "num_heads": 12,
    "dim_head": 4,
    "dim_ff": 34,
    "num_layers": 2,
    "init_std": 0.2,
}

# a dense layer and two of experts, each balance in turn: `micro_batch` depends on how many there are, by its definition
EXPERTS = {
    **{name: size for name, size in SIZES.items() if name != "num_layers"},
    "num_layers": 3,
    "dense_layers": (1,),
    "num_heads_kv": 2,
    "num_experts": 8,
    "top_k": 3,
    "dim_expert": 10,
    "balance": "sequence",
    "balance_coef": 0.05,
}
MIXTURES = [
    Case(dp=2, ep=2),
    Case(dp=4, ep=4, how=KEPT),
    Case(dp=4, ep=2, how=ZERO2),
    Case(dp=4, ep=2, replica=2),
    Case(tp=2, dp=2, ep=2),
    Case(pp=2, how=KEPT),
    Case(pp=2, stages=Stages(micro_batches=3)),
    Case(pp=2, dp=2, ep=2, stages=Stages([1, 2], micro_batches=2)),
    Case(pp=3, how=ZERO2, stages=Stages(micro_batches=4)),
    Case(pp=1, stages=Stages(chunks=3, micro_batches=2)),
]
MANY = [  # on 8 ranks, and as the recipe of grok1-40B on 16
    Case(pp=2, tp=2, dp=2, ep=2, stages=Stages(micro_batches=2)),
    Case(pp=2, tp=4, dp=2, ep=2, stages=Stages(micro_batches=2)),
]


def batch_of(step: int, dp_rank: int, dp: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of a step's ids and targets, of which all ranks together have the same ones in any layout."""
    random = np.random.default_rng([7, step])
    ids = random.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    rows = slice(dp_rank * BATCH // dp, (dp_rank + 1) * BATCH // dp)
    return Tensor(np.ascontiguousarray(ids[rows, :-1])), Tensor(np.ascontiguousarray(ids[rows, 1:]))


def masked(batch: tuple[Tensor, Tensor], uneven: bool) -> tuple[Tensor, Tensor]:
    """The batch; `uneven`: rows have different numbers of tokens that count, the first none."""
    if not uneven:
        return batch
    targets = batch[1].asnumpy().copy()
    for i, row in enumerate(targets):
        row[i * LENGTH // len(targets) :] = -100
    return batch[0], Tensor(targets)


def parts(values: dict[str, tuple[Layout, Tensor]]) -> dict[str, tuple[dict, np.ndarray]]:
    """What a rank has of each tensor, for `whole`."""
    return {name: (layout.to_json(), x.asnumpy().copy()) for name, (layout, x) in values.items()}


def whole(found: list[dict[str, tuple[dict, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Tensors put together from the parts of all ranks; those that several have are the same to the last bit."""
    out: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for of_rank in found:
        for name, (saved, shard) in of_rank.items():
            layout = Layout.from_json(saved)
            tensor = out.setdefault(name, np.zeros(layout.whole, shard.dtype))
            there = seen.setdefault(name, np.zeros(layout.whole, bool))
            before = layout.cut(tensor)
            for piece, box in layout.boxes():
                known = there[box].reshape(-1)
                assert np.array_equal(before[piece][known], shard[piece][known]), f"copies of {name} differ"
            layout.paste(shard, tensor)
            layout.paste(np.ones(layout.length, bool), there)
    assert all(x.all() for x in seen.values()), [name for name, x in seen.items() if not x.all()]
    return out


def model_of(case: Case, sizes: dict[str, Any]) -> CausalLM:
    """Of the `family` that sizes name; a Llama, or a Qwen3 where there are experts, if they name none."""
    name = sizes.get("family", "Qwen3Moe" if "num_experts" in sizes else "Llama")
    family = next(f for f in FAMILIES if f.__name__ == name)
    own = {size: value for size, value in sizes.items() if size != "family"}
    model = family(family.CONFIG(**(own if name == "Qwen3Moe" else {**SIZES, **own})))
    if case.stages is None and case.pp == 1:
        bms.init_parameters(model)
        return spread(model, case.how)
    spread(model, case.how, case.stages)
    bms.init_parameters(model)
    return model


def train(
    world: World, case: Case, steps: int, sizes: dict[str, Any], logits: bool = False, uneven: bool = False
) -> dict[str, Any]:
    """Initial values, losses, norms, the first step's gradients, and the values after the last, in parts.

    `logits`: the loss is that of all logits, on every rank.  `uneven`: see `masked`.
    """
    with use_world(case.world(world)) as here:
        model = model_of(case, sizes)
        params = model.trainable_params()
        first = parts({p.name: (p.layout, p) for p in params})
        manager = bms.optim.OptimManager(loss_scale=2.0**12 if sizes.get("dtype") == "float16" else None)
        optimizer = bms.optim.AdamOptimizer(params, lr=3e-3, weight_decay=0.01)
        manager.add_optimizer(optimizer)
        losses, norms, grads = [], [], {}

        def loss(ids: Tensor, targets: Tensor) -> Tensor:
            if logits:
                return bms.nn.functional.cross_entropy(model(ids).reshape(-1, VOCAB), targets.reshape(-1))
            return model.loss(ids, targets)

        for step in range(steps):
            manager.zero_grad()
            function = model.loss if isinstance(model.loss, Scheduled) else loss
            value = manager.backward(function, *masked(batch_of(step, here.mesh.dp_rank, case.dp), uneven))
            if not step:
                grads = parts({p.name: (p.layout, manager.grad(p) * (1.0 / manager.grads_scale)) for p in params})
            norms.append(manager.clip_grad_norm(optimizer.param_groups, 1.0))
            losses.append(bms.sum_loss(value).asnumpy().item())
            manager.step()
        return {
            "first": first,
            "losses": losses,
            "norms": norms,
            "grads": grads,
            "last": parts({p.name: (p.layout, p) for p in params}),
        }


def alone(steps: int, sizes: dict[str, Any], uneven: bool = False) -> dict[str, Any]:
    """The same training on one rank, in this process."""
    with use_world(World(SingleEngine(), Mesh(1, 0))) as one:
        return train(one, Case(), steps, sizes, uneven=uneven)
