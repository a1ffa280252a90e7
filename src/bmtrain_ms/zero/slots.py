"""What a Block knows of the module that it wraps."""

from __future__ import annotations

import contextlib
import operator
import warnings
from typing import Any, Callable, Iterator, Sequence

from mindspore import Parameter, Tensor, nn

from ..comm import World, rank
from ..compat.autograd import Graph
from ..compat.cells import child_table, drop_rate, parameter_table
from ..compat.habits import refuse_recompute
from ..compat.runtime import is_float
from .copies import Copies
from .elsewhere import Elsewhere
from .group import ParamGroup
from .param import DistributedParameter

Place = tuple[nn.Cell, str]  # a cell, and the attribute that holds a parameter


class Slots:
    """A module, and where in it the parameters are.

    Attributes:
        module: the wrapped Cell.
        function: what is called; None: the module itself.
        graph: the name under which its recomputations are recorded.
        places: each parameter, with every place that holds it.
        params: in the order of `places`, which is that of the groups.
        elsewhere: parameters of elsewhere whose shards it uses.
    """

    def __init__(self, module: nn.Cell):
        self.module = module
        self.function: Callable[..., Any] | None = None
        self.graph = Graph()
        self.places = _find_places(module)
        self.params = [parameter for parameter, _ in self.places]
        self._made_of = contents(module)
        self._cells = [x for x in self._made_of if isinstance(x, nn.Cell)]
        self._note_tables()
        self._no_tensors: set[type] = set()  # types of attributes that are no tensors
        self._dropouts = [(name, c) for name, c in module.cells_and_names() if _is_dropout(c)]
        self._groups: list[ParamGroup] = []
        self._warned = False
        self.elsewhere = Elsewhere()
        self._looked_at: Any = None

    def __len__(self) -> int:
        return len(self.places)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; nothing is gathered here."""
        return (self.function or self.module)(*args, **kwargs)

    @property
    def groups(self) -> list[ParamGroup]:
        """The parameters, by the axis that they are sharded along; made at the first call, when they have their final names."""
        if None in self._groups or not self._groups:  # None: this is a copy, whose parameters are others
            self._groups, block = [], object()
            for along in dict.fromkeys(p.along for p in self.params):
                params = [p for p in self.params if p.along == along]
                self._groups.append(ParamGroup(params, _common_prefix([p.name for p in params]), block))
        return self._groups

    @property
    def world(self) -> World:
        """The world of the parameters, which is one for all."""
        return self.places[0][0].world

    @property
    def label(self) -> str:
        """What messages call these parameters, e.g. `layers.3`."""
        return self.groups[0].label

    def trainable(self) -> list[int]:
        """Indices of the parameters that require a gradient now; the flag may be toggled between calls."""
        return [i for i, (p, _) in enumerate(self.places) if p.requires_grad]

    @contextlib.contextmanager
    def substituted(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside the `with` statement the parameters are hidden behind full tensors.

        Raises:
            RuntimeError: they are already: the module calls the Block that it is in.
        """
        if any(name in vars(cell) for _, places in self.places[:1] for cell, name in places):
            raise RuntimeError(
                f"rank {rank()}: {type(self.module).__name__} ({self.label}) calls the Block that it is in: write the "
                "repetition as a loop around the Block"
            )
        for (_, places), tensor in zip(self.places, tensors):
            for cell, name in places:
                vars(cell)[name] = tensor
        try:
            yield
        finally:
            for _, places in self.places:
                for cell, name in places:
                    vars(cell).pop(name, None)

    def plain_parameters(self) -> list[Parameter]:
        """The parameters that are whole on every rank: statistics, counters, frozen ones."""
        found = [p for cell in self._cells for p in parameter_table(cell).values() if p is not None]
        return [p for p in found if not isinstance(p, DistributedParameter)]

    def is_due(self) -> bool:
        """Whether what cannot be looked at in every pass is looked at in this one: the first, and the first in another mode."""
        state = [(cell.training, vars(cell).get("p")) for cell in self._cells], self.trainable()
        due, self._looked_at = state != self._looked_at, state
        if due:
            self._refuse_recompute()
        return due

    def _refuse_recompute(self) -> None:
        for name, cell in self.module.cells_and_names():
            refuse_recompute(name, cell)

    def flags(self) -> list[bool]:
        """Attributes of the cells that are truth values: what a module may decide by."""
        return [
            x for cell in self._cells for name, x in vars(cell).items() if (x is True or x is False) and name[0] != "_"
        ]  # of hundreds of attributes

    def holds(self, copies: Copies) -> bool:
        """Whether a cell has one of the full tensors, or a view of one, as an attribute."""
        for cell in self._cells:
            found = vars(cell).values()
            if not self._no_tensors.issuperset(map(type, found)):  # of hundreds of attributes hardly one is a tensor
                self._no_tensors.update(kind for kind in map(type, found) if not issubclass(kind, Tensor))
                if any(isinstance(x, Tensor) and copies.owns(x) for x in found):
                    return True
        return False

    def refuse_outside(self) -> None:
        """Raise RuntimeError where a parameter is of a stage of a list that this module is not in."""
        for p in self.params:
            p.refuse_outside()

    def refuse_changes(self) -> None:
        """Raise ValueError where the module is not what it was when it was wrapped."""
        held = _held(self._cells)
        if len(held) == len(self._held) and all(map(operator.is_, held, self._held)) and all(map(_is_buffer, self._buffers)):
            return
        for parameter, places in self.places:
            for cell, name in places:
                if parameter_table(cell).get(name) is not parameter:
                    raise ValueError(
                        f"parameter {parameter.name} of {type(cell).__name__}.{name} was replaced after the Block was made, on "
                        f"rank {parameter.world.mesh.rank}: the Block would go on with the old one. Write values into the "
                        "parameter (copy_full, set_shard), or replace it before wrapping"
                    )
        now = contents(self.module)
        if len(now) != len(self._made_of) or any(a is not b for a, b in zip(now, self._made_of)):
            self._refuse_recompute()
            raise ValueError(
                f"rank {rank()}: cells or parameters of {type(self.module).__name__} were added, exchanged, removed or, of those "
                "that are not sharded, made trainable after the Block was made: gradients would be lost. Change the module "
                "(adapters, pruning) before wrapping it"
            )
        self._note_tables()  # there is another buffer

    def _note_tables(self) -> None:
        self._held = _held(self._cells)
        self._buffers = self.plain_parameters()

    def refuse_dropout(self) -> None:
        """Raise ValueError for a dropout of MindSpore's: its generators do not replay, so recomputation would draw another mask."""
        for name, dropout in self._dropouts if self.module.training else ():
            if drop_rate(dropout):
                raise ValueError(
                    f"{name or 'the module'} is a mindspore.nn.Dropout in a checkpointed Block; it cannot draw the same mask "
                    "twice. Use bmtrain_ms.nn.Dropout, or Block(use_checkpoint=False)"
                )

    def warn_of_copies(self, gathered: Copies) -> None:
        """Say once which parameters stay in memory until backward in spite of ZeRO-3."""
        if self._warned:
            return
        self._warned = True
        copied = gathered.copied()
        if copied:
            cells = {id(p): type(places[0][0]).__name__ for p, places in self.places}
            names = ", ".join(f"{p.name} (in {cells[id(p)]})" for p in copied)
            warnings.warn(
                f"the recorded graph keeps a full copy of {names} until backward: on this MindSpore a view of a parameter, such as "
                "w.T, a slice or a reshape, copies it. Multiply with ops.MatMul(transpose_b=True) or "
                "bmtrain_ms.nn.functional.linear instead, or use Block(use_checkpoint=True)",
                stacklevel=2,
            )


