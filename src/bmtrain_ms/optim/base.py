"""What the optimizers over shards have in common: groups, steps, and their state, in parts or whole."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from typing import Any, Iterable, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor

from ..comm import World, is_initialized
from ..comm import world as current_world
from ..zero import DistributedParameter, context_of
from .state import StateTensors, check_arrays, from_arrays, named_states, to_arrays

_UNSAVED = ("params", "own_lr")  # of a group: what it is made of, not a setting
_LABELS = ("group", "name")  # of a group: the user's
_LARGEST = 1 << 62  # no number of steps reaches it


def average_whole(params: Sequence[Parameter], grads: list[Tensor], world: World | None) -> list[Tensor]:
    """Gradients of parameters that are whole on every rank become means over its stage, as those of sharded ones are; over all
    stages where these have rows of their own."""
    whole = [i for i, p in enumerate(params) if not isinstance(p, DistributedParameter)]
    whole.sort(key=lambda i: params[i].name)  # mindnlp's trainable_params has another order on every rank
    ranks = world and (world.everyone if context_of(world).rows_differ else world.stage)
    if whole and ranks is not None and ranks.size > 1:
        reduced = ranks.all_reduce([grads[i] for i in whole], "mean", "gradients of whole parameters").wait()
        for i, grad in zip(whole, reduced):
            grads[i] = grad
    return grads


def announce_change(parameters: Iterable[Parameter]) -> None:
    """Parameters are about to be updated: what was gathered ahead is stale, and what was written into their padding is no value."""
    sharded = [p for p in parameters if isinstance(p, DistributedParameter)]
    for p in sharded:
        p.clear_padding()
    for touched in {p.world for p in sharded}:
        context_of(touched).pipeline.parameters_changed()


def end_step(made: bool = True, *, in_world: World | None = None) -> None:
    """Say that a training step is over: routers count anew, and what is drawn next (dropout) is another step's.

    `OptimManager.step` does it, and an optimizer of ours that steps by itself. It is for loops of your own that update by another
    optimizer, and (`made=False`) for a step that they leave out, so that the next one draws what it would have drawn.

    Args:
        made: whether parameters were updated.
        in_world: default: the current world.
    """
    world = in_world or current_world()
    context = context_of(world)
    world.everyone.clock.step += 1
    context.draws.next_step(made)
    context.pulled = False


class ParamState(ABC):
    """One parameter's share of an optimizer's state."""

    def __init__(self) -> None:
        self.step = 0  # updates so far

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, shaped as the parameter's shard; writing into them changes the state."""


