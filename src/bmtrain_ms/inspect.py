"""Looking at parameters, and at tensors on their way through a model (BMTrain: `inspect`)."""

from __future__ import annotations

import contextlib
import fnmatch
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from .comm import Engine, World, gather_json, reduce_numbers
from .comm import world as current_world
from .compat.autograd import hookable, recording
from .compat.cells import child_table, parameter_table
from .compat.runtime import host_array
from .optim.norms import counts_here
from .zero import Block, DistributedParameter, context_of

_COLUMNS = ("name", "shape", "max", "min", "std", "mean", "grad_std", "grad_mean")


def inspect_model(model: nn.Cell, param_name: str, prefix: str = "") -> list[dict[str, Any]]:
    """Statistics of parameters over all ranks; nothing is gathered. All ranks call it.

    Args:
        model: any Cell; parameters go by their paths in it.
        param_name: pattern (`fnmatch`) of names, e.g. `"*.weight"` or `"*"`.
        prefix: put before every name, also for matching.

    Returns:
        For each parameter, in the model's order, those of later stages of a pipeline last: `name`, `shape` (of the full tensor),
        `std` (n - 1 in the denominator), `mean`, `max`, `min`, and `grad_std`, `grad_mean` of the gradient that
        `OptimManager.backward` accumulated, without the loss scale; 0 where there is none or the parameter is frozen.
    """
    mine = {name: p for name, p in _named_parameters(model, prefix) if fnmatch.fnmatchcase(name, param_name)}
    world = current_world()
    shapes = {name: list(p.layout.whole if isinstance(p, DistributedParameter) else p.shape) for name, p in mine.items()}
    if world.mesh.pp > 1:  # one order on all ranks
        shapes = {name: x for of_rank in gather_json(shapes, world.everyone, "inspect names") for name, x in of_rank.items()}
    if not shapes:
        return []
    values: list[np.ndarray] = []
    for name in shapes:
        p = mine.get(name)
        values += [np.zeros(0)] * 2 if p is None else [_own_part(p, x, world) for x in (p, _gradient(world, p))]
    numbers = _statistics(values, world.everyone)
    rows = []
    for i, (name, sizes) in enumerate(shapes.items()):
        own, grad, shape = numbers[2 * i], numbers[2 * i + 1], tuple(sizes)
        rows.append({"name": name, "shape": shape, **own, "grad_std": grad["std"], "grad_mean": grad["mean"]})
    return rows


def format_summary(summary: Sequence[dict[str, Any]]) -> str:
    """A table of what `inspect_model` or `InspectTensor.get_summary` returned."""
    width = max([len("name"), *(len(row["name"]) for row in summary)])
    lines = [f"{'name':<{width}} {'shape':<20}" + "".join(f" {column:>11}" for column in _COLUMNS[2:])]
    for row in summary:
        numbers = "".join(f" {row[column]:>11.4f}" for column in _COLUMNS[2:])
        lines.append(f"{row['name']:<{width}} {tuple(row['shape'])!s:<20}{numbers}")
    return "\n".join(lines)


@dataclass
class Record:
    """A tensor that was recorded.

    Attributes:
        name, group: as given to `record_tensor`.
        tensor: the tensor itself; differentiable where it was recorded by autograd.
        grad: the gradient of the loss (with the loss scale), after backward; else None.
    """

    name: str
    group: str | None
    tensor: Tensor
    grad: Tensor | None = None


