"""Small things that training scripts use (BMTrain: `utils`, `synchronize`, `print_*`)."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Iterator, Mapping, TextIO

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from bmtrain_ms_base.absent import absent
from bmtrain_ms_base.layout import part_of
from bmtrain_ms_base.memory import reset_peak_memory, resident_memory

from .comm import Engine, is_initialized
from .comm import rank as this_rank
from .comm import world as current_world
from .compat.cells import child_table, parameter_table
from .compat.device import on_host
from .compat.runtime import from_host, host_array
from .distributed import all_reduce
from .zero import Block, DistributedParameter, context_of

__getattr__ = absent(
    __name__,
    {"check_torch_version": "there is no torch here; MindSpore's version is in bmtrain_ms.compat.versions"},
)
WIDTH = 60  # of the blocks that are printed


def round_up(x: int, d: int) -> int:
    """The least multiple of d that is not below x."""
    return -(-x // d) * d


def tp_split_tensor(tensor: Tensor, split_dim: int) -> Tensor:
    """This tensor-parallel rank's part of a tensor, as layers have it (BMTrain: `tp_split_tensor`); no communication.

    Raises:
        ValueError: there is no such dim.
    """
    if not 0 <= split_dim < tensor.ndim:
        raise ValueError(f"split_dim={split_dim} is no dim of a tensor of shape {tuple(tensor.shape)}: give one from 0")
    mesh = current_world().mesh
    start, stop = part_of(tensor.shape[split_dim], mesh.tp_rank, mesh.tp)
    return tensor[(slice(None),) * split_dim + (slice(start, stop),)]


def print_rank(*args: Any, rank: int = 0, **kwargs: Any) -> None:
    """`print` on that rank only."""
    if this_rank() == rank:
        print(*args, **kwargs)


def print_block(title: str, content: str | None = None, file: TextIO | None = None) -> None:
    """A title in a line of `=`, and the content below; on every rank that calls it."""
    file = file or sys.stdout
    left = max(0, WIDTH - len(title) - 2) // 2
    right = max(0, WIDTH - len(title) - 2 - left)
    print(f"{'=' * left} {title} {'=' * right}", file=file)
    if content is not None:
        print(content, file=file)


def print_dict(title: str, content: Mapping[str, Any], file: TextIO | None = None) -> None:
    """`print_block` of `name: value` lines, aligned."""
    width = max((len(str(name)) for name in content), default=0)
    print_block(title, "\n".join(f"{name!s:<{width}} : {value}" for name, value in content.items()), file)


def see_memory(message: str, detail: bool = False) -> dict[str, float]:
    """Print, on rank 0, the memory in use and at most since the last call, and start a new peak.

    Args:
        message: the title.
        detail: more numbers: on CPU of gathered parameters, on Ascend what the device has reserved.

    Returns:
        Name -> MiB, of this rank.
    """
    mib = 2.0**20
    if on_host():
        now, most = resident_memory()
        numbers = {"resident": now / mib, "most": most / mib}
        reset_peak_memory()
    else:
        numbers = {"allocated": ms.runtime.memory_allocated() / mib, "most": ms.runtime.max_memory_allocated() / mib}
        if detail:
            numbers["reserved"] = ms.runtime.memory_reserved() / mib
        with contextlib.suppress(RuntimeError):  # 2.5, before the first operation: there is no peak yet
            ms.runtime.reset_max_memory_allocated()
    if is_initialized():
        meter = context_of(current_world()).pipeline.meter
        if detail:
            numbers.update({"gathered": meter.current / mib, "most gathered": meter.peak / mib})
        meter.reset_peak()
    if this_rank() == 0:
        print_dict(message, {name: f"{value:.1f} MiB" for name, value in numbers.items()})
    return numbers


class AverageRecorder:
    """Exponential moving average without the bias of its start: sum of alpha^(n-i) v_i, divided by the sum of the weights.

    Args:
        alpha: weight of the past, in [0, 1).
        start_value: `value` before the first record; one other than 0 is averaged in with weight alpha^n, as in BMTrain.
    """

    def __init__(self, alpha: float = 0.9, start_value: float = 0.0):
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"alpha must be in [0, 1), not {alpha}")
        self._alpha, self._raw, self._steps = alpha, float(start_value), 0
        self.value = float(start_value)

    def record(self, v: float) -> None:
        """Take a value in."""
        self._raw = self._alpha * self._raw + (1.0 - self._alpha) * float(v)
        self._steps += 1
        self.value = self._raw / (1.0 - self._alpha**self._steps)


def sum_loss(loss: Tensor, comm: Engine | None = None) -> Tensor:
    """The *mean* of a loss over the ranks, whatever the name says; differentiable. All ranks call it."""
    return all_reduce(loss, "avg", comm)


def gather_result(result: Tensor) -> Tensor:
    """Concatenate over the ranks along dim 0: (n, ...) -> (ranks * n, ...); a scalar counts as (1,). All ranks call it.

    Raises:
        ValueError: shapes or types differ between ranks; on every rank.
    """
    engine = current_world().everyone
    array = np.atleast_1d(host_array(result))
    mine = f"{array.shape} {array.dtype}"
    text = np.zeros(256, np.uint8)
    text[: len(mine)] = np.frombuffer(mine.encode(), np.uint8)
    rows = host_array(engine.all_gather([from_host(text)], label="gather_result").wait()[0]).reshape(engine.size, -1)
    shapes = [bytes(row).rstrip(b"\0").decode() for row in rows]
    if len(set(shapes)) > 1:
        raise ValueError(
            "gather_result needs the same shape and type on every rank, not "
            + ", ".join(f"{shape} on rank {r}" for r, shape in enumerate(shapes))
            + "; pad dim 0, or use store.allgather_objects"
        )
    return engine.all_gather([from_host(array.copy())], label="gather_result").wait()[0]


def wait_loader() -> None:
    """Let the host run no further ahead of the device (BMTrain: at most a block). On CPU operations are over when they return."""
    if not on_host():
        ms.runtime.synchronize()


def grouped_parameters(model: nn.Cell) -> Iterator[tuple[str | None, list[Parameter]]]:
    """(group, parameters) for each `group` that DistributedParameters were given, None for the others; each parameter once."""
    groups: dict[str | None, list[Parameter]] = {}
    seen: set[int] = set()

    def visit(cell: nn.Cell) -> None:
        for p in parameter_table(cell).values():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                groups.setdefault(p.group if isinstance(p, DistributedParameter) else None, []).append(p)
        for child in child_table(cell).values():
            if child is not None:
                visit(child)

    visit(model.inner if isinstance(model, Block) else model)
    yield from groups.items()
