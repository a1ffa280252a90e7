"""BMTrain's pipelines: a chain of Blocks over the stages, with embedding, head and loss on every rank, see [Note: rows]."""

from __future__ import annotations

import contextlib
from typing import Any, ContextManager, Iterable, Sequence, Union

import numpy as np
from mindspore import Parameter, Tensor

from bmtrain_ms_base.stages import divide

from ..comm import world as current_world
from ..compat.autograd import recording
from ..compat.runtime import from_host
from ..zero import Block, DistributedParameter, TransformerBlockList, context_of
from .rows import Route, Tensors
from .shared import Part, refuse_shared
from .stage import DRAWS, SPAN


class PipelineTransformerBlockList(TransformerBlockList):
    """A chain of Blocks over the stages of a pipeline (BMTrain: `PipelineTransformerBlockList`).

    Each stage keeps its own layers only: the first `layers % stages` stages have one more. Everything else of the model is on every
    rank, and each rank passes rows of its own, as many as the others: part `mesh.pp_rank * mesh.dp + mesh.dp_rank` of
    `mesh.pp * mesh.dp`, which is `rank()` of `world_size()` without tensor parallelism. A call takes all of a pipeline's rows
    through the stages in `num_micro_batches` parts, all forward and later all backward, so that a stage keeps what all of them need
    (GPipe); `model_center.spread` has schedules that keep less. Layers keep their numbers, and their parameters the names and
    initial values that one rank gives them.

    Args:
        modules: Cells, which are wrapped in `Block(mode="PIPE")`, or such Blocks; any iterable. All layers, on every rank: those of
            other stages are let go of. The same Cell twice, in one stage, shares its parameters.
        num_hidden: how many leading arguments are hidden states, each replaced by the outputs of the block before. Layers keep
            their shapes and types.

    Attributes:
        num_layers: how many layers all stages have; `len`, iteration and `[...]` are those of this stage.
        stages, stage_id: how many stages there are, and which this is.

    `list(h_1, ..., h_n, *others, batch_related=(), return_hidden_states=False, **kwargs)`: `batch_related` has the positions among
    `others`, and the names, of tensors with a row for each row of the hidden states, which go along with these; default: those with
    as many dims and rows as `h_1`. All else goes unchanged to every layer, and is to be the same on all ranks of a pipeline. The
    result is that of `TransformerBlockList`, of this rank's rows. All ranks call it, and their losses have to depend on its result.

    Raises:
        AssertionError: a Block that is not `mode="PIPE"`, or the same one twice (as BMTrain).
        ValueError: fewer layers than stages, a Cell or a Parameter in two stages, or a model in this world is spread over stages.
        RuntimeError: when trained: a Parameter of a layer is used outside of the list, too.
    """

    def __init__(self, modules: Iterable[Any], num_hidden: int = 1):
        world, given = current_world(), list(modules)
        if any(isinstance(module, Block) and module.mode != "PIPE" for module in given):
            raise AssertionError('a PipelineTransformerBlockList takes Blocks that were made with mode="PIPE", or Cells')
        plan = [stage.layers for stage in divide(len(given), world.mesh.pp)]
        own = plan[world.mesh.pp_rank]
        _refuse_shared(given, plan)
        blocks = [x if isinstance(x, Block) else Block(x, mode="PIPE") for x in (given[i] for i in own)]
        super().__init__(blocks, num_hidden, numbers=own)
        context = context_of(world)
        context.divide(rows_differ=True)
        if context.anchor is None:
            context.anchor = Parameter(from_host(np.zeros(1, np.float32)), name="anchor of pipelines")
        for number, module in enumerate(given if world.mesh.pp > 1 else ()):
            for path, p in module.parameters_and_names():
                if isinstance(p, DistributedParameter):
                    p.stage = next(stage for stage, layers in enumerate(plan) if number in layers)
                    p.place = f"{path} of layer {number}"
        self.num_layers, self.stages, self.stage_id = len(given), world.mesh.pp, world.mesh.pp_rank
        self._world, self._plan = world, plan

    def get_range_by_stage_id(self, stage_id: int) -> range:
        """The numbers of the layers of a stage."""
        return self._plan[stage_id]

    def get_part_len_by_stage_id(self, stage_id: int) -> int:
        """How many layers a stage has."""
        return len(self._plan[stage_id])

    def get_stage_by_layer_id(self, layer_id: int) -> int:
        """The stage that has a layer."""
        return next(stage for stage, layers in enumerate(self._plan) if layer_id in layers)

    def construct(
        self, *args: Any, batch_related: Sequence[int | str] = (), return_hidden_states: bool = False, **kwargs: Any
    ) -> Any:
        """Run the chain; the class says what goes in and comes out.

        Raises:
            ValueError: fewer arguments than hidden states, fewer rows than micro-batches, or `batch_related` names what is no
                tensor with as many rows. A layer returned hidden states of another number, shape or type.
        """
        if len(args) < self.num_hidden:
            raise ValueError(f"{self.num_hidden} hidden states are expected as the first arguments, {len(args)} were given")
        hidden, others = args[: self.num_hidden], {**dict(enumerate(args[self.num_hidden :])), **kwargs}
        pipe = self._world.along("pp")
        number = self._world.micro_batches or pipe.size
        related = _related(hidden[0], others, batch_related)
        context = context_of(self._world)
        route = Route(pipe, hidden, number, context.reducer.finish)
        with self._undisturbed(), self._held(), context.drawing():
            tokens = []
            for key in related:
                others[key], token = route.gather(others[key])
                tokens += token
            assert context.anchor is not None
            token, entered = route.enter(context.anchor, tokens, hidden)
            first_draw = (context.draws.count // SPAN + 1) * SPAN
            states, results = [], []
            for b in range(number):
                token, x = (token, entered[b]) if self.stage_id == 0 else route.receive(b, token)
                mine = {key: y[slice(*route.parts[b])] if key in related else y for key, y in others.items()}
                x, seen = self._through(x, mine, first_draw + b * self.num_layers * DRAWS)
                states += seen if return_hidden_states else []
                if self.stage_id == self.stages - 1:
                    results += x
                else:
                    token = route.send(b, token, x)
            context.draws.count = first_draw + SPAN
            found = route.leave(token, results, states, self._plan)
        return found[0] if len(found) == 1 else found

    def _through(self, hidden: Tensors, others: dict[Any, Any], first_draw: int) -> tuple[Tensors, list[Tensor]]:
        """A micro-batch through this stage's layers: their results, and all their inputs."""
        args, kwargs = (
            [x for key, x in others.items() if isinstance(key, int)],
            {k: x for k, x in others.items() if isinstance(k, str)},
        )
        seen: list[Tensor] = []
        draws, like = context_of(self._world).draws, [(x.shape, x.dtype) for x in hidden]
        for number, block in zip(self._plan[self.stage_id], self):
            seen += hidden
            with draws.numbered(first_draw + number * DRAWS):
                out = block(*hidden, *args, **kwargs)
            hidden = out if isinstance(out, tuple) else (out,)
            if [(x.shape, x.dtype) for x in hidden] != like:
                raise ValueError(
                    f"layer {number} returned {_described(hidden)} for hidden states {_described(seen[-len(like) :])}: stages "
                    "exchange tensors of the shapes and types that the list was given, so have layers keep them"
                )
        return hidden, seen

    def _held(self) -> ContextManager[None]:
        """Parameters stay gathered for all micro-batches: until the backward pass has ended, if there is one."""
        context, groups = context_of(self._world), [group for block in self for group in block.groups]
        if not recording():
            return context.pipeline.hold(groups)
        context.pipeline.hold_until_end(groups, context.current)
        return contextlib.nullcontext()


Key = Union[int, str]  # position among the arguments behind the hidden states, or name


def _related(hidden: Tensor, others: dict[Key, Any], asked: Sequence[Key]) -> list[Key]:
    """Arguments that have a row for each row of the hidden states."""
    if not asked:
        return [
            key for key, x in others.items() if isinstance(x, Tensor) and x.ndim == hidden.ndim and x.shape[0] == hidden.shape[0]
        ]
    for key in asked:
        x = others.get(key)
        if not isinstance(x, Tensor) or not x.ndim or x.shape[0] != hidden.shape[0]:
            what = "there is no such one" if key not in others else _described([x]) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"batch_related={list(asked)}: argument {key!r} behind the hidden states must be a tensor with {hidden.shape[0]} "
                f"rows, as these, but {what}"
            )
    return [key for key in others if key in asked]


