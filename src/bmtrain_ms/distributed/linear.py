"""A linear layer whose weight is divided over tensor-parallel ranks, as one function with a derivative of its own.

Inputs are not kept whole: what was gathered in forward is gathered again in backward, as the rank's part is all that has to stay
(Korthikanti et al., 2022). Derivatives of the collectives are those of [Note: gradients], so each rank's gradients of what all
ranks have are its own part of a sum, whatever the combination.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Iterator, Sequence

from mindspore import Tensor, ops

from bmtrain_ms_base.layout import part_of

from ..comm import Engine, Work
from ..compat.autograd import custom_vjp
from ..ops import matmul

Tensors = tuple[Tensor, ...]


class ReduceType(Enum):
    """What becomes of products that are parts of a sum (BMTrain: `ReduceType`): the sum on every rank, or a part of its rows."""

    ALL_REDUCE = 1
    REDUCE_SCATTER = 2


def parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    engine: Engine,
    *,
    gather_input: bool = False,
    split_input: bool = False,
    reduce_output: ReduceType | None = None,
    gather_output: bool = False,
    out_features: int | None = None,
    chunks: int | None = None,
) -> Tensor:
    """x Wᵀ + b with this rank's part of W (BMTrain: `OpParallelLinear`); all ranks of `engine` call it together.

    Args:
        x: (rows, ..., in).
        weight: (out, in), this rank's part along one of its dims.
        bias: (out,), with the part of the output that this rank has: added once, after a reduction.
        gather_input: x is this rank's part of the rows (sequence parallelism): it is gathered along dim 0.
        split_input: x is this rank's part of the rows, with all columns: all rows of this rank's columns are taken.
        reduce_output: W is divided along `in`, so products are summed.
        gather_output: W is divided along `out`; the result has all columns.
        out_features: with `gather_output`: of all ranks; default: equal parts.
        chunks: with collectives along rows: in how many pieces they travel, while another piece is multiplied. Default: 1 on CPU
            ranks, whose transfers take the same core as products, 2 on devices.

    Returns:
        (rows', ..., out'): rows' = rows * ranks where gathered, rows / ranks where scattered.

    Raises:
        ValueError: arguments that exclude each other, `chunks` below 1, or rows that cannot be scattered evenly.
    """
    if gather_input and reduce_output is not None:
        raise ValueError("gather_input is for a weight divided along its outputs, reduce_output for one along its inputs: use one")
    if gather_input and split_input:
        raise ValueError("gather_input and split_input are two things to do with the rows of one input: choose one")
    if gather_output and reduce_output is not None:
        raise ValueError("gather_output joins columns of products, reduce_output sums them: choose one")
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks must be at least 1, not {chunks}")
    chunks = chunks or (1 if engine.lands_in_place else 2)
    how = _Linear(engine, gather_input, split_input, reduce_output, gather_output, out_features, chunks)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return custom_vjp(how.forward, how.backward, *inputs)[0]


@dataclass(frozen=True)
class _Linear:
    """The options of `parallel_linear`; matrices are (rows, columns)."""

    engine: Engine
    gather_input: bool
    split_input: bool
    reduce_output: ReduceType | None
    gather_output: bool
    out_features: int | None
    chunks: int

    def forward(self, x: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensors, None]:
        rows = _matrix(x)
        if self.gather_input:
            y = self.joined([matmul(piece, weight, transpose_b=True) for piece in self.gathered(rows, "input")])
        else:
            rows = self._own_columns(rows) if self.split_input else rows
            if self.reduce_output is ReduceType.REDUCE_SCATTER:
                y = _join_rows(self._leaving(rows, weight, True, "output"))
            else:
                y = matmul(rows, weight, transpose_b=True)
        if self.reduce_output is ReduceType.ALL_REDUCE:
            y = self.engine.all_reduce([y], label="linear, sum of the output").wait()[0]
        for b in bias:
            y = ops.add(y, b)
        if self.gather_output:
            y = self._all_columns(y)
        return (y.reshape(-1, *x.shape[1:-1], y.shape[-1]),), None

    def backward(self, inputs: Tensors, _: None, grads: Tensors) -> list[Tensor]:
        x, weight, *bias = inputs
        rows, grad = _matrix(x), _matrix(grads[0])
        if self.gather_output:
            grad = self._own_part(grad, weight.shape[0])
        found = [grad.sum(0) for _ in bias]
        again = self.engine.all_gather([rows], label="linear, input again") if self.gather_input else None
        if self.split_input:
            rows = self._own_columns(rows)
        if self.reduce_output is ReduceType.REDUCE_SCATTER:
            pieces = list(self.gathered(grad, "gradient"))
            x_grad = self.joined([matmul(piece, weight) for piece in pieces])
            grad = self.joined(pieces)
        elif self.reduce_output is ReduceType.ALL_REDUCE:
            grad = self.engine.all_reduce([grad], label="linear, sum of the gradient").wait()[0]
            x_grad = matmul(grad, weight)
        elif self.gather_input:
            leaving = self._leaving(grad, weight, False, "gradient")
            weight_grad = matmul(grad, again.wait()[0], transpose_a=True)
            return [_join_rows(leaving).reshape(x.shape), weight_grad, *found]
        else:
            x_grad = matmul(grad, weight)
        if self.split_input:
            x_grad = self._from_own_columns(x_grad)
        return [x_grad.reshape(x.shape), matmul(grad, rows, transpose_a=True), *found]

    # Rows: gathered, or summed and scattered, in pieces of which one travels while another is multiplied #

    def gathered(self, rows: Tensor, what: str) -> Iterator[Tensor]:
        """Pieces of the rows of all ranks: each (ranks * some rows, columns), ordered by rank."""
        parts = _parts(rows.shape[0], self.chunks)
        label = f"linear, {what}"
        work = self.engine.all_gather([_rows(rows, *parts[0])], label=label)
        for part in parts[1:]:
            following = self.engine.all_gather([_rows(rows, *part)], label=label)
            yield work.wait()[0]
            work = following
        yield work.wait()[0]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """What was made of `gathered` pieces as one matrix, all rows in order."""
        if len(pieces) == 1:
            return pieces[0]
        columns = pieces[0].shape[-1]
        return ops.cat([piece.reshape(self.engine.size, -1, columns) for piece in pieces], 1).reshape(-1, columns)

    def _leaving(self, rows: Tensor, weight: Tensor, transpose: bool, what: str) -> list[Work]:
        """rows W, or rows Wᵀ, on its way: each rank gets the sum of its part of the rows."""
        size, columns = self.engine.size, rows.shape[-1]
        if rows.shape[0] % size:
            raise ValueError(
                f"{rows.shape[0]} rows cannot be scattered over {size} tensor-parallel ranks: pad them to a multiple, or use "
                "all_reduce_output"
            )
        parts = _parts(rows.shape[0] // size, self.chunks)
        works = []
        for part in parts:
            piece = rows if len(parts) == 1 else rows.reshape(size, -1, columns)[:, part[0] : part[1]].reshape(-1, columns)
            works.append(self.engine.reduce_scatter([matmul(piece, weight, transpose_b=transpose)], label=f"linear, {what}"))
        return works

    # Columns #

    def _own_columns(self, rows: Tensor) -> Tensor:
        """This rank's columns of all ranks' rows: (n, ranks * c) -> (ranks * n, c)."""
        n, columns, size = rows.shape[0], rows.shape[1], self.engine.size
        if columns % size:
            raise ValueError(f"{columns} columns cannot be divided over {size} tensor-parallel ranks")
        by_rank = rows.reshape(n, size, columns // size).transpose(1, 0, 2).reshape(size * n, -1)
        return self.engine.all_to_all([by_rank], "linear, split input").wait()[0]

    def _from_own_columns(self, grad: Tensor) -> Tensor:
        """The gradient of `_own_columns`, which is its inverse."""
        size = self.engine.size
        n, columns = grad.shape[0] // size, grad.shape[1]
        back = self.engine.all_to_all([grad], "linear, split input, backward").wait()[0]
        return back.reshape(size, n, columns).transpose(1, 0, 2).reshape(n, size * columns)

    def _widths(self, own: int) -> list[int]:
        """How many columns each rank has."""
        size, total = self.engine.size, self.out_features or own * self.engine.size
        ends = [part_of(total, i, size) for i in range(size)]
        return [stop - start for start, stop in ends]

    def _all_columns(self, y: Tensor) -> Tensor:
        """(n, own) -> (n, columns of all ranks)."""
        widths, n = self._widths(y.shape[1]), y.shape[0]
        padded = _pad_columns(y, max(widths))
        gathered = self.engine.all_gather([padded], label="linear, columns of the output").wait()[0]
        by_rank = gathered.reshape(self.engine.size, n, -1)
        if len(set(widths)) == 1:
            return by_rank.transpose(1, 0, 2).reshape(n, -1)
        return ops.cat([by_rank[i][:, :width] for i, width in enumerate(widths)], 1)

    def _own_part(self, grad: Tensor, own: int) -> Tensor:
        """The gradient of `_all_columns`: the sum over the ranks of those of this rank's columns."""
        widths, n = self._widths(own), grad.shape[0]
        if len(set(widths)) == 1:
            by_rank = grad.reshape(n, self.engine.size, -1).transpose(1, 0, 2).reshape(self.engine.size * n, -1)
        else:
            starts = [sum(widths[:i]) for i in range(len(widths))]
            pieces = [_pad_columns(grad[:, start : start + width], max(widths)) for start, width in zip(starts, widths)]
            by_rank = ops.cat(pieces, 0)
        summed = self.engine.reduce_scatter([by_rank], label="linear, columns of the gradient").wait()[0]
        return summed if summed.shape[1] == own else summed[:, :own]


