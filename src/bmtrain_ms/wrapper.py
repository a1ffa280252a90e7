"""Ordinary models, made sharded where they are (BMTrain: `wrapper`).

No cell is replaced: a cell that owns parameters gets a class that gathers them when they are read (`DistributedModule`), and a
repeated layer gets a `construct` that goes through a `Block`. So names, attributes, references between cells and callers of
`.construct` all stay as they were.
"""

from __future__ import annotations

import collections
import fnmatch
import gc
import sys
import zlib
from dataclasses import dataclass, field
from typing import Any, Sequence

import numpy as np
from mindspore import Parameter, nn

from bmtrain_ms_base.tree import flatten

from .comm import world as current_world
from .compat.autograd import recording
from .compat.cells import child_table, drop_rate, parameter_lists, parameter_table
from .compat.habits import refuse_recompute
from .compat.runtime import from_host, host_array, is_float
from .nn.dropout import Dropout, ReplayingDropout
from .zero import Block, DistributedModule, DistributedParameter, empty, refuse_written

# Written by operations in forward, so they stay whole on every rank.
_RUNNING = ("moving_mean", "moving_variance", "running_mean", "running_var")
_CONTAINERS = (nn.CellList, nn.SequentialCell, nn.CellDict)


@dataclass
class WrapReport:
    """What `BMTrainModelWrapper` did.

    Attributes:
        blocks: path -> class of each layer that became a Block.
        not_checkpointed: path -> why the Block keeps its activations.
        not_blocks: path -> why a repeated layer did not become a Block.
        buffers: names of parameters that stay whole on every rank.
        tied: name -> the other paths of a parameter that is in several cells.
        dropouts: how many `nn.Dropout` draw masks that can be repeated now.
        elements, elements_outside: of all sharded parameters, and of those outside of Blocks.
        shard_bytes: of this rank's shards.
    """

    blocks: dict[str, str] = field(default_factory=dict)
    not_checkpointed: dict[str, str] = field(default_factory=dict)
    not_blocks: dict[str, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    tied: dict[str, list[str]] = field(default_factory=dict)
    dropouts: int = 0
    elements: int = 0
    elements_outside: int = 0
    shard_bytes: int = 0

    def __str__(self) -> str:
        lines = [
            f"BMTrainModelWrapper: {self.elements} elements sharded, {self.shard_bytes / 2**20:.2f} MiB on this rank; "
            f"{len(self.blocks)} blocks, {self.elements_outside} elements outside of them"
        ]
        for kind in sorted(set(self.blocks.values())):
            lines.append(f"  blocks of {kind}: {', '.join(path for path, k in self.blocks.items() if k == kind)}")
        for what, why in (("not checkpointed", self.not_checkpointed), ("not a block", self.not_blocks)):
            reasons = {reason: [path for path, r in why.items() if r == reason] for reason in why.values()}
            lines += [f"  {what}, because of {reason}: {', '.join(paths)}" for reason, paths in reasons.items()]
        lines += [f"  tied: {name} = {', '.join(others)}" for name, others in self.tied.items()]
        if self.buffers:
            lines.append(f"  whole on every rank: {', '.join(self.buffers)}")
        if self.dropouts:
            lines.append(f"  {self.dropouts} dropouts draw masks that recomputation and resuming repeat")
        return "\n".join(lines)


def BMTrainModelWrapper(
    model: nn.Cell,
    layers: Sequence[str] | None = None,
    use_checkpoint: bool = True,
    zero_level: int = 3,
    buffers: Sequence[str] = (),
    verbose: bool = True,
) -> nn.Cell:
    """Make an ordinary model a sharded one, in place (BMTrain: `BMTrainModelWrapper`).

    All ranks call it, before an optimizer is made.

    Every floating-point Parameter becomes a `DistributedParameter`, with its flags and its name (of several with one name each gets
    its path); ties stay ties; what is sharded already stays as it is. Repeated layers become Blocks: the outermost members of
    `CellList`s, `SequentialCell`s and `CellDict`s of a class that is there more than once. Parameters elsewhere are gathered when
    they are read: `requires_grad` and hooks of what a read gives are the parameter's; a write into it, which the parameter does not
    see, is an error (`cell.parameter(name).copy_full(values)` writes it). So what the model itself updates while it runs must be
    named in `buffers`. `nn.Dropout` draws from the run's stateless generator. Layers with running statistics (BatchNorm), or with a
    dropout that is a mere number in a cell, are not checkpointed: recomputation would update the one twice, and draw the other
    anew. Parameters in a `ParameterTuple`, as those of `nn.LSTM`, stay whole on every rank, and a layer that has some is no Block.

    A model built under `mindspore.nn.utils.no_init_parameters()` is initialised here, one parameter at a time, so no rank ever
    holds more than its shards and one full parameter. MindSpore's initialisers draw one after the other: the values are those of
    the same model built whole, with the same seeds, if it makes its parameters in the order in which it holds them. Otherwise
    each rank has built it whole before it comes here.

    Args:
        model: any Cell.
        layers: patterns (`fnmatch`) of the paths of cells to be made Blocks, e.g. `["encoder.layers.*"]`; of the cells that one
            pattern matches, the outermost with parameters. Default: found as above.
        use_checkpoint, zero_level: of the Blocks.
        buffers: patterns of names of parameters to leave whole on every rank. Running statistics and integers always are.
        verbose: rank 0 writes the report to stderr; it is `model.wrap_report` anyway.

    Returns:
        `model`.

    Raises:
        TypeError: it is not a Cell.
        ValueError: a pattern matches nothing, ranks have different values of what is sharded or trained, a layer is inside another
            or is never called, or a cell keeps parameters where they cannot be replaced.
    """
    _check_arguments(model, layers, buffers)
    report = WrapReport()
    cells = _cells(model, stop_at=(Block,))
    for path, cell in cells:
        refuse_recompute(path, cell)
    chosen = None if layers is None else _matching(cells, layers)
    _shard_parameters(cells, buffers, report)
    gc.collect()  # the Parameters that were replaced: they are in reference cycles
    _change_cells(cells, report)
    _wrap_layers(_repeated_layers(cells) if chosen is None else chosen, use_checkpoint, zero_level, report)
    _count_elements(model, report)
    _have_reads_gather(model)
    model.__dict__["wrap_report"] = report
    if verbose and current_world().everyone.rank == 0:
        sys.stderr.write(f"{report}\n")
    return model


def _check_arguments(model: Any, layers: Sequence[str] | None, buffers: Sequence[str]) -> None:
    if not isinstance(model, nn.Cell):
        raise TypeError(f"BMTrainModelWrapper wraps a Cell, not a {type(model).__name__}")
    if isinstance(layers, str) or isinstance(buffers, str):
        raise TypeError(f"layers and buffers are lists of patterns: [{layers if isinstance(layers, str) else buffers!r}]")


def _change_cells(cells: list[tuple[str, nn.Cell]], report: WrapReport) -> None:
    """Give cells with sharded parameters, and dropouts, the classes that handle them."""
    for _, cell in cells:
        if any(isinstance(p, DistributedParameter) for p in parameter_table(cell).values()):
            _mix_in(DistributedModule, cell)
        if isinstance(cell, nn.Dropout) and type(cell).construct is nn.Dropout.construct:
            _mix_in(ReplayingDropout, cell)
            report.dropouts += 1


def _wrap_layers(layers: list[tuple[str, nn.Cell]], use_checkpoint: bool, zero_level: int, report: WrapReport) -> None:
    """Make a Block of each layer that can be one, and checkpoint those that can be repeated."""
    for path, cell in layers:
        if _is_wrapped(cell):
            continue
        if in_tuple := _in_parameter_tuple(cell):
            report.not_blocks[path] = in_tuple
            continue
        reason = _not_replayable(cell) if use_checkpoint else None
        Block.in_place(cell, use_checkpoint and reason is None, zero_level)
        report.blocks[path] = type(cell).__name__
        if reason:
            report.not_checkpointed[path] = reason


def _cells(model: nn.Cell, stop_at: tuple[type, ...] = ()) -> list[tuple[str, nn.Cell]]:
    """(path, cell) of every cell once, parents first; not below those of a type of `stop_at`.

    (`cells_and_names` is patched by some packages.)
    """
    found: list[tuple[str, nn.Cell]] = []
    seen: set[int] = set()

    def visit(path: str, cell: nn.Cell) -> None:
        if id(cell) in seen:
            return
        seen.add(id(cell))
        found.append((path, cell))
        if isinstance(cell, stop_at):
            return
        for name, child in child_table(cell).items():
            if child is not None:
                visit(_join(path, name), child)

    visit("", model)
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_wrapped(cell: nn.Cell) -> bool:
    return isinstance(cell, Block) or isinstance(getattr(vars(cell).get("construct"), "__self__", None), Block)


def _count_elements(model: nn.Cell, report: WrapReport) -> None:
    """Fill in the report's numbers of elements and bytes, of the whole model."""
    found = [(cell, p) for _, cell in _cells(model) for p in parameter_table(cell).values() if isinstance(p, DistributedParameter)]
    blocks = [cell for _, cell in _cells(model) if _is_wrapped(cell)]
    inside = {id(p) for block in blocks for _, cell in _cells(block) for p in parameter_table(cell).values()}
    for p in {id(p): p for _, p in found}.values():
        report.elements += p.full_size
        report.elements_outside += 0 if id(p) in inside else p.full_size
        report.shard_bytes += p.nbytes


def _have_reads_gather(model: nn.Cell) -> None:
    """Parameters of cells that are reached without going through a Block are gathered when they are read, also where a Block has
    them as well; those of Blocks as `_Reads` says."""
    if not _is_wrapped(model):
        _mix_in(WrappedModel, model)
        reads = model.__dict__.setdefault("_reads", _Reads())
        for _, cell in _cells(model):
            if vars(cell).get("_in_block"):
                vars(cell)["_in_block"] = reads
    outside = [model]
    reached: set[int] = set()
    while outside:
        cell = outside.pop()
        if id(cell) not in reached and not _is_wrapped(cell):
            reached.add(id(cell))
            vars(cell).pop("_in_block", None)
            outside += [child for child in child_table(cell).values() if child is not None]


class _Reads:
    """Whether a parameter of a Block is itself what somebody gets who reads it through its cell, while the Block does not run.

    It is to those who freeze it or write it. While the model runs, or is differentiated, the whole is meant, as of any model
    (weight normalisation, a head that borrows a layer's weight): then it is gathered.
    """

    running = 0  # calls of the model

    def __bool__(self) -> bool:
        return not (self.running or recording())


class WrappedModel(nn.Cell):
    """A model whose Blocks' weights are whole to those who read them while it runs.

    Its call says so, and not its `construct`: MindSpore looks into that.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        reads = vars(self)["_reads"]
        reads.running += 1
        try:
            out = super().__call__(*args, **kwargs)
        finally:
            reads.running -= 1
        if not reads.running:
            refuse_written()
        return out


@dataclass
class _Found:
    """A Parameter, and everywhere it is."""

    parameter: Parameter
    places: list[tuple[nn.Cell, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def _shard_parameters(cells: list[tuple[str, nn.Cell]], buffers: Sequence[str], report: WrapReport) -> None:
    """Put a DistributedParameter wherever a Parameter is, the same one wherever the same is."""
    found: dict[int, _Found] = {}
    whole: set[int] = set()
    in_tuples = {id(p) for _, cell in cells for listed in parameter_lists(cell).values() for p in listed}
    matched: set[str] = set()
    for path, cell in cells:
        for name, p in parameter_table(cell).items():
            if p is None:
                continue
            match = found.setdefault(id(p), _Found(p))
            match.places.append((cell, name))
            match.paths.append(_join(path, name))
            patterns = [x for x in buffers if fnmatch.fnmatchcase(match.paths[-1], x) or fnmatch.fnmatchcase(p.name, x)]
            matched.update(patterns)
            if not isinstance(p, DistributedParameter) and (patterns or name in _RUNNING or not is_float(p) or id(p) in in_tuples):
                whole.add(id(p))
    missing = [x for x in buffers if x not in matched]
    if missing:
        raise ValueError(f"buffers: no parameter matches {missing[0]!r}; names are as in model.parameters_and_names()")
    stays = whole | {i for i, f in found.items() if isinstance(f.parameter, DistributedParameter)}
    _refuse_hidden(cells, set(found) - stays)
    report.buffers = [f.paths[0] for i, f in found.items() if i in whole]
    report.tied = {f.paths[0]: f.paths[1:] for f in found.values() if len(f.paths) > 1}
    names = collections.Counter(f.parameter.name for f in found.values())
    digests: list[tuple[str, int]] = []
    for i in list(found):
        match = found.pop(i)
        name = match.parameter.name
        ambiguous = names[name] > 1 or name == "Parameter"  # MindSpore's default
        if i in whole:
            _compared_whole(match.parameter, match.paths[0] if ambiguous else name, digests)
        elif i not in stays:
            made = _sharded(match.parameter, match.paths[0] if ambiguous else name, digests)
            for cell, attribute in match.places:
                parameter_table(cell)[attribute] = made
    _compare(digests)


def _compared_whole(p: Parameter, name: str, digests: list[tuple[str, int]]) -> None:
    """Note the values of a parameter that stays whole, if it is trained: ranks average its gradients, and step from where it is.

    Running statistics, counters and what is frozen may be each rank's own.
    """
    if p.has_init:
        p.init_data()  # in its turn, as MindSpore's initialisers draw
    if p.requires_grad and is_float(p):
        digests.append((name, _digest(host_array(p))))


def _digest(values: np.ndarray) -> int:
    return zlib.crc32(values.reshape(-1).view(np.uint8).data)


def _sharded(p: Parameter, name: str, digests: list[tuple[str, int]]) -> DistributedParameter:
    lazy = p.has_init and p.init_mode is not None
    values = host_array(p.init_mode.init_data() if lazy else p)
    if lazy:
        p.init_mode = None  # lets go of the values
    digests.append((name, _digest(values)))
    made = DistributedParameter(empty(*p.shape, dtype=p.dtype), requires_grad=p.requires_grad, name=name)
    made.copy_full(values.reshape(made.full_shape))
    return made


def _compare(digests: list[tuple[str, int]]) -> None:
    """Raise on all ranks where they were built with different values."""
    engine = current_world().everyone
    mine = from_host(np.array([crc for _, crc in digests] or [0], np.int64))
    rows = host_array(engine.all_gather([mine], label=f"wrap {len(digests)} parameters").wait()[0]).reshape(engine.size, -1)
    different = np.flatnonzero((rows != rows[0]).any(0))
    if different.size:
        raise ValueError(
            f"parameter {digests[different[0]][0]} has different values on different ranks (as have {different.size - 1} others): "
            "every rank must build the same model. Build it after init_distributed, which seeds the generators, or load the same "
            "weights everywhere first"
        )


def _refuse_hidden(cells: list[tuple[str, nn.Cell]], sharded: set[int]) -> None:
    for path, cell in cells:
        for name, value in vars(cell).items():
            held = [] if name in ("_params", "_params_list") else [x for x in flatten(value)[0] if isinstance(x, Parameter)]
            if not any(id(x) in sharded for x in held):
                continue
            raise ValueError(
                f"{type(cell).__name__} {path or '(the model)'} keeps a parameter in its attribute {name!r}, outside of its "
                "parameters, where it cannot be sharded; leave it whole on every rank with buffers=[...]"
            )


def _mix_in(mixin: type, cell: nn.Cell) -> None:
    """Give the cell a class that is `mixin` first, and its own besides."""
    cls = type(cell)
    if isinstance(cell, mixin):
        return
    if (mixin, cls) not in _classes:
        bases = (mixin,) if cls in mixin.__mro__ else (mixin, cls)
        _classes[mixin, cls] = type(cls.__name__, bases, {"__module__": cls.__module__})
    cell.__class__ = _classes[mixin, cls]


_classes: dict[tuple[type, type], type] = {}


def _repeated_layers(cells: list[tuple[str, nn.Cell]]) -> list[tuple[str, nn.Cell]]:
    """The outermost members of containers of a class that occurs more than once among members; one is looked into otherwise."""
    single: set[int] = set()
    while True:
        members: dict[int, tuple[str, nn.Cell]] = {}
        classes: list[type] = []
        for path, cell in cells:
            below = any(_is_below(path, other) for other, member in members.values() if id(member) not in single)
            if isinstance(cell, _CONTAINERS) and not below:
                for name, member in child_table(cell).items():
                    if _is_layer(member):
                        members.setdefault(id(member), (_join(path, name), member))
                        classes.append(type(member))
        once = {i for i, (_, member) in members.items() if classes.count(type(member)) == 1}
        if once <= single:
            return [(path, member) for i, (path, member) in members.items() if i not in single]
        single |= once


def _is_layer(cell: nn.Cell | None) -> bool:
    if cell is None or isinstance(cell, (Block, *_CONTAINERS)):
        return False
    return sum(any(isinstance(p, DistributedParameter) for p in parameter_table(c).values()) for _, c in _cells(cell)) > 1


def _is_below(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.") or other == ""


def _matching(cells: list[tuple[str, nn.Cell]], patterns: Sequence[str]) -> list[tuple[str, nn.Cell]]:
    chosen: dict[int, tuple[str, nn.Cell]] = {}
    for pattern in patterns:
        found: list[tuple[str, nn.Cell]] = []
        for path, cell in cells:
            if not fnmatch.fnmatchcase(path, pattern) or any(_is_below(path, other) for other, _ in found):
                continue
            if any(p is not None for _, c in _cells(cell) for p in parameter_table(c).values()):
                found.append((path, cell))
        if not found:
            raise ValueError(f"layers: no cell with parameters matches {pattern!r}; paths are as in model.cells_and_names()")
        for path, cell in found:
            if isinstance(cell, (nn.CellList, nn.CellDict)):
                raise ValueError(f"layers: {path} is a {type(cell).__name__}, which is never called; name its members: '{path}.*'")
            chosen[id(cell)] = path, cell
    for path, _ in chosen.values():
        inner = [p for p, _ in chosen.values() if p != path and _is_below(p, path)]
        if inner:
            raise ValueError(f"layers: {inner[0]} is inside {path}; a Block cannot be inside another, name only one of them")
    return list(chosen.values())


def _in_parameter_tuple(cell: nn.Cell) -> str | None:
    """Which trained parameters of a layer are not sharded because of a ParameterTuple, or None."""
    for _, c in _cells(cell):
        for name, listed in parameter_lists(c).items():
            if any(p.requires_grad and not isinstance(p, DistributedParameter) for p in listed):
                return f"the ParameterTuple {type(c).__name__}.{name}"
    return None


def _not_replayable(cell: nn.Cell) -> str | None:
    """Why a layer must not be recomputed, or None."""
    for _, c in _cells(cell):
        if any(name in parameter_table(c) for name in _RUNNING):
            return f"the running statistics of {type(c).__name__}"
        if _drops_in_its_own_way(c):
            return f"{type(c).__name__}, which is random in its own way"
        for name, value in vars(c).items():
            if "drop" in name and isinstance(value, float) and 0.0 < value < 1.0 and not isinstance(c, nn.Dropout):
                return f"{type(c).__name__}.{name}={value:g}"
    return None


def _drops_in_its_own_way(cell: nn.Cell) -> bool:
    if isinstance(cell, (Dropout, ReplayingDropout)):
        return False
    if isinstance(cell, nn.Dropout):
        return drop_rate(cell) > 0
    rates = vars(cell)
    named = "dropout" in type(cell).__name__.lower() and not child_table(cell)
    return named and 0 not in (rates.get("p"), rates.get("prob")) and rates.get("keep_prob") != 1
