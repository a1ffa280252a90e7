"""Layers whose weights are divided over tensor-parallel ranks (Shoeybi et al., 2019; Korthikanti et al., 2022).

Every rank calls them with the same batch. Written for any number of ranks: sizes are those of the whole layer, and so are initial
values and what `copy_full` takes. On one rank they are `Linear` and an embedding.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, TypeVar

import mindspore as ms
from mindspore import Tensor, nn

from ..comm import Engine, World, any_rank
from ..comm import world as current_world
from ..compat.autograd import no_grad
from ..compat.cells import is_only_construct, parameter_table
from ..compat.runtime import host_array
from ..distributed import all_gather, gathered_linears, parallel_embedding, parallel_linear, parallel_linear_cross_entropy
from ..distributed.linear import ReduceType
from ..zero import DistributedModule, DistributedParameter, ParameterInitializer, empty, init
from . import functional
from .linear import Linear, weight_initializer


class ColumnParallelLinear(DistributedModule):
    """y = x Wᵀ + b, each tensor-parallel rank with some of the columns of y (BMTrain: `nn.ColumnParallelLinear`).

    Args:
        in_features, out_features: sizes of the last dim of x and, over all ranks, y.
        bias: whether there is one; starts at zero, and is divided as y is.
        dtype: of the parameters; x must have the same. None: float32.
        gather_output: y has all columns on every rank.
        gather_input: x is this rank's part of the rows (sequence parallelism), and is gathered along dim 0; False: x is the same on
            every rank.
        async_gather_chunks: in how many pieces x travels while others are multiplied; None: as many as suit the device.
        init_std: of the normal distribution that W starts with; None: xavier normal.
        parts: into how many parts W is divided, a divisor of the ranks, which share them; None: one for each.

    Raises:
        ValueError: the outputs cannot be divided in so many parts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: Any = None,
        gather_output: bool = False,
        gather_input: bool = True,
        async_gather_chunks: int | None = None,
        *,
        init_std: float | None = None,
        parts: int | None = None,
    ):
        super().__init__()
        dtype = ms.float32 if dtype is None else dtype
        self.in_features, self.out_features = in_features, out_features
        self.gather_input, self.gather_output, self.chunks = gather_input, gather_output, async_gather_chunks
        self.weight = DistributedParameter(
            empty(out_features, in_features, dtype=dtype),
            init_method=weight_initializer(init_std),
            tp_mode=True,
            tp_split_dim=0,
            tp_parts=parts,
        )
        self.bias = _zeros(out_features, dtype, 0, parts) if bias else None
        weight = self.parameter("weight")
        if gather_output and weight.tp_parts != weight.world.mesh.tp:
            raise ValueError("gather_output needs a part for each rank, not parts that are shared: leave `parts` out")

    @classmethod
    def of(cls, linear: Linear, gather_output: bool = False, parts: int | None = None) -> ColumnParallelLinear:
        """What a `Linear` becomes, of the same names and values, whose input is this rank's part of the rows."""
        if hasattr(linear, "as_column"):  # a layer with more to divide, as an adapter's
            return linear.as_column(gather_output, parts)
        sizes, weight = (linear.in_features, linear.out_features), linear.parameter("weight")
        made = cls(*sizes, linear.has_bias, weight.dtype, gather_output, parts=parts)
        return take_over(linear, made)

    def construct(self, x: Tensor) -> Tensor:
        """x (rows, ..., in_features) -> (rows, ..., this rank's columns); rows * ranks with `gather_input`."""
        return parallel_linear(
            x,
            self.weight,
            self.bias,
            _engine(self),
            gather_input=self.gather_input,
            gather_output=self.gather_output,
            out_features=self.out_features,
            chunks=self.chunks,
        )

    def cross_entropy(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The loss of the logits of all ranks for x, see `distributed.parallel_linear_cross_entropy`; there is no bias.

        Args:
            x: (rows, in_features), this rank's part of the rows with `gather_input`.
            targets: of the first rows, those that are no padding.
        """
        if self.bias is not None:
            raise ValueError("cross_entropy is for a projection without a bias: make the layer with bias=False")
        return loss_of_columns(self, x, self.weight, targets, options)


class RowParallelLinear(DistributedModule):
    """y = x Wᵀ + b, each tensor-parallel rank with some of the columns of x (BMTrain: `nn.RowParallelLinear`).

    Args:
        in_features, out_features: sizes of the last dim of, over all ranks, x and y.
        bias: whether there is one; starts at zero, the same on every rank, and is added once, to the sum.
        dtype: of the parameters; x must have the same. None: float32.
        split_input: x has all columns and is this rank's part of the rows; False: it has all rows and this rank's columns.
        all_reduce_output: y is the same on every rank; False: it is this rank's part of the rows (sequence parallelism).
        async_chunks: in how many pieces y travels while others are multiplied; None: as many as suit the device.
        init_std: of the normal distribution that W starts with; None: xavier normal.

    Raises:
        ValueError: the inputs cannot be divided over the ranks; when called, the rows cannot.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: Any = None,
        split_input: bool = False,
        all_reduce_output: bool = False,
        async_chunks: int | None = None,
        *,
        init_std: float | None = None,
    ):
        super().__init__()
        dtype = ms.float32 if dtype is None else dtype
        self.in_features, self.out_features = in_features, out_features
        self.split_input, self.all_reduce_output, self.chunks = split_input, all_reduce_output, async_chunks
        self.weight = DistributedParameter(
            empty(out_features, in_features, dtype=dtype), init_method=weight_initializer(init_std), tp_mode=True, tp_split_dim=1
        )
        self.bias = _zeros(out_features, dtype) if bias else None

    @classmethod
    def of(cls, linear: Linear) -> RowParallelLinear:
        """What a `Linear` becomes, of the same names and values, whose output is this rank's part of the rows."""
        if hasattr(linear, "as_row"):
            return linear.as_row()
        sizes, weight = (linear.in_features, linear.out_features), linear.parameter("weight")
        return take_over(linear, cls(*sizes, linear.has_bias, weight.dtype))

    def construct(self, x: Tensor) -> Tensor:
        """x (rows, ..., this rank's columns) -> (rows, ..., out_features); rows / ranks without `all_reduce_output`."""
        return parallel_linear(
            x,
            self.weight,
            self.bias,
            _engine(self),
            split_input=self.split_input,
            reduce_output=ReduceType.ALL_REDUCE if self.all_reduce_output else ReduceType.REDUCE_SCATTER,
            chunks=self.chunks,
        )


