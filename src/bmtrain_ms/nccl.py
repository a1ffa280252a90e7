"""BMTrain's raw collectives, for scripts that call them: blocking, into a tensor that exists, without gradients (BMTrain: `nccl`).

`comm` is an engine, e.g. `config["comm"]`. Tensors take the place of storages. New code uses `bmtrain_ms.distributed`, or engines.
"""

from __future__ import annotations

from mindspore import Tensor

from bmtrain_ms_base.absent import absent

from . import distributed
from .comm import Engine
from .compat.autograd import no_grad
from .compat.runtime import overwrite

_OPS = {"sum": "sum", "avg": "mean", "max": "max", "min": "min"}


_MADE = "init_distributed makes the communicators; take config['comm'], or comm.world().everyone.subgroup(ranks)"
__getattr__ = absent(
    __name__,
    {
        **dict.fromkeys(("NCCLCommunicator", "getUniqueId", "commInitRank", "commDestroy"), _MADE),
        **dict.fromkeys(("groupStart", "groupEnd"), "delete the call: an engine takes a list of tensors as one collective"),
    },
)


def commCount(comm: Engine) -> int:
    """How many ranks the group has."""
    return comm.size


def commRank(comm: Engine) -> int:
    """This process's rank in the group."""
    return comm.rank


def allReduce(src: Tensor, dst: Tensor, op: str, comm: Engine) -> None:
    """dst = reduction of src over the ranks; `op`: sum, avg, max, min or (of floats) prod; dst may be src."""
    with no_grad():
        _into(dst, _all_reduced(src, op, comm, "nccl.allReduce"))


def broadcast(src: Tensor, dst: Tensor, root: int, comm: Engine) -> None:
    """dst = rank `root`'s src."""
    with no_grad():
        _into(dst, comm.broadcast([src], root, "nccl.broadcast").wait()[0])


def reduce(src: Tensor, dst: Tensor, op: str, root: int, comm: Engine) -> None:
    """dst = reduction of src over the ranks, on rank `root`; on the others dst is left alone."""
    if not 0 <= root < comm.size:
        raise ValueError(f"root={root} is not a rank of this group of {comm.size} (0..{comm.size - 1})")
    with no_grad():
        result = _all_reduced(src, op, comm, "nccl.reduce")
        if comm.rank == root:
            _into(dst, result)


def allGather(src: Tensor, dst: Tensor, comm: Engine) -> None:
    """dst = every rank's src, in rank order; dst has ranks times the elements."""
    with no_grad():
        _into(dst, comm.all_gather([src.reshape(-1)], label="nccl.allGather").wait()[0])


def reduceScatter(src: Tensor, dst: Tensor, op: str, comm: Engine) -> None:
    """dst = this rank's part of the reduction of src, which has ranks times the elements."""
    with no_grad():
        if op == "prod":
            _into(dst, distributed.reduce_scatter(src.reshape(-1), op, comm))
        else:
            _into(dst, comm.reduce_scatter([src.reshape(-1)], _op(op), "nccl.reduceScatter").wait()[0])


def send(src: Tensor, peer: int, comm: Engine) -> None:
    """Send to rank `peer`, which calls `recv`."""
    with no_grad():
        comm.send([src], peer, "nccl.send").wait()


def recv(dst: Tensor, peer: int, comm: Engine) -> None:
    """dst = what rank `peer` sends, of the same shape and type."""
    with no_grad():
        _into(dst, comm.recv([dst], peer, "nccl.send").wait()[0])


def _all_reduced(src: Tensor, op: str, comm: Engine, label: str) -> Tensor:
    if op == "prod":
        return distributed.all_reduce(src, op, comm)
    return comm.all_reduce([src], _op(op), label).wait()[0]


def _op(op: str) -> str:
    if op not in _OPS:
        raise ValueError(f"unknown reduction {op!r}; choose one of {', '.join(_OPS)}, prod")
    return _OPS[op]


def _into(dst: Tensor, result: Tensor) -> None:
    if dst.size != result.size or dst.dtype != result.dtype:
        raise ValueError(f"dst has {dst.size} elements of {dst.dtype}, the result {result.size} of {result.dtype}")
    overwrite(dst, result.reshape(dst.shape))
