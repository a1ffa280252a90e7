"""Models in pipeline stages: each rank of a pipeline has some of the layers, and nothing of the others."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from bmtrain_ms_base import schedule, stages
from bmtrain_ms_base.checks import whole
from bmtrain_ms_base.layout import part_of

from ..comm import World, reduce_numbers
from ..comm.agreement import all_gather_bytes
from ..compat.autograd import no_grad, recording
from ..compat.cells import child_table, parameter_table
from ..compat.runtime import from_host, host_array
from ..nn import Router
from ..ops.in_place import add_
from ..parallel import Part, Scheduled, Segment, Stage, outside, refuse_shared
from ..zero import ParamGroup, context_of
from .layer import Encoder, KeyValueCache, Positions
from .targets import targets_that_count

_COPY = 1 << 20  # added to `Layout.copy` of the tied table on the last stage: the first one's counts


@dataclass(frozen=True)
class Stages:
    """How a model is divided into the stages of a pipeline, and in which order these compute.

    `layout`: layers of each stage, as `stages.divide` takes it: None: as even as can be; a list of numbers; or a text with the
    embedding and the head, as `Et*3|tt|t,L`.  `schedule`: `1f1b`, `gpipe` or `interleaved`; None: interleaved where a rank has
    several chunks, 1f1b otherwise.  `chunks`: stages of each rank (v); stage s is chunk s // p of rank s % p.  `micro_batches`:
    into how many a rank's batch is divided by rows (m); None: what `init_distributed(num_micro_batches=)` says.  `group`: of
    `interleaved`: how many micro-batches pass a chunk before they pass the next one.  `batches`: which ranks of a pipeline have
    one: `all`, which pass the same; or the `first` only, from which the others, who pass None for each tensor of the loss, get it.

    Raises:
        ValueError: an unknown schedule or other words, or a number below 1. When a model is spread: layers or micro-batches do not
            fit.
    """

    layout: str | Sequence[int] | None = None
    schedule: str | None = None
    chunks: int = 1
    micro_batches: int | None = None
    group: int | None = None
    batches: str = "all"

    def __post_init__(self) -> None:
        if self.batches not in ("all", "first"):
            raise ValueError(f"batches must be 'all' or 'first', not {self.batches!r}")
        whole("chunks", self.chunks, 1)
        if self.micro_batches is not None:
            whole("micro_batches", self.micro_batches, 1)
        if self.schedule is not None and str(self.schedule).lower() not in schedule.NAMES:
            raise ValueError(f"unknown pipeline schedule {self.schedule!r}; choose one of {', '.join(schedule.NAMES)}")

    def table(self, world: World) -> schedule.Schedule:
        """The order in which the ranks of a world's pipelines compute."""
        p, m = world.mesh.pp, self.micro_batches or world.micro_batches or world.mesh.pp
        name = self.schedule or ("interleaved" if self.chunks > 1 else "1f1b")
        return schedule.schedule(name, p, m, self.chunks, self.group)


@dataclass
class _Batch:
    """What every rank of a pipeline knows of a micro-batch; without targets it is one whose logits are wanted."""

    ids: Tensor
    positions: Positions
    targets: Tensor | None = None
    cache: KeyValueCache | None = None
    options: dict[str, Any] | None = None
    part: tuple[int, int, int] | None = None  # of the whole batch's rows, see `Draws`


