"""A small model in training, of any layout, with a checkpointer."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer
from bmtrain_ms.comm import Mesh, World, use_world
from bmtrain_ms.comm.launch import Launch
from bmtrain_ms.files import format as format_module
from bmtrain_ms.lr_scheduler import Linear
from bmtrain_ms.nn.functional import cross_entropy
from bmtrain_ms.optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager
from tests.helpers.models import CLASSES, WIDTH, Dense, Residual, data, full, share


@dataclass(frozen=True)
class Layout:
    """What may differ between the run that saves and the one that loads."""

    half: bool = False
    zero_level: int = 3
    use_checkpoint: bool = True
    prefetch: int = 1
    shard_size: int | None = None
    blocks: str = "each"  # "pairs": two layers share a block; "none": no blocks
    offload: bool = False


class Pair(nn.Cell):
    """Two layers."""

    def __init__(self, first: nn.Cell, second: nn.Cell):
        super().__init__()
        self.first, self.second = first, second

    def construct(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Net(nn.Cell):
    """Four layers, dropout, and a head; the names do not depend on the layout."""

    def __init__(self, layout: Layout, dropout: float = 0.0, dtype: Any = ms.float32):
        super().__init__()
        layers = [Residual(dtype) for _ in range(4)]

        def block(layer: nn.Cell) -> nn.Cell:
            return bms.Block(layer, layout.use_checkpoint, layout.zero_level)

        if layout.blocks == "each":
            self.layers = bms.TransformerBlockList(block(layer) for layer in layers)
        elif layout.blocks == "none":
            self.layers = nn.SequentialCell(layers)
        else:
            self.pairs = bms.TransformerBlockList(block(Pair(*layers[i : i + 2])) for i in (0, 2))
        self.dropout, self.head = bms.nn.Dropout(dropout), Dense(WIDTH, CLASSES, dtype)
        for p in self.get_parameters():
            if p.name.startswith("pairs."):
                _, pair, place, rest = p.name.split(".", 3)
                p.name = f"layers.{2 * int(pair) + ('first', 'second').index(place)}.{rest}"

    def construct(self, x: Tensor) -> Tensor:
        layers = self.pairs if hasattr(self, "pairs") else self.layers
        return self.head(self.dropout(layers(x)))


class Run:
    """`Net` in training in a world of its own over the same ranks, and its checkpoints in `folder`."""

    def __init__(
        self,
        world: World,
        folder: str,
        layout: Layout | None = None,
        *,
        dropout: float = 0.0,
        loss_scale: float | None = None,
        launch: Launch | None = None,
        **checkpointer: Any,
    ):
        layout = layout or Layout()
        world.engine.clock.step = 0
        mesh = Mesh.data_parallel(world.engine.size, world.engine.rank, layout.shard_size)
        self.world = World(world.engine, mesh, 5, launch or world.launch, layout.prefetch)
        self.dtype = ms.float16 if layout.half else ms.float32
        if layout.half and loss_scale is None:
            loss_scale = 1024.0
        with use_world(self.world):
            self.model = Net(layout, dropout, self.dtype).set_train(True)
            bms.init_parameters(self.model)
            kind = AdamOffloadOptimizer if layout.offload else AdamOptimizer
            self.optimizer = kind(self.model.trainable_params(), weight_decay=0.1, eps=1e-4)
            self.manager = OptimManager(loss_scale=loss_scale, loss_scale_steps=3)
            self.manager.add_optimizer(self.optimizer, Linear(self.optimizer, 0.02, 2, 12))
            self.checkpoints = Checkpointer(folder, self.model, self.manager, **checkpointer)

    def backward(self, number: int, factor: float = 1.0) -> float:
        """One micro-step on this rank's share of a batch; the loss over all ranks."""
        with use_world(self.world):
            x, y = (share(self.world, a) for a in data(number))
            inputs = Tensor(x).astype(self.dtype), Tensor(y)
            loss = self.manager.backward(lambda x, y: cross_entropy(self.model(x), y) * factor, *inputs)
            return float(self.world.engine.all_reduce([loss.reshape(1)], "mean").wait()[0].asnumpy()[0])

    def update(self) -> bool:
        with use_world(self.world):
            self.manager.clip_grad_norm(self.optimizer.param_groups, 1.0)
            return bool(self.manager.step())

    def train(self, steps: range, overflow_at: int | None = None) -> list[float]:
        """Losses; the gradient of step `overflow_at` is infinite."""
        losses = []
        for step in steps:
            self.manager.zero_grad()
            losses.append(self.backward(step, float("inf") if step == overflow_at else 1.0))
            self.update()
        return losses

    def save(self, step: int, extra: dict[str, Any] | None = None, wait: bool = True) -> None:
        with use_world(self.world):
            self.checkpoints.save(step, extra, wait)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        with use_world(self.world):
            return self.checkpoints.load(*args, **kwargs)

    def close(self) -> None:
        with use_world(self.world):
            self.checkpoints.close()

    def everything(self) -> dict[str, np.ndarray]:
        """Full parameters, moments and masters by name, the same on every rank."""
        found = {}
        for p in self.optimizer.parameters:
            found[p.name] = full(self.world, p)
            for kind, tensor in self.optimizer.state_of(p).items():
                found[f"{kind} {p.name}"] = full(self.world, p, tensor)
        return found

    def counters(self) -> dict[str, Any]:
        """What is not a tensor."""
        return self.manager.state_dict(tensors=False)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(x.shape == b[name].shape and x.tobytes() == b[name].tobytes() for name, x in a.items())


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """How many bytes of each rank's file are read in the `with` block."""
    counts: dict[str, int] = {}
    kind = format_module.RegularFile
    read = kind.read

    def counting(self: Any, start: int, count: int) -> bytes:
        counts[self.path.name] = counts.get(self.path.name, 0) + count
        return read(self, start, count)

    read_into = kind.read_into

    def counting_into(self: Any, start: int, out: np.ndarray) -> None:
        counts[self.path.name] = counts.get(self.path.name, 0) + out.nbytes
        read_into(self, start, out)

    kind.read, kind.read_into = counting, counting_into  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        kind.read, kind.read_into = read, read_into  # type: ignore[method-assign]