class InspectTensor:
    """What was recorded inside a `with inspect_tensor() as inspector` statement."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}

    @property
    def summary(self) -> list[dict[str, Any]]:
        """`name`, `group`, `tensor`, `grad` of each record, in order."""
        return [vars(record).copy() for record in self.records]

    @property
    def records(self) -> list[Record]:
        """The records, in the order of the forward pass."""
        return list(self._records.values())

    def get_summary(self) -> list[dict[str, Any]]:
        """Statistics over all ranks; all ranks call it, having recorded the same names.

        Returns:
            For each record: `name` (with `group.` before it), `shape` (dim 0 times the number of ranks), and the numbers of
            `inspect_model`.

        Raises:
            RuntimeError: ranks have layers and rows of their own, in a `PipelineTransformerBlockList`.
        """
        if context_of(current_world()).rows_differ and current_world().mesh.pp > 1:
            raise RuntimeError(
                "stages of a PipelineTransformerBlockList record other tensors each, of other rows, so there are no numbers over "
                "all ranks: take this rank's with get_tensor(name)"
            )
        engine = current_world().along("dp")
        values: list[np.ndarray] = []
        for record in self.records:
            grad = record.grad
            values += [_flat(record.tensor), np.zeros(record.tensor.size) if grad is None else _flat(grad)]
        numbers = _statistics(values, engine)
        rows = []
        for i, record in enumerate(self.records):
            shape = tuple(record.tensor.shape)
            own, grad = numbers[2 * i], numbers[2 * i + 1]
            name = record.name if record.group is None else f"{record.group}.{record.name}"
            whole = (shape[0] * engine.size, *shape[1:]) if shape else (engine.size,)
            rows.append({"name": name, "shape": whole, **own, "grad_std": grad["std"], "grad_mean": grad["mean"]})
        return rows

    def get_tensor(self, name: str, group: str | None = None, index: int | None = None) -> Tensor:
        """The tensor recorded under a name: the first, or the index-th of them.

        Raises:
            KeyError: there is none.
            IndexError: there are fewer.
        """
        found = [r.tensor for r in self.records if r.name == name and r.group == group]
        if not found:
            known = sorted({r.name if r.group is None else f"{r.name} (group {r.group})" for r in self.records})
            raise KeyError(f"no tensor {name!r} was recorded in group {group!r}; recorded: {', '.join(known) or 'nothing'}")
        index = 0 if index is None else index
        if not -len(found) <= index < len(found):
            raise IndexError(f"{name!r} was recorded {len(found)} times, there is no index {index}")
        return found[index]

    def _take(self, place: int, made: Record, replaying: bool, with_grad: bool) -> None:
        x = made.tensor
        if not replaying or place not in self._records:
            self._records[place] = made
        if with_grad and recording():
            record = self._records[place]

            def keep(grad: Tensor) -> None:
                record.grad = grad

            try:
                x.register_hook(keep)
            except RuntimeError as error:  # 2.10, behind a stop_gradient: there will be no gradient
                if "requires grad is false" not in str(error):
                    raise


_active: list[InspectTensor] = []


@contextlib.contextmanager
def inspect_tensor() -> Iterator[InspectTensor]:
    """Record what `record_tensor` is given inside the `with` statement, and the gradients of it; for looking: it costs copies.

    Raises:
        RuntimeError: one is active already.
    """
    if _active:
        raise RuntimeError("inspect_tensor is active already; it cannot be nested")
    made = InspectTensor()
    _active.append(made)
    try:
        with hookable():
            yield made
    finally:
        _active.pop()


def record_tensor(x: Tensor, name: str, group: str | None = None, requires_grad: bool = True) -> None:
    """Have the active `inspect_tensor` record x; without one nothing happens.

    Also inside of checkpointed Blocks: the value is that of the forward pass, the gradient that of the recomputed one.

    Args:
        requires_grad: record its gradient too.

    Raises:
        TypeError: x is a Parameter (`inspect_model` shows those), or no tensor.
    """
    if isinstance(x, Parameter) or not isinstance(x, Tensor):
        raise TypeError(f"record_tensor takes a tensor, not a {type(x).__name__}; parameters are shown by inspect_model")
    if not _active:
        return
    draws = context_of(current_world()).draws
    place = draws.records
    draws.records += 1
    _active[0]._take(place, Record(name, group, x), draws.replaying, requires_grad)


def _named_parameters(model: nn.Cell, prefix: str) -> Iterator[tuple[str, Parameter]]:
    """Parameters by path; a Block is transparent, a parameter in several places goes by the first."""
    seen: set[int] = set()

    def visit(path: str, cell: nn.Cell) -> Iterator[tuple[str, Parameter]]:
        cell = cell.inner if isinstance(cell, Block) else cell
        for name, p in parameter_table(cell).items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield f"{path}{name}", p
        for name, child in child_table(cell).items():
            if child is not None:
                yield from visit(f"{path}{name}.", child)

    return visit(prefix, model)


def _gradient(world: World, p: Parameter) -> np.ndarray | None:
    """The accumulated gradient, unscaled."""
    if not p.requires_grad:
        return None
    for manager in context_of(world).managers:
        grad = manager.grad(p)
        if grad is not None:
            return host_array(grad) / np.float32(manager.grads_scale)
    return None


def _own_part(p: Parameter, x: Any, world: World) -> np.ndarray:
    """What this rank adds to the statistics of a parameter or its gradient `x`: each element is counted on one rank."""
    if x is None:
        return np.zeros(1 if world.everyone.rank == 0 else 0)
    if not counts_here(p, world):
        return np.zeros(0)
    values = _flat(x)
    return values[: p.layout.owned_size] if isinstance(p, DistributedParameter) else values


def _flat(x: Tensor | np.ndarray) -> np.ndarray:
    return host_array(x).reshape(-1).astype(np.float64)


def _statistics(values: Iterable[np.ndarray], engine: Engine) -> list[dict[str, float]]:
    """The statistics of each array over all ranks, in two passes; four collectives in all."""
    arrays = list(values)

    def reduce(numbers: list[float], op: str = "sum") -> np.ndarray:
        return reduce_numbers(engine, numbers, "inspect", np.float64, op)

    with np.errstate(all="ignore"):
        sizes, sums = reduce([float(x.size) for x in arrays] + [x.sum() for x in arrays]).reshape(2, -1)
        counts = np.maximum(sizes, 1)
        means = sums / counts
        squares = reduce([((x - mean) ** 2).sum() for x, mean in zip(arrays, means)])
        largest = reduce([x.max(initial=-np.inf) for x in arrays], "max")
        least = reduce([x.min(initial=np.inf) for x in arrays], "min")
        deviations = np.sqrt(squares / np.maximum(counts - 1, 1))
    return [
        {"std": float(s), "mean": float(m), "max": float(a), "min": float(b)}
        for s, m, a, b in zip(deviations, means, largest, least)
    ]