def _find_places(module: nn.Cell) -> list[tuple[DistributedParameter, list[Place]]]:
    """Each parameter once, with every (cell, attribute) that holds it: tied parameters have several."""
    found: dict[int, tuple[DistributedParameter, list[Place]]] = {}
    for path, cell in module.cells_and_names():
        for name, parameter in parameter_table(cell).items():
            if _is_buffer(parameter):
                continue
            if not isinstance(parameter, DistributedParameter):
                where = f"{path}.{name}" if path else name
                raise ValueError(
                    f"rank {rank()}: parameter {where} is a {type(parameter).__name__}; all parameters in a Block must be "
                    "DistributedParameter (use bmtrain_ms.nn layers), or have requires_grad=False"
                )
            found.setdefault(id(parameter), (parameter, []))[1].append((cell, name))
    places = list(found.values())
    for parameter, _ in places:
        if parameter.world is not places[0][0].world:
            raise ValueError(
                f"rank {rank()}: parameters {places[0][0].name} and {parameter.name} of one Block are in different worlds: it "
                "could not say among which ranks to gather. Make them with the same in_world, or wrap them in Blocks of their own"
            )
    axes = list(dict.fromkeys(parameter.along for parameter, _ in places))
    return sorted(places, key=lambda place: axes.index(place[0].along))


def _is_dropout(cell: nn.Cell) -> bool:
    return isinstance(cell, nn.Dropout) and not getattr(cell, "replays", False)


def contents(cell: nn.Cell) -> list[Any]:
    """All cells and parameters below, without buffers: others after something was changed."""
    found = [cell, *(p for p in parameter_table(cell).values() if not _is_buffer(p))]
    for child in child_table(cell).values():
        if child is not None:
            found += contents(child)
    return found


def _held(cells: Sequence[nn.Cell]) -> list[Any]:
    """Names and values of the parameters of cells, and their children: the same objects unless something was changed."""
    found: list[Any] = []
    for cell in cells:
        table = parameter_table(cell)
        found += table
        found += table.values()
        found += child_table(cell).values()
    return found


def _is_buffer(parameter: Any) -> bool:
    """A plain Parameter that is not trained: replicated, and left alone."""
    if parameter is None or isinstance(parameter, DistributedParameter):
        return parameter is None
    return not (parameter.requires_grad and is_float(parameter))


def _common_prefix(names: list[str]) -> str:
    """`layers.3` for `layers.3.a.weight`, `layers.3.b.weight`."""
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for column in zip(*(p[:-1] for p in parts)):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) or names[0]