class ShardOptimizer(ABC):
    """An optimizer that works on what each rank stores: shards, whose padding stays zero.

    Attributes:
        defaults: the settings of a group that has none of its own.
        param_groups: dicts of settings with the group's `params`; `own_lr`: the rate that the group was given for itself, or None.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        if isinstance(params, (Parameter, dict)):
            raise TypeError(f"params must be a list of parameters or of groups, not one {type(params).__name__}: put it in a list")
        if not isinstance(params, Iterable):
            raise TypeError(f"params must be a list of parameters, as model.trainable_params(), not a {type(params).__name__}")
        entries = list(params)
        staged = is_initialized() and current_world().mesh.pp > 1  # a stage may have nothing that is trained
        if not (entries and isinstance(entries[0], dict)) and (entries or staged):
            entries = [{"params": entries}]
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self._states: dict[int, Any] = {}  # id of parameter -> `ParamState`
        self._made_for: dict[int, tuple[Any, int]] = {}  # id of parameter -> (dtype, size) that its state is for
        groups = [self._group(entry) for entry in entries]
        if not any(group["params"] for group in groups) and not staged:
            raise ValueError("the optimizer got no parameters; is everything frozen?")
        self._add(groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, from the next step on, e.g. for gradual unfreezing (PyTorch: `add_param_group`).

        A group without a rate of its own gets that of the others, and a schedule covers it from now on.

        Args:
            param_group: as in the constructor: `{"params": [...], "lr": ..., ...}`.

        Raises:
            TypeError: it is not a dict.
            ValueError: a parameter is in a group already, an unknown setting, or one out of range; nothing is changed.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group is a dict with params and settings, not {type(param_group).__name__}")
        group = self._group(param_group)
        if not group["params"]:
            raise ValueError("the parameter group has no parameters in its params")
        if "lr" not in param_group:
            group["lr"] = next((other["lr"] for other in self.param_groups if other["own_lr"] is None), group["lr"])
        self._add([group])

    def _group(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A complete one of what the user gave."""
        if not isinstance(entry, dict):
            raise TypeError(f"params must be a list of parameters or of groups, not of both: one is {type(entry).__name__}")
        unknown = sorted(map(str, set(entry) - set(self.defaults) - {"params", *_LABELS}))
        if unknown:
            raise ValueError(f"a parameter group has unknown settings {unknown}; known are {sorted(self.defaults)}")
        if "params" not in entry:
            raise ValueError(f"a parameter group has no params; it has {sorted(entry)}")
        inner = entry["params"]  # one parameter is a group of one, as in PyTorch; its elements are not parameters
        params = [inner] if isinstance(inner, Parameter) else list(inner)
        other = [type(p).__name__ for p in params if not isinstance(p, Parameter)]
        if other:
            raise TypeError(f"an optimizer takes Parameters, not a {other[0]}: give it model.trainable_params()")
        return {**self.defaults, **entry, "params": params, "own_lr": entry.get("lr")}

    def _add(self, groups: list[dict[str, Any]]) -> None:
        """Take groups that fit, all or none."""
        for group in groups:
            try:
                self._check(group)
            except TypeError as error:
                raise ValueError(f"a setting of a parameter group is of a wrong type: {error}") from error
        added = [p for group in groups for p in group["params"]]
        if len({id(p) for p in [*self.parameters, *added]}) < len(self.parameters) + len(added):
            raise ValueError("a parameter appears twice in the optimizer's groups")
        wide = [p.name for p in added if p.dtype == ms.float64]
        if wide:
            raise ValueError(
                f"parameter {wide[0]} is float64, and updates are computed in float32: make it float32, or use an optimizer of "
                "MindSpore's"
            )
        self.param_groups += groups
        self._made_for.update({id(p): (p.dtype, p.size) for p in added})
        self._states.update({id(p): self._make_state(p) for p in added})

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a setting is out of range."""

    @abstractmethod
    def _make_state(self, p: Parameter) -> ParamState: ...

    def _state(self, p: Parameter) -> ParamState:
        if id(p) not in self._states:
            self._refuse_appended()
            raise ValueError(f"the optimizer does not have parameter {p.name}")
        return self._states[id(p)]

    @abstractmethod
    def _update(self, updates: list[tuple[dict[str, Any], Parameter, Tensor]], scale: float) -> None:
        """Apply (group, parameter, gradient) for all parameters that have a gradient."""

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of their groups; what to differentiate with respect to."""
        return [p for group in self.param_groups for p in group.get("params", ())]

    def __call__(self, grads: Sequence[Tensor]) -> None:
        """MindSpore's spelling: `grads` as `value_and_grad(forward, None, optimizer.parameters)` returns them.

        Those of parameters that are not sharded are averaged over the ranks here; the others are means already. It ends the step,
        see `step`.
        """
        if len(grads) != len(self.parameters):  # before any rank waits for another
            raise ValueError(f"{len(grads)} gradients for {len(self.parameters)} parameters")
        averaged = average_whole(self.parameters, list(grads), current_world() if is_initialized() else None)
        self.step(averaged)

    def step(self, grads: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Update every parameter that has a gradient.

        It ends the training step (`end_step`), unless no backward pass has ended since the last step did: so one does under an
        `OptimManager`, and of several optimizers that are stepped one after another the first. Optimizers with a backward pass
        of their own before each of them, as for adversarial networks, make a step each.

        Args:
            grads: for each of `parameters`, in their order, the gradient of its shard, any dtype; None: it has none.
            scale: what the gradients are multiplied with first, e.g. 1 / loss scale.

        Raises:
            TypeError: they are a dict.
            ValueError: they are more or fewer than the parameters, a gradient is not of the size of the shard, a parameter has
                become another since, or a group was put into `param_groups`. Nothing is changed.
        """
        self._refuse_appended()
        if isinstance(grads, dict):
            raise TypeError("gradients are a list in the order of optimizer.parameters, None where there is none, not a dict")
        owners = [(group, p) for group in self.param_groups for p in group["params"]]
        if len(grads) != len(owners):
            raise ValueError(f"{len(grads)} gradients for {len(owners)} parameters")
        updates = [(group, p, grad) for (group, p), grad in zip(owners, grads) if grad is not None]
        for _, p, grad in updates:
            self._check_fit(p, grad)  # compiled loops do not look
        announce_change(self.parameters)
        self._update(updates, scale)
        self._end_step()

    def _end_step(self) -> None:
        worlds = {p.world for p in self.parameters if isinstance(p, DistributedParameter)}
        if not worlds and is_initialized():
            worlds = {current_world()}
        for world in worlds:
            if context_of(world).pulled:
                end_step(in_world=world)

    def _refuse_appended(self) -> None:
        """Groups may go, and parameters may change their group; new ones need a state."""
        for group in self.param_groups:
            new = [p.name for p in group.get("params", ()) if id(p) not in self._made_for]
            missing = sorted({"params", *self.defaults} - set(group))
            if new or missing:
                raise ValueError(
                    f"a group with {f'parameter {new[0]}' if new else f'no {missing[0]}'} was put into param_groups, and the "
                    "optimizer has made nothing for it: take it out, and call optimizer.add_param_group(group)"
                )
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError("a parameter appears twice in the optimizer's groups")

    def _check_fit(self, p: Parameter, grad: Tensor) -> None:
        dtype, size = self._made_for[id(p)]
        if (p.dtype, p.size) != (dtype, size):
            raise ValueError(
                f"parameter {p.name} was {dtype} of {size} elements when the optimizer was made, and is {p.dtype} of {p.size}; "
                "make the optimizer after changing parameters"
            )
        if grad.size != size:
            raise ValueError(
                f"the gradient for {p.name} has {grad.size} elements, its shard {size}: gradients are those of the shards, in the "
                "order of optimizer.parameters"
            )

    def state_of(self, p: Parameter) -> dict[str, Tensor]:
        """The tensors that belong to a parameter, as its shard; written into to restore them."""
        return self._state(p).tensors()

    def state_tensors(self) -> StateTensors:
        """All tensors of the state, by name; written into to restore them."""
        self._refuse_appended()
        return named_states(self.parameters, [self.state_of(p) for p in self.parameters])

    def state_dict(self, gather: bool = False, tensors: bool = True) -> dict[str, Any]:
        """Settings, steps, and tensors as arrays (BMTrain: `state_dict(gather)`).

        Args:
            gather: whole tensors, on every rank, loadable at any number of ranks; all ranks call it. Otherwise this rank's shards,
                to be loaded by the same rank of as many. A `Checkpointer` streams instead, and holds neither.
            tensors: False leaves them out; the rest is JSON-serialisable.
        """
        self._refuse_appended()
        state = {
            "groups": [
                {**{k: v for k, v in group.items() if k not in _UNSAVED}, "names": [p.name for p in group["params"]]}
                for group in self.param_groups
            ],
            "steps": [self._state(p).step for p in self.parameters],
        }
        return {**state, **to_arrays(self.state_tensors(), gather)} if tensors else state

    def settings(self) -> list[dict[str, Any]]:
        """The settings of each group, with the rate that it was given for itself, and the `names` of its parameters."""
        hidden = ("params", *_LABELS)
        return [
            {**{k: v for k, v in group.items() if k not in hidden}, "names": [p.name for p in group["params"]]}
            for group in self.param_groups
        ]

    def change_settings(self, index: int, values: dict[str, Any]) -> None:
        """Change some settings of the group at `index`."""
        self.param_groups[index].update(values)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Restore what `state_dict` returned, the groups' settings included: those of the group that had the same parameters, by
        name. Nothing is changed if it does not fit.

        Args:
            strict: False: parameters that the state does not have keep what they have, and those that are not here are left out. A
                group takes the settings of the one that had all of its parameters which the state has.

        Raises:
            ValueError: of other groups or parameters (strict), other shapes, or shards of another number of ranks.
        """
        self.check_state_dict(state, strict)
        from_arrays(self.state_tensors(), state)
        groups = self._named_groups(state["groups"])
        settings = {name: group for group in groups for name in group["names"]}
        for group in self.param_groups:
            theirs = [settings[p.name] for p in group["params"] if p.name in settings]
            if theirs and all(saved is theirs[0] for saved in theirs):
                group.update({k: tuple(v) if isinstance(v, list) else v for k, v in theirs[0].items() if k != "names"})
        steps = dict(zip([name for group in groups for name in group["names"]], state["steps"]))
        for p in self.parameters:
            if p.name in steps:
                self._state(p).step = steps[p.name]

    def check_state_dict(self, state: Any, strict: bool = True) -> None:
        """Whether `load_state_dict` would take it; changes nothing.

        Raises:
            ValueError: it would not.
        """
        groups, steps = (state.get("groups"), state.get("steps")) if isinstance(state, dict) else (None, None)
        if not (isinstance(groups, list) and isinstance(steps, list)):
            raise ValueError(f"this is not the state of an {type(self).__name__}: it has no groups and steps")
        if not all(type(step) is int and 0 <= step < _LARGEST for step in steps):
            raise ValueError(f"the state's steps must be numbers of 0 or more, not {reprlib.repr(steps)}")
        for saved in groups:
            self._check_group(saved)
        named = all("names" in saved for saved in groups)
        counts = len(groups), len(steps)
        if (strict or not named) and counts != (len(self.param_groups), len(self.parameters)):
            raise ValueError(
                f"the state has {counts[0]} groups and {counts[1]} parameters, this optimizer has {len(self.param_groups)} and "
                f"{len(self.parameters)}"
            )
        theirs = [set(saved["names"]) for saved in self._named_groups(groups)]
        if sum(map(len, theirs)) != len(steps) or len(set().union(*theirs)) != len(steps):
            raise ValueError(f"the state has {len(steps)} steps, for parameters called {reprlib.repr(theirs)}")
        other = [names for names in theirs if names not in [{p.name for p in group["params"]} for group in self.param_groups]]
        if strict and other:
            raise ValueError(f"the state has a group of the parameters {reprlib.repr(sorted(other[0]))}, this optimizer has not")
        check_arrays(self.state_tensors(), state, strict)

    def _check_group(self, saved: Any) -> None:
        """Refuse a saved group that is no group of this optimizer's."""
        if not isinstance(saved, dict):
            raise ValueError(f"a group of the state is {type(saved).__name__}, not a dictionary of settings")
        unknown = sorted(set(saved) - set(self.defaults) - {"names", *_LABELS})
        if unknown:
            raise ValueError(f"a group of the state has unknown settings {unknown}; known are {sorted(self.defaults)}")
        names = saved.get("names", [])
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"a group of the state has parameters called {reprlib.repr(names)}")
        try:
            self._check({**self.defaults, **saved})
        except TypeError as error:
            raise ValueError(f"a group of the state has a setting of a wrong type: {error}") from error

    def _named_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved ones; those of earlier versions, which have no names, go by their order."""
        if all("names" in saved for saved in groups):
            return groups
        return [{**saved, "names": [p.name for p in own["params"]]} for saved, own in zip(groups, self.param_groups)]
