"""Collectives that can be differentiated.

[Note: gradients]
What is differentiated is the sum over all ranks of their losses: a rank's gradient of x says how x changes every rank's loss, not
its own alone. So the derivative of an all-gather is a reduce-scatter, that of a sum is a sum. With parameters, whose gradients are
means over the ranks, that gives the gradient of the mean loss, as everywhere else in bmtrain_ms. BMTrain differs where it is
marked: it returns this rank's own gradient, without those of the others.

All ranks of the group call a function together, and the backward passes must meet too: a rank whose loss does not depend on the
result keeps the others waiting until the time-out.
"""

from __future__ import annotations

from typing import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..comm import Engine
from ..comm import world as current_world
from ..compat.autograd import custom_op, no_grad
from ..compat.runtime import from_host, host_array, is_float, numpy_dtype

_OPS = ("sum", "avg", "max", "min", "prod")
_DTYPES = (ms.float32, ms.float16, ms.bfloat16, ms.float64, ms.int32, ms.int64, ms.bool_, ms.uint8, ms.int8)
_HEADER = 16  # numbers that say what follows: index of the dtype, dims, shape


def all_gather(x: Tensor, comm: Engine | None = None) -> Tensor:
    """x of every rank: (...) -> (ranks, ...). All ranks pass equal shapes.

    Gradient: the sum over the ranks of their gradients of this rank's part (BMTrain: of this rank's alone).
    """
    engine = _engine(comm, "all_gather", x)

    def forward(x: Tensor) -> tuple[Tensor]:
        gathered = engine.all_gather([_flat(x)], label="distributed.all_gather").wait()[0]
        return (gathered.reshape(engine.size, *x.shape),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        own = engine.reduce_scatter([_flat(grads[0])], label="distributed.all_gather, backward").wait()[0]
        return (own.reshape(x.shape),)

    return custom_op(forward, backward, x)[0]


def all_reduce(x: Tensor, op: str = "sum", comm: Engine | None = None) -> Tensor:
    """`sum`, `avg`, `max`, `min` or `prod` of x over the ranks; shape kept, the same bits on every rank.

    Gradient: of `sum` and `avg` the sum, or mean, over the ranks of their gradients (BMTrain: this rank's alone); of `max` and
    `min` their sum where x is the result, shared by ranks that are equal; of `prod` their sum times the product of the other ranks'
    x, which is right at 0 too (BMTrain: output / input, NaN there). `prod` gathers: it takes ranks times the memory of x.
    """
    engine = _engine(comm, "all_reduce", x, op)
    label = f"distributed.all_reduce {op}"
    kept: list[np.ndarray] = []

    def forward(x: Tensor) -> tuple[Tensor]:
        if op == "prod":
            rows = _rows(engine.all_gather([_flat(x)], label=label).wait()[0], engine.size)
            kept.append(_products_of_others(rows, engine.rank))
            return (_tensor(_product(rows), x, x.shape),)
        result = engine.all_reduce([x], "mean" if op == "avg" else op, label).wait()[0]
        if op in ("max", "min"):
            kept.append(np.asarray(host_array(x) == host_array(result)))
        return (result,)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        total = engine.all_reduce([grads[0]], "mean" if op == "avg" else "sum", f"{label}, backward").wait()[0]
        if op in ("sum", "avg"):
            return (total,)
        if op == "prod":
            return (_tensor(host_array(total).reshape(-1) * kept[0], x, x.shape),)
        mine = np.asarray(kept[0], np.float32)
        winners = host_array(engine.all_reduce([from_host(mine)], label=f"{label}, backward").wait()[0])
        return (_tensor(host_array(total) * (mine / winners), x, x.shape),)

    return custom_op(forward, backward, x)[0]


def reduce_scatter(x: Tensor, op: str = "sum", comm: Engine | None = None) -> Tensor:
    """Part `rank` of dim 0 of the reduction of x over the ranks: (ranks * n, ...) -> (n, ...); ops as in `all_reduce`.

    Gradient: each rank gets that of every part back from the rank that has it (BMTrain: the same for `sum` and `avg`, and none for
    the others).

    Raises:
        ValueError: dim 0 is not a multiple of the number of ranks.
    """
    engine = _engine(comm, "reduce_scatter", x, op)
    label, shape = f"distributed.reduce_scatter {op}", tuple(x.shape)
    kept: list[np.ndarray] = []

    def forward(x: Tensor) -> tuple[Tensor]:
        if op in ("sum", "avg"):
            return (engine.reduce_scatter([x], "mean" if op == "avg" else op, label).wait()[0],)
        # rows: this part of every rank
        rows = _rows(engine.all_to_all([x], label).wait()[0], engine.size)
        if op == "prod":
            kept.append(np.stack([_products_of_others(rows, rank) for rank in range(engine.size)]))
            result = _product(rows)
        else:
            result = rows.max(0) if op == "max" else rows.min(0)
            winners = rows == result
            kept.append(winners / winners.sum(0))
        return (_tensor(result, x, (shape[0] // engine.size, *shape[1:])),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        if op in ("sum", "avg"):
            whole = engine.all_gather([grads[0]], label=f"{label}, backward").wait()[0]
            return (whole if op == "sum" else whole * (1.0 / engine.size),)
        parts = _tensor(host_array(grads[0]).reshape(1, -1) * kept[0], x, shape)
        return (engine.all_to_all([parts], f"{label}, backward").wait()[0],)

    return custom_op(forward, backward, x)[0]


def broadcast(src: Tensor, root: int, comm: Engine | None = None) -> Tensor:
    """Rank `root`'s tensor on every rank; the others pass one of the same shape and type.

    Gradient: on `root` the sum over the ranks, on the others, whose tensor has no influence, zero (BMTrain: the sum everywhere).
    """
    engine = _engine(comm, "broadcast", src)

    def forward(x: Tensor) -> tuple[Tensor]:
        return (engine.broadcast([x], root, "distributed.broadcast").wait()[0],)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor | None]:
        total = engine.all_reduce([grads[0]], label="distributed.broadcast, backward").wait()[0]
        return (total if engine.rank == root else None,)

    return custom_op(forward, backward, src)[0]


def send(x: Tensor, dst: int, comm: Engine | None = None) -> Tensor:
    """Send x to rank `dst`, which calls `recv`; in backward its gradient comes back from there.

    Returns:
        A float32 zero: add it to this rank's loss, or return it as the loss; otherwise backward does not come here, and `dst`
        waits.
    """
    engine = _engine(comm, "send", x)

    def forward(x: Tensor) -> tuple[Tensor]:
        send_activations(x, dst, engine)
        return (from_host(np.zeros((), np.float32)),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (engine.recv([x], dst, "distributed.send, backward").wait()[0],)

    return custom_op(forward, backward, x)[0]


def recv(src: int, anchor: Tensor, comm: Engine | None = None) -> Tensor:
    """The tensor that rank `src` sends with `send`; in backward its gradient goes there.

    Args:
        anchor: a tensor that gradients flow to on this rank, e.g. a parameter: MindSpore differentiates functions of such tensors
            only. It gets a gradient of zero from here.
    """
    engine = _engine(comm, "recv", anchor)

    def forward(_: Tensor) -> tuple[Tensor]:
        return (recv_activations(src, engine),)

    def backward(grads: tuple[Tensor, ...]) -> tuple[None]:
        engine.send([grads[0]], src, "distributed.recv, backward").wait()
        return (None,)

    return custom_op(forward, backward, anchor)[0]


def send_activations(hidden_state: Tensor, next_rank: int, comm: Engine | None = None) -> None:
    """Send a tensor of any shape of at most 14 dims, and its shape and type, to be received with `recv_activations`; no gradient.

    Raises:
        ValueError: too many dims, or a type that cannot be sent.
    """
    engine = comm or current_world().everyone
    if hidden_state.ndim > _HEADER - 2 or hidden_state.dtype not in _DTYPES:
        raise ValueError(
            f"a tensor of shape {tuple(hidden_state.shape)} and type {hidden_state.dtype} cannot be sent; at most {_HEADER - 2} "
            f"dims, and one of {', '.join(map(str, _DTYPES))}"
        )
    header = np.zeros(_HEADER, np.int64)
    header[:2] = _DTYPES.index(hidden_state.dtype), hidden_state.ndim
    header[2 : 2 + hidden_state.ndim] = hidden_state.shape
    with no_grad():
        engine.send([from_host(header)], next_rank, "send_activations, header").wait()
        engine.send([hidden_state], next_rank, "send_activations").wait()


def recv_activations(prev_rank: int, comm: Engine | None = None) -> Tensor:
    """What rank `prev_rank` sends with `send_activations`; no gradient."""
    engine = comm or current_world().everyone
    with no_grad():
        header = engine.recv([from_host(np.zeros(_HEADER, np.int64))], prev_rank, "send_activations, header").wait()[0]
        kind, ndim, *shape = host_array(header).tolist()
        like = from_host(np.zeros(tuple(shape[:ndim]), numpy_dtype(_DTYPES[kind])))
        return engine.recv([like], prev_rank, "send_activations").wait()[0]


def _engine(comm: Engine | None, what: str, x: Tensor, op: str = "sum") -> Engine:
    if op not in _OPS:
        raise ValueError(f"unknown reduction {op!r}; choose one of {', '.join(_OPS)}")
    if not is_float(x):
        raise TypeError(f"{what} is differentiable and takes a floating-point tensor, not {x.dtype}; for others: world().everyone")
    return comm or current_world().everyone


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1)


def _rows(gathered: Tensor, ranks: int) -> np.ndarray:
    """(ranks, n), wide enough to multiply in."""
    rows = host_array(gathered).reshape(ranks, -1)
    return rows if rows.dtype.itemsize >= 4 else rows.astype(np.float32)


def _product(rows: np.ndarray) -> np.ndarray:
    return np.multiply.reduce(rows, 0)


def _products_of_others(rows: np.ndarray, rank: int) -> np.ndarray:
    return np.multiply.reduce(np.delete(rows, rank, 0), 0)


def _tensor(array: np.ndarray, like: Tensor, shape: Sequence[int]) -> Tensor:
    return from_host(np.asarray(array.astype(numpy_dtype(like.dtype)), order="C").reshape(tuple(shape)))
