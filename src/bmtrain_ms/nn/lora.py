"""Low-rank adapters (Hu et al., 2021: LoRA), and which parameters are trained."""

from __future__ import annotations

import collections
import math
import re
from typing import Any, Callable, Iterator, NamedTuple

from mindspore import Parameter, Tensor, nn, ops

from bmtrain_ms_base.checks import number, whole

from ..comm import is_initialized
from ..comm import world as current_world
from ..comm.agreement import any_rank, gather_json
from ..compat.autograd import no_grad
from ..compat.cells import child_table, parameter_table
from ..compat.runtime import from_host, host_array
from ..zero import Block, DistributedParameter
from ..zero.init import initialise
from . import functional
from .dropout import Dropout
from .linear import Linear
from .tensor_parallel import ColumnParallelLinear, RowParallelLinear, loss_of_columns, take_over


class Adapter(NamedTuple):
    """Settings of a layer's adapter, see `LoRALinear`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False


class LoRALinear(Linear):
    """y = x Wᵀ + b + scale * (x Aᵀ) Bᵀ, of which A and B are trained; parameters are called as before, and `lora_A.weight` and
    `lora_B.weight`, as PEFT calls them. B starts at zero, and so does what is added.

    Args:
        linear: whose place it takes, with its parameters.
        rank: rows of A.
        alpha: scale is alpha / rank; alpha / sqrt(rank) with `rslora` (Kalajdzievski, 2023).
        dropout: of x, in front of A.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        dtype = linear.parameter("weight").dtype
        super().__init__(linear.in_features, linear.out_features, linear.has_bias, dtype)
        _keep_parameters(linear, self)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.lora_A: nn.Cell = Linear(self.in_features, rank, False, dtype, 1.0 / math.sqrt(3.0 * self.in_features))
        self.lora_B: nn.Cell = Linear(rank, self.out_features, False, dtype, 0.0)
        self.lora_dropout = Dropout(dropout) if dropout else None

    def construct(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return super().construct(x) + adapted(self, x)

    def cross_entropy(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """See `Linear`; all logits are there at once, unless `rows` says of how many tokens."""
        if options.get("rows") is None:
            return functional.cross_entropy(self(x), targets, **_without_rows(options))
        if self.bias is not None:
            raise ValueError("rows are for a projection without a bias: leave them out, or make the layer with bias=False")
        return functional.linear_cross_entropy(*_joined(self, x), targets, **options)

    def as_column(self, gather_output: bool, parts: int | None) -> ColumnParallelLinear:
        """What it becomes over tensor-parallel ranks that have some of the columns of y each."""
        return _LoRAColumn(self, gather_output, parts)

    def as_row(self) -> RowParallelLinear:
        """What it becomes over tensor-parallel ranks that have some of the columns of x each."""
        return _LoRARow(self)


class _LoRAColumn(ColumnParallelLinear):
    """A's result, of this rank's part of the rows, travels to all ranks, which have a part of B each."""

    def __init__(self, linear: LoRALinear, gather_output: bool, parts: int | None):
        dtype = linear.parameter("weight").dtype
        sizes = linear.in_features, linear.out_features
        super().__init__(*sizes, linear.has_bias, dtype, gather_output, parts=parts)
        take_over(linear, self)
        _settings_of(linear, self)
        self.lora_A, self.lora_dropout = linear.lora_A, None
        self.lora_B = ColumnParallelLinear.of(linear.lora_B, gather_output, parts)  # type: ignore[arg-type]

    def construct(self, x: Tensor) -> Tensor:
        """Compute the layer's and its adapter's result, see `ColumnParallelLinear`."""
        self.lora_B.gather_input = self.gather_input  # which may be set after the layer was made
        return super().construct(x) + adapted(self, x)

    def cross_entropy(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """See `ColumnParallelLinear`; all logits are there at once, on every rank, unless `rows` says of how many tokens."""
        if options.get("rows") is not None:
            if self.bias is not None:
                raise ValueError("rows are for a projection without a bias: leave them out, or make the layer with bias=False")
            return loss_of_columns(self, *_joined(self, x), targets, options)
        if not self.gather_output:
            raise ValueError("the loss of an adapted projection is of all ranks' logits: make the layer with gather_output=True")
        return functional.cross_entropy(self(x)[: targets.shape[0]], targets, **_without_rows(options))


class _LoRARow(RowParallelLinear):
    """A is divided as W is; its result is this rank's part of the rows, which B multiplies."""

    def __init__(self, linear: LoRALinear):
        dtype = linear.parameter("weight").dtype
        super().__init__(linear.in_features, linear.out_features, linear.has_bias, dtype)
        take_over(linear, self)
        _settings_of(linear, self)
        self.lora_B, self.lora_dropout = linear.lora_B, None
        self.lora_A = RowParallelLinear.of(linear.lora_A)  # type: ignore[arg-type]

    def construct(self, x: Tensor) -> Tensor:
        """Compute the layer's and its adapter's result, see `RowParallelLinear`."""
        return super().construct(x) + adapted(self, x)


_ADAPTED = (LoRALinear, _LoRAColumn, _LoRARow)


def _settings_of(linear: LoRALinear, made: Any) -> None:
    if linear.lora_dropout is not None:  # it draws for all rows or columns, of which a rank has a part
        raise ValueError(_no_dropout(linear.parameter("weight").name, linear.dropout))
    for name in ("rank", "alpha", "dropout", "rslora", "scale"):
        setattr(made, name, getattr(linear, name))


def _no_dropout(name: str, dropout: float) -> str:
    return f"{name} has an adapter with dropout={dropout}, which tensor-parallel ranks cannot draw: use dropout=0"


def adapted(layer: Any, x: Tensor) -> Tensor:
    """What an adapter adds."""
    return layer.lora_B(_narrow(layer, x)) * layer.scale


def _narrow(layer: Any, x: Tensor) -> Tensor:
    return layer.lora_A(x if layer.lora_dropout is None else layer.lora_dropout(x))


def _joined(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and W of one product that is that of the layer and its adapter: [x, scale * x Aᵀ] [W, B]ᵀ, which can be made in pieces."""
    return ops.cat((x, _narrow(layer, x) * layer.scale), -1), ops.cat((layer.weight, layer.lora_B.weight), -1)


def _without_rows(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "rows"}


def weight_of(layer: Any) -> Tensor:
    """What a linear layer multiplies with, its adapter's product included, for who multiplies by it in another order; no dropout
    is drawn, and no gradient is meant to go through. Over tensor-parallel ranks this rank's part, of a layer that has some of the
    columns of y."""
    if not hasattr(layer, "lora_A"):
        return layer.weight
    return layer.weight + ops.matmul(layer.lora_B.weight, layer.lora_A.weight) * layer.scale


def add_lora(
    model: nn.Cell, pattern: str, rank: int = 8, alpha: float = 16.0, *, dropout: float = 0.0, rslora: bool = False
) -> list[str]:
    """Give layers of a model adapters, and freeze everything else. Before an optimizer is made; `spread`, `init_parameters` or
    loading a model's files may come before or after. Adapters have their first values from here on. All ranks call it together.

    Called again, for other layers and with any settings, it leaves the adapters that there are as they are, trained if they were.

    Args:
        model: any Cell with `Linear` layers in it, or with what `spread` has made of them.
        pattern: a regular expression, to be found in the path of a layer: `q_proj|v_proj`.
        rank, alpha, dropout, rslora: see `LoRALinear`. With dropout the model is for one tensor-parallel rank.

    Returns:
        The paths of the layers; in a pipeline those of this rank's stages.

    Raises:
        ValueError: nothing matches, on no rank; a layer has an adapter already, or shares its weight with another place in the
            model; layers of a `PipelineTransformerBlockList`; or a number is out of range. Nothing has been changed then.
    """
    rank = whole("rank", rank, 1)
    if not 0.0 <= number("dropout", dropout) < 1.0:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    settings = Adapter(rank, float(alpha), float(dropout), rslora)
    return give_adapters(model, pattern, lambda path: settings)


def give_adapters(model: nn.Cell, pattern: str, settings_of: Callable[[str], Adapter]) -> list[str]:
    """`add_lora` with settings of each layer's own, by its path."""
    blocks = _blocks_of(model)
    if any(block.mode == "PIPE" for block in blocks):
        raise ValueError("layers in a PipelineTransformerBlockList cannot be given adapters: give them to the layers it is made of")
    found, twice = _found(model, pattern), [name for name, *_ in _adapted_in(model) if re.search(pattern, name)]
    if not _found_somewhere(bool(found or twice), "layers to adapt"):
        known = sorted({name.rsplit(".", 1)[-1] for name, _, _, cell in _children(model) if _fits(cell)})
        raise ValueError(f"no Linear layer has {pattern!r} in its path; the last parts of those that there are: {', '.join(known)}")
    if twice:
        text = f"{twice[0]} has an adapter already: use a pattern that leaves it out, or merge_lora first"
    else:
        text = next(_obstacles(model, found, settings_of), "")
    _refuse(text)
    kept = {id(p) for *_, cell in _adapted_in(model) for p in _own_parameters(cell)}
    for p in model.get_parameters():
        if id(p) not in kept:
            _freeze(p)
    for name, parent, key in found:
        made = _adapted_layer(child_table(parent)[key], *settings_of(name))
        _exchange(parent, key, made, name)
        initialise(child_table(made)["lora_A"].parameter("weight"))  # with A and B both zero neither would ever have a gradient
    for block in blocks:
        block.accept_changes()
    return [name for name, _, _ in found]


def _obstacles(model: nn.Cell, found: list[tuple[str, nn.Cell, str]], settings_of: Callable[[str], Adapter]) -> Iterator[str]:
    """Why layers cannot be given adapters."""
    places = _places(model)
    for name, parent, key in found:
        layer: Any = child_table(parent)[key]
        there = places[id(layer.parameter("weight"))]
        if len(there) > 1:  # an adapter of one place would be merged into what the other one multiplies with
            yield (
                f"{there[0][0]} and {there[1][0]} have one weight, which an adapter would be merged into for both: use a pattern "
                "that leaves them out, give each its own weight, or put the layer into its second place when it has its adapter"
            )
        dropout = settings_of(name).dropout
        if dropout and type(layer) is not Linear:
            yield _no_dropout(f"{name}.weight", dropout)


def merge_lora(model: nn.Cell) -> int:
    """Put what adapters add into the weights, W + scale * B A, and the plain layers back; before a model is spread or after. An
    optimizer of the adapters has nothing to do any more. All ranks call it together.

    Returns:
        How many there were, one that is in several places once; in a pipeline those of this rank's stages.

    Raises:
        ValueError: an adapted layer's weight is somewhere else without this adapter, so that what is computed there would change.
            Nothing has been changed then.
    """
    found = list(_adapted_in(model))
    _refuse(_merged_elsewhere(model, found))
    merged: set[int] = set()
    plain: dict[int, tuple[str, Any]] = {}  # an adapted layer -> its first path, and what takes its place wherever it is
    for name, parent, key, cell in found:
        weight: Any = cell.parameter("weight")
        if id(weight) not in merged:  # layers that were divided while they shared it are several, and have one adapter
            _merge(cell, weight)
        merged.add(id(weight))
        if id(cell) not in plain:
            plain[id(cell)] = name, _plain_layer(cell)
        _exchange(parent, key, plain[id(cell)][1], plain[id(cell)][0])
    for block in _blocks_of(model):
        block.accept_changes()
    return len(merged)


def _merge(cell: Any, weight: Any) -> None:
    with no_grad():
        a, b = (host_array(p.gather_all()) for p in _own_parameters(cell))
        values = host_array(weight.gather_all())
        added = cell.scale * (b.astype("float32") @ a.astype("float32"))
        weight.copy_full(from_host((values.astype("float32") + added).astype(values.dtype)))


def _merged_elsewhere(model: nn.Cell, found: list[tuple[str, nn.Cell, str, Any]]) -> str:
    """Which adapted layer has its weight in another place, too, without its adapter; empty: none."""
    places = _places(model)
    for name, _, _, cell in found:
        for path, other in places[id(cell.parameter("weight"))]:
            if not isinstance(other, _ADAPTED) or not all(a is b for a, b in zip(_own_parameters(cell), _own_parameters(other))):
                return f"{name} and {path} have one weight, and not one adapter, so that merging it would change {path}, too"
    return ""


def adapters_of(model: nn.Cell) -> dict[str, Adapter]:
    """The settings of the adapters on this rank, by the names that their parameters begin with."""
    found = {}
    for *_, cell in _adapted_in(model):
        layer: Any = cell
        path = _own_parameters(layer)[0].name.removesuffix(".lora_A.weight")
        found[path] = Adapter(layer.rank, layer.alpha, layer.dropout, layer.rslora)
    return found


def _adapted_in(model: nn.Cell) -> Iterator[tuple[str, nn.Cell, str, Any]]:
    return (found for found in _children(model) if isinstance(found[3], _ADAPTED))


def _own_parameters(layer: nn.Cell) -> list[Any]:
    """Those of A and B."""
    parts: list[Any] = [child_table(layer)[part] for part in ("lora_A", "lora_B")]
    return [part.parameter("weight") for part in parts]


def _places(model: nn.Cell) -> dict[int, list[tuple[str, nn.Cell]]]:
    """Where each parameter is: the id -> the cells that have it, and their paths; a cell that is in the model twice has two."""
    found = collections.defaultdict(list)
    for path, cell in [("the model", model), *((path, cell) for path, _, _, cell in _children(model))]:
        for i in {id(p) for p in parameter_table(cell).values() if p is not None}:
            found[i].append((path, cell))
    return found


def _refuse(text: str) -> None:
    """Raise ValueError on all ranks of the pipeline where one says why, so that none goes on alone."""
    if is_initialized() and current_world().mesh.pp > 1:
        said = gather_json(text, current_world().along("pp"), "obstacles to adapters")
        text = text or next(filter(None, said), "")
    if text:
        raise ValueError(text)


def freeze(model: nn.Cell, pattern: str = "") -> list[str]:
    """Have parameters whose names match a regular expression not be trained; all of them by default. All ranks call it together.

    Returns:
        Their names; in a pipeline those of this rank's stages, which may have none.

    Raises:
        ValueError: nothing matches, on no rank.
    """
    found = _named(model, pattern)
    for p in found:
        _freeze(p)
    return [p.name for p in found]


def thaw(model: nn.Cell, pattern: str = "") -> list[str]:
    """The opposite of `freeze`, and of `requires_grad = False` of a `DistributedParameter`. What was not trained when it was frozen
    stays as it is, and so do other Parameters that nobody has trained: running means, biases that a rule of its own moves.

    Returns:
        The names of those that are trained now; in a pipeline those of this rank's stages, which may have none.

    Raises:
        ValueError: nothing matches, on no rank, or nothing of it is to be trained.
    """
    found = [p for p in _named(model, pattern) if _may_be_trained(p)]
    if not _found_somewhere(bool(found), "parameters to thaw"):
        raise ValueError(
            f"no parameter of this {type(model).__name__} with {pattern!r} in its name was ever trained: set its requires_grad "
            "yourself if it is to be"
        )
    for p in found:
        p.requires_grad = True
    return [p.name for p in found]


def _named(model: nn.Cell, pattern: str) -> list[Parameter]:
    found: list[Parameter] = [p for p in model.get_parameters() if re.search(pattern, p.name)]
    if not _found_somewhere(bool(found), "parameters to train"):
        raise ValueError(f"no parameter of this {type(model).__name__} has {pattern!r} in its name")
    return found


_TRAINED_BEFORE = "trained_before_it_was_frozen"


def _freeze(p: Any) -> None:
    setattr(p, _TRAINED_BEFORE, p.requires_grad or getattr(p, _TRAINED_BEFORE, False))
    p.requires_grad = False


def _may_be_trained(p: Parameter) -> bool:
    """Whether it is, or was before it was frozen. Of what no `freeze` has seen, buffers are Parameters that are not sharded."""
    return p.requires_grad or getattr(p, _TRAINED_BEFORE, isinstance(p, DistributedParameter))


def _found_somewhere(here: bool, label: str) -> bool:
    """Whether a rank of the pipeline has found what was asked for; other ranks have the same as one of them."""
    if not is_initialized() or current_world().mesh.pp == 1:
        return here
    return any_rank(current_world().along("pp"), here, label)


def _blocks_of(model: nn.Cell) -> list[Block]:
    return [cell for _, cell in model.cells_and_names() if isinstance(cell, Block)]


def layers_to_adapt(model: nn.Cell, pattern: str) -> list[str]:
    """The paths of the layers that `add_lora` would give adapters on this rank."""
    return [name for name, _, _ in _found(model, pattern)]


def _found(model: nn.Cell, pattern: str) -> list[tuple[str, nn.Cell, str]]:
    return [(name, parent, key) for name, parent, key, cell in _children(model) if _fits(cell) and re.search(pattern, name)]


def _fits(cell: nn.Cell) -> bool:
    """Whether it is a linear layer, or one that `spread` has divided."""
    if type(cell) is RowParallelLinear:
        return not cell.split_input and not cell.all_reduce_output
    return type(cell) in (Linear, ColumnParallelLinear)


def _adapted_layer(layer: Any, *settings: Any) -> Any:
    """The layer with an adapter of these settings: of the same parameters, and divided as the layer is."""
    if type(layer) is Linear:
        return LoRALinear(layer, *settings)
    weight, has_bias = layer.parameter("weight"), parameter_table(layer).get("bias") is not None
    whole_layer = LoRALinear(Linear(layer.in_features, layer.out_features, has_bias, weight.dtype), *settings)
    whole_layer.parameter("weight").name = weight.name
    made: Any = whole_layer.as_row()
    if isinstance(layer, ColumnParallelLinear):
        made = whole_layer.as_column(layer.gather_output, weight.tp_parts)
        made.gather_input = layer.gather_input
    made.chunks = layer.chunks
    _keep_parameters(layer, made)
    return made


def _plain_layer(layer: Any) -> Any:
    """The layer without an adapter, of the same parameters, and divided as the layer is."""
    weight, has_bias = layer.parameter("weight"), parameter_table(layer).get("bias") is not None
    sizes = layer.in_features, layer.out_features, has_bias, weight.dtype
    if isinstance(layer, LoRALinear):
        made: Any = Linear(*sizes)
    elif isinstance(layer, ColumnParallelLinear):
        made = ColumnParallelLinear(*sizes, layer.gather_output, parts=weight.tp_parts)
        made.gather_input, made.chunks = layer.gather_input, layer.chunks
    else:
        made = RowParallelLinear(*sizes)
        made.chunks = layer.chunks
    _keep_parameters(layer, made)
    return made


def _keep_parameters(layer: nn.Cell, made: nn.Cell) -> None:
    """Have a layer's parameters be those of the one that takes its place."""
    for name in ("weight", "bias"):
        if parameter_table(layer).get(name) is not None:
            parameter_table(made)[name] = parameter_table(layer)[name]


def _exchange(parent: nn.Cell, key: str, made: nn.Cell, path: str) -> None:
    """Put a layer in another one's place. MindSpore renames its parameters then; initial values depend on their names."""
    setattr(parent, key, made)
    for name, cell in made.cells_and_names():
        for own, parameter in parameter_table(cell).items():
            if parameter is not None:
                parameter.name = ".".join(part for part in (path, name, own) if part)


def _children(model: nn.Cell, path: str = "") -> Iterator[tuple[str, nn.Cell, str, nn.Cell]]:
    """Each cell below: its path, its parent, its key there, itself; parts of adapted layers are none of their own."""
    for key, cell in list(child_table(model).items()):
        if cell is not None:
            name = f"{path}.{key}" if path else key
            yield name, model, key, cell
            if not isinstance(cell, _ADAPTED):
                yield from _children(cell, name)