def _described(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors)


def _refuse_shared(modules: Sequence[Any], plan: Sequence[range]) -> None:
    """Raise ValueError where a Cell or a Parameter is in two stages, or in those of another list."""
    inner = [module.inner if isinstance(module, Block) else module for module in modules]
    seen: dict[int, tuple[int, int]] = {}  # id of a Cell -> stage, number of its first layer
    for stage, layers in enumerate(plan):
        for number in layers:
            first = seen.setdefault(id(inner[number]), (stage, number))
            if first[0] != stage:
                raise ValueError(
                    f"layers {first[1]} and {number} are the same {type(inner[number]).__name__}, and in stages {first[0]} and "
                    f"{stage}: stages share nothing. Use fewer stages, or a layer of its own for each"
                )
    layers = [(f"layer {i}", stage, inner[i]) for stage, numbers in enumerate(plan) for i in numbers] if len(plan) > 1 else []
    for name, stage, layer in layers:
        for path, p in layer.parameters_and_names():
            if isinstance(p, DistributedParameter) and p.stage not in (None, stage):
                raise ValueError(
                    f"{path} of {name}, on rank {stage} of the pipeline, is a parameter of another list's stage {p.stage}, too, "
                    "and stages share nothing: give each its own"
                )
    parts = [Part(name, stage, layer.parameters_and_names()) for name, stage, layer in layers]
    refuse_shared(parts, "use fewer stages, so that one has both, or give each its own")
