"""One call of a Block."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor

from bmtrain_ms_base.tree import flatten

from ..comm import rank
from ..compat.autograd import closed, custom_op, references, requested, vjp
from ..compat.runtime import is_float, is_zero
from .context import ZeroContext
from .copies import Copies
from .param import DistributedParameter
from .pipeline import Phase
from .reducer import without_padding
from .replay import Replay, hashes
from .slots import Slots


class Call:
    """One call of a Block: its arguments, and what its backward must remember."""

    def __init__(self, slots: Slots, zero_level: int, context: ZeroContext, args: tuple, kwargs: dict[str, Any]):
        self.slots, self.zero_level = slots, zero_level
        self.context, self.reducer, self.of = context, context.reducer, context.current
        self.args, self.kwargs = args, kwargs
        self.leaves, self.rebuild = flatten((args, kwargs))
        self.measure = slots.world.measure
        self.backward_span = contextlib.ExitStack()
        self.differentiable = [i for i, x in enumerate(self.leaves) if is_float(x)]
        self.trainable = slots.trainable()
        self.prints: tuple[int, ...] = ()  # of the shards that forward used
        self.inside: Callable[[], ContextManager[None]] = closed

    # The three ways to run #

    def evaluate(self) -> Any:
        """Not recorded: gather, run, release."""
        self.inside = contextlib.nullcontext  # forces, attributions: nothing is recorded yet
        gathered = self._copies().enter(Phase.EVAL)
        try:
            with self.measure(f"evaluate {self.slots.label}"), self.slots.substituted(gathered.tensors()), self.inside():
                out = list_as_tuple(self.slots.run(*self.args, **self.kwargs))
            gathered.verify()
            return out
        finally:
            gathered.leave()

    def checkpointed(self) -> Any:
        """One function of (inputs, shards) that recomputes in its backward."""
        keep = self.zero_level == 2
        result = _Result()
        due = self.slots.is_due()
        replay = Replay(self.context.draws, looks=due or self.slots.world.everyone.lands_in_place)
        replay.given(self.leaves)
        kept: list[Copies] = []
        gathers: list[DistributedParameter] = []

        def forward(*inputs_and_shards: Tensor) -> tuple[Tensor, ...]:
            gathered = self._copies().enter(Phase.FORWARD)
            try:
                with self.measure(f"forward {self.slots.label}"), self.context.gathers(gathers):
                    out = result.take(self._run(inputs_and_shards[: len(self.differentiable)], gathered.tensors()))
                gathered.verify()
                self.prints = gathered.prints
            except BaseException:
                gathered.leave()
                raise
            if keep:
                gathered.keep()
                kept.append(gathered)
            else:
                gathered.leave()
            replay.ended(out, self.slots.flags())
            return out

        def backward(grads: tuple[Tensor, ...]) -> list[Tensor]:
            gathered = kept[0] if keep else self._copies().enter(Phase.BACKWARD)
            try:
                with self.measure(f"backward {self.slots.label}"):
                    pulled = self._pull(gathered, grads, replay, due)
                gathered.verify_again(self.prints)
            except BaseException:
                gathered.leave()
                raise
            gathered.leave()
            inputs = len(self.differentiable)
            return [*pulled[:inputs], *self._reduce(pulled[inputs:])]

        inputs = *self._inputs(), *self._shards()
        return result.restore(custom_op(forward, backward, *inputs, captured=lambda: _once(gathers)))

    def kept(self) -> Any:
        """Recorded by autograd as it runs; only the gathered memory is let go of in between."""
        result = _Result()
        gathered = self._copies().enter(Phase.FORWARD)
        # What autograd records lies between two functions of ours: backward reaches `_behind` first, which with ZeRO-3 gathers
        # again, and `_before` last, which reduces and releases. References are counted between the two, so that another number
        # after the module has run comes from the module.
        try:
            weights = list(gathered.tensors())
            inputs = self._before(gathered, weights)
            known = list(map(references, weights))
            with self.measure(f"forward {self.slots.label}"):
                out = result.take(self._run(inputs, weights))
            gathered.verify()
            self.prints = gathered.prints
            # what somebody has kept of the weights has to stay what it is
            stays = self.zero_level == 2 or any(gathered.owns(x) for x in out) or self.slots.holds(gathered)
            stays = stays or known != list(map(references, weights))
            out = self._behind(gathered, out)
        except BaseException:
            gathered.leave()
            raise
        if stays:
            gathered.keep()
        else:
            self.slots.warn_of_copies(gathered)
            gathered.park()
        return result.restore(out)

    # Pieces #

    def _before(self, gathered: Copies, weights: list[Tensor]) -> list[Tensor]:
        """Make full tensors functions of the shards; the last thing that backward reaches. Replaces entries of `weights`."""
        inputs = self._inputs()
        if not self.trainable:  # nothing to reduce, but something to release: an identity on the inputs

            def leave(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                self._end_of_backward(gathered)
                gathered.leave()
                return grads

            return list(custom_op(lambda *xs: xs, leave, *inputs)) if inputs else inputs

        def reduce(grads: tuple[Tensor, ...]) -> list[Tensor]:
            self._end_of_backward(gathered)
            gathered.leave()
            return self._reduce(grads)

        full = tuple(weights[i] for i in self.trainable)
        for i, tensor in zip(self.trainable, custom_op(lambda *_: full, reduce, *self._shards())):
            weights[i] = tensor
        return inputs

    def _end_of_backward(self, gathered: Copies) -> None:
        self.backward_span.close()
        gathered.verify_again(self.prints)

    def _behind(self, gathered: Copies, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """An identity; the first thing that backward reaches."""

        def gather_again(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if self.zero_level == 3:
                gathered.enter_again()
            self.backward_span = contextlib.ExitStack()
            self.backward_span.enter_context(self.measure(f"backward {self.slots.label}"))
            return grads

        return custom_op(lambda *xs: xs, gather_again, *outputs) if outputs else outputs

    def _copies(self) -> Copies:
        return Copies(self.slots.groups, self.context.pipeline, self.of)

    def _reduce(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Start reducing gradients of the full tensors that are trained; what autograd is told. The copies are released."""
        self.context.pipeline.before_reduce()
        told, left, first = [], list(zip(self.trainable, grads)), 0
        for group in self.slots.groups:
            behind = first + len(group.params)
            mine = [(i - first, grad) for i, grad in left if first <= i < behind]
            if mine:
                told += self.reducer.reduce(group, [i for i, _ in mine], [grad for _, grad in mine])
            first = behind
        return told

    def _inputs(self) -> list[Tensor]:
        return [self.leaves[i] for i in self.differentiable]

    def _shards(self) -> list[Any]:  # tensors and `Sharded`: Python has no type for both
        return [self.slots.params[i] for i in self.trainable]

    def _run(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for i, x in zip(self.differentiable, inputs):
            leaves[i] = x
        args, kwargs = self.rebuild(iter(leaves))
        self.context.in_stage.append(self.slots.params[0].in_stage)
        try:
            with self.slots.substituted(weights), self.inside():
                out = self.slots.run(*args, **kwargs)
        finally:
            self.context.in_stage.pop()
        left, _ = flatten((args, kwargs))
        if len(left) != len(leaves) or any(x is not y for x, y in zip(left, leaves)):
            raise RuntimeError(
                f"rank {rank()}: {type(self.slots.module).__name__} ({self.slots.label}) changed a list or dict that it was given, "
                "which only its Block would see: what is put there has no gradient outside. Return it instead"
            )
        return out

    def refuse_complex(self) -> None:
        """Raise TypeError where an argument is complex: it would get no gradient."""
        refuse_complex(self.leaves, self.slots)

    def _pull(self, gathered: Copies, grads: tuple[Tensor, ...], replay: Replay, due: bool) -> tuple[Tensor, ...]:
        """Recompute, and differentiate with respect to inputs and trainable full tensors."""
        weights, inputs = gathered.tensors(), len(self.differentiable)
        captured: list[Parameter] = []
        others = self.slots.elsewhere.to_ask_for(self.slots.params, due)
        self._refuse_changed_inputs(replay)

        def recompute(*inputs_and_weights: Tensor) -> tuple[Tensor, ...]:
            full = list(weights)
            for i, tensor in zip(self.trainable, inputs_and_weights[inputs:]):
                full[i] = tensor
            buffers = self.slots.plain_parameters()
            before = hashes(buffers)
            out = _Result().take(self._run(inputs_and_weights[:inputs], full))
            self._check(gathered, replay, out, [p.name for p, old, new in zip(buffers, before, hashes(buffers)) if old != new])
            return out

        leaves = [weights[i] for i in self.trainable]
        gathers: list[DistributedParameter] = []
        with replay.again(), self.context.gathers(gathers):

            def capture() -> list[Parameter]:
                captured.extend(_captured(gathers, [*self._shards(), *others]))
                return captured

            found = vjp(recompute, self._inputs(), grads, leaves, self.slots.graph, capture)
        asked = inputs + len(leaves)
        self._add_captured(captured, found[asked:], gathers)
        return found[:asked]

    def _refuse_changed_inputs(self, replay: Replay) -> None:
        what = "what it was given" if replay.inputs_differ(self.leaves) else None
        what = what or ("a flag of its cells" if replay.flags_differ(self.slots.flags()) else None)
        if what:
            raise RuntimeError(
                f"rank {rank()}: {what} was changed between forward and backward of {self.slots.label} "
                f"({type(self.slots.module).__name__}), which a checkpointed Block computes with again: its gradients would be "
                "wrong. Change it after backward, or use Block(use_checkpoint=False)"
            )

    def _check(self, gathered: Copies, replay: Replay, again: tuple[Tensor, ...], changed: list[str]) -> None:
        """Check that recomputation does what forward did, to rounding, and leaves buffers as they were."""
        where = f"rank {rank()}: recomputing {self.slots.label} ({type(self.slots.module).__name__})"
        if replay.differs(again):
            gathered.verify_again(self.prints)  # other values of parameters are the better explanation
            raise RuntimeError(
                f"{where} gave other values than its forward pass, so its gradients would be wrong: something in it is random "
                "(a dropout that is a function, not a bmtrain_ms.nn.Dropout) or changes state. Use "
                "Block(use_checkpoint=False) for it"
            )
        if changed:
            raise RuntimeError(
                f"{where} changed {changed[0]} a second time (running statistics, a counter): use Block(use_checkpoint=False) for "
                "it"
            )

    def _add_captured(self, captured: list[Parameter], grads: Sequence[Tensor], gathers: list[DistributedParameter]) -> None:
        """Autograd never sees what the module used without being given it: those gradients are added beside it."""
        gathered = set(map(id, gathers))
        for p, grad in zip(captured, grads):
            if not isinstance(p, DistributedParameter) or id(p) in gathered:
                self.reducer.add(p, grad * 1.0)  # the gradients of a and b in a + b are one tensor
            elif not self.slots.world.everyone.lands_in_place or not is_zero(grad):  # the module uses the shard itself
                if not any(p is own for own in self.slots.params):
                    self.slots.elsewhere.note_use(p, self.slots.module, self.slots.label)
                self.reducer.add(p, without_padding(p, grad * 1.0))


def list_as_tuple(out: Any) -> Any:
    """A Block's result as BMTrain has it: a list becomes a tuple."""
    return tuple(out) if isinstance(out, list) else out


def refuse_complex(leaves: Sequence[Any], slots: Slots | None) -> None:
    """Raise TypeError for complex tensors among arguments, or (no `slots`) results: they would carry no gradient."""
    if any(isinstance(x, Tensor) and x.dtype in (ms.complex64, ms.complex128) for x in leaves):
        where = "returned by the module of a Block" if slots is None else f"given to Block {slots.label}"
        raise TypeError(
            f"a complex tensor is {where}, through which it carries no gradient: pass real and imaginary part as two tensors"
        )


def _once(params: Sequence[DistributedParameter]) -> list[DistributedParameter]:
    """Each parameter that is trained, once."""
    return list({id(p): p for p in params if p.requires_grad}.values())


def _captured(gathers: list[DistributedParameter], shards: Sequence[Any]) -> list[Parameter]:
    """Parameters that a recomputed module may have used without being given them: whole ones, and those it gathered itself.

    `shards`: those whose shards it may have used.
    """
    found = dict(requested().of(DistributedParameter, others=True))
    found.update((id(p), p) for p in _once(gathers))
    found.update((id(p), p) for p in shards if not p.has_hooks)  # a hook would see what is no gradient
    return list(found.values())


class _Result:
    """Separates a result's floating-point tensors, which autograd handles, from the rest of it."""

    def take(self, out: Any) -> tuple[Tensor, ...]:
        """Remember the structure of `out`; return its floating-point tensors."""
        self._leaves, self._rebuild = flatten(list_as_tuple(out))
        refuse_complex(self._leaves, None)
        self._places = [i for i, x in enumerate(self._leaves) if is_float(x)]
        return tuple(self._leaves[i] for i in self._places)

    def restore(self, tensors: Sequence[Tensor]) -> Any:
        """The same structure around `tensors`."""
        for i, x in zip(self._places, tensors):
            self._leaves[i] = x
        return self._rebuild(iter(self._leaves))