class StagedModel:
    """What a model is on one rank of a pipeline.

    Args:
        model: with an `Encoder` as `model`, `logits_of`, `loss_of`, a `config` with vocab_size and dim_model, and `lm_head`, which
            is None where the embedding's table is the head too (`Llama`). Layers, embedding, norm and head that are other ranks'
            are taken out of it here.
        how: the stages.
        recompute: layers keep only their inputs for the backward pass.
        world: the ranks.
        hold: the layers' parameters stay gathered throughout a step.

    Raises:
        TypeError: the model has no such parts.
        ValueError: the layers cannot be divided so, a rank would hold nothing, or ranks would share a parameter; or routers balance
            the global batch, of which there are several micro-batches.
    """

    def __init__(self, model: Any, how: Stages, recompute: bool, world: World, hold: bool):
        self.model, self.encoder, self.table, self.world = model, _encoder_of(model), how.table(world), world
        context_of(world).divide(rows_differ=False)
        self._recompute, self._hold, self._from_first = recompute, hold, how.batches == "first"
        self._pipe = world.along("pp")
        layers = list(self.encoder.layers)
        self.plan = stages.divide(len(layers), self.table.p, self.table.v, how.layout)
        self.own = self.plan[self._pipe.rank :: self.table.p]
        self.tied = model.lm_head is None
        routers = [cell for _, cell in model.cells_and_names() if isinstance(cell, Router)]
        self._routed = any(router.config.has_losses for router in routers)  # on any stage
        if self.table.m > 1 and any(router.config.balance == "global_batch" for router in routers):
            raise ValueError(
                "balance='global_batch' counts what the micro-batches so far have chosen, as the first one's backward pass cannot "
                f"wait for the last, so gradients would depend on their number, {self.table.m}: use balance='sequence', or "
                "Stages(micro_batches=1)"
            )
        self._refuse_empty_ranks()
        self._refuse_shared(layers)
        self._dtype = host_array(_table_of(self.encoder)).dtype
        self.numbers = [number for stage in self.own for number in stage.layers]
        self.first, self.last = any(s.embedding for s in self.own), any(s.head for s in self.own)
        self.encoder.layers = nn.CellList([layers[number] for number in self.numbers])
        if not self.last:
            _leave_out(self.encoder, "norm")
            if not self.tied:
                _leave_out(model, "lm_head")
        if not self.first and self.encoder.embed_positions is not None:
            _leave_out(self.encoder, "embed_positions")
        if not self.first and not (self.last and self.tied):
            _leave_out(self.encoder, "embed_tokens")

    def attach(self) -> None:
        """The rest of the model is as it will be: have the model's calls go through the stages from now on."""
        shared = _table_of(self.encoder) if self.shares_table else None
        if shared is not None and not self.first:
            shared.layout = replace(shared.layout, copy=shared.layout.copy + _COPY)
        own = self.model.__dict__
        own["construct"], own["loss"], own["stages"] = self.logits, StagedLoss(self), self

    @property
    def shares_table(self) -> bool:
        """Whether the tied table is on this rank, and on another one too."""
        return self.tied and self.table.p > 1 and (self.first or self.last)

    def logits(
        self,
        input_ids: Tensor,
        padding: Tensor | None = None,
        cache: KeyValueCache | None = None,
        documents: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """What calling the model returns, on every rank: the last stage sends it to all. No gradients.

        All ranks of a pipeline call it together, with the same arguments.
        """
        if recording():
            raise RuntimeError(
                "a model in pipeline stages makes its gradients micro-batch by micro-batch: train it with "
                "manager.backward(model.loss, *batch); calling it, or model.loss, is for evaluation and generation"
            )
        if cache is not None:
            cache.check_room(input_ids.shape[1])
        self.compare(input_ids, None, padding, documents)
        batch = self._batch(input_ids, padding, cache, documents)
        batch.positions.last_only = last_only
        if cache is not None and not self.numbers:
            cache.pass_by(input_ids.shape[1])
        found = self._ran.evaluate(self._forward_table(1), [batch])
        shape = (input_ids.shape[0], batch.positions.wanted, self.model.config.vocab_size)
        return self._from_last(found[0] if found else from_host(np.zeros(shape, self._dtype)), "logits")

    # Pieces #

    def given(self, *tensors: Any) -> tuple[Any, ...]:
        """The tensors, or None, that this rank was given, or the first one of the pipeline where only that has any.

        Raises:
            ValueError: the first rank of the pipeline has no batch, or another one has; on all of them.
        """
        if not self._from_first:
            return tensors
        mine = {str(i): host_array(x) for i, x in enumerate(tensors) if x is not None}
        packed = io.BytesIO()
        np.savez(packed, **mine)
        parts = all_gather_bytes(self._pipe, packed.getvalue() if mine else b"", "batch")
        others = [rank for rank, part in enumerate(parts) if bool(part) != (rank == 0)]
        if others:
            what = "no batch was given to the first rank" if 0 in others else f"a batch was given to rank(s) {others}, too,"
            raise ValueError(f"{what} of a pipeline with batches='first': give it to the first one, and None to the others")
        with np.load(io.BytesIO(parts[0])) as found:
            return tuple(from_host(found[str(i)]) if str(i) in found else None for i in range(len(tensors)))

    def compare(self, input_ids: Tensor, targets: Any, padding: Any, documents: Any, weight: float = 1.0) -> None:
        """Fail, on every rank, where the ranks of a pipeline were given different batches; on devices nobody looks."""
        given = {"input ids": input_ids, "targets": targets, "padding": padding, "documents": documents}
        for what, value in given.items():
            self._pipe.compare(what, value)
        for engine in (self._pipe, self.world.along("tp")):
            engine.compare("weight of the loss", float(weight))
        if self._pipe.lands_in_place:
            self._pipe.barrier("batches are the same").wait()

    @property
    def _ran(self) -> Stage:
        """The stage that runs the layers there are now: some may have been exchanged (adapters) since the last time."""
        chunks = [self._segments(stage) for stage in self.own]
        return Stage(chunks, len(self.plan) + self.plan[-1].last + 2, self._message, self.world, self._held)

    def batches(
        self, number: int, ids: Tensor, targets: Tensor, padding: Any, documents: Any, options: dict[str, Any]
    ) -> list[_Batch]:
        """A batch in so many micro-batches, whose sizes differ by one row at most."""
        rows = [slice(*part_of(ids.shape[0], i, number)) for i in range(number)]
        targets = targets.reshape(ids.shape)
        found = []
        for part in rows:
            batch = self._batch(_rows(ids, part), _rows(padding, part), None, _rows(documents, part))
            batch.targets, batch.options = _rows(targets, part), options
            batch.part = part.start, part.stop - part.start, ids.shape[0]
            found.append(batch)
        return found

    def routers_weight(self, batches: list[_Batch], of_mean: float, trains: bool) -> float:
        """What the sum over this rank's tokens of what routers add is multiplied with, so that it is `of_mean` times the mean over
        its tokens; `trains`: over those of all data-parallel ranks, which call it together, as `Routing.add_losses` has it."""
        if not self._routed:
            return 0.0
        tokens = sum(batch.positions.tokens for batch in batches)
        if trains:
            tokens, of_mean = reduce_numbers(self.world.along("dp"), [tokens, of_mean], "router, tokens").tolist()
        return of_mean / max(1.0, tokens)

    def evaluated(self, batches: list[_Batch]) -> list[Tensor]:
        """Losses of micro-batches; those of the last stage, none elsewhere."""
        return self._ran.evaluate(self._forward_table(len(batches)), batches)

    def trained(
        self, batches: list[_Batch], params: Sequence[Parameter], cotangent: float, routers: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Losses and gradients, as `Stage.train` makes them; gradients of a table on two stages are the sum of both.

        `routers`: what the sum over the tokens of what routers add is multiplied with.
        """
        if self._routed:
            counts = routers * self.world.mesh.tp  # each tensor-parallel rank's routers add their rows' only
            for batch in batches:
                batch.positions.routing.pull(from_host(np.array(counts, np.float32)))
        scale = from_host(np.array([cotangent], np.float32))
        losses, grads = self._ran.train(self.table, batches, params, scale)
        if self.shares_table:
            table = _table_of(self.encoder)
            grads = [self._summed(grad) if p is table else grad for p, grad in zip(params, grads)]
        return losses, grads

    def from_last(self, losses: list[Tensor], scale: float) -> Tensor:
        """The sum of the last stage's losses times a number, on every rank of the pipeline: float32, a scalar."""
        total = sum(float(host_array(x).reshape(-1)[0]) for x in losses)
        return self._from_last(from_host(np.array([total * scale], np.float32)), "loss").reshape(())

    def of_routers(self, batches: list[_Batch]) -> float:
        """The sum over the tokens of what the routers of all stages add, on every rank of the pipeline."""
        if not self._routed:
            return 0.0
        total = np.array([sum(batch.positions.routing.value() for batch in batches)], np.float32)
        with no_grad():
            found = from_host(total)
            for axis in ("tp", "pp"):
                found = self.world.along(axis).all_reduce([found], label="router losses").wait()[0]
        return float(host_array(found)[0])

    def all_from_last(self, losses: list[Tensor], size: int) -> Tensor:
        """The last stage's losses of all tokens, (size,) float32, on every rank of the pipeline."""
        found = np.concatenate([host_array(x).reshape(-1) for x in losses]) if losses else np.zeros(size)
        return self._from_last(from_host(found.astype(np.float32)), "losses")

    def _from_last(self, x: Tensor, what: str) -> Tensor:
        with no_grad():
            return self._pipe.broadcast([x], self._pipe.size - 1, f"{what} of the last stage").wait()[0]

    def _summed(self, grad: Tensor) -> Tensor:
        """The sum of the first and the last stage's gradient, the same bits on both. They are sharded alike: shards are added."""
        label, last = "gradient of the tied table", self._pipe.size - 1
        with no_grad():
            if not self.first:
                self._pipe.send([grad], 0, label).wait()
                return self._pipe.recv([grad], 0, label).wait()[0]
            total = add_(grad, self._pipe.recv([grad], last, label).wait()[0])
            self._pipe.send([total], last, label).wait()
            return total

    def _batch(self, ids: Tensor, padding: Any, cache: KeyValueCache | None, documents: Any) -> _Batch:
        positions = Positions.of(ids, padding, cache, documents)
        positions.divide(self.encoder.ranks)
        return _Batch(ids, positions, cache=cache)

    def _message(self, batch: _Batch) -> Tensor:
        rows = batch.positions.rows // self.encoder.ranks
        return from_host(np.empty((rows, self.model.config.dim_model), self._dtype))

    def _held(self) -> list[ParamGroup]:
        return [group for layer in self.encoder.layers for group in layer.groups] if self._hold else []

    def _forward_table(self, number: int) -> schedule.Schedule:
        p, v = self.table.p, self.table.v
        group = number if number % p else p  # a short last group may have ranks wait for each other
        return schedule.Schedule("forward only", p, v, number, schedule.interleaved_rows(p, v, number, group))

    def _segments(self, stage: stages.Stage) -> list[Segment]:
        encoder, layers = self.encoder, dict(zip(self.numbers, self.encoder.layers))
        found = []
        if stage.embedding:
            embedding = [cell for cell in (encoder.embed_tokens, encoder.embed_positions) if cell is not None]
            # always recomputed: a recorded look-up keeps the whole table for each micro-batch that is under way
            found.append(Segment("the embedding", lambda _, b: encoder.embed(b.ids.reshape(-1), b.positions), embedding, 0, True))
        for number in stage.layers:
            found.append(Segment(f"layer {number}", _layer(layers[number], number), [layers[number]], 1 + number, self._recompute))
        if stage.head:
            head = [encoder.norm, encoder.embed_tokens if self.tied else self.model.lm_head]
            found.append(Segment("the head", self._head, head, 1 + stage.last, False))
        return found or [Segment("nothing", lambda hidden, _: _same(hidden), [], 0, False)]

    def _head(self, hidden: Tensor | None, batch: _Batch) -> Tensor:
        hidden = self.encoder.norm(hidden)
        if batch.targets is None:
            return self.model.logits_of(hidden, batch.positions)
        return self.model.loss_of(hidden, batch.targets, **(batch.options or {})).reshape(-1)

    def _refuse_empty_ranks(self) -> None:
        for rank in range(self.table.p):
            if not any(s.embedding or s.head or s.layers for s in self.plan[rank :: self.table.p]):
                raise ValueError(
                    f"rank {rank} of the {self.table.p} of the pipeline would hold neither a layer nor the embedding nor the head: "
                    "use fewer stages, or another layout"
                )

    def _refuse_shared(self, layers: list[nn.Cell]) -> None:
        """Raise ValueError where parts of different ranks share a parameter, other than a tied table."""
        p, encoder = self.table.p, self.encoder
        if p == 1:
            return
        of = {number: s % p for s, stage in enumerate(self.plan) for number in stage.layers}
        first, last = (next(s % p for s, stage in enumerate(self.plan) if getattr(stage, name)) for name in ("embedding", "head"))
        ends = [("the embedding", first, encoder.embed_tokens), ("the embedding of positions", first, encoder.embed_positions)]
        ends += [("the norm behind the layers", last, encoder.norm), ("the head", last, self.model.lm_head)]
        parts = [Part(name, rank, cell.parameters_and_names()) for name, rank, cell in ends if cell is not None]
        parts[1:1] = [Part(f"layer {i}", of[i], layer.parameters_and_names()) for i, layer in enumerate(layers)]
        rest = outside(self.model, [encoder.layers, *(cell for _, _, cell in ends)])
        refuse_shared(
            [*parts, Part("the rest of the model", None, rest)],
            "keep the layers that share it in one stage (stages=), or give each its own; a tied embedding is config.tied",
        )


class StagedLoss(Scheduled):
    """`loss` of a model in pipeline stages: arguments and result are those that the model's own had, the result the same on every
    rank of the pipeline, which all pass the same rows, or None (`Stages.batches`).

    The batch is divided into micro-batches by rows. The mean is over all tokens that count, whatever micro-batch they are in.
    """

    def __init__(self, staged: StagedModel):
        self._staged = staged

    def __call__(
        self,
        input_ids: Tensor | None,
        targets: Tensor | None,
        padding: Any = None,
        documents: Any = None,
        weight: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """The loss alone; see the class. Not where gradients are recorded.

        Raises:
            RuntimeError: it is called inside of a function that is being differentiated.
        """
        if recording():
            self.refuse_recording()
        reduction, rest = options.pop("reduction", "mean"), options
        input_ids, targets, padding, documents = self._staged.given(input_ids, targets, padding, documents)
        self._staged.compare(input_ids, targets, padding, documents, weight)
        number = min(self._staged.table.m, input_ids.shape[0])
        per_token = {**rest, "reduction": "none" if reduction == "none" else "sum"}
        batches = self._staged.batches(number, input_ids, targets, padding, documents, per_token)
        found = self._staged.evaluated(batches)
        if reduction == "none":
            return self._staged.all_from_last(found, input_ids.shape[0] * input_ids.shape[1]) * weight
        share = weight * _share(reduction, targets, rest)
        loss = self._staged.from_last(found, share)
        of_routers = self._staged.routers_weight(batches, _routers_share(reduction, targets, rest), trains=False)
        return loss + self._staged.of_routers(batches) * of_routers

    __name__, __code__ = "loss", __call__.__code__  # MindSpore asks for them before it differentiates, and is told that it may not

    def refuse_recording(self) -> None:
        """Raise RuntimeError: MindSpore is asked to differentiate it."""
        raise RuntimeError(
            "the loss of a model in pipeline stages makes its gradients itself: pass it to the manager as it is, "
            "manager.backward(model.loss, *batch), and neither to value_and_grad nor in a function that calls it"
        )

    def differentiated(self, params: Sequence[Parameter], scale: float, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients, see `Scheduled`.

        Raises:
            ValueError: the batch has fewer rows than there are micro-batches, or `reduction` is not `mean` or `sum`.
        """
        return self._differentiated(params, scale, *args, **kwargs)

    def _differentiated(
        self,
        params: Sequence[Parameter],
        scale: float,
        input_ids: Tensor | None,
        targets: Tensor | None,
        padding: Any = None,
        documents: Any = None,
        weight: float = 1.0,
        reduction: str = "mean",
        **options: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        input_ids, targets, padding, documents = self._staged.given(input_ids, targets, padding, documents)
        self._staged.compare(input_ids, targets, padding, documents, weight)
        number, rows = self._staged.table.m, input_ids.shape[0]
        if rows < number:
            raise ValueError(
                f"a batch of {rows} row{'s' * (rows > 1)} cannot be divided into {number} micro-batches: give each rank at least "
                f"{number} rows, or set num_micro_batches={rows} or less"
            )
        share = weight * _share(reduction, targets, options)
        per_token = {**options, "reduction": "sum"}
        batches = self._staged.batches(number, input_ids, targets, padding, documents, per_token)
        of_routers = self._staged.routers_weight(batches, _routers_share(reduction, targets, options), trains=True)
        losses, grads = self._staged.trained(batches, params, scale * share, scale * of_routers)
        return self._staged.from_last(losses, share) + self._staged.of_routers(batches) * of_routers, grads


def _share(reduction: str, targets: Tensor, options: dict[str, Any]) -> float:
    """What the sum of the tokens' losses is multiplied with."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"the loss of a model in pipeline stages is a mean or a sum, not reduction={reduction!r}")
    if reduction == "sum":
        return 1.0
    counts = targets_that_count(targets, options)
    return 1.0 / counts if counts else 0.0


def _routers_share(reduction: str, targets: Tensor, options: dict[str, Any]) -> float:
    """What the mean over the tokens of what routers add is multiplied with."""
    return 1.0 if reduction == "mean" else float(targets_that_count(targets, options))


def _layer(layer: Any, number: int) -> Any:
    def run(hidden: Tensor | None, batch: _Batch) -> Tensor:
        return layer(hidden, batch.positions, None if batch.cache is None else batch.cache.layer(number))

    return run


def _same(hidden: Tensor | None) -> Tensor:
    assert hidden is not None
    return hidden * 1


def _rows(x: Any, part: slice) -> Any:
    return None if x is None else from_host(np.ascontiguousarray(host_array(x)[part]))


def _table_of(encoder: Encoder) -> Any:
    return parameter_table(encoder.embed_tokens)["weight"]


def _leave_out(cell: nn.Cell, name: str) -> None:
    """Have an attribute that is a Cell be None."""
    child_table(cell)[name] = None


def _encoder_of(model: Any) -> Encoder:
    encoder = getattr(model, "model", None)
    needed = ("logits_of", "loss_of", "lm_head", "config")
    missing = [name for name in needed if not hasattr(model, name)]
    if not isinstance(encoder, Encoder) or missing or encoder.embed_tokens is None:
        raise TypeError(
            f"pipeline stages are for language models as those of model_center.model: an Encoder with an embedding as `model`, and "
            f"{', '.join(needed)}; {type(model).__name__} is none"
        )
    return encoder
