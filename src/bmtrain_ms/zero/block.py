"""Blocks: the unit of gathering, recomputation and reduction.

A call of a Block is made of differentiable functions of our own (`compat.autograd.custom_op`), so that autograd itself calls us at
the right moments, and gradients are right by construction: *gather* is a function from shards to full tensors, and its derivative
is *reduce*. While the inner module runs, its parameters are hidden behind the full tensors (instance attributes win over a Cell's
parameter table); it need not know about any of this.

With checkpointing the whole call is one such function. Its backward gathers once, recomputes and differentiates. Without, there
are two: the gather before the inner module, and an identity behind it whose backward gathers again into the memory that the
recorded graph reads (`Gathered.park`).
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ..comm import rank
from ..compat.autograd import Graph, custom_op, recording, vjp
from ..compat.cells import child_table, drop_rate, parameter_table, share_tables
from ..compat.runtime import host_array, is_float
from .context import ZeroContext, context_of
from .group import Gathered, ParamGroup
from .param import DistributedParameter
from .pipeline import Phase
from .tree import Rebuild, flatten


class Block(nn.Cell):
    """ZeRO around a module: gathers its parameters for the call and lets go of them afterwards (BMTrain: `Block`).

    Transparent: parameters keep their names, attributes are the inner module's. Arguments and results may be anything; tensors in
    tuples, lists and dicts at any depth receive gradients. A list or tuple as result becomes a tuple, as in BMTrain.

    Args:
        inner_module: a Cell all of whose parameters are `DistributedParameter`. One without any is called as it is.
        use_checkpoint: recompute the forward pass in backward instead of keeping its activations.
        zero_level: 3 gathers again for backward; 2 keeps the gathered parameters from forward to backward.
        initialized, mode: of pipelines in BMTrain; only False and `BLOCK` so far.

    Raises:
        TypeError: `inner_module` is not a Cell.
        ValueError: a parameter is not a `DistributedParameter`, a Block is inside, `zero_level` is not 2 or 3, or an option is one
            of pipelines.
    """

    def __init__(
        self,
        inner_module: nn.Cell,
        use_checkpoint: bool = True,
        zero_level: int = 3,
        initialized: bool = False,
        mode: str = "BLOCK",
    ):
        super().__init__(auto_prefix=False)
        if initialized or mode != "BLOCK":
            raise ValueError(
                f"Block(initialized={initialized}, mode={mode!r}) is for pipelines, which are not part of this release: "
                "leave both out"
            )
        if not isinstance(inner_module, nn.Cell):
            raise TypeError(f"Block wraps a Cell, not a {type(inner_module).__name__}")
        if zero_level not in (2, 3):
            raise ValueError(f"zero_level must be 2 or 3, not {zero_level!r}")
        slots = _find_slots(inner_module)
        own = self.__dict__  # not Cell attributes: the inner module must not appear as a child with a name of its own
        own["inner"], own["use_checkpoint"], own["zero_level"] = inner_module, bool(use_checkpoint), zero_level
        own["_slots"], own["_group"], own["_checked"], own["_graph"] = slots, None, False, Graph()
        own["_function"], own["_replay_checked"], own["_made_of"] = None, False, _contents(inner_module)
        share_tables(self, with_cell=inner_module)
        self.training = inner_module.training
        own["_dropouts"] = [(name, c) for name, c in inner_module.cells_and_names() if _is_dropout(c)]
        for _, places in slots:
            for cell, _ in places:
                cell.__dict__["_in_block"] = True

    @classmethod
    def in_place(cls, module: nn.Cell, use_checkpoint: bool = True, zero_level: int = 3) -> Block:
        """Have `module` itself act as a Block, wherever it is referred to; returns the Block that calls go through.

        `module(...)` and `module.construct(...)` do. For models whose code we do not know: `BMTrainModelWrapper` uses it.
        """
        block = cls(module, use_checkpoint, zero_level)
        block.__dict__["_function"] = module.construct
        module.__dict__["construct"] = block.construct
        return block

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("inner")
        if inner is None:
            return super().__getattr__(name)
        return getattr(inner, name)

    def __repr__(self) -> str:
        return f"Block({self.inner!r})"

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        if self._function is None and self.inner.training != self.training:
            self.inner.training = self.training  # set_train on a parent sees the Block and the children, not the inner module
        if not self._slots:  # nothing to gather; recomputing it would draw dropout anew
            return _Call._result(self.run(*args, **kwargs))
        self._refuse_replaced_parameters()
        leaves, rebuild = flatten((args, kwargs))
        call = _Call(self, context_of(self.group.world), leaves, rebuild)
        if not recording():
            return call.evaluate()
        self._refuse_replaying_dropout()
        return call.checkpointed() if self.use_checkpoint else call.kept()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module, ungathered."""
        return (self._function or self.inner)(*args, **kwargs)

    @property
    def group(self) -> ParamGroup:
        """The parameters; made at the first call, when they have their final names."""
        group = self._group
        if group is None:
            params = [parameter for parameter, _ in self._slots]
            group = self.__dict__["_group"] = ParamGroup(params, _common_prefix([p.name for p in params]))
        return group

    @contextlib.contextmanager
    def substituted(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Hide the parameters behind full tensors."""
        for (_, places), tensor in zip(self._slots, tensors):
            for cell, name in places:
                vars(cell)[name] = tensor
        try:
            yield
        finally:
            for _, places in self._slots:
                for cell, name in places:
                    vars(cell).pop(name, None)

    def _refuse_replaced_parameters(self) -> None:
        for parameter, places in self._slots:
            for cell, name in places:
                if parameter_table(cell).get(name) is not parameter:
                    raise ValueError(
                        f"parameter {parameter.name} of {type(cell).__name__}.{name} was replaced after the Block was made, on "
                        f"rank {parameter.world.mesh.rank}: the Block would go on with the old one. Write values into the "
                        "parameter (copy_full, set_shard), or replace it before wrapping"
                    )
        contents = _contents(self.inner)
        if len(contents) != len(self._made_of) or any(a is not b for a, b in zip(contents, self._made_of)):
            raise ValueError(
                f"rank {rank()}: cells or parameters of {type(self.inner).__name__} were added, exchanged, removed or, of those "
                "that are not sharded, made trainable after the Block was made: gradients would be lost. Change the module "
                "(adapters, pruning) before wrapping it"
            )

    def _warn_of_copies(self, gathered: Gathered) -> None:
        """Once for each Block: of parameters that stay in memory until backward in spite of ZeRO-3."""
        if self._checked:
            return
        self.__dict__["_checked"] = True
        copied = gathered.copied()
        if copied:
            cells = {id(p): type(places[0][0]).__name__ for p, places in self._slots}
            names = ", ".join(f"{p.name} (in {cells[id(p)]})" for p in copied)
            warnings.warn(
                f"the recorded graph keeps a full copy of {names} until backward: on this MindSpore a view of a parameter, such as "
                "w.T, a slice or a reshape, copies it. Multiply with ops.MatMul(transpose_b=True) or "
                "bmtrain_ms.nn.functional.linear instead, or use Block(use_checkpoint=True)",
                stacklevel=2,
            )

    def _refuse_replaying_dropout(self) -> None:
        """MindSpore's generators do not replay: recomputation would draw another mask, and gradients would be wrong."""
        if not (self.use_checkpoint and self.inner.training):
            return
        for name, dropout in self._dropouts:
            if drop_rate(dropout):
                raise ValueError(
                    f"{name or 'the module'} is a mindspore.nn.Dropout in a checkpointed Block; it cannot draw the same mask "
                    "twice. Use bmtrain_ms.nn.Dropout, or Block(use_checkpoint=False)"
                )

    def _plain_values(self) -> list[tuple[str, np.ndarray]]:
        """Names and values of the plain Parameters inside."""
        cells = [cell for _, cell in self.inner.cells_and_names()]
        plain = [p for cell in cells for p in parameter_table(cell).values() if p is not None]
        return [(p.name, p.asnumpy().copy()) for p in plain if not isinstance(p, DistributedParameter)]

    def _check_replay(self, first: Sequence[Tensor], again: Sequence[Tensor], before: list[tuple[str, np.ndarray]]) -> None:
        """Once for each Block: that recomputation does what forward did, to rounding, and leaves its buffers as they were."""
        self.__dict__["_replay_checked"] = True
        where = f"rank {rank()}: recomputing {self.group.label} ({type(self.inner).__name__})"
        for x, y in zip(first, again):
            a, b = (host_array(z).astype(np.float32) for z in (x, y))
            rough = 1e-3 if x.dtype == ms.float32 else 1e-2
            if not np.allclose(a, b, rtol=rough, atol=rough * float(np.abs(a[np.isfinite(a)]).max(initial=0)), equal_nan=True):
                raise RuntimeError(
                    f"{where} gave other values than its forward pass, so its gradients would be wrong: something in it is random "
                    "(a dropout that is a function, not a bmtrain_ms.nn.Dropout) or changes state. Use "
                    "Block(use_checkpoint=False) for it"
                )
        for (name, old), (_, new) in zip(before, self._plain_values()):
            if not np.array_equal(old, new, equal_nan=old.dtype.kind == "f"):
                raise RuntimeError(
                    f"{where} changed {name} a second time (running statistics, a counter): use Block(use_checkpoint=False) for it"
                )


CheckpointBlock = Block


class _Call:
    """One call of a Block: its arguments, and what its backward must remember."""

    def __init__(self, block: Block, context: ZeroContext, leaves: list[Any], rebuild: Rebuild):
        self.block, self.group, self.pipeline = block, block.group, context.pipeline
        self.reducer, self.draws = context.reducer, context.draws
        self.leaves, self.rebuild = leaves, rebuild
        self.measure = self.group.world.measure
        self.backward_span = contextlib.ExitStack()
        self.differentiable = [i for i, x in enumerate(leaves) if is_float(x)]
        self.trainable = self.group.trainable()
        self.first_out: tuple[Tensor, ...] | None = None

    # The three ways to run #

    def evaluate(self) -> Any:
        """Not recorded: gather, run, release."""
        gathered = self.pipeline.enter(self.group, Phase.EVAL)
        try:
            with self.measure(f"evaluate {self.group.label}"):
                return self._result(self._run(self._inputs(), gathered.tensors()))
        finally:
            self.pipeline.leave(gathered)

    def checkpointed(self) -> Any:
        """One function of (inputs, shards) that recomputes in its backward."""
        keep = self.block.zero_level == 2
        result = _Result()
        self.start = self.draws.count, self.draws.records
        kept: list[Gathered] = []

        def forward(*inputs_and_shards: Tensor) -> tuple[Tensor, ...]:
            gathered = self.pipeline.enter(self.group, Phase.FORWARD)
            try:
                with self.measure(f"forward {self.group.label}"):
                    out = result.take(self._run(inputs_and_shards[: len(self.differentiable)], gathered.tensors()))
            except BaseException:
                self.pipeline.leave(gathered)
                raise
            self.pipeline.leave(gathered, keep=keep)
            kept.append(gathered)
            self.first_out = None if self.block._replay_checked else out
            return out

        def backward(grads: tuple[Tensor, ...]) -> list[Tensor]:
            gathered = kept[0] if keep else self.pipeline.enter(self.group, Phase.BACKWARD)
            try:
                with self.measure(f"backward {self.group.label}"):
                    pulled = self._pull(gathered, grads)
            except BaseException:
                self.pipeline.leave(gathered)
                raise
            here = len(self.differentiable)
            shards = self.reducer.reduce(self.group, self.trainable, pulled[here:]) if self.trainable else []
            self.pipeline.leave(gathered)
            return [*pulled[:here], *shards]

        self.reducer.expect(self.group, self.trainable)
        return result.restore(custom_op(forward, backward, *self._inputs(), *self._shards()))

    def kept(self) -> Any:
        """Recorded by autograd as it runs; only the gathered memory is let go of in between."""
        result = _Result()
        gathered = self.pipeline.enter(self.group, Phase.FORWARD)
        try:
            weights = list(gathered.tensors())
            inputs = self._before(gathered, weights)
            with self.measure(f"forward {self.group.label}"):
                out = result.take(self._run(inputs, weights))
            out = self._behind(gathered, out)
        except BaseException:
            self.pipeline.leave(gathered)
            raise
        stays = self.block.zero_level == 2 or any(gathered.owns(x) for x in out)
        if stays:
            self.pipeline.leave(gathered, keep=True)
        else:
            self.block._warn_of_copies(gathered)
            self.pipeline.park(gathered)
        return result.restore(out)

    # Pieces #

    def _before(self, gathered: Gathered, weights: list[Tensor]) -> list[Tensor]:
        """Make full tensors functions of the shards; the last thing that backward reaches. Replaces entries of `weights`."""
        inputs = self._inputs()
        if not self.trainable:  # nothing to reduce, but something to release: an identity on the inputs

            def leave(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                self.backward_span.close()
                self.pipeline.leave(gathered)
                return grads

            return list(custom_op(lambda *xs: xs, leave, *inputs)) if inputs else inputs

        def reduce(grads: tuple[Tensor, ...]) -> list[Tensor]:
            self.backward_span.close()
            shards = self.reducer.reduce(self.group, self.trainable, grads)
            self.pipeline.leave(gathered)
            return shards

        self.reducer.expect(self.group, self.trainable)
        full = tuple(weights[i] for i in self.trainable)
        for i, tensor in zip(self.trainable, custom_op(lambda *_: full, reduce, *self._shards())):
            weights[i] = tensor
        return inputs

    def _behind(self, gathered: Gathered, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """An identity; the first thing that backward reaches."""

        def gather_again(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if self.block.zero_level == 3:
                self.pipeline.enter(self.group, Phase.BACKWARD, parked=gathered)
            self.backward_span = contextlib.ExitStack()
            self.backward_span.enter_context(self.measure(f"backward {self.group.label}"))
            return grads

        return custom_op(lambda *xs: xs, gather_again, *outputs) if outputs else outputs

    def _inputs(self) -> list[Tensor]:
        return [self.leaves[i] for i in self.differentiable]

    def _shards(self) -> list[DistributedParameter]:
        return [self.group.params[i] for i in self.trainable]

    def _run(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for i, x in zip(self.differentiable, inputs):
            leaves[i] = x
        args, kwargs = self.rebuild(iter(leaves))
        with self.block.substituted(weights):
            return self.block.run(*args, **kwargs)

    def _pull(self, gathered: Gathered, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Recompute, and differentiate with respect to inputs and trainable full tensors."""
        weights, here = gathered.tensors(), len(self.differentiable)

        def recompute(*inputs_and_weights: Tensor) -> tuple[Tensor, ...]:
            full = list(weights)
            for i, tensor in zip(self.trainable, inputs_and_weights[here:]):
                full[i] = tensor
            before = [] if self.first_out is None else self.block._plain_values()
            out = _Result().take(self._run(inputs_and_weights[:here], full))
            if self.first_out is not None:
                self.block._check_replay(self.first_out, out, before)
                self.first_out = None
            return out

        with self.draws.replay(self.start):
            return vjp(recompute, self._inputs(), grads, leaves=[weights[i] for i in self.trainable], graph=self.block._graph)

    @staticmethod
    def _result(out: Any) -> Any:
        return tuple(out) if isinstance(out, list) else out


class _Result:
    """Separates a result's floating-point tensors, which autograd handles, from the rest of it."""

    def take(self, out: Any) -> tuple[Tensor, ...]:
        """Remember the structure of `out`; return its floating-point tensors."""
        self._leaves, self._rebuild = flatten(_Call._result(out))
        self._places = [i for i, x in enumerate(self._leaves) if is_float(x)]
        return tuple(self._leaves[i] for i in self._places)

    def restore(self, tensors: Sequence[Tensor]) -> Any:
        """The same structure around `tensors`."""
        for i, x in zip(self._places, tensors):
            self._leaves[i] = x
        return self._rebuild(iter(self._leaves))


def _find_slots(module: nn.Cell) -> list[tuple[DistributedParameter, list[tuple[nn.Cell, str]]]]:
    """Each parameter once, with every (cell, attribute) that holds it: tied parameters have several."""
    slots: dict[int, tuple[DistributedParameter, list[tuple[nn.Cell, str]]]] = {}
    for path, cell in module.cells_and_names():
        if isinstance(cell, Block):
            raise ValueError(
                f"rank {rank()}: there is a Block inside the Block already ({path or 'the module itself'}): wrap only one of them"
            )
        for name, parameter in parameter_table(cell).items():
            if _is_buffer(parameter):
                continue
            if not isinstance(parameter, DistributedParameter):
                where = f"{path}.{name}" if path else name
                raise ValueError(
                    f"rank {rank()}: parameter {where} is a {type(parameter).__name__}; all parameters in a Block must be "
                    "DistributedParameter (use bmtrain_ms.nn layers), or have requires_grad=False"
                )
            slots.setdefault(id(parameter), (parameter, []))[1].append((cell, name))
    return list(slots.values())


def _is_dropout(cell: nn.Cell) -> bool:
    return isinstance(cell, nn.Dropout) and not getattr(cell, "replays", False)


def _contents(cell: nn.Cell) -> list[Any]:
    """All cells and parameters below, without buffers: others after something was changed."""
    found = [cell, *(p for p in parameter_table(cell).values() if not _is_buffer(p))]
    for child in child_table(cell).values():
        if child is not None:
            found += _contents(child)
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


class TransformerBlockList(nn.Cell):
    """A chain of Blocks (BMTrain: `TransformerBlockList`).

    Args:
        modules: Cells, which are wrapped in `Block`, or Blocks; any iterable. The same Cell twice shares its parameters.
        num_hidden: how many leading arguments are hidden states, each replaced by the outputs of the block before.

    `list(h_1, ..., h_n, *others, return_hidden_states=False, **kwargs)`: the other arguments go unchanged to every block. The
    result is the last block's output: a tensor for `num_hidden=1`, else a tuple. With `return_hidden_states` a stacked tensor for
    each hidden state follows, (len(list), *hidden.shape), of the *inputs* of the blocks. May also be iterated, indexed and sliced.

    Raises:
        AssertionError: the same Block twice (as BMTrain).
        ValueError: no modules, or fewer arguments than hidden states.
    """

    def __init__(self, modules: Any, num_hidden: int = 1):
        super().__init__()
        blocks: list[Block] = []
        for module in modules:
            block = module if isinstance(module, Block) else Block(module)
            if any(block is other for other in blocks):
                raise AssertionError("the same Block appears twice in the list; pass its inner module twice to share parameters")
            blocks.append(block)
        if not blocks:
            raise ValueError("a TransformerBlockList needs at least one module")
        self.num_hidden = num_hidden
        named: set[int] = set()
        for i, block in enumerate(blocks):
            if id(block.inner) not in named:
                block.update_parameters_name(f"{i}.")
            named.add(id(block.inner))
            child_table(self)[str(i)] = block

    def __len__(self) -> int:
        return len(child_table(self))

    def __iter__(self) -> Iterator[Block]:
        return iter(child_table(self).values())

    def __getitem__(self, index: int | str | slice) -> Any:
        if isinstance(index, str):
            return child_table(self)[index]
        return list(child_table(self).values())[index]

    def construct(self, *args: Any, return_hidden_states: bool = False, **kwargs: Any) -> Any:
        if len(args) < self.num_hidden:
            raise ValueError(f"{self.num_hidden} hidden states are expected as the first arguments, {len(args)} were given")
        hidden, others = args[: self.num_hidden], args[self.num_hidden :]
        seen: list[tuple[Tensor, ...]] = []
        for block in self:
            seen.append(hidden)
            out = block(*hidden, *others, **kwargs)
            hidden = out if isinstance(out, tuple) else (out,)
            if len(hidden) != self.num_hidden:
                raise ValueError(f"a block returned {len(hidden)} tensors for {self.num_hidden} hidden states")
        if return_hidden_states:
            hidden += tuple(ops.stack(list(states)) for states in zip(*seen))
        return hidden[0] if len(hidden) == 1 else hidden


__all__ = ["Block", "CheckpointBlock", "TransformerBlockList"]
