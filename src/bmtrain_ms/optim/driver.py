"""What the manager asks of an optimizer and of a schedule, and adapters for those that answer less."""

from __future__ import annotations

import json
from typing import Any, Protocol, Sequence, runtime_checkable

import xxhash
from mindspore import Parameter, Tensor

from .state import StateTensors


@runtime_checkable
class Driver(Protocol):
    """What the manager steps: an optimizer of ours, or an adapter around another one."""

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order in which `step` takes gradients."""
        ...

    def step(self, grads: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Update the parameters by gradients of their shards times `scale`, one for each of `parameters`; None: it has none."""
        ...

    def state_tensors(self) -> StateTensors:
        """The tensors of its state, by name; written into to restore them."""
        ...

    def settings(self) -> list[dict[str, Any]]:
        """The settings of each group, as they are now."""
        ...

    def change_settings(self, index: int, values: dict[str, Any]) -> None:
        """Change some settings of the group at `index`."""
        ...

    def state_dict(self, gather: bool = False, tensors: bool = True) -> dict[str, Any]:
        """What `load_state_dict` restores; `gather`: whole tensors; without `tensors` it is JSON-serialisable."""
        ...

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Continue where `state` was taken; not `strict`: other parameters and groups may be missing on either side."""
        ...

    def check_state_dict(self, state: Any, strict: bool = True) -> None:
        """Raise ValueError where `load_state_dict` would not take `state`; changes nothing."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """What the manager asks of what sets the rates of an optimizer."""

    def step(self) -> None:
        """Count one step, and set the rates."""
        ...

    def cover_new_groups(self) -> None:
        """Set the rates of groups that were added since."""
        ...

    def settings(self) -> dict[str, Any] | None:
        """What it was made with, and its position; None where nobody can tell."""
        ...

    def state_dict(self) -> dict[str, Any] | None:
        """What `load_state_dict` restores; None for no schedule."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Continue where `state` was taken."""
        ...

    def check_state_dict(self, state: Any) -> Any:
        """What `load_state_dict` takes of `state`; raises ValueError where it would take nothing, and changes nothing."""
        ...


def rule_of(drivers: Sequence[Driver], has_gradients: bool, max_norm: float | None) -> str:
    """What a step is made by, in words that are the same on all ranks that decide alike: rates, clipping, a digest of the rest."""
    groups = [{name: x for name, x in group.items() if name != "names"} for driver in drivers for group in driver.settings()]
    rates = ", ".join(f"{float(group.pop('lr')):.9g}" for group in groups if "lr" in group)
    clipped = "" if max_norm is None else f", clipped to {float(max_norm):.9g}"
    rest = xxhash.xxh32_hexdigest(json.dumps(groups, default=lambda x: type(x).__name__).encode())
    return f"a step with {'' if has_gradients else 'no gradients, '}rates {rates or 'unknown'}{clipped} (other settings: {rest})"


class OtherOptimizer:
    """A driver around somebody's optimizer that has `parameters`, `step(grads, scale)`, `state_dict` and `load_state_dict`.

    Its states are taken as they are, and it tells nothing of its settings.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, as the optimizer has them."""
        return list(self.optimizer.parameters)

    def step(self, grads: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Hand the gradients on."""
        self.optimizer.step(grads, scale)

    def state_tensors(self) -> StateTensors:
        """Raise TypeError: nothing is known of the state's tensors.

        Raises:
            TypeError: always; a checkpoint would leave them out.
        """
        raise TypeError(
            f"{type(self.optimizer).__name__} does not say which tensors are its state, and a Checkpointer saves them: give it the "
            "methods of bmtrain_ms.optim.Driver, or save manager.state_dict() yourself"
        )

    def settings(self) -> list[dict[str, Any]]:
        """No settings, of no group."""
        return []

    def change_settings(self, index: int, values: dict[str, Any]) -> None:
        """Change nothing: nobody asks, as there are no settings."""

    def state_dict(self, gather: bool = False, tensors: bool = True) -> dict[str, Any]:
        """What the optimizer returns."""
        return self.optimizer.state_dict(gather, tensors)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Hand the state on."""
        self.optimizer.load_state_dict(state)

    def check_state_dict(self, state: Any, strict: bool = True) -> None:
        """Take everything: the optimizer itself complains."""


class OtherSchedule:
    """A schedule around somebody's that has a `step`, maybe with `state_dict` and `load_state_dict`; or around None."""

    def __init__(self, schedule: Any):
        self._schedule = schedule

    def step(self) -> None:
        """Have it step, if there is one."""
        if self._schedule is not None:
            self._schedule.step()

    def cover_new_groups(self) -> None:
        """Do nothing: it will see them in its own step."""

    def settings(self) -> dict[str, Any] | None:
        """None: nothing is known of the settings."""
        return None

    def state_dict(self) -> dict[str, Any] | None:
        """What it returns; None for no schedule."""
        return None if self._schedule is None else self._schedule.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Hand the state on, if there is one who takes it."""
        if self._schedule is not None:
            self._schedule.load_state_dict(state)

    def check_state_dict(self, state: Any) -> Any:
        """Take everything: it complains itself."""
        return state
