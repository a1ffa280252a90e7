"""A small GPT of plain Parameters, and the ways to shard it."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms

VOCABULARY, WIDTH, HEADS, INNER, LENGTH, ROWS = 17, 8, 2, 12, 6, 2


class Linear(nn.Cell):
    def __init__(self, width: int, out: int, random: np.random.Generator, dtype: Any):
        super().__init__()
        self.weight = Parameter(Tensor(random.standard_normal((out, width)) * 0.3, ms.float32).astype(dtype), name="weight")
        self.bias = Parameter(Tensor(random.standard_normal(out) * 0.1, ms.float32).astype(dtype), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        return ops.MatMul(transpose_b=True)(x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1) + self.bias


class Norm(nn.Cell):
    """In float32 inside."""

    def __init__(self, width: int, dtype: Any):
        super().__init__()
        self.gain = Parameter(ops.ones((width,), dtype), name="gain")

    def construct(self, x: Tensor) -> Tensor:
        y = x.astype(ms.float32)
        y = y - y.mean(-1, keep_dims=True)
        return (y * ops.rsqrt((y * y).mean(-1, keep_dims=True) + 1e-5)).astype(x.dtype) * self.gain


class Attention(nn.Cell):
    def __init__(self, random: np.random.Generator, dtype: Any):
        super().__init__()
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH, random, dtype), Linear(WIDTH, WIDTH, random, dtype)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            t.reshape(ROWS, LENGTH, HEADS, WIDTH // HEADS).swapaxes(1, 2).reshape(-1, LENGTH, WIDTH // HEADS)
            for t in ops.chunk(self.qkv(x), 3, -1)
        )
        scores = ops.bmm(q, k.swapaxes(1, 2)).astype(ms.float32) / (WIDTH // HEADS) ** 0.5 + mask
        y = ops.bmm(ops.softmax(scores, -1).astype(x.dtype), v)
        return self.out(y.reshape(ROWS, HEADS, LENGTH, -1).swapaxes(1, 2).reshape(ROWS, LENGTH, WIDTH))


class Layer(nn.Cell):
    def __init__(self, random: np.random.Generator, dtype: Any):
        super().__init__()
        self.norm1, self.attention = Norm(WIDTH, dtype), Attention(random, dtype)
        self.norm2 = Norm(WIDTH, dtype)
        self.up, self.down = Linear(WIDTH, INNER, random, dtype), Linear(INNER, WIDTH, random, dtype)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(ops.tanh(self.up(self.norm2(x))))


class Gpt(nn.Cell):
    """Logits of token ids."""

    def __init__(self, layers: int, dtype: Any = ms.float32):
        super().__init__()
        random = np.random.default_rng(7)
        table = Tensor(random.standard_normal((VOCABULARY, WIDTH)) * 0.5, ms.float32)
        places = Tensor(random.standard_normal((LENGTH, WIDTH)) * 0.5, ms.float32)
        self.table, self.places = Parameter(table.astype(dtype), name="table"), Parameter(places.astype(dtype), name="places")
        self.layers = nn.CellList([Layer(random, dtype) for _ in range(layers)])
        self.norm, self.head = Norm(WIDTH, dtype), Linear(WIDTH, VOCABULARY, random, dtype)

    def construct(self, ids: Tensor) -> Tensor:
        x = ops.gather(self.table, ids, 0) + self.places
        mask = Tensor(np.triu(np.full((LENGTH, LENGTH), -1e4, np.float32), 1))
        return self.head(self.norm(self.through(x, mask))).reshape(-1, VOCABULARY)

    def through(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class ListGpt(Gpt):
    """Calls its TransformerBlockList."""

    def through(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layers(x, mask)


def sharded(kind: str, layers: int, dtype: Any = ms.float32) -> nn.Cell:
    """`wrapper`; `list`: a TransformerBlockList that is called; `unrolled`: one whose Blocks are called."""
    model = (ListGpt if kind == "list" else Gpt)(layers, dtype)
    if kind == "wrapper":
        return bms.BMTrainModelWrapper(model, verbose=False)
    bms.BMTrainModelWrapper(model, layers=[], verbose=False)
    model.layers = bms.TransformerBlockList(list(model.layers))
    return model


def tokens(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Ids (ROWS, LENGTH), and the next ones, flat; -100 at the end of the first row: padding, which losses ignore."""
    random = np.random.default_rng(1000 * step + rank)
    ids = random.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    targets = ids[:, 1:].copy()
    targets[0, LENGTH - random.integers(0, LENGTH) :] = -100
    return Tensor(ids[:, :-1]), Tensor(targets.reshape(-1))
