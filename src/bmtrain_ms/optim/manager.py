"""Loss scaling, accumulation, clipping and stepping of one or several optimizers."""

from __future__ import annotations

import math
import sys
from typing import Any, Callable, Iterable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from ..comm import World, world
from ..compat.runtime import added, from_host, host_array, scaled, square_sum
from ..zero import DistributedParameter, context_of


class OptimManager:
    """Drives training steps (BMTrain: `optim.OptimManager`).

    Gradients are the mean over the ranks of what each rank's loss gives, kept as float32 shards, and carry the loss scale until
    `step`. Several calls of `backward` add up.

    Args:
        loss_scale: initial scale; None turns scaling, and skipping, off.
        loss_scale_factor: the scale is divided by it after an overflow, and multiplied after `loss_scale_steps` steps without.
        loss_scale_steps: see there.
        min_loss_scale, max_loss_scale: the scale stays between them.
        in_world: the ranks; default: the current world.
    """

    def __init__(
        self,
        loss_scale: float | None = None,
        loss_scale_factor: float = 2.0,
        loss_scale_steps: int = 1024,
        min_loss_scale: float = 1.0,
        max_loss_scale: float = math.inf,
        *,
        in_world: World | None = None,
    ):
        if loss_scale is not None and not 0 < loss_scale < math.inf:
            raise ValueError(f"loss_scale must be positive and finite, or None, not {loss_scale}")
        if loss_scale_factor <= 0 or loss_scale_factor == 1 or loss_scale_steps < 1:
            raise ValueError(
                f"need a positive loss_scale_factor other than 1 and loss_scale_steps >= 1, not {loss_scale_factor}, "
                f"{loss_scale_steps}"
            )
        if not 0 < min_loss_scale <= max_loss_scale:
            raise ValueError(f"need 0 < min_loss_scale <= max_loss_scale, not {min_loss_scale}, {max_loss_scale}")
        self.loss_scale_enabled = loss_scale is not None
        self.loss_scale = 1.0 if loss_scale is None else float(loss_scale)
        self.loss_scale_factor = max(loss_scale_factor, 1.0 / loss_scale_factor)
        self.loss_scale_steps = loss_scale_steps
        self.min_loss_scale, self.max_loss_scale = min_loss_scale, max_loss_scale
        self.steps_since_last_scale = 0
        self.skipped_steps = 0
        self.optimizers: list[Any] = []
        self.lr_schedulers: list[Any] = []
        self._world = in_world or world()
        self._grads: dict[int, Tensor] = {}  # id of parameter -> float32 shard of the scaled gradient

    def add_optimizer(self, optimizer: Any, lr_scheduler: Any = None) -> None:
        """Another optimizer, which steps with the others, and the schedule that steps with it.

        Raises:
            ValueError: it shares a parameter with an optimizer added before.
        """
        known = {id(p) for other in self.optimizers for p in other.parameters}
        shared = [p.name for p in optimizer.parameters if id(p) in known]
        if shared:
            raise ValueError(f"another optimizer has parameter {shared[0]} already: it would be updated twice")
        self.optimizers.append(optimizer)
        self.lr_schedulers.append(lr_scheduler)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """loss * loss_scale, for those who differentiate by themselves."""
        return loss * self.loss_scale

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        self._grads.clear()

    def grad(self, p: Parameter) -> Tensor | None:
        """The accumulated gradient of a parameter's shard, float32, times the loss scale; None if there is none yet."""
        return self._grads.get(id(p))

    def backward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `forward(*args, **kwargs)`, differentiate its loss, and add the gradients to the accumulated ones.

        Args:
            forward: returns the loss, a scalar tensor, or a tuple that starts with it.

        Returns:
            What `forward` returned; the loss is this rank's, unscaled.

        Raises:
            RuntimeError: there is no optimizer.
            TypeError: `forward` did not return a loss of one element.
        """
        if not self.optimizers:
            raise RuntimeError("OptimManager.backward needs an optimizer: call add_optimizer first")
        params = [p for optimizer in self.optimizers for p in optimizer.parameters if p.requires_grad]
        returned: list[Any] = []

        def loss_of_forward() -> Tensor:
            out = forward(*args, **kwargs)
            returned.append(out)
            loss = out[0] if isinstance(out, tuple) and out else out
            if not isinstance(loss, Tensor) or loss.size != 1:
                what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"forward must return a scalar loss, or a tuple that starts with it, not {what}")
            return self.scale_loss(loss) if self.loss_scale_enabled else loss

        _, grads = ms.value_and_grad(loss_of_forward, None, params)()
        grads = list(grads)
        for p in params:
            self._add(p, grads.pop(0))  # let go of each: with accumulation there are two otherwise
        return returned[0]

    def clip_grad_norm(
        self, param_groups: Iterable[dict[str, Any]], max_norm: float, norm_type: float = 2.0, eps: float = 1e-6
    ) -> float:
        """Scale gradients down so that their norm over all ranks is at most `max_norm`.

        Args:
            param_groups: as in `optimizer.param_groups`; their parameters are clipped together.
            norm_type: p of the p-norm, or `inf`.

        Returns:
            The norm before clipping, without the loss scale; not finite after an overflow, and then nothing is scaled.
        """
        ids = [id(p) for group in param_groups for p in group["params"] if id(p) in self._grads]
        norm = self._norm([self._grads[i] for i in ids], float(norm_type))
        coefficient = max_norm * self.loss_scale / (norm + eps)
        if math.isfinite(norm) and coefficient < 1.0:
            for i in ids:
                self._grads[i] = scaled(self._grads[i], coefficient)
        return norm / self.loss_scale

    def step(self) -> bool:
        """Update the parameters and the rates, or, after an overflow, skip both and lower the loss scale.

        All ranks decide alike. Accumulated gradients are kept until `zero_grad`, except after a skip.

        Returns:
            Whether the parameters were updated.
        """
        self._world.engine.clock.step += 1
        context_of(self._world).draws.count = 0  # random draws are numbered within the step: a resumed run repeats them
        if self.loss_scale_enabled and not math.isfinite(self._norm(list(self._grads.values()), 2.0)):
            self._skip()
            return False
        for optimizer, scheduler in zip(self.optimizers, self.lr_schedulers):
            with self._world.measure("optimizer step"):
                optimizer.step(self._grads, 1.0 / self.loss_scale)
            if scheduler is not None:
                scheduler.step()
        if self.loss_scale_enabled:
            self.steps_since_last_scale += 1
            if self.steps_since_last_scale >= self.loss_scale_steps:
                self._rescale(self.loss_scale * self.loss_scale_factor)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything but tensors: scaler with its counters, settings of optimizers and schedules. JSON-serialisable."""
        return {
            "loss_scale": self.loss_scale,
            "loss_scale_enabled": self.loss_scale_enabled,
            "steps_since_last_scale": self.steps_since_last_scale,
            "skipped_steps": self.skipped_steps,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "lr_schedulers": [None if s is None else s.state_dict() for s in self.lr_schedulers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: another number of optimizers, or a schedule on one side only.
        """
        mine = [s is None for s in self.lr_schedulers]
        theirs = [s is None for s in state["lr_schedulers"]]
        if len(state["optimizers"]) != len(self.optimizers) or mine != theirs:
            raise ValueError(
                f"the state has {len(theirs)} optimizers (schedule missing: {theirs}), this manager has {len(mine)} ({mine})"
            )
        for name in ("loss_scale", "loss_scale_enabled", "steps_since_last_scale", "skipped_steps"):
            setattr(self, name, state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.lr_schedulers, state["lr_schedulers"]):
            if scheduler is not None:
                scheduler.load_state_dict(saved)

    # Implementation #

    def _add(self, p: Parameter, grad: Tensor) -> None:
        before = self._grads.get(id(p))
        if grad.dtype != ms.float32:
            grad = grad.astype(ms.float32)
        elif not isinstance(p, DistributedParameter):
            grad = grad * 1.0  # changed in place later, and the gradients of a and b in a + b are one tensor
        self._grads[id(p)] = grad if before is None else added(before, grad)

    def _norm(self, grads: list[Tensor], p: float) -> float:
        """p-norm over all ranks that hold different shards. Not finite if any element is not."""
        if p == math.inf:
            # the sum is 0, or NaN if an element is not finite: max() on CPU ignores NaN
            largest = [host_array(g.abs().max() + (g * 0.0).sum()).item() for g in grads]
            mine = math.nan if any(math.isnan(x) for x in largest) else max(largest, default=0.0)
            gathered = host_array(self._world.shards.all_gather([_scalar(mine)], label="grad norm").wait()[0])
            return float(np.max(gathered))
        mine = sum(square_sum(g) if p == 2.0 else host_array((g.abs() ** p).sum()).item() for g in grads)
        total = host_array(self._world.shards.all_reduce([_scalar(mine)], label="grad norm").wait()[0]).item()
        return total ** (1.0 / p) if math.isfinite(total) else total

    def _skip(self) -> None:
        old = self.loss_scale
        self._rescale(self.loss_scale / self.loss_scale_factor)
        self.skipped_steps += 1
        self.zero_grad()
        if self._world.mesh.rank == 0:
            sys.stderr.write(f"Gradient overflow: step skipped, loss scale {old:g} -> {self.loss_scale:g}\n")

    def _rescale(self, scale: float) -> None:
        self.loss_scale = min(max(scale, self.min_loss_scale), self.max_loss_scale)
        self.steps_since_last_scale = 0


def _scalar(x: float) -> Tensor:
    return from_host(np.array([x], np.float32))