def gathered_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], engine: Engine, chunks: int | None = None
) -> Tensors:
    """`parallel_linear(x, w, b, engine, gather_input=True)` for several weights, of which the rows of x travel for all of them.

    Args:
        x: (rows, ..., in), this rank's part of the rows.
        weights, biases: as many of each; (out, in), this rank's part of the outputs, and (out,) or None.
        chunks: see `parallel_linear`.

    Returns:
        (rows * ranks, ..., out) for each weight.

    Raises:
        ValueError: `chunks` is below 1.
    """
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks must be at least 1, not {chunks}")
    how = _Linear(engine, True, False, None, False, None, chunks or (1 if engine.lands_in_place else 2))
    count, of_bias = len(weights), [i for i, b in enumerate(biases) if b is not None]

    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensors, None]:
        pieces: list[list[Tensor]] = [[] for _ in weights]
        for rows in how.gathered(_matrix(x), "input"):
            for found, weight in zip(pieces, parameters):
                found.append(matmul(rows, weight, transpose_b=True))
        outputs = [how.joined(found) for found in pieces]
        for i, bias in zip(of_bias, parameters[count:]):
            outputs[i] = ops.add(outputs[i], bias)
        return tuple(y.reshape(-1, *x.shape[1:-1], y.shape[-1]) for y in outputs), None

    def backward(inputs: Tensors, _: None, grads: Tensors) -> list[Tensor]:
        x, *parameters = inputs
        again = engine.all_gather([_matrix(x)], label="linear, input again")
        of_outputs = [_matrix(grad) for grad in grads]
        x_grad = matmul(of_outputs[0], parameters[0])
        for grad, weight in zip(of_outputs[1:], parameters[1:count]):
            x_grad = ops.add(x_grad, matmul(grad, weight))
        leaving = engine.reduce_scatter([x_grad], label="linear, gradient")
        rows = again.wait()[0]
        of_weights = [matmul(grad, rows, transpose_a=True) for grad in of_outputs]
        return [leaving.wait()[0].reshape(x.shape), *of_weights, *(of_outputs[i].sum(0) for i in of_bias)]

    return custom_vjp(forward, backward, x, *weights, *(b for b in biases if b is not None))


def _matrix(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _parts(rows: int, chunks: int) -> list[tuple[int, int]]:
    """Ranges of rows, at most `chunks`, none of them empty."""
    return [part_of(rows, i, min(chunks, rows) or 1) for i in range(min(chunks, rows) or 1)]


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    return x if stop - start == x.shape[0] else x[start:stop]


def _join_rows(works: Sequence[Work]) -> Tensor:
    pieces = [work.wait()[0] for work in works]
    return pieces[0] if len(pieces) == 1 else ops.cat(pieces, 0)


def _pad_columns(x: Tensor, columns: int) -> Tensor:
    missing = columns - x.shape[1]
    return ops.cat((x, ops.zeros((x.shape[0], missing), x.dtype)), 1) if missing else x