class VPEmbedding(DistributedModule):
    """An embedding whose table is divided over tensor-parallel ranks by rows of the vocabulary (BMTrain: `nn.VPEmbedding`).

    A look-up sums what the ranks find; the table is never gathered (BMTrain: it is, at each call). The vocabulary need not be a
    multiple of the ranks.

    Args:
        vocab_size: rows of the table.
        embedding_size: columns.
        dtype: of the table. None: float16, as in BMTrain.
        init_mean, init_std: of the normal distribution that it starts with.
        scatter_output: a look-up returns this rank's part of dim 0 (sequence parallelism); False: the same on every rank.

    Raises:
        ValueError: when called: an id is outside of the vocabulary, or dim 0 cannot be divided.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        dtype: Any = None,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        *,
        scatter_output: bool = False,
    ):
        super().__init__()
        dtype = ms.float16 if dtype is None else dtype
        self.vocab_size, self.embedding_size, self.scatter_output = vocab_size, embedding_size, scatter_output
        self.weight = DistributedParameter(
            empty(vocab_size, embedding_size, dtype=dtype),
            init_method=ParameterInitializer(init.normal_, mean=init_mean, std=init_std),
            tp_mode=True,
            tp_split_dim=0,
        )

    def construct(self, x: Tensor, projection: bool = False) -> Tensor:
        """ids (rows, ...) -> (rows, ..., embedding_size); with `projection`, hidden states (rows, ..., embedding_size) -> logits
        (rows, ..., this rank's part of the vocabulary), where the hidden states are the same on every rank."""
        if projection:
            return self.projection(x)
        first = self.parameter("weight").layout.box[0].start
        return parallel_embedding(x, self.weight, first, self.vocab_size, _engine(self), self.scatter_output)

    def projection(self, x: Tensor, gather_input: bool = False, gather_output: bool = False) -> Tensor:
        """Hidden states (rows, ..., embedding_size) -> logits of this rank's part of the vocabulary; see `FusedCrossEntropy`.

        Args:
            gather_input: x is this rank's part of the rows.
            gather_output: all ranks get the logits of the whole vocabulary.
        """
        return parallel_linear(
            x,
            self.weight,
            None,
            _engine(self),
            gather_input=gather_input,
            gather_output=gather_output,
            out_features=self.vocab_size,
        )

    def cross_entropy(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The loss of the logits of all ranks for x, see `distributed.parallel_linear_cross_entropy`.

        Args:
            x: (rows, embedding_size), this rank's part of the rows with `scatter_output`.
            targets: of the first rows, those that are no padding.
        """
        return _cross_entropy(x, self.weight, targets, _engine(self), self.scatter_output, self.vocab_size, options)


class VPProjection(ColumnParallelLinear):
    """Logits of this rank's part of the vocabulary, for `FusedCrossEntropy(parallel=True)` (BMTrain: `nn.VPProjection`, which its
    tests name).

    Args:
        in_size, vocab_size: sizes of the last dim of the hidden states and, over all ranks, of the logits.
        dtype: of the weight; None: float32.
        gather_input: the hidden states are this rank's part of the rows; False: the same on every rank.
        init_std: of the normal distribution that the weight starts with; None: xavier normal.
    """

    def __init__(
        self, in_size: int, vocab_size: int, dtype: Any = None, gather_input: bool = False, *, init_std: float | None = None
    ):
        super().__init__(in_size, vocab_size, bias=False, dtype=dtype, gather_input=gather_input, init_std=init_std)


class Projection(VPProjection):
    """Logits of the whole vocabulary on every rank, from a weight that is divided by it (BMTrain: `nn.Projection`, which its tests
    name). Arguments as those of `VPProjection`."""

    def __init__(
        self, in_size: int, vocab_size: int, dtype: Any = None, gather_input: bool = False, *, init_std: float | None = None
    ):
        super().__init__(in_size, vocab_size, dtype, gather_input, init_std=init_std)
        self.gather_output = True


class OpParallelLinear:
    """What parallel layers are made of, for weights of one's own, e.g. several joined (BMTrain: `OpParallelLinear`)."""

    @staticmethod
    def apply(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        gather_input: bool = False,
        gather_output: bool = False,
        split_input: bool = False,
        reduce_output_type: ReduceType | None = None,
        async_gather_chunks: int | None = None,
        *,
        in_world: World | None = None,
    ) -> Tensor:
        """See `bmtrain_ms.distributed.parallel_linear`; among the tensor-parallel ranks of the current world, or `in_world`."""
        return parallel_linear(
            input,
            weight,
            bias,
            (in_world or current_world()).along("tp"),
            gather_input=gather_input,
            split_input=split_input,
            reduce_output=None if reduce_output_type is None else ReduceType(reduce_output_type),
            gather_output=gather_output,
            chunks=async_gather_chunks,
        )


def projections(x: Tensor, *layers: nn.Cell) -> tuple[Tensor, ...]:
    """What each of several linear layers makes of one x; where all are column-parallel and gather it, it travels once.

    A layer with hooks, a cast of its own or another construct (an adapter) is called by itself, and so are the others then.
    """
    if not all(map(is_only_construct, layers)):
        return tuple(layer(x) for layer in layers)
    plain = [layer for layer in layers if type(layer) is Linear]
    if len(plain) == len(layers):
        return functional.linears(x, [layer.weight for layer in plain], [layer.bias for layer in plain])
    joint = [layer for layer in layers if type(layer) is ColumnParallelLinear and layer.gather_input and not layer.gather_output]
    if len(joint) < len(layers):
        return tuple(layer(x) for layer in layers)
    weights, biases = [layer.weight for layer in joint], [layer.bias for layer in joint]
    return gathered_linears(x, weights, biases, _engine(joint[0]), joint[0].chunks)


Layer = TypeVar("Layer", bound=DistributedModule)
_taken: list[dict[int, tuple[DistributedParameter, DistributedParameter]]] = []  # of models that are being divided, see `dividing`


@contextlib.contextmanager
def dividing(model: nn.Cell) -> Iterator[None]:
    """Inside the `with` statement layers of a model are divided, and parameters that they share stay shared.

    Raises:
        ValueError: layers share a parameter, and are divided in different ways, or only some of them are; on every rank.
    """
    taken: dict[int, tuple[DistributedParameter, DistributedParameter]] = {}
    _taken.append(taken)
    try:
        yield
    finally:
        _taken.pop()
    for path, cell in model.cells_and_names():
        for name, p in parameter_table(cell).items():
            if id(p) in taken:
                raise ValueError(
                    f"{path}.{name} is the parameter {taken[id(p)][1].name} of a layer that is divided over tensor-parallel ranks, "
                    f"and {type(cell).__name__} is not: give each its own, or use tp_size=1"
                )


def take_over(old: DistributedModule, new: Layer) -> Layer:
    """Give parameters of a layer to the one that takes its place: names, how they are initialised, whether they are trained, and
    values, if any rank has written some. All ranks call it together.

    Returns:
        `new`.
    """
    for name in ("weight", "bias"):
        before, after = parameter_table(old).get(name), parameter_table(new).get(name)
        if before is None or after is None:
            continue
        if _taken and id(before) in _taken[-1]:  # of a layer that was divided already
            parameter_table(new)[name] = _shared(_taken[-1][id(before)][1], after)
            continue
        after.name, after.requires_grad = before.name, before.requires_grad
        after.init_method, after.group = before.init_method, before.group
        written = before.replaced > 0 or bool(host_array(before).any())
        if any_rank(before.world.along(before.along), written, f"values of {before.name}"):
            with no_grad():
                after.copy_full(before.gather())
        if _taken:
            _taken[-1][id(before)] = before, after
    return new


def _shared(there: DistributedParameter, asked: DistributedParameter) -> DistributedParameter:
    """What a parameter has become, for another layer that has it, too, and asks for one that is cut like `asked`."""
    if there.layout != asked.layout:
        cuts = [", ".join(f"dim {cut.dim} in {cut.parts}" for cut in p.layout.splits) or "nothing" for p in (there, asked)]
        raise ValueError(
            f"{there.name} is in two layers that tensor parallelism divides in different ways, {cuts[0]} and {cuts[1]}: give each "
            "its own, or use tp_size=1"
        )
    return there


def loss_of_columns(layer: ColumnParallelLinear, x: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
    """See `ColumnParallelLinear.cross_entropy`; of a weight that is divided as the layer's."""
    return _cross_entropy(x, weight, targets, _engine(layer), layer.gather_input, layer.out_features, options)


def _cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, engine: Engine, gather: bool, classes: int, options: dict[str, Any]
) -> Tensor:
    if gather:
        x = all_gather(x, engine).reshape(-1, x.shape[-1])
        x = x if x.shape[0] == targets.shape[0] else x[: targets.shape[0]]
    return parallel_linear_cross_entropy(x, weight, targets, engine, classes, **options)


def _engine(layer: DistributedModule) -> Engine:
    """The tensor-parallel ranks of the world that the layer was made in."""
    return layer.parameter("weight").world.along("tp")


def _zeros(size: int, dtype: Any, split_dim: int = -1, parts: int | None = None) -> DistributedParameter:
    return DistributedParameter(
        empty(size, dtype=dtype),
        init_method=ParameterInitializer(init.zeros_),
        tp_mode=split_dim >= 0,
        tp_split_dim=split_dim,
        tp_parts=parts,
    )
