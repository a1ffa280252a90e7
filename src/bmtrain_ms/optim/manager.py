"""Loss scaling, accumulation, clipping and stepping of one or several optimizers."""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from bmtrain_ms_base.checks import number, whole

from ..comm import World
from ..comm import world as current_world
from ..compat.habits import refuse_graph_mode
from ..compat.runtime import from_host, is_float
from ..ops.in_place import add_, scale_, square_sum
from ..parallel import Scheduled
from ..zero import DistributedParameter, context_of
from .base import average_whole, end_step
from .driver import Driver, Schedule, rule_of
from .native import adapted, adapted_schedule
from .norms import checked_order, counts_here, parameters_of, total_norm
from .overflow import GradientOverflowError, advice
from .result import StepResult
from .settings import Made

_LARGEST = 2.0**127  # no scale and no count reaches it
_COUNTERS = ("loss_scale", "loss_scale_enabled", "steps_since_last_scale", "skipped_steps")
_LATER_COUNTERS = ("skipped_in_a_row", "overflows_left", "grads_scale")  # not in states saved before these existed


class OptimManager:
    """Drives training steps (BMTrain: `optim.OptimManager`).

    Gradients are the mean over the ranks of what each rank's loss gives, kept as float32 shards, and carry the loss scale until
    `step`. Several calls of `backward` add up. A skipped step leaves no trace but the lower scale and the counters: the next one
    draws the random numbers (dropout) that it would have drawn.

    Args:
        loss_scale: initial scale; None turns scaling, and skipping, off.
        loss_scale_factor: the scale is divided by it after an overflow, and multiplied after `loss_scale_steps` steps without.
        loss_scale_steps: see there.
        min_loss_scale, max_loss_scale: the scale stays between them; the initial one must be.
        grad_scale: what the sum of the gradients of ranks with rows of their own is divided by; default: how many these are, so
            that it is their mean.
        hysteresis: how many overflows it takes to lower the scale, counted since it was last raised (Megatron-LM).
        max_skipped_steps: after so many skipped steps in a row `step` raises; None: never.
        in_world: the ranks; default: the current world.

    Raises:
        TypeError: a setting that is not a number.
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        loss_scale: float | None = None,
        loss_scale_factor: float = 2.0,
        loss_scale_steps: int = 1024,
        min_loss_scale: float = 1.0,
        max_loss_scale: float = math.inf,
        grad_scale: float | None = None,
        *,
        hysteresis: int = 1,
        max_skipped_steps: int | None = 64,
        in_world: World | None = None,
    ):
        loss_scale = None if loss_scale is None else number("loss_scale", loss_scale)
        grad_scale = None if grad_scale is None else number("grad_scale", grad_scale)
        loss_scale_factor = number("loss_scale_factor", loss_scale_factor)
        min_loss_scale, max_loss_scale = number("min_loss_scale", min_loss_scale), number("max_loss_scale", max_loss_scale)
        loss_scale_steps, hysteresis = whole("loss_scale_steps", loss_scale_steps), whole("hysteresis", hysteresis)
        max_skipped_steps = None if max_skipped_steps is None else whole("max_skipped_steps", max_skipped_steps)
        if loss_scale is not None and not 0 < loss_scale < math.inf:
            raise ValueError(f"loss_scale must be positive and finite, or None, not {loss_scale}")
        if not 0 < loss_scale_factor < math.inf or loss_scale_factor == 1 or loss_scale_steps < 1:
            raise ValueError(
                f"need a positive loss_scale_factor other than 1 and loss_scale_steps >= 1, not {loss_scale_factor}, "
                f"{loss_scale_steps}"
            )
        if not 0 < min_loss_scale <= max_loss_scale:
            raise ValueError(f"need 0 < min_loss_scale <= max_loss_scale, not {min_loss_scale}, {max_loss_scale}")
        if loss_scale is not None and not min_loss_scale <= loss_scale <= max_loss_scale:
            raise ValueError(
                f"loss_scale must be from min_loss_scale={min_loss_scale} to max_loss_scale={max_loss_scale}, not {loss_scale}"
            )
        if grad_scale is not None and not 0 < grad_scale < math.inf:
            raise ValueError(f"grad_scale must be positive and finite, or None, not {grad_scale}")
        if hysteresis < 1 or (max_skipped_steps is not None and max_skipped_steps < 1):
            raise ValueError(f"hysteresis and max_skipped_steps must be at least 1, not {hysteresis}, {max_skipped_steps}")
        self.loss_scale_enabled = loss_scale is not None
        self.loss_scale = 1.0 if loss_scale is None else float(loss_scale)
        self.loss_scale_factor = max(loss_scale_factor, 1.0 / loss_scale_factor)
        self.loss_scale_steps = loss_scale_steps
        self.min_loss_scale, self.max_loss_scale = min_loss_scale, max_loss_scale
        self.steps_since_last_scale = 0
        self.skipped_steps = self.skipped_in_a_row = 0
        self.hysteresis, self.overflows_left = hysteresis, hysteresis
        self.max_skipped_steps = max_skipped_steps
        self.optimizers: list[Any] = []  # as they were given, as the schedules
        self.lr_schedulers: list[Any] = []
        self.drivers: list[Driver] = []
        self._schedules: list[Schedule] = []
        self._made: list[Made] = []
        self._began = False  # whether something else than what was asked for may be in force
        self._world = in_world or current_world()
        self.grads_scale = self.loss_scale / self._world.mesh.tp  # of the gradients that are there; `loss_scale` may have moved on
        self._stepped = True  # the gradients that are there have been used
        self._grad_scale = grad_scale
        self._grad_norm: float | None = None
        self._max_norm: float | None = None  # that gradients were clipped to
        self._grads: dict[int, Tensor] = {}  # id of parameter -> float32 shard of the scaled gradient
        self._elsewhere: set[int] = set()  # ids of those that another rank counts in norms
        context_of(self._world).managers.add(self)

    def add_optimizer(self, optimizer: Any, lr_scheduler: Any = None) -> None:
        """Another optimizer, which steps with the others, and the schedule that steps with it.

        Args:
            optimizer: one of ours; or of `mindspore.nn`, `mindspore.experimental.optim` or `mindspore.mint.optim`, see
                `NativeOptimizer`.
            lr_scheduler: one of `bmtrain_ms.lr_scheduler`, or None.

        Raises:
            ValueError: it shares a parameter, or the schedule, with an optimizer added before; the schedule is another optimizer's;
                or it needs whole parameters.
            TypeError: it is not an optimizer.
        """
        driver = adapted(optimizer)
        schedule = adapted_schedule(lr_scheduler)
        if lr_scheduler is not None and any(lr_scheduler is other for other in self.lr_schedulers):
            raise ValueError("this schedule steps with another optimizer already, and would step twice; make one for each")
        if getattr(lr_scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError(f"this {type(lr_scheduler).__name__} was made for another optimizer, and would set its rates")
        self._refuse_shared([*self.drivers, driver])
        self.optimizers.append(optimizer)
        self.drivers.append(driver)
        self.lr_schedulers.append(lr_scheduler)
        self._schedules.append(schedule)
        self._made.append(Made(driver, schedule, lr_scheduler))

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters of all optimizers, in the order in which these were added."""
        return [p for driver in self.drivers for p in driver.parameters]

    @property
    def rate(self) -> float | None:
        """The learning rate of the first group of the first optimizer; None where that computes it by itself."""
        groups = self.drivers[0].settings()
        return groups[0]["lr"] if groups else None

    def scale_loss(self, loss: Tensor) -> Tensor:
        """loss * loss_scale, or a tensor-parallel rank's share of it, for those who differentiate by themselves."""
        return self._scaled(loss, self.scale_to_accumulate)

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        self._grads.clear()
        self._grad_norm = None

    def grad(self, p: Parameter) -> Tensor | None:
        """The accumulated gradient of a parameter's shard, float32, times `grads_scale`; None if there is none yet."""
        return self._grads.get(id(p))

    def backward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `forward(*args, **kwargs)`, differentiate its loss, and add the gradients to the accumulated ones.

        Args:
            forward: returns the loss, a scalar tensor, or a tuple that starts with it; or the `loss` of a model in pipeline stages.

        Returns:
            What `forward` returned; the loss is this rank's, unscaled.

        Raises:
            RuntimeError: there is no optimizer, or MindSpore is in GRAPH_MODE.
            TypeError: `forward` is not a function, or did not return a loss of one element.
        """
        if isinstance(forward, Tensor):
            raise TypeError(
                "backward takes the function that computes the loss, and its arguments, not the loss: MindSpore differentiates "
                "functions. Write manager.backward(forward, *batch) where BMTrain has manager.backward(forward(*batch))"
            )
        if not callable(forward):
            raise TypeError(f"backward takes the function that computes the loss, and its arguments, not {forward!r}")
        refuse_graph_mode("OptimManager.backward")
        if not self.optimizers:
            raise RuntimeError("OptimManager.backward needs an optimizer: call add_optimizer first")
        self._refuse_shared(self.drivers)  # groups may have been added
        params = [p for p in self.parameters if p.requires_grad]
        if isinstance(forward, Scheduled):
            loss, grads = forward.differentiated(params, self.scale_to_accumulate * self._factor, *args, **kwargs)
            self.accumulate(params, grads)
            return loss
        context = context_of(self._world)
        if self._world.mesh.pp > 1 and not context.rows_differ:
            raise RuntimeError(
                f"with pipe_size={self._world.mesh.pp} the loss is made micro-batch by micro-batch: spread the model over "
                "the stages, and write manager.backward(model.loss, *batch), with its loss and no function that calls it; or have "
                "its layers in a PipelineTransformerBlockList"
            )
        returned: list[Any] = []

        def loss_of_forward() -> Tensor:
            out = forward(*args, **kwargs)
            returned.append(out)
            loss = out[0] if isinstance(out, tuple) and out else out
            if not isinstance(loss, Tensor) or loss.size != 1:
                what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"forward must return a scalar loss, or a tuple that starts with it, not {what}")
            if not is_float(loss):
                raise TypeError(f"the loss is {loss.dtype}, which has no gradient: leave out what made it so, as astype(int32)")
            return self._scaled(loss, scale)

        scale = self.scale_to_accumulate
        anchors = [] if context.anchor is None else [context.anchor]
        _, grads = ms.value_and_grad(loss_of_forward, None, [*params, *anchors])()
        grads = list(grads)[: len(params)]
        self.accumulate(params, grads)
        return returned[0]

    @property
    def _factor(self) -> float:
        """What means over ranks are multiplied with to be what `grad_scale` asks for."""
        return 1.0 if self._grad_scale is None else context_of(self._world).data_ranks / self._grad_scale

    @property
    def scale_to_accumulate(self) -> float:
        """What losses are multiplied with now: the scale of the gradients that are there already, or else the loss scale, of which
        each tensor-parallel rank has a share, as all of them have the loss."""
        return self.grads_scale if self._grads else self.loss_scale / self._world.mesh.tp

    def accumulate(self, params: Sequence[Parameter], grads: list[Tensor]) -> None:
        """Add gradients that were made elsewhere to the accumulated ones. All ranks call it together.

        Args:
            params: of the optimizers.
            grads: as `value_and_grad` returns them, one for each parameter, of losses times `scale_to_accumulate`; the list is
                emptied, so that no gradient is alive twice.
        """
        scale = self.scale_to_accumulate
        averaged, self._stepped = average_whole(params, grads, self._world), False
        self._grad_norm, self.grads_scale = None, scale
        self._elsewhere.update(id(p) for p in params if not counts_here(p, self._world))
        for p in params:
            self._add(p, averaged.pop(0))

    def clip_grad_norm(self, param_groups: Any, max_norm: float, norm_type: float | str = 2.0, eps: float = 1e-6) -> float:
        """Scale gradients down so that their norm over all ranks is at most `max_norm`.

        Args:
            param_groups: whose gradients are clipped together: `optimizer.param_groups`, parameters, or an optimizer (MindSpore's
                have no `param_groups`).
            norm_type: p of the p-norm; `inf`, also as a string, for the largest absolute value.

        Returns:
            The norm before clipping, without the loss scale; not finite after an overflow, and then nothing is scaled.

        Raises:
            ValueError: `max_norm` or `norm_type` is not positive.
        """
        order = checked_order(max_norm, norm_type)
        ids = [id(p) for p in parameters_of(param_groups) if id(p) in self._grads]
        norm = self._norm(ids, order)
        coefficient = max_norm * self.grads_scale / (norm + eps)
        if math.isfinite(norm) and coefficient < 1.0:
            for i in ids:
                self._grads[i] = scale_(self._grads[i], coefficient)
        self._grad_norm = unscaled = norm / self.grads_scale
        self._max_norm = max_norm
        return unscaled

    def step(self) -> StepResult:
        """Update the parameters and the rates, or, after an overflow, skip both and lower the loss scale.

        All ranks decide alike. Accumulated gradients are kept until `zero_grad`, except after a skip. Without loss scaling there is
        no search for overflows (as in BMTrain).

        Raises:
            GradientOverflowError: `max_skipped_steps` were skipped in a row.
        """
        if self.loss_scale_enabled:
            norm = self._norm(list(self._grads), 2.0)
            if self._grad_norm is None:
                self._grad_norm = norm / self.grads_scale
            if not math.isfinite(norm):
                end_step(made=False, in_world=self._world)
                return self._skip()
        end_step(in_world=self._world)
        self._began = True
        if self._world.everyone.lands_in_place:  # a device would be waited for, and has nobody who compares
            self._world.follow(rule_of(self.drivers, bool(self._grads), self._max_norm))
        self._max_norm = None
        for driver, schedule in zip(self.drivers, self._schedules):
            schedule.cover_new_groups()
            with self._world.measure("optimizer step"):
                driver.step([self.grad(p) for p in driver.parameters], 1.0 / self.grads_scale)
            schedule.step()
        self.skipped_in_a_row, self._stepped = 0, True
        norm = self._grad_norm
        if self.loss_scale_enabled:
            self.steps_since_last_scale += 1
            if self.steps_since_last_scale >= self.loss_scale_steps:
                self._rescale(self.loss_scale * self.loss_scale_factor)
                self.overflows_left = self.hysteresis
        return StepResult(True, norm, self.loss_scale, self.skipped_steps, 0)

    def discard_step(self) -> None:
        """Count a step without making it; its gradients are forgotten, and the next draws the same random numbers."""
        end_step(made=False, in_world=self._world)
        self._world.follow("a step that was discarded")
        self.zero_grad()

    def state_dict(self, gather_opt: bool = False, tensors: bool = True) -> dict[str, Any]:
        """The scaler with its counters, and the states of optimizers and schedules (BMTrain: `state_dict(gather_opt)`).

        Args:
            gather_opt: optimizer states are whole, and load at any number of ranks; all ranks call it. See
                `AdamOptimizer.state_dict`.
            tensors: False leaves out what is a tensor; the rest is JSON-serialisable.
        """
        return {
            **{name: getattr(self, name) for name in (*_COUNTERS, *_LATER_COUNTERS)},
            "optimizers": [
                {**driver.state_dict(gather_opt, tensors), **made.state_dict()} for driver, made in zip(self.drivers, self._made)
            ],
            "lr_schedulers": [schedule.state_dict() for schedule in self._schedules],
        }

    def load_state_dict(self, state: dict[str, Any], strict: bool = True, keep: str = "saved") -> None:
        """Continue where `state` was taken; whether losses are scaled, and the limits of the scale, are this manager's, e.g. where
        float16 goes on from float32. Nothing is changed if it does not fit.

        Args:
            strict: False: optimizers may have other parameters and groups, see `AdamOptimizer.load_state_dict`.
            keep: which settings to use where this run chose others than the one that saved (a schedule's length, a rate, betas):
                the `saved`, or its `own`; rank 0 tells both. The position in a schedule, and what was changed by hand in the run
                that saved, is restored.

        Raises:
            ValueError: see `check_state_dict`.
        """
        if keep not in ("own", "saved"):
            raise ValueError(f"keep must be own or saved, not {keep!r}")
        self.check_state_dict(state, strict)
        schedules = self._load_optimizers(state, strict, keep)
        self.grads_scale = state.get("grads_scale", state["loss_scale"])
        for name in ("skipped_steps", "skipped_in_a_row"):
            setattr(self, name, state.get(name, getattr(self, name)))
        if self.loss_scale_enabled and state["loss_scale_enabled"]:
            self.loss_scale = min(max(state["loss_scale"], self.min_loss_scale), self.max_loss_scale)
            self.steps_since_last_scale = state["steps_since_last_scale"]
            self.overflows_left = min(state.get("overflows_left", self.overflows_left), self.hysteresis)
        for schedule, saved in zip(self._schedules, schedules):
            schedule.load_state_dict(saved)
        self._began = True

    def _load_optimizers(self, state: dict[str, Any], strict: bool, keep: str) -> list[Any]:
        """Returns the states for the schedules."""
        schedules, used, replaced, fresh = list(state["lr_schedulers"]), [], [], not self._began
        theirs = [saved.get("made") if isinstance(saved, dict) else None for saved in state["optimizers"]]
        before = [driver.settings() for driver in self.drivers]
        for i, (made, schedule) in enumerate(zip(self._made, self._schedules)):
            chosen, mine, others = made.schedule_to_load(schedules[i], theirs[i], fresh)
            used, replaced = used + mine, replaced + others
            schedules[i] = schedule.check_state_dict(chosen) if keep == "own" else schedules[i]
        for i, (driver, saved) in enumerate(zip(self.drivers, state["optimizers"])):
            saved = {name: x for name, x in saved.items() if name != "made"} if isinstance(saved, dict) else saved
            driver.load_state_dict(saved, strict)
            mine, others = self._made[i].choose_groups(before[i], theirs[i], fresh, keep == "own")
            used += [f"optimizer {i}, {x}" for x in mine]
            replaced += [f"optimizer {i}, {x}" for x in others]
        if self._world.everyone.rank == 0 and used:
            whose, other = ("its own", "saved") if keep == "own" else ("the saved ones", "own")
            sys.stderr.write(
                f"WARNING: this run has other settings than the one that saved, and uses {whose}: {'; '.join(used)}. "
                f"A script that wants the others loads with keep='{other}'\n"
            )
        if self._world.everyone.rank == 0 and replaced:
            sys.stderr.write(
                f"WARNING: what was changed by hand before loading is replaced by what was saved: {'; '.join(replaced)}. "
                "Change it after loading\n"
            )
        return schedules

    def check_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Whether `load_state_dict` would take it; changes nothing.

        Raises:
            ValueError: another number of optimizers, a schedule on one side only, states that do not fit them, or no such state.
        """
        saved: dict[str, Any] = state if isinstance(state, dict) else {}
        known = [*_COUNTERS, *(name for name in _LATER_COUNTERS if name in saved)]
        wrong = [name for name in known if not isinstance(saved.get(name), (int, float)) or not 0 <= saved[name] < _LARGEST]
        wrong += [name for name in ("loss_scale", "grads_scale") if not wrong and saved.get(name, 1.0) <= 0]
        wrong += [name for name in ("optimizers", "lr_schedulers") if not isinstance(saved.get(name), list)]
        if wrong:
            raise ValueError(f"this is not the state of an OptimManager: {wrong[0]} is missing, or wrong")
        optimizers, schedules = saved["optimizers"], saved["lr_schedulers"]
        mine, theirs = [s is None for s in self.lr_schedulers], [s is None for s in schedules]
        if len(optimizers) != len(self.optimizers) or mine != theirs:
            raise ValueError(
                f"the state has {len(optimizers)} optimizers (schedule missing: {theirs}), this manager has {len(mine)} ({mine})"
            )
        for driver, its in zip(self.drivers, optimizers):
            driver.check_state_dict(its, strict)
        for schedule, its in zip(self._schedules, schedules):
            schedule.check_state_dict(its)

    # For checkpoints #

    def parameters_by_name(self) -> dict[str, Parameter]:
        """The parameters of all optimizers."""
        return {p.name: p for p in self.parameters}

    def gradients(self) -> dict[str, tuple[DistributedParameter | None, Tensor]]:
        """Gradients that wait for `step`: name of parameter -> (what it is sharded as, None: whole; the gradient)."""
        if self._stepped:
            return {}
        named = self.parameters_by_name()
        return {name: (_like(p), self._grads[id(p)]) for name, p in named.items() if id(p) in self._grads}

    def empty_gradient(self, p: Parameter) -> tuple[DistributedParameter | None, Tensor]:
        """(what it is sharded as, zeros), to be filled and given to `restore_gradients`."""
        return _like(p), from_host(np.zeros(tuple(p.shape), np.float32))

    def restore_gradients(self, grads: dict[str, Tensor]) -> None:
        """Have these be the accumulated gradients."""
        self.zero_grad()
        self._stepped = not grads
        named = self.parameters_by_name()
        self._grads.update({id(named[name]): grad for name, grad in grads.items()})
        self._elsewhere.update(id(p) for p in named.values() if not counts_here(p, self._world))

    # Implementation #

    def _refuse_shared(self, drivers: list[Driver]) -> None:
        names = {id(p): p.name for driver in drivers for p in driver.parameters}
        counts = Counter(id(p) for driver in drivers for p in driver.parameters)
        shared = [names[i] for i, count in counts.items() if count > 1]
        if shared:
            raise ValueError(f"another optimizer has parameter {shared[0]} already: it would be updated twice")

    def _scaled(self, loss: Tensor, scale: float) -> Tensor:
        factor = scale * self._factor
        return loss if factor == 1.0 else loss * factor

    def _add(self, p: Parameter, grad: Tensor) -> None:
        before = self._grads.get(id(p))
        if grad.dtype != ms.float32:
            grad = grad.astype(ms.float32)
        elif not isinstance(p, DistributedParameter):
            grad = grad * 1.0  # changed in place later, and the gradients of a and b in a + b are one tensor
        self._grads[id(p)] = grad if before is None else add_(before, grad)

    def _norm(self, ids: list[int], p: float) -> float:
        """p-norm over all ranks; each element counts once. Not finite if any is not."""
        return total_norm([self._grads[i] for i in ids if i not in self._elsewhere], self._world, p)

    def _skip(self) -> StepResult:
        old, norm = self.loss_scale, self._grad_norm
        self.overflows_left -= 1
        self.steps_since_last_scale = 0
        if self.overflows_left <= 0:
            self._rescale(self.loss_scale / self.loss_scale_factor)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.max_skipped_steps is not None and self.skipped_in_a_row >= self.max_skipped_steps:
            bad = [p for p in self.parameters if id(p) in self._grads and not self._is_finite(p)]
            raise GradientOverflowError(advice(bad, self._world, self.skipped_in_a_row, old, self.min_loss_scale))
        self.zero_grad()
        if self._world.everyone.rank == 0:
            sys.stderr.write(f"Gradient overflow: step skipped, loss scale {old:g} -> {self.loss_scale:g}\n")
        return StepResult(False, norm, self.loss_scale, self.skipped_steps, self.skipped_in_a_row)

    def _is_finite(self, p: Parameter) -> bool:
        return math.isfinite(square_sum(self._grads[id(p)]))

    def _rescale(self, scale: float) -> None:
        self.loss_scale = min(max(scale, self.min_loss_scale), self.max_loss_scale)
        self.steps_since_last_scale = 0


def _like(p: Parameter) -> DistributedParameter | None:
    return p if isinstance(p, DistributedParameter) else None
